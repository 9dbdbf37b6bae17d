"""Which cached page goes first: a score by page, which a `priority_queue` keeps in order.

A policy is a function from what is known of pages to a score, lower goes first; ties go to the page
unused for longest. Only pages that nobody holds and that no cached page follows are in the queue: a
page names the one before it by number, so that number must not change its meaning. What an eviction
loses is thus one page, never a subtree, whatever the policy.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax


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
