"""The automatic prefix cache: a page table whose full pages stay findable after their sequences.

A page is free, held by a row, or *cached*: held by nobody and in the prefix index, which full pages
enter before anyone looks there (`entering`). Cached pages are as good as free: when the stack runs
short they leave the pool, leaf first, in the order of an eviction policy: for the host if there is
one, where they stay findable, and away if there is none or it is full of pages that somebody holds.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpage.paging import page_table, prefix_index, priority_queue, status
from jaxpage.paging.cache_state import (
    PrefixCache,
    at,
    enqueue_leaves,
    make_room,
    take,
)
from jaxpage.paging.eviction import ScoreFn
from jaxpage.paging.fitting import fitting as fitting_rows
from jaxpage.paging.host_tier import HostTier
from jaxpage.paging.in_place import first_read
from jaxpage.paging.page_table import Appended, num_pages_for
from jaxpage.paging.prefix_index import HashFn, Match
from jaxpage.paging.priority_queue import PriorityQueue


class Found(NamedTuple):
    """What `admit` found for a row, and the copy that it asks for: places in the pool, or `P`."""

    status: jax.Array  # i32[]
    num_tokens: jax.Array  # i32[], that need not be computed
    source: jax.Array  # i32[], page
    target: jax.Array  # i32[], page


def create(
    num_slots: int,
    pages_per_slot: int,
    num_pages: int,
    page_size: int,
    host_pages: int = 0,
    budget: int | None = None,
    zero_freed: bool = False,
) -> PrefixCache:
    """Empty rows over a free pool, and an empty index; see `page_table.create`."""
    null = num_pages + host_pages
    return PrefixCache(
        table=page_table.create(
            num_slots, pages_per_slot, num_pages, page_size, host_pages, budget, zero_freed
        ),
        index=prefix_index.create(null, page_size),
        queue=priority_queue.create(null, num_queues=2 if host_pages > 0 else 1),
        num_cached=jnp.asarray(0, jnp.int32),
        num_host_cached=jnp.asarray(0, jnp.int32),
        hosted_children=jnp.zeros((null,), jnp.int32),
        num_indexed=jnp.zeros((num_slots,), jnp.int32),
        twins=jnp.full((num_slots,), null, jnp.int32),
        step=jnp.asarray(0, jnp.int32),
    )


def admit(
    cache: PrefixCache,
    row: jax.Array,
    tokens: jax.Array,
    num_tokens: jax.Array,
    salt: jax.Array,
    soon: jax.Array,
    owed: jax.Array,
    *,
    score: ScoreFn,
    hash_fn: HashFn,
    whole: bool = False,
) -> tuple[PrefixCache, Found]:
    """Gives the empty row `row` the longest cached prefix of its `num_tokens` known tokens.

    The last token is always left to compute, for its logits. Nothing changes unless the pages for
    `soon` tokens can be had beside `owed` ones; they are not taken yet. A page that agrees only
    in part is copied: the row gets a page of its own for it. Found pages may be on the host, and
    are the row's `num_hosted`; it computes nothing until they are back.
    """
    null = cache.null
    found = prefix_index.match(cache.index, tokens, num_tokens - 1, salt, cache.step, hash_fn)
    found, cache = first_read(_copyable(found, cache.tier, cache.page_size), cache)
    pages, hosted = found.pages, cache.tier.is_hosted(found.pages)
    num_hosted = jnp.sum(hosted, dtype=jnp.int32)
    wakes = (at(cache.table.ref_counts, pages, fill=1) == 0) & ~hosted
    num_woken = jnp.sum(wakes, dtype=jnp.int32)
    available = cache.num_free + cache.num_cached - num_woken - owed
    enough = num_pages_for(soon, cache.page_size) - found.num_pages + num_hosted <= available

    def nothing():
        return jnp.full_like(pages, null), jnp.full_like(found.partial, null)

    pages, partial = lax.cond(enough, lambda: (pages, found.partial), nothing)
    num_tokens = jnp.where(enough, found.num_tokens, 0)
    cache = take(cache, pages)
    copies, source = partial < null, cache.tier.in_pool(partial)
    cache = make_room(cache, copies.astype(jnp.int32), score, whole=whole)
    table = cache.table
    target = jnp.where(copies, table.free_pages[jnp.maximum(table.num_free - 1, 0)], null)
    pages = pages.at[jnp.where(copies, found.num_pages, pages.shape[0])].set(target, mode="drop")
    row = jnp.where(enough, row, table.lengths.shape[0])
    table = table.replace(
        page_indices=table.page_indices.at[row].set(pages, mode="drop"),
        lengths=table.lengths.at[row].set(num_tokens, mode="drop"),
        num_hosted=table.num_hosted.at[row].set(num_hosted, mode="drop"),
        ref_counts=table.ref_counts.at[target].set(1, mode="drop"),
        num_free=table.num_free - copies.astype(jnp.int32),
    )
    cache = cache.replace(
        table=table, num_indexed=cache.num_indexed.at[row].set(found.num_pages, mode="drop")
    )
    outcome = jnp.where(enough, status.OK, status.OUT_OF_PAGES)
    return cache, Found(outcome, num_tokens, source, target=cache.tier.in_pool(target))


def append(
    cache: PrefixCache,
    counts: jax.Array,
    max_new_pages: int | None = None,
    *,
    score: ScoreFn,
    whole: bool = False,
) -> tuple[PrefixCache, Appended]:
    """`page_table.append`, for which cached pages leave as far as the stack is short."""
    counts, cache = first_read(counts, cache)  # an admission may just have written to it
    needed, cache = first_read(page_table.needs(cache.table, counts), cache)
    cache = make_room(cache, jnp.sum(needed.demand), score, whole=whole)
    table, appended = page_table.append(cache.table, counts, max_new_pages, needed)
    return cache.replace(table=table), appended


def fitting(cache: PrefixCache, order: jax.Array, counts: jax.Array) -> jax.Array:
    """`fitting.fitting`, for which cached pages are free ones."""
    return fitting_rows(cache.table, order, counts, cache.num_cached)


def share(
    cache: PrefixCache, source: jax.Array, target: jax.Array, num_tokens: jax.Array
) -> PrefixCache:
    """`page_table.share`; the target's full pages are in the index as far as the source's are.

    Of a full page the target gets all or nothing: as its last owner it would write to it, and a
    page of the index is never written.
    """
    in_full = num_tokens // cache.page_size * cache.page_size
    ends_in_full_page = cache.lengths[source] >= in_full + cache.page_size
    num_tokens = jnp.where(ends_in_full_page, in_full, num_tokens)
    shared = jnp.minimum(cache.num_indexed[source], num_tokens // cache.page_size)
    return cache.replace(
        table=page_table.share(cache.table, source, target, num_tokens),
        num_indexed=cache.num_indexed.at[target].set(shared),
    )


def release(cache: PrefixCache, rows: jax.Array, *, score: ScoreFn) -> PrefixCache:
    """Empties `rows: bool[B]`; their pages that nobody holds stay cached if the index has them."""
    null = cache.null

    def release_next(carry):
        cache, rows = carry
        row = jnp.argmax(rows)
        table, unowned = page_table.release_row(cache.table, row)
        stays = (unowned < null) & cache.index.holds(unowned)
        hosted = stays & cache.tier.is_hosted(unowned)
        kept = jnp.where(stays, unowned, null)
        cache = cache.replace(
            table=page_table.free(table, jnp.where(stays, null, unowned)),
            index=prefix_index.note_use(cache.index, kept, cache.step, again=0),
            num_cached=cache.num_cached + jnp.sum(stays & ~hosted, dtype=jnp.int32),
            num_host_cached=cache.num_host_cached + jnp.sum(hosted, dtype=jnp.int32),
            num_indexed=cache.num_indexed.at[row].set(0),
            twins=cache.twins.at[row].set(null),
        )
        return enqueue_leaves(cache, kept, stays, score), rows.at[row].set(False)

    return lax.while_loop(lambda carry: jnp.any(carry[1]), release_next, (cache, rows))[0]


def violations(cache: PrefixCache) -> jax.Array:
    """Counts broken invariants, `i32[10]`: those of the page table, and

    6. pages of the index that their bucket does not name once, or other pages that a bucket names;
    7. parents that are not in the index, or whose children are miscounted, or on the host before
       a page of the pool; pages that are not in the index and said to have children;
    8. rows whose first `num_indexed` pages are not a chain of the index, or not full;
    9. pages that are queued and not leaves that nobody holds, or the reverse; or minima of blocks;
    10. a wrong count of cached pages, or a twin that is not in the index.
    """
    null, index = cache.null, cache.index
    pages = jnp.arange(null, dtype=jnp.int32)
    is_in, is_cached, hosted = index.holds(pages), cache.is_cached, cache.tier.is_hosted(pages)
    expected = is_in.astype(jnp.int32)

    named = jnp.zeros((null,), jnp.int32).at[index.buckets].add(1, mode="drop")
    own_bucket = index.buckets[prefix_index.bucket_of(index, index.digests)]
    in_own = jnp.sum(own_bucket == pages[:, None], axis=1, dtype=jnp.int32)

    parents = jnp.where(is_in, index.parents, null)
    children = jnp.zeros((null,), jnp.int32).at[parents].add(1, mode="drop")
    away = jnp.zeros((null,), jnp.int32).at[jnp.where(hosted, parents, null)].add(1, mode="drop")
    orphans = is_in & (parents < null) & ~index.holds(parents)
    stranded = is_in & ~hosted & cache.tier.is_hosted(parents)

    columns = jnp.arange(cache.page_indices.shape[1], dtype=jnp.int32)[None]
    chained = columns < cache.num_indexed[:, None]
    before = jnp.roll(cache.page_indices, 1, axis=1)
    row_parents = at(index.parents, cache.page_indices, fill=null)
    follows = jnp.where(columns > 0, row_parents == before, row_parents > null)
    unfull = cache.num_indexed > cache.lengths // cache.page_size

    leaves = [is_cached & ~hosted & (children == away), is_cached & hosted & (children == 0)]
    leaves = jnp.stack(leaves[: cache.queue.keys.shape[1]])
    lost_twins = (cache.twins < null) & ~index.holds(cache.twins)
    more = [
        _count((named != expected) | (in_own != expected)),
        _count(orphans)
        + _count(stranded)
        + _count(children != index.num_children)
        + _count(~is_in & (index.newest_child != null))
        + _count(away != cache.hosted_children),
        _count(chained & ~follows) + _count(unfull),
        _broken(cache.queue, leaves),
        _count(cache.num_cached != _count(is_cached & ~hosted))
        + _count(cache.num_host_cached != _count(is_cached & hosted))
        + _count(lost_twins),
    ]
    return jnp.concatenate([page_table.violations(cache.table, is_in), jnp.stack(more)])


def _broken(queue: PriorityQueue, leaves: jax.Array) -> jax.Array:
    """Pages that are queued and not in `leaves: bool[T, n]`, or the reverse, and wrong minima."""
    num_tiers, num_pages = leaves.shape
    queued = queue.keys[0, :, :num_pages] < priority_queue.NEVER
    broken = _count(queued != leaves)
    for below, level in itertools.pairwise(queue.levels):
        of_blocks = level.reshape(3, num_tiers, -1)[..., : below.shape[2]]
        block = jnp.arange(below.shape[2], dtype=jnp.int32)
        lowest = priority_queue.lowest(below, jnp.broadcast_to(block, below.shape[1:3]))
        is_same = jnp.all(of_blocks == lowest, axis=0)
        is_empty = lowest[0] == priority_queue.NEVER  # then its item means nothing
        broken += _count(~is_same & ~is_empty)
        broken += _count((of_blocks[0] != priority_queue.NEVER) & is_empty)
    return broken


def _count(broken: jax.Array) -> jax.Array:
    return jnp.sum(broken, dtype=jnp.int32)


def _copyable(found: Match, tier: HostTier, page_size: int) -> Match:
    """`found`, without a page that agrees in part if it is on the host: copies are of the pool."""
    gone = tier.is_hosted(found.partial)
    in_full = found.num_pages * page_size
    return found._replace(
        partial=jnp.where(gone, tier.places.shape[0], found.partial),
        num_tokens=jnp.where(gone, in_full, found.num_tokens),
    )
