"""The host tier: pages of sequences that have to wait, moved out of the pool and back one by one.

A row that waits keeps its place in the table and names, where it has lost a page, the page on the
host that holds its content: entry `P + 1 + h` for host page `h`. Nothing is computed for such a
row until all of its pages are back. Only whole tables know which page moves; the bytes follow in
`kv_pool`, in the order of the plan: out, then in.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jaxpage.paging import page_table, prefix_cache
from jaxpage.paging.eviction import ScoreFn
from jaxpage.paging.in_place import first_read
from jaxpage.paging.page_table import PageTable
from jaxpage.paging.prefix_cache import PrefixCache


class HostTier(struct.PyTreeNode):
    """The stack of free host pages, `free_pages[:num_free]`, the top last."""

    free_pages: jax.Array  # i32[H]
    num_free: jax.Array  # i32[]

    @property
    def num_pages(self) -> int:
        """Host pages, `H`."""
        return self.free_pages.shape[0]


class TierOps(NamedTuple):
    """The verbs of one kind of table with a host tier; `PAGED` says what each does."""

    movable: Callable[..., jax.Array]
    move_out: Callable[..., tuple[Any, HostTier, "Moved"]]
    move_in: Callable[..., tuple[Any, HostTier, "Moved"]]
    demand: Callable[..., jax.Array]  # (table, counts) -> pages that each row needs, i32[B]
    make_room: Callable[..., Any]  # (table, n) -> table, of which n pages are free if they can be


class Moved(NamedTuple):
    """A page and the host page that it went to or came from, both `i32[]`."""

    page: jax.Array
    host_page: jax.Array


def create(num_pages: int) -> HostTier:
    """A tier of `num_pages` free pages, page 0 on top."""
    return HostTier(
        free_pages=jnp.arange(num_pages - 1, -1, -1, dtype=jnp.int32),
        num_free=jnp.asarray(num_pages, jnp.int32),
    )


def movable(table: PageTable, rows: jax.Array) -> jax.Array:
    """Entries whose page nobody holds but `rows: bool[B]`, `bool[B, M]`; they may leave the pool.

    The work follows the pool's size.
    """
    entries = jnp.where(rows[:, None], table.page_indices, table.num_pages)
    holders = jnp.zeros_like(table.ref_counts).at[entries].add(1, mode="drop")
    only_theirs = holders == table.ref_counts
    return only_theirs.at[entries].get(mode="fill", fill_value=False)


def movable_cached(cache: PrefixCache, rows: jax.Array) -> jax.Array:
    """`movable`; a page that the index knows by what follows it has to stay until that has left."""
    pages = cache.page_indices
    followers = cache.index.num_children.at[pages].get(mode="fill", fill_value=0)
    is_leaf = (followers == 0) | ~cache.index.holds(pages)
    return movable(cache.table, rows) & is_leaf


def move_out(
    table: PageTable, tier: HostTier, row: jax.Array, column: jax.Array
) -> tuple[PageTable, HostTier, Moved]:
    """Gives the page of an entry that is `movable` back to the pool, for a page of the host.

    All rows that name it name the host's from now on.
    """
    page, table = first_read(table.page_indices[row, column], table)
    host_page, tier = first_read(tier.free_pages[tier.num_free - 1], tier)
    names = table.page_indices == page
    table = table.replace(
        page_indices=jnp.where(names, table.num_pages + 1 + host_page, table.page_indices),
        ref_counts=table.ref_counts.at[page].set(0),
        num_hosted=table.num_hosted + jnp.any(names, axis=1).astype(jnp.int32),
    )
    tier = tier.replace(num_free=tier.num_free - 1)
    return page_table.free(table, page[None]), tier, Moved(page, host_page)


def move_out_cached(
    cache: PrefixCache, tier: HostTier, row: jax.Array, column: jax.Array
) -> tuple[PrefixCache, HostTier, Moved]:
    """`move_out`, of a page that leaves the index too; its rows enter it again when it is back."""
    page = cache.page_indices[row, column]
    names = jnp.any(cache.page_indices == page, axis=1)
    cache = prefix_cache.forget(cache, page)
    num_indexed = jnp.where(names, jnp.minimum(cache.num_indexed, column), cache.num_indexed)
    table, tier, moved = move_out(cache.table, tier, row, column)
    return cache.replace(table=table, num_indexed=num_indexed), tier, moved


def move_in(
    table: PageTable, tier: HostTier, row: jax.Array, column: jax.Array
) -> tuple[PageTable, HostTier, Moved]:
    """Gives the entry, which names a page of the host, a page of the pool; one must be free."""
    entry, table = first_read(table.page_indices[row, column], table)
    page, table = first_read(table.free_pages[table.num_free - 1], table)
    names = table.page_indices == entry
    is_owner = jnp.any(names, axis=1).astype(jnp.int32)
    table = table.replace(
        page_indices=jnp.where(names, page, table.page_indices),
        ref_counts=table.ref_counts.at[page].set(jnp.sum(is_owner)),
        num_free=table.num_free - 1,
        num_hosted=table.num_hosted - is_owner,
    )
    host_page = entry - table.num_pages - 1
    tier = tier.replace(
        free_pages=tier.free_pages.at[tier.num_free].set(host_page), num_free=tier.num_free + 1
    )
    return table, tier, Moved(page, host_page)


def move_in_cached(
    cache: PrefixCache, tier: HostTier, row: jax.Array, column: jax.Array, *, score: ScoreFn
) -> tuple[PrefixCache, HostTier, Moved]:
    """`move_in`, for which a cached page leaves if none is free."""
    cache = prefix_cache.make_room(cache, jnp.asarray(1, jnp.int32), score)
    table, tier, moved = move_in(cache.table, tier, row, column)
    return cache.replace(table=table), tier, moved


PAGED = TierOps(
    movable, move_out, move_in, demand=page_table.demand, make_room=lambda table, num_pages: table
)


def with_prefix_cache(score: ScoreFn) -> TierOps:
    """The verbs of a page table with a prefix cache."""
    return TierOps(
        movable=movable_cached,
        move_out=move_out_cached,
        move_in=partial(move_in_cached, score=score),
        demand=lambda cache, counts: page_table.demand(cache.table, counts),
        make_room=partial(prefix_cache.make_room, score=score),
    )


def recount(tier: HostTier, page_indices: jax.Array, num_pages: int) -> HostTier:
    """Frees the host pages that no entry of `page_indices: i32[B, M]` names any more."""
    is_free = ~_named(tier, page_indices, num_pages)
    # Stable, so that the lowest page is on top again.
    order = jnp.argsort(is_free, stable=True, descending=True).astype(jnp.int32)
    count = jnp.sum(is_free, dtype=jnp.int32)
    place = jnp.arange(tier.num_pages, dtype=jnp.int32)
    return tier.replace(
        free_pages=jnp.where(place < count, order[jnp.maximum(count - 1 - place, 0)], order),
        num_free=count,
    )


def violations(tier: HostTier, page_indices: jax.Array, num_pages: int) -> jax.Array:
    """Counts host pages that are free and named, or neither, or twice in the stack, `i32[]`.

    `page_indices: i32[B, M]` are the entries of the table over `num_pages` pages.
    """
    stacked = jnp.arange(tier.num_pages, dtype=jnp.int32) < tier.num_free
    in_stack = jnp.where(stacked, tier.free_pages, tier.num_pages)
    times_free = jnp.zeros_like(tier.free_pages).at[in_stack].add(1, mode="drop")
    is_named = _named(tier, page_indices, num_pages)
    return jnp.sum(times_free + is_named.astype(jnp.int32) != 1, dtype=jnp.int32)


def _named(tier: HostTier, page_indices: jax.Array, num_pages: int) -> jax.Array:
    """Host pages that an entry names, `bool[H]`."""
    host_pages = page_indices - num_pages - 1
    host_pages = jnp.where(host_pages >= 0, host_pages, tier.num_pages)
    return jnp.zeros(tier.free_pages.shape, jnp.bool_).at[host_pages].set(True, mode="drop")
