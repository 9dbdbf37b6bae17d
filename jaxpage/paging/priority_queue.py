"""Priority queues over items that are numbered: the lowest is always known, and any may leave.

A key is two integers, compared as a pair. Keys stand in blocks of `WIDTH`, the lowest of each block
in blocks again, and so on up to a single one: a tree of few levels, in which each look and each
change touches one block a level. A heap, a tree of twos, would be a loop of scalars.
"""

import jax
import jax.numpy as jnp
from flax import struct

from jaxpage.paging.in_place import first_read

NEVER = int(jnp.iinfo(jnp.int32).max)  # the first of a key that is not in the queue
WIDTH = 32


class PriorityQueue(struct.PyTreeNode):
    """`Q` queues over the same items."""

    # i32[2, Q, blocks, WIDTH] each: the keys, NEVER where an item is not queued; the lowest of each
    # block of keys; the lowest of each block of those; and so on to a single block.
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
        tuple(jnp.full((2, num_queues, count, WIDTH), NEVER, jnp.int32) for count in blocks)
    )


def put(
    queue: PriorityQueue, which: jax.Array | int, item: jax.Array, key: jax.Array
) -> PriorityQueue:
    """Gives `item: i32[]` of a queue a `key: i32[2]`. Item `NEVER` is none: nothing changes."""
    levels = []
    for level in queue.levels:
        block, place = item // WIDTH, item % WIDTH
        level = level.at[:, which, block, place].set(key, mode="drop")
        key = lowest(level.at[:, which, block].get(mode="fill", fill_value=NEVER))
        key, level = first_read(key, level)
        levels.append(level)
        item = block
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
    item = jnp.asarray(0, jnp.int32)
    for level in reversed(queue.levels):
        item = item * WIDTH + _argmin(level[:, which, item])
    return item


def first_key(queue: PriorityQueue, which: int = 0) -> jax.Array:
    """The lowest key of a queue, `i32[2]`; begins with `NEVER` if none is queued there."""
    return lowest(queue.levels[-1][:, which, 0])


def lowest(keys: jax.Array) -> jax.Array:
    """The lowest of each block of `keys: i32[2, ..., WIDTH]`, `i32[2, ...]`."""
    ranks, ties = keys
    rank = jnp.min(ranks, axis=-1)
    tie = jnp.min(jnp.where(ranks == rank[..., None], ties, NEVER), axis=-1)
    return jnp.stack([rank, tie])


def _argmin(keys: jax.Array) -> jax.Array:
    is_lowest = jnp.all(keys == lowest(keys)[:, None], axis=0)
    return jnp.argmax(is_lowest).astype(jnp.int32)
