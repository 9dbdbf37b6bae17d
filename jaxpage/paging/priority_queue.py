"""Priority queues over items that are numbered: the lowest is always known, and any may leave.

A key is two integers, compared as a pair. Keys stand in blocks of about the square root of their
number, and beside them the lowest of each block: the lowest of all is found in two looks, and a
change touches one block, each of them one vector operation. A heap would be a loop of scalars.
"""

import jax
import jax.numpy as jnp
from flax import struct

from jaxpage.paging.in_place import first_read

NEVER = int(jnp.iinfo(jnp.int32).max)  # the first of a key that is not in the queue


class PriorityQueue(struct.PyTreeNode):
    """`Q` queues over the same items."""

    keys: jax.Array  # i32[2, Q, blocks, W], NEVER where an item is not queued
    lowest: jax.Array  # i32[2, Q, blocks]

    @property
    def width(self) -> int:
        return self.keys.shape[3]


def create(num_items: int, num_queues: int = 1) -> PriorityQueue:
    """Empty queues of items below `num_items`, each of which may be in any of them."""
    width = 1 << (max(num_items - 1, 1).bit_length() + 1) // 2
    shape = (2, num_queues, -(-num_items // width))
    return PriorityQueue(
        keys=jnp.full((*shape, width), NEVER, jnp.int32), lowest=jnp.full(shape, NEVER, jnp.int32)
    )


def put(
    queue: PriorityQueue, which: jax.Array | int, item: jax.Array, key: jax.Array
) -> PriorityQueue:
    """Gives `item: i32[]` of a queue a `key: i32[2]`. Item `NEVER` is none: nothing changes."""
    block, place = item // queue.width, item % queue.width
    keys = queue.keys.at[:, which, block, place].set(key, mode="drop")
    lowest = _lowest(keys.at[:, which, block].get(mode="fill", fill_value=NEVER))
    lowest, keys = first_read(lowest, keys)
    return PriorityQueue(keys, queue.lowest.at[:, which, block].set(lowest, mode="drop"))


def remove(queue: PriorityQueue, which: jax.Array | int, item: jax.Array) -> PriorityQueue:
    """Takes an item of a queue out, if it is in."""
    return put(queue, which, item, jnp.full((2,), NEVER, jnp.int32))


def is_queued(queue: PriorityQueue, which: int, item: jax.Array) -> jax.Array:
    """Whether `item: i32[]`, which may be none, is in a queue."""
    block, place = item // queue.width, item % queue.width
    key = queue.keys.at[0, which, block, place].get(mode="fill", fill_value=NEVER)
    return key < NEVER


def first(queue: PriorityQueue, which: int = 0) -> jax.Array:
    """The item of a queue with the lowest key, `i32[]`; meaningless if none is queued there."""
    block = _argmin(queue.lowest[:, which])
    return block * queue.width + _argmin(queue.keys[:, which, block])


def first_key(queue: PriorityQueue, which: int = 0) -> jax.Array:
    """The lowest key of a queue, `i32[2]`; begins with `NEVER` if none is queued there."""
    return _lowest(queue.lowest[:, which])


def _lowest(keys: jax.Array) -> jax.Array:
    """The lowest of `keys: i32[2, W]`, `i32[2]`."""
    ranks, ties = keys
    rank = jnp.min(ranks)
    return jnp.stack([rank, jnp.min(jnp.where(ranks == rank, ties, NEVER))])


def _argmin(keys: jax.Array) -> jax.Array:
    is_lowest = jnp.all(keys == _lowest(keys)[:, None], axis=0)
    return jnp.argmax(is_lowest).astype(jnp.int32)
