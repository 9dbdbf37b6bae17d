"""Which cached page goes first: a score by page, and a queue that always knows the lowest.

A policy is a function from what is known of pages to a score, lower goes first; ties go to the page
unused for longest. Only pages that nobody holds and that no cached page follows are in the queue: a
page names the one before it by number, so that number must not change its meaning. What an eviction
loses is thus one page, never a subtree, whatever the policy.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jaxpage.paging.in_place import first_read

NEVER = int(jnp.iinfo(jnp.int32).max)  # the score of pages that are not in the queue


class Usage(NamedTuple):
    """What a policy may know of pages; all of one shape, `i32`, in steps or counts."""

    entered: jax.Array  # step in which the page became findable
    last_used: jax.Array  # step in which a sequence last took it, or let it go
    num_uses: jax.Array  # sequences that took it, the one that computed it included
    depth: jax.Array  # pages before it


ScoreFn = Callable[[Usage], jax.Array]


def lru(usage: Usage) -> jax.Array:
    """Least recently used."""
    return usage.last_used


def lfu(usage: Usage) -> jax.Array:
    """Least frequently used."""
    return usage.num_uses


def fifo(usage: Usage) -> jax.Array:
    """First in, first out."""
    return usage.entered


def deepest(usage: Usage) -> jax.Array:
    """The page with most before it: the fewest prompts can share it."""
    return -usage.depth


EVICTION_POLICIES: dict[str, ScoreFn] = {
    policy.__name__: policy for policy in (lru, lfu, fifo, deepest)
}


class EvictionQueue(struct.PyTreeNode):
    """A key for each page by tier, in blocks of about `sqrt(P)`, and the lowest of each block.

    A key is a score and, to break ties, the last use. The lowest of a tier is found in two looks,
    and a change touches one block: the work of both grows with the square root of the pool, in one
    vector operation each.
    """

    keys: jax.Array  # i32[2, T, blocks, W], NEVER where a page is not queued
    lowest: jax.Array  # i32[2, T, blocks]

    @property
    def width(self) -> int:
        return self.keys.shape[3]


def create(num_pages: int, num_tiers: int = 1) -> EvictionQueue:
    """An empty queue for pages below `num_pages`, each of which may be in any of the tiers."""
    width = 1 << (max(num_pages - 1, 1).bit_length() + 1) // 2
    shape = (2, num_tiers, -(-num_pages // width))
    return EvictionQueue(
        keys=jnp.full((*shape, width), NEVER, jnp.int32), lowest=jnp.full(shape, NEVER, jnp.int32)
    )


def put(
    queue: EvictionQueue, tier: jax.Array | int, page: jax.Array, key: jax.Array
) -> EvictionQueue:
    """Gives `page: i32[]` of a tier a `key: i32[2]`. Page `NEVER` is none: nothing changes."""
    block, place = page // queue.width, page % queue.width
    keys = queue.keys.at[:, tier, block, place].set(key, mode="drop")
    lowest = _lowest(keys.at[:, tier, block].get(mode="fill", fill_value=NEVER))
    lowest, keys = first_read(lowest, keys)
    return EvictionQueue(keys, queue.lowest.at[:, tier, block].set(lowest, mode="drop"))


def remove(queue: EvictionQueue, tier: jax.Array | int, page: jax.Array) -> EvictionQueue:
    """Takes a page of a tier out, if it is in."""
    return put(queue, tier, page, jnp.full((2,), NEVER, jnp.int32))


def is_queued(queue: EvictionQueue, tier: int, page: jax.Array) -> jax.Array:
    """Whether `page: i32[]`, which may be none, is in the queue of a tier."""
    block, place = page // queue.width, page % queue.width
    key = queue.keys.at[0, tier, block, place].get(mode="fill", fill_value=NEVER)
    return key < NEVER


def first(queue: EvictionQueue, tier: int) -> jax.Array:
    """The page of a tier to evict next, `i32[]`; meaningless if none is queued there."""
    block = _argmin(queue.lowest[:, tier])
    return block * queue.width + _argmin(queue.keys[:, tier, block])


def _lowest(keys: jax.Array) -> jax.Array:
    """The lowest of `keys: i32[2, W]`, `i32[2]`."""
    scores, last_used = keys
    score = jnp.min(scores)
    return jnp.stack([score, jnp.min(jnp.where(scores == score, last_used, NEVER))])


def _argmin(keys: jax.Array) -> jax.Array:
    is_lowest = jnp.all(keys == _lowest(keys)[:, None], axis=0)
    return jnp.argmax(is_lowest).astype(jnp.int32)
