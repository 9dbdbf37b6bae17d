"""The prefix cache's state, and how cached pages wake, queue, and leave the pool and the host."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxpage.paging import host_tier, page_table, prefix_index, priority_queue
from jaxpage.paging.eviction import ScoreFn
from jaxpage.paging.host_tier import HostTier
from jaxpage.paging.in_place import first_read
from jaxpage.paging.page_table import PageTable
from jaxpage.paging.prefix_index import PrefixIndex
from jaxpage.paging.priority_queue import PriorityQueue

POOL, HOST = 0, 1  # the queue's tiers


class PrefixCache(struct.PyTreeNode):
    """A page table, the index over its pages, and the queues of those that may leave it.

    The first `num_indexed[b]` pages of row `b` are in the index, each the parent of the next; so
    whoever holds a page holds all before it, and the cached pages below a cached one are cached.
    Pages leave the pool, and then the host, from the end of a chain: before a page of the pool
    all are in the pool.
    """

    table: PageTable
    index: PrefixIndex
    queue: PriorityQueue  # by tier, cached pages that no page follows, or none of the pool
    num_cached: jax.Array  # i32[], pages of the pool in the index that nobody holds
    num_host_cached: jax.Array  # i32[], the same of the host
    hosted_children: jax.Array  # i32[P + H], pages of the host that name it as parent
    num_indexed: jax.Array  # i32[B], pages
    twins: jax.Array  # i32[B], the page that equals the row's next one to be entered, or NULL_PAGE
    step: jax.Array  # i32[], the clock of the policies

    @property
    def page_indices(self) -> jax.Array:
        return self.table.page_indices

    @property
    def lengths(self) -> jax.Array:
        return self.table.lengths

    @property
    def num_free(self) -> jax.Array:
        """Pages on the stack, `i32[]`."""
        return self.table.num_free

    @property
    def num_pages(self) -> int:
        return self.table.num_pages

    @property
    def null(self) -> int:
        return self.table.null

    @property
    def tier(self) -> HostTier:
        return self.table.tier

    @property
    def in_pool(self) -> jax.Array:
        return self.table.in_pool

    @property
    def page_size(self) -> int:
        return self.table.page_size

    @property
    def num_hosted(self) -> jax.Array:
        return self.table.num_hosted

    @property
    def num_host_held(self) -> jax.Array:
        return self.table.num_host_held - self.num_host_cached

    @property
    def held_pages(self) -> jax.Array:
        return self.table.held_pages

    @property
    def reserved_tokens(self) -> jax.Array:
        return self.table.reserved_tokens

    @property
    def is_first_holder(self) -> jax.Array:
        return self.table.is_first_holder

    @property
    def is_cached(self) -> jax.Array:
        """Pages that nobody holds and the index does, `bool[P + H]`."""
        pages = jnp.arange(self.null, dtype=jnp.int32)
        return (self.table.ref_counts == 0) & self.index.holds(pages)

    @property
    def is_shared(self) -> jax.Array:
        return self.table.is_shared


def take(cache: PrefixCache, pages: jax.Array) -> PrefixCache:
    """Adds a reference to each of `pages: i32[n]`, a chain of the index; `P + H` is none."""
    owners, pages = first_read(at(cache.table.ref_counts, pages, fill=1), pages)
    wakes, hosted = owners == 0, cache.tier.is_hosted(pages)
    cache = _for_each(unqueue, cache, _last_by_tier(cache, pages, wakes))
    return cache.replace(
        table=cache.table.replace(ref_counts=cache.table.ref_counts.at[pages].add(1, mode="drop")),
        index=prefix_index.note_use(cache.index, pages, cache.step, again=1),
        num_cached=cache.num_cached - jnp.sum(wakes & ~hosted, dtype=jnp.int32),
        num_host_cached=cache.num_host_cached - jnp.sum(wakes & hosted, dtype=jnp.int32),
    )


def make_room(
    cache: PrefixCache, num_pages: jax.Array, score: ScoreFn, *, whole: bool = False
) -> PrefixCache:
    """Takes cached pages out of the pool until `num_pages` are free, or none is cached.

    They go to the host while this step's budget lasts, and are lost if not. One that pages of the
    host follow has to go there. With `whole`, all cached pages before one that leaves leave too,
    as far as nothing else follows them: old sequences go as a whole.
    """

    def is_short(carry):
        cache, follows = carry
        is_short = (cache.num_free < num_pages) & (cache.num_cached > 0)
        return is_short | (follows < cache.null) if whole else is_short

    def leave_next(carry):
        cache, follows = carry
        page = priority_queue.first(cache.queue, POOL)
        if not whole:
            return leave(cache, page)[0], follows
        page = jnp.where(follows < cache.null, follows, page)
        cache, parent = leave(cache, page)
        # If a page of the host had to make room first, it is still there.
        parent = jnp.where(priority_queue.is_queued(cache.queue, POOL, page), page, parent)
        is_next = priority_queue.is_queued(cache.queue, POOL, parent)
        return cache, jnp.where(is_next, parent, cache.null)

    def leave(cache, page):
        """One page leaves the pool; or the host, so that it finds room there. And its parent."""
        tier = cache.tier
        if tier.num_pages == 0:
            return evict(cache, page, score)
        # Nobody holds what follows a cached page: if any is on the host, one can be evicted there.
        has_room = tier.num_free + cache.num_host_cached > 0
        is_followed, cache = first_read(cache.hosted_children[page] > 0, cache)
        goes = ((tier.outs.count < tier.budget) | is_followed) & has_room
        moves, is_full = goes & (tier.num_free > 0), goes & (tier.num_free == 0)
        page = jnp.where(is_full, priority_queue.first(cache.queue, HOST), page)
        # One of the two is none: branches would have to copy what only one of them changes.
        moved = jnp.where(moves, page, cache.null)
        cache, parent = _move(unqueue(cache, page), moved)
        cache, lost_parent = _drop(cache, jnp.where(moves, cache.null, page))
        parent = jnp.minimum(parent, lost_parent)
        return enqueue_leaf(enqueue_leaf(cache, parent, score), moved, score), parent

    start = jnp.asarray(cache.null, jnp.int32) if whole else None
    return lax.while_loop(is_short, leave_next, (cache, start))[0]


def make_host_room(cache: PrefixCache, score: ScoreFn) -> PrefixCache:
    """Evicts a cached page of the host if none is free there."""
    page = priority_queue.first(cache.queue, HOST)
    return evict(cache, jnp.where(cache.tier.num_free == 0, page, cache.null), score)[0]


def move_out(cache: PrefixCache, page: jax.Array, score: ScoreFn) -> PrefixCache:
    """Moves a page of the pool, which none of the pool follows, to the host, where one is free.

    It stays in the index if it is there. Rows that hold it are not told.
    """
    cache, parent = _move(unqueue(cache, page), page)
    return enqueue_leaf(cache, parent, score)


def evict(cache: PrefixCache, page: jax.Array, score: ScoreFn) -> tuple[PrefixCache, jax.Array]:
    """Takes a cached page that no page follows out of the index, and frees it; or none.

    Returns its parent too.
    """
    cache, parent = _drop(unqueue(cache, page), page)
    return enqueue_leaf(cache, parent, score), parent


def _move(cache: PrefixCache, page: jax.Array) -> tuple[PrefixCache, jax.Array]:
    """`move_out`, but for the queue; and the page's parent."""
    is_cached = (at(cache.table.ref_counts, page, fill=1) == 0).astype(jnp.int32)
    parent = at(cache.index.parents, page, fill=cache.null)  # none, if it is not in the index
    parent, cache = first_read(parent, cache)
    tier, spare = host_tier.leave(cache.tier, page)
    cache = cache.replace(
        table=page_table.free(cache.table.replace(tier=tier), spare[None]),
        num_cached=cache.num_cached - is_cached,
        num_host_cached=cache.num_host_cached + is_cached,
        hosted_children=cache.hosted_children.at[parent].add(1, mode="drop"),
        twins=jnp.where(cache.twins == page, cache.null, cache.twins),
    )
    return cache, parent


