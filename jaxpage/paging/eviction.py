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
    """Scores of all pages in blocks of about `sqrt(P)`, and the lowest of each block.

    The lowest of all is found in two looks, and a change touches one block: the work of both grows
    with the square root of the pool, in one vector operation each.
    """

    scores: jax.Array  # i32[blocks, W], NEVER where a page is not queued
    last_used: jax.Array  # i32[blocks, W], breaks ties
    lowest_scores: jax.Array  # i32[blocks]
    lowest_used: jax.Array  # i32[blocks], of the lowest score

    @property
    def width(self) -> int:
        return self.scores.shape[1]


def create(num_pages: int) -> EvictionQueue:
    """An empty queue for pages below `num_pages`."""
    width = 1 << (max(num_pages - 1, 1).bit_length() + 1) // 2
    blocks = -(-num_pages // width)
    return EvictionQueue(
        scores=jnp.full((blocks, width), NEVER, jnp.int32),
        last_used=jnp.full((blocks, width), NEVER, jnp.int32),
        lowest_scores=jnp.full((blocks,), NEVER, jnp.int32),
        lowest_used=jnp.full((blocks,), NEVER, jnp.int32),
    )


def put(
    queue: EvictionQueue, page: jax.Array, score: jax.Array, last_used: jax.Array
) -> EvictionQueue:
    """Gives `page: i32[]` a score; `NEVER` takes it out. Page `NEVER` is none: nothing changes."""
    block, place = page // queue.width, page % queue.width
    scores = queue.scores.at[block, place].set(score, mode="drop")
    used = queue.last_used.at[block, place].set(last_used, mode="drop")
    row = scores.at[block].get(mode="fill", fill_value=NEVER)
    lowest = _lowest(row, used.at[block].get(mode="fill", fill_value=NEVER))
    (lowest, lowest_used), scores, used = first_read(lowest, scores, used)
    return queue.replace(
        scores=scores,
        last_used=used,
        lowest_scores=queue.lowest_scores.at[block].set(lowest, mode="drop"),
        lowest_used=queue.lowest_used.at[block].set(lowest_used, mode="drop"),
    )


def remove(queue: EvictionQueue, page: jax.Array) -> EvictionQueue:
    """Takes a page out, if it is in."""
    never = jnp.asarray(NEVER, jnp.int32)
    return put(queue, page, never, never)


def first(queue: EvictionQueue) -> jax.Array:
    """The page to evict next, `i32[]`; meaningless if the queue is empty."""
    block = _argmin(queue.lowest_scores, queue.lowest_used)
    return block * queue.width + _argmin(queue.scores[block], queue.last_used[block])


def _lowest(scores: jax.Array, last_used: jax.Array) -> tuple[jax.Array, jax.Array]:
    score = jnp.min(scores)
    return score, jnp.min(jnp.where(scores == score, last_used, NEVER))


def _argmin(scores: jax.Array, last_used: jax.Array) -> jax.Array:
    score, used = _lowest(scores, last_used)
    return jnp.argmax((scores == score) & (last_used == used)).astype(jnp.int32)
