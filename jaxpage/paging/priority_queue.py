"""Priority queues over items that are numbered: the lowest is always known, and any may leave.

A key is two integers, compared as a pair. Keys stand in blocks of `WIDTH`, the lowest of each block
with its item in blocks again, and so on up to a single one: a tree of few levels. A look touches
that one, a change one block a level. A heap, a tree of twos, would be a loop of scalars.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxpage.paging.in_place import first_read

NEVER = int(jnp.iinfo(jnp.int32).max)  # the first of a key that is not in the queue
WIDTH = 16

Entry = tuple[jax.Array, ...]  # rank and tie of a key, and its item


class PriorityQueue(struct.PyTreeNode):
    """`Q` queues over the same items."""

    # i32[2, Q, blocks, WIDTH], the keys, NEVER where an item is not queued; then, each an
    # i32[3, Q, blocks, WIDTH], the lowest key of each block with its item; the lowest of each block
    # of those; and so on to a single block.
    levels: tuple[jax.Array, ...]

    @property
    def keys(self) -> jax.Array:
        """All keys of all queues, and some that are no item's, `i32[2, Q, n]`."""
        return self.levels[0].reshape(*self.levels[0].shape[:2], -1)


def create(num_items: int, num_queues: int = 1) -> PriorityQueue:
    """Empty queues of items below `num_items`, each of which may be in any of them."""
    blocks = [-(-num_items // WIDTH)]
    while blocks[-1] > 1:
        blocks.append(-(-blocks[-1] // WIDTH))
    return PriorityQueue(
        tuple(
            jnp.full((3 if level else 2, num_queues, count, WIDTH), NEVER, jnp.int32)
            for level, count in enumerate(blocks)
        )
    )


def put(
    queue: PriorityQueue, which: jax.Array | int, item: jax.Array, key: jax.Array
) -> PriorityQueue:
    """Gives `item: i32[]` of a queue a `key: i32[2]`. Item `NEVER` is none: nothing changes."""
    levels, entry, number = [], key, item
    for level in queue.levels:
        block, place = number // WIDTH, number % WIDTH
        level = level.at[:, which, block, place].set(entry, mode="drop")
        entry = lowest(level.at[:, which, block].get(mode="fill", fill_value=NEVER), block)
        entry, level = first_read(entry, level)
        levels.append(level)
        number = block
    return PriorityQueue(tuple(levels))


def remove(queue: PriorityQueue, which: jax.Array | int, item: jax.Array) -> PriorityQueue:
    """Takes an item of a queue out, if it is in."""
    return put(queue, which, item, jnp.full((2,), NEVER, jnp.int32))


def is_queued(queue: PriorityQueue, which: int, item: jax.Array) -> jax.Array:
    """Whether `item: i32[]`, which may be none, is in a queue."""
    block, place = item // WIDTH, item % WIDTH
    rank = queue.levels[0].at[0, which, block, place].get(mode="fill", fill_value=NEVER)
    return rank < NEVER


def first(queue: PriorityQueue, which: int = 0) -> jax.Array:
    """The item of a queue with the lowest key, `i32[]`; meaningless if none is queued there."""
    return lowest(queue.levels[-1][:, which, 0], jnp.asarray(0, jnp.int32))[2]


def first_key(queue: PriorityQueue, which: int = 0) -> jax.Array:
    """The lowest key of a queue, `i32[2]`; begins with `NEVER` if none is queued there."""
    return lowest(queue.levels[-1][:, which, 0], jnp.asarray(0, jnp.int32))[:2]


def lowest(level: jax.Array, block: jax.Array) -> jax.Array:
    """The lowest key of each block of a level, and of its items the lowest, `i32[3, ...]`.

    `level: i32[2 or 3, ..., WIDTH]` are the entries of the blocks numbered `block: i32[...]`.
    """
    ranks, ties, *items = level
    if not items:  # of the keys themselves
        places = lax.broadcasted_iota(jnp.int32, ranks.shape, ranks.ndim - 1)
        items = [block[..., None] * WIDTH + places]
    entries = ranks, ties, items[0]
    never = (jnp.asarray(NEVER, jnp.int32),) * 3
    return jnp.stack(lax.reduce(entries, never, _lower, (ranks.ndim - 1,)))


def _lower(one: Entry, other: Entry) -> Entry:
    """The lower of two entries, compared number by number: one pass in place of one for each."""
    (rank, tie, item), (other_rank, other_tie, other_item) = one, other
    is_lower = (tie < other_tie) | ((tie == other_tie) & (item < other_item))
    is_lower = (rank < other_rank) | ((rank == other_rank) & is_lower)
    return tuple(jnp.where(is_lower, x, y) for x, y in zip(one, other, strict=True))