def _drop(cache: PrefixCache, page: jax.Array) -> tuple[PrefixCache, jax.Array]:
    """`evict`, but for the queue; and the page's parent."""
    is_page, hosted = page < cache.null, cache.tier.is_hosted(page).astype(jnp.int32)
    index, parent = prefix_index.drop(cache.index, page)
    cache = cache.replace(
        table=page_table.free(cache.table, page[None]),
        index=index,
        num_cached=cache.num_cached - (is_page.astype(jnp.int32) - hosted),
        num_host_cached=cache.num_host_cached - hosted,
        hosted_children=cache.hosted_children.at[parent].add(-hosted, mode="drop"),
        twins=jnp.where(cache.twins == page, cache.null, cache.twins),
    )
    return cache, parent


def enqueue_leaves(
    cache: PrefixCache, chain: jax.Array, chosen: jax.Array, score: ScoreFn
) -> PrefixCache:
    """Queues those of `chain: i32[n]` that are `chosen: bool[n]`, cached, and followed by none."""
    leaves = _last_by_tier(cache, chain, chosen)
    return _for_each(partial(enqueue_leaf, score=score), cache, leaves)


def enqueue_leaf(cache: PrefixCache, page: jax.Array, score: ScoreFn) -> PrefixCache:
    """Queues `page: i32[]` if it is a page, cached, and no page of its tier follows it."""
    index, hosted = cache.index, cache.tier.is_hosted(page)
    followers = at(index.num_children, page)
    if cache.tier.num_pages > 0:
        # Of the pool, those on the host do not count; and before the pool nothing is on the host.
        followers -= jnp.where(hosted, 0, at(cache.hosted_children, page))
    is_leaf = (page < cache.null) & (followers == 0)
    owners, cache = first_read(at(cache.table.ref_counts, page, fill=1), cache)
    is_leaf &= owners == 0
    usage = index.usage(jnp.where(is_leaf, page, 0))
    leaf = jnp.where(is_leaf, page, priority_queue.NEVER)
    key = jnp.stack([score(usage), usage.last_used])
    return cache.replace(queue=priority_queue.put(cache.queue, _tier_of(cache, page), leaf, key))


