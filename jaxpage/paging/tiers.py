"""Pages of sequences that have to wait: moved to the host one by one, and back.

A row that waits keeps its slot and goes on naming all of its pages; nothing is computed for it
until they are back. Only tables know which page moves; the bytes follow in `kv_pool`, in the order
of the plan.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpage.paging import cache_state, host_tier, page_table
from jaxpage.paging.cache_state import PrefixCache, at
from jaxpage.paging.eviction import ScoreFn
from jaxpage.paging.in_place import first_read
from jaxpage.paging.page_table import PageTable


class Movable(NamedTuple):
    """Entries of a table whose pages may go to the host, `bool[B, M]` each."""

    theirs: jax.Array  # the page is in the pool, and nobody else holds it
    now: jax.Array  # of these, no page of the pool follows it in the index


class TierOps(NamedTuple):
    """The verbs of one kind of table with a host tier; `PAGED` says what each does."""

    movable: Callable[..., Movable]
    moved: Callable[..., Movable]
    move_out: Callable[..., Any]
    move_in: Callable[..., Any]
    demand: Callable[..., jax.Array]  # (table, counts) -> pages that each row needs, i32[B]
    make_room: Callable[..., Any]  # (table, n) -> table, of which n pages are free if they can be
    take_moves: Callable[..., tuple]  # as in `page_table.take_moves`
    take_freed: Callable[..., tuple]  # as in `page_table.take_freed`


def movable(table: PageTable, rows: jax.Array) -> Movable:
    """Entries whose page is in the pool and held by nobody but `rows: bool[B]`.

    The work follows the pool's size.
    """
    entries = jnp.where(rows[:, None], table.page_indices, table.null)
    holders = jnp.zeros_like(table.ref_counts).at[entries].add(1, mode="drop")
    only_theirs = holders == table.ref_counts
    only_theirs = only_theirs.at[entries].get(mode="fill", fill_value=False)
    theirs = only_theirs & ~table.tier.is_hosted(entries)
    return Movable(theirs, theirs)


def moved(table: PageTable, entries: Movable, page: jax.Array) -> Movable:
    """What `movable` would say of the same rows now that `page: i32[]` is on the host."""
    stays = table.page_indices != page
    return Movable(entries.theirs & stays, entries.now & stays)


def movable_cached(cache: PrefixCache, rows: jax.Array) -> Movable:
    """`movable`; a page stays until those of the pool that follow it in the index have left."""
    pages, theirs = cache.page_indices, movable(cache.table, rows).theirs
    is_leaf = (_followers(cache, pages) == 0) | ~cache.index.holds(pages)
    return Movable(theirs, theirs & is_leaf)


def moved_cached(cache: PrefixCache, entries: Movable, page: jax.Array) -> Movable:
    """`moved`; the page's parent may have become the last of the pool."""
    parent = at(cache.index.parents, page, fill=cache.null)
    parent = jnp.where(_followers(cache, parent) == 0, parent, cache.null)
    is_last = (cache.page_indices == parent) & (parent < cache.null)
    theirs, now = moved(cache.table, entries, page)
    return Movable(theirs, now | (theirs & is_last))


def _followers(cache: PrefixCache, pages: jax.Array) -> jax.Array:
    """How many pages of the pool follow each of `pages: i32[...]` in the index."""
    return at(cache.index.num_children, pages) - at(cache.hosted_children, pages)


def move_out(table: PageTable, row: jax.Array, column: jax.Array) -> PageTable:
    """Moves the page of an entry that is `movable` to the host, which must have room."""
    page = table.page_indices[row, column]
    names = jnp.any(table.page_indices == page, axis=1).astype(jnp.int32)
    tier, spare = host_tier.leave(table.tier, page)
    table = table.replace(tier=tier, num_hosted=table.num_hosted + names)
    return page_table.free(table, spare[None])


def move_out_cached(
    cache: PrefixCache, row: jax.Array, column: jax.Array, *, score: ScoreFn
) -> PrefixCache:
    """`move_out`; a cached page of the host leaves if none is free there."""
    page = cache.page_indices[row, column]
    names = jnp.any(cache.page_indices == page, axis=1).astype(jnp.int32)
    cache = cache_state.move_out(cache_state.make_host_room(cache, score), page, score)
    num_hosted = cache.table.num_hosted + names
    return cache.replace(table=cache.table.replace(num_hosted=num_hosted))


def move_in(table: PageTable, row: jax.Array, column: jax.Array) -> PageTable:
    """Moves the page of an entry, which is on the host, to the pool, where one must be free."""
    page = table.page_indices[row, column]
    spare, table = first_read(table.free_pages[table.num_free - 1], table)
    names = jnp.any(table.page_indices == page, axis=1).astype(jnp.int32)
    return table.replace(
        tier=host_tier.come_back(table.tier, page, spare),
        num_free=table.num_free - 1,
        num_hosted=table.num_hosted - names,
    )


def move_in_cached(cache: PrefixCache, row: jax.Array, column: jax.Array) -> PrefixCache:
    """`move_in`, of a page before which all are in the pool."""
    parent = cache.index.parents[cache.page_indices[row, column]]
    return cache.replace(
        table=move_in(cache.table, row, column),
        hosted_children=cache.hosted_children.at[parent].add(-1, mode="drop"),
    )


def _take_moves_cached(cache: PrefixCache):
    table, outs, ins = page_table.take_moves(cache.table)
    return cache.replace(table=table), outs, ins


def _take_freed_cached(cache: PrefixCache, copied: jax.Array):
    table, in_pool, on_host = page_table.take_freed(cache.table, copied)
    return cache.replace(table=table), in_pool, on_host


PAGED = TierOps(
    movable,
    moved,
    move_out,
    move_in,
    demand=lambda table, counts: page_table.needs(table, counts).demand,
    make_room=lambda table, num_pages: table,
    take_moves=page_table.take_moves,
    take_freed=page_table.take_freed,
)


def with_prefix_cache(score: ScoreFn, whole: bool = False) -> TierOps:
    """The verbs of a page table with a prefix cache."""
    return TierOps(
        movable=movable_cached,
        moved=moved_cached,
        move_out=partial(move_out_cached, score=score),
        move_in=move_in_cached,
        demand=lambda cache, counts: page_table.needs(cache.table, counts).demand,
        make_room=partial(cache_state.make_room, score=score, whole=whole),
        take_moves=_take_moves_cached,
        take_freed=_take_freed_cached,
    )
