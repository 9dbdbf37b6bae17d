"""Chains of full pages, for a host that keeps copies of them: found by tokens, and put back.

Nothing here belongs to a step. A chain is looked up without being held, and one that is put back is
cached and held by nobody, so that admission finds it like any other.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpage.paging import page_table, prefix_index
from jaxpage.paging.cache_state import (
    PrefixCache,
    at,
    enqueue_leaves,
    make_room,
    take,
)
from jaxpage.paging.eviction import ScoreFn
from jaxpage.paging.prefix_index import Entries, HashFn


class Found(NamedTuple):
    """What the index has of a chain, and the room for pages after it."""

    pages: jax.Array  # i32[M]; P + H after the last
    num_pages: jax.Array  # i32[]
    room: jax.Array  # i32[], pages that could be put back: 0 after one that is on the host


class ChainOps(NamedTuple):
    """The verbs of a table that keeps pages, as below."""

    find: Callable[..., Found]
    put_back: Callable[..., tuple[PrefixCache, jax.Array]]


def find(
    cache: PrefixCache,
    tokens: jax.Array,
    num_tokens: jax.Array,
    salt: jax.Array,
    *,
    hash_fn: HashFn,
) -> Found:
    """The longest chain of full pages with the first `num_tokens` of `tokens: i32[N]`."""
    match = prefix_index.match(cache.index, tokens, num_tokens, salt, cache.step, hash_fn)
    hosted = cache.tier.is_hosted(match.pages)
    is_cached = at(cache.table.ref_counts, match.pages, fill=1) == 0
    others = cache.num_cached - jnp.sum(is_cached & ~hosted, dtype=jnp.int32)
    # Before a page of the pool all are in the pool.
    room = jnp.where(jnp.any(hosted), 0, cache.num_free + others)
    return Found(match.pages, match.num_pages, room)


def put_back(
    cache: PrefixCache,
    tokens: jax.Array,
    first: jax.Array,
    count: jax.Array,
    salt: jax.Array,
    *,
    most: int,
    score: ScoreFn,
    hash_fn: HashFn,
) -> tuple[PrefixCache, jax.Array]:
    """Enters up to `count` pages, at most `most`, of the chain of `tokens: i32[N]` from `first` on.

    Returns the cache and the pages, `i32[most]`, `P + H` after the last, which somebody has to
    fill before the next step. There are fewer where room or their bucket is short, and none unless
    the index has exactly the `first` pages before them, all in the pool. Other cached pages make
    room; their moves to the host are left in the tier, and come before anything is filled.
    """
    null, page_size = cache.null, cache.page_size
    found = find(cache, tokens, (first + count) * page_size, salt, hash_fn=hash_fn)
    fits = found.num_pages == first
    rest = tokens.shape[0] // page_size - first  # pages that the sequence can still have
    wanted = jnp.minimum(jnp.minimum(count, most), jnp.minimum(found.room, rest))
    wanted = jnp.where(fits, wanted, 0)
    chain = jnp.where(wanted > 0, found.pages, null)
    cache = make_room(take(cache, chain), wanted, score)  # held meanwhile, so that it stays

    rank = jnp.arange(most, dtype=jnp.int32)
    num_taken = jnp.minimum(wanted, cache.num_free)
    place = jnp.where(rank < num_taken, cache.num_free - 1 - rank, cache.num_pages)
    pages = at(cache.table.free_pages, place, fill=null)
    cache = cache.replace(table=cache.table.replace(num_free=cache.num_free - num_taken))
    before = jnp.where(first > 0, at(chain, first - 1, fill=null), cache.index.root(salt))
    slots = jnp.arange(page_size, dtype=jnp.int32)[None]
    entries = Entries(
        pages=pages,
        parents=jnp.where(rank > 0, jnp.roll(pages, 1), before),
        tokens=at(tokens, (first + rank)[:, None] * page_size + slots),
        steps=jnp.full_like(rank, cache.step),
        row=jnp.zeros_like(rank),
        offset=rank,
        depth=first + rank,
    )
    index, entered, _ = prefix_index.enter(cache.index, entries, 1, hash_fn)
    spare = jnp.where(rank < entered[0], null, pages)
    pages = jnp.where(rank < entered[0], pages, null)
    cache = cache.replace(
        table=page_table.free(cache.table, spare[::-1]),  # in the order in which they stood there
        index=index,
        num_cached=cache.num_cached + entered[0],
    )
    return _let_go(cache, chain, pages, score), pages


def _let_go(cache: PrefixCache, chain: jax.Array, pages: jax.Array, score: ScoreFn) -> PrefixCache:
    """Ends the hold on `chain: i32[M]`, which `pages: i32[n]` that nobody holds follow."""
    ref_counts = cache.table.ref_counts.at[chain].add(-1, mode="drop")
    sleeps = at(ref_counts, chain, fill=1) == 0
    cache = cache.replace(
        table=cache.table.replace(ref_counts=ref_counts),
        num_cached=cache.num_cached + jnp.sum(sleeps, dtype=jnp.int32),
    )
    line = jnp.concatenate([chain, pages])
    return enqueue_leaves(cache, line, line < cache.null, score)