def unqueue(cache: PrefixCache, page: jax.Array) -> PrefixCache:
    """Takes `page: i32[]`, which may be none, out of the queue, if it is in."""
    tier, cache = first_read(_tier_of(cache, page), cache)
    page = jnp.where(page < cache.null, page, priority_queue.NEVER)
    return cache.replace(queue=priority_queue.remove(cache.queue, tier, page))


def _tier_of(cache: PrefixCache, page: jax.Array) -> jax.Array | int:
    if cache.tier.num_pages == 0:
        return POOL
    return jnp.where(cache.tier.is_hosted(page), HOST, POOL)


def _for_each(
    change: Callable[[PrefixCache, jax.Array], PrefixCache], cache: PrefixCache, pages: jax.Array
) -> PrefixCache:
    """The cache after `change` of each of `pages: i32[n]`, which may be none, lowest first.

    A loop, for XLA's CPU makes one function of a loop of scalars, and many of the same in a line.
    """

    def change_next(carry):
        cache, pages = carry
        page = jnp.min(pages)
        return change(cache, page), jnp.where(pages == page, cache.null, pages)

    start = cache, pages
    return lax.while_loop(lambda carry: jnp.any(carry[1] < cache.null), change_next, start)[0]


def _last_by_tier(cache: PrefixCache, chain: jax.Array, chosen: jax.Array) -> jax.Array:
    """The last of `chain: i32[n]` in each tier that is `chosen: bool[n]`, or none; `i32[tiers]`.

    No other page of a chain can be a leaf.
    """
    hosted = cache.tier.is_hosted(chain)
    last = [_last_of(chain, chosen & ~hosted, cache.null)]
    if cache.tier.num_pages > 0:
        last.append(_last_of(chain, chosen & hosted, cache.null))
    return jnp.stack(last)


def _last_of(pages: jax.Array, chosen: jax.Array, null: int) -> jax.Array:
    """The last of `pages: i32[n]` that are `chosen: bool[n]`, `null` if none is; `i32[]`."""
    place = jnp.max(jnp.where(chosen, jnp.arange(pages.shape[0], dtype=jnp.int32), -1))
    return jnp.where(place >= 0, pages[jnp.maximum(place, 0)], null)


def at(values: jax.Array, index: jax.Array, fill: int = 0) -> jax.Array:
    """`values[index]`, and `fill` outside."""
    return values.at[index].get(mode="fill", fill_value=fill)
