"""The page table: which pages of the pool hold which sequence's tokens, as JAX arrays.

Every verb is `verb(table, ...) -> table` or `-> (table, value)`, pure and of static shape. A page
is taken when a token needs it and not before (Kwon et al. 2023, section 4.3). Failure is a value
of `paging.status`, and all-or-nothing: a row whose pages cannot all be had is unchanged.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxpage.paging import host_tier, ragged, status
from jaxpage.paging.copies import Copies
from jaxpage.paging.freed import Freed
from jaxpage.paging.host_tier import HostTier
from jaxpage.paging.in_place import first_read


class PageTable(struct.PyTreeNode):
    """Pages by sequence, reference counts by page, and the stack of free pages.

    Row `b` keeps token `i < lengths[b]` in slot `i % S` of page `page_indices[b, i // S]`; entries
    past its last page are `NULL_PAGE`, an index that scatters drop. A page is free exactly when its
    reference count is zero, and then it stands once in `free_pages[:num_free]`, the top last, or if
    it is on the host, on the stack there. Without a host tier, `H` is 0 and a page's number is
    its place.
    """

    page_indices: jax.Array  # i32[B, M]
    lengths: jax.Array  # i32[B], tokens
    ref_counts: jax.Array  # i32[P + H]
    free_pages: jax.Array  # i32[P]
    num_free: jax.Array  # i32[]
    num_hosted: jax.Array  # i32[B], entries whose page is on the host
    tier: HostTier
    page_size: int = struct.field(pytree_node=False)

    @property
    def num_pages(self) -> int:
        """Pages in the pool, `P`."""
        return self.free_pages.shape[0]

    @property
    def null(self) -> int:
        """The number that means "no page", `NULL_PAGE = P + H`."""
        return self.ref_counts.shape[0]

    @property
    def in_pool(self) -> jax.Array:
        """Where in the pool each entry's page is, `i32[B, M]`, `P` for none and on the host."""
        return self.tier.in_pool(self.page_indices)

    @property
    def held_pages(self) -> jax.Array:
        """Pages of each row, `i32[B]`, those on the host too."""
        return num_pages_for(self.lengths, self.page_size)

    @property
    def reserved_tokens(self) -> jax.Array:
        """Tokens that each row's memory could hold, `i32[B]`."""
        return self.held_pages * self.page_size

    @property
    def num_cached(self) -> jax.Array:
        """Pages of the pool that nobody holds and that are not free, `i32[]`: none here."""
        return jnp.asarray(0, jnp.int32)

    @property
    def num_host_cached(self) -> jax.Array:
        """The same of the host, `i32[]`."""
        return jnp.asarray(0, jnp.int32)

    @property
    def num_host_held(self) -> jax.Array:
        """Pages of the host that rows hold, `i32[]`."""
        return self.tier.num_pages - self.tier.num_free

    @property
    def is_cached(self) -> jax.Array:
        """Pages that nobody holds and that are not free, `bool[P + H]`: none."""
        return jnp.zeros(self.ref_counts.shape, jnp.bool_)

    @property
    def is_shared(self) -> jax.Array:
        """Pages that several rows hold, `bool[P + H]`."""
        return self.ref_counts > 1

    @property
    def is_first_holder(self) -> jax.Array:
        """Rows before which no row holds their last page, `bool[B]`; empty ones too.

        None whose last page is on the host.
        """
        last = jnp.take_along_axis(self.page_indices, _last_column(self)[:, None], 1)[:, 0]
        owners = self.ref_counts.at[last].get(mode="fill", fill_value=0)
        return (_copies(last, owners)[1] == last.shape[0]) & ~self.tier.is_hosted(last)


class Appended(NamedTuple):
    """What `append` did in each row, and the copies that it asks for.

    Where a row was to write to a page that others hold as well, it now holds page `targets[b]` in
    place of page `sources[b]`, whose content must be copied before the row's new tokens are written
    (copy-on-write, Kwon et al. 2023, section 4.4). Both are places in the pool, `P` for no copy.
    """

    status: jax.Array  # i32[B]
    sources: jax.Array  # i32[B], pages
    targets: jax.Array  # i32[B], pages


def num_pages_for[N: (int, jax.Array)](num_tokens: N, page_size: int) -> N:
    """Pages that hold `num_tokens` tokens: the quotient, rounded up."""
    return (num_tokens + page_size - 1) // page_size


def create(
    num_slots: int,
    pages_per_slot: int,
    num_pages: int,
    page_size: int,
    host_pages: int = 0,
    budget: int | None = None,
    zero_freed: bool = False,
) -> PageTable:
    """A table of empty rows, every page free; page 0 is on top of the stack.

    Of cached pages at most `budget` a step move to the host, and any number if none is given.
    With `zero_freed` the table lists pages that become free (`take_freed`).
    """
    null = num_pages + host_pages
    return PageTable(
        page_indices=jnp.full((num_slots, pages_per_slot), null, jnp.int32),
        lengths=jnp.zeros((num_slots,), jnp.int32),
        ref_counts=jnp.zeros((null,), jnp.int32),
        free_pages=jnp.arange(num_pages - 1, -1, -1, dtype=jnp.int32),
        num_free=jnp.asarray(num_pages, jnp.int32),
        num_hosted=jnp.zeros((num_slots,), jnp.int32),
        tier=host_tier.create(num_pages, host_pages, budget, zero_freed),
        page_size=page_size,
    )


def append(
    table: PageTable,
    counts: jax.Array,
    max_new_pages: int | None = None,
    needed: "Needs | None" = None,
) -> tuple[PageTable, Appended]:
    """Makes room for `counts: i32[B]` more tokens in each row, and counts them as written.

    Pages go to rows in index order without overtaking: once a row finds too few, no later row
    that needs a page gets one. A row that would write to a shared page gets one in its place, and
    the last owner writes in place. `max_new_pages` bounds the pages of one call (by default `P`), a
    static number that the work follows. What is `needed` may be known already, from `needs`.
    """
    null = table.null
    capacity = table.num_pages if max_new_pages is None else max_new_pages
    lengths, held, last = table.lengths + counts, table.held_pages, _last_column(table)
    of_rows = needs(table, counts) if needed is None else needed
    of_rows, table = first_read(of_rows, table)
    demand, copies = of_rows.demand, of_rows.copies

    available = jnp.minimum(table.num_free, capacity)
    starved = (demand > 0) & (jnp.cumsum(demand) > available)
    # Whoever counted on a copy that an earlier row does not get is not the last owner.
    starved |= starved.at[of_rows.before].get(mode="fill", fill_value=False)

    granted = jnp.where(starved, 0, demand)
    new = ragged.expand(granted, capacity)
    rank = jnp.arange(capacity, dtype=jnp.int32)
    page = table.free_pages.at[table.num_free - 1 - rank].get(mode="fill", fill_value=0)
    page = jnp.where(new.live, page, null)
    column = (held - copies).at[new.row].get(mode="fill", fill_value=0) + new.offset
    page_indices = table.page_indices.at[new.row, column].set(page, mode="drop")

    row_status = jnp.where(
        of_rows.too_long, status.SLOT_FULL, jnp.where(starved, status.OUT_OF_PAGES, status.OK)
    )
    copied = (copies > 0) & (row_status == status.OK)
    sources = jnp.where(copied, of_rows.last_page, null)
    targets = jnp.where(copied, jnp.take_along_axis(page_indices, last[:, None], 1)[:, 0], null)
    table = table.replace(
        page_indices=page_indices,
        lengths=jnp.where(row_status == status.OK, lengths, table.lengths),
        ref_counts=table.ref_counts.at[page].set(1, mode="drop").at[sources].add(-1, mode="drop"),
        num_free=table.num_free - jnp.sum(granted),
    )
    in_pool = table.tier.in_pool
    return table, Appended(row_status, in_pool(sources), in_pool(targets))


class Needs(NamedTuple):
    """What each row needs to append; all of `[B]`."""

    demand: jax.Array  # i32, pages from the stack
    copies: jax.Array  # i32, of these in place of a shared page, 0 or 1
    before: jax.Array  # i32, the row whose copy makes this one the last owner, B for none
    last_page: jax.Array  # i32, the page in which it goes on, NULL_PAGE for none
    too_long: jax.Array  # bool, it would outgrow its slot


def needs(table: PageTable, counts: jax.Array) -> Needs:
    """What each row needs to append `counts: i32[B]`; pages that nobody holds do not change it."""
    lengths, held = table.lengths + counts, table.held_pages
    too_long = lengths > table.page_indices.shape[1] * table.page_size
    writes = (counts > 0) & (table.lengths % table.page_size != 0) & ~too_long
    last_page = jnp.take_along_axis(table.page_indices, _last_column(table)[:, None], 1)[:, 0]
    last_page = jnp.where(writes, last_page, table.null)
    owners = table.ref_counts.at[last_page].get(mode="fill", fill_value=0)
    copies, before = _copies(last_page, owners)
    demand = num_pages_for(lengths, table.page_size) - held + copies
    return Needs(jnp.where(too_long, 0, demand), copies, before, last_page, too_long)


def _last_column(table: PageTable) -> jax.Array:
    """The column of each row's last page, 0 in an empty one."""
    return jnp.maximum(table.held_pages - 1, 0)


def _copies(pages: jax.Array, owners: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Who copies, of rows about to write to `pages: i32[B]` that have `owners: i32[B]`.

    Rows that write to the same page copy it one after the other, until one is the last owner.
    Returns the pages that each row copies, 0 or 1, and the row before it that writes to its page,
    `B` for none; both `i32[B]`.
    """
    num_rows = pages.shape[0]
    index = jnp.arange(num_rows, dtype=jnp.int32)

    def by_page():
        order = jnp.argsort(pages, stable=True).astype(jnp.int32)
        in_order = pages[order]
        is_first = jnp.concatenate([jnp.ones((1,), jnp.bool_), in_order[1:] != in_order[:-1]])
        first = lax.cummax(jnp.where(is_first, index, 0))
        copies = owners[order] - (index - first) > 1
        before = jnp.where(is_first, num_rows, jnp.roll(order, 1))
        place = jnp.zeros_like(order).at[order].set(index)
        # All rows that write to no shared page stand together, and before nobody.
        is_shared = owners > 1
        return copies[place].astype(jnp.int32), jnp.where(is_shared, before[place], num_rows)

    def nobody():
        return jnp.zeros((num_rows,), jnp.int32), jnp.full((num_rows,), num_rows, jnp.int32)

    return lax.cond(jnp.any(owners > 1), by_page, nobody)


def share(
    table: PageTable, source: jax.Array, target: jax.Array, num_tokens: jax.Array
) -> PageTable:
    """Lets the empty row `target` hold the first `num_tokens` tokens of row `source`.

    Nothing is copied: their pages gain a reference each. A last page that is only part full may
    be shared as well; whoever writes to it first gets a copy (`append`).
    """
    columns = jnp.arange(table.page_indices.shape[1], dtype=jnp.int32)
    count = num_pages_for(num_tokens, table.page_size)
    held, target = first_read(table.page_indices[source], target)
    pages = jnp.where(columns < count, held, table.null)
    num_hosted = jnp.sum(table.tier.is_hosted(pages), dtype=jnp.int32)
    return table.replace(
        page_indices=table.page_indices.at[target].set(pages),
        lengths=table.lengths.at[target].set(num_tokens),
        ref_counts=table.ref_counts.at[pages].add(1, mode="drop"),
        num_hosted=table.num_hosted.at[target].set(num_hosted),
    )


def fork(table: PageTable, source: jax.Array, target: jax.Array) -> PageTable:
    """Makes the empty row `target` a second owner of all that row `source` holds."""
    return share(table, source, target, table.lengths[source])


def release(table: PageTable, rows: jax.Array) -> PageTable:
    """Empties `rows: bool[B]`: each of their pages loses a reference, and unowned ones are free.

    The loop takes one row a turn, since few end in one step and two of them may share pages;
    within a row pages are distinct. Its cost follows the rows released, not the table.
    """

    def release_next(carry):
        table, rows = carry
        row = jnp.argmax(rows)
        table, unowned = release_row(table, row)
        return free(table, unowned), rows.at[row].set(False)

    return lax.while_loop(lambda carry: jnp.any(carry[1]), release_next, (table, rows))[0]


def release_row(table: PageTable, row: jax.Array) -> tuple[PageTable, jax.Array]:
    """Empties one row; returns the pages that nobody holds any more, and `NULL_PAGE`s, `i32[M]`.

    They are not free yet: `free` gives them back.
    """
    pages, row = first_read(table.page_indices[row], row)
    ref_counts = table.ref_counts.at[pages].add(-1, mode="drop")
    is_unowned = ref_counts.at[pages].get(mode="fill", fill_value=1) == 0
    table = table.replace(
        page_indices=table.page_indices.at[row].set(jnp.full_like(pages, table.null)),
        lengths=table.lengths.at[row].set(0),
        ref_counts=ref_counts,
        num_hosted=table.num_hosted.at[row].set(0),
    )
    return table, jnp.where(is_unowned, pages, table.null)


def free(table: PageTable, pages: jax.Array) -> PageTable:
    """Puts `pages: i32[n]` that nobody holds on the stack in their order; `NULL_PAGE` is none.

    Those on the host go on the stack there.
    """
    table = table.replace(tier=host_tier.note_freed(table.tier, pages))
    if table.tier.num_pages > 0:
        hosted = table.tier.is_hosted(pages)
        tier = host_tier.free(table.tier, jnp.where(hosted, pages, table.null))
        table, pages = table.replace(tier=tier), jnp.where(hosted, table.null, pages)
    is_page = pages < table.null
    place = table.num_free + jnp.cumsum(is_page.astype(jnp.int32)) - 1
    place = jnp.where(is_page, place, table.num_pages)
    return table.replace(
        free_pages=table.free_pages.at[place].set(pages, mode="drop"),
        num_free=table.num_free + jnp.sum(is_page, dtype=jnp.int32),
    )


def take_moves(table: PageTable) -> tuple[PageTable, Copies, Copies]:
    """The moves of the step to the host and back, for an executor; the table has none after."""
    tier = table.tier
    return table.replace(tier=host_tier.without_moves(tier)), tier.outs, tier.ins


def take_freed(table: PageTable, copied: jax.Array) -> tuple[PageTable, Freed, Freed]:
    """See `host_tier.take_freed`."""
    tier, in_pool, on_host = host_tier.take_freed(table.tier, copied)
    return table.replace(tier=tier), in_pool, on_host


def page_owners(page_indices: jax.Array, num_pages: int) -> jax.Array:
    """A row that holds each page, `i32[P]`, from a table's `i32[B, M]`; `B` if no row does."""
    num_slots = page_indices.shape[0]
    rows = jnp.arange(num_slots, dtype=jnp.int32)[:, None]
    owners = jnp.full((num_pages,), num_slots, jnp.int32)
    return owners.at[page_indices].set(jnp.broadcast_to(rows, page_indices.shape), mode="drop")


def violations(table: PageTable, kept: jax.Array | bool = False) -> jax.Array:
    """Counts broken invariants, `i32[5]`; a sound table gives zeros.

    Pages that are `kept: bool[P + H]` are off the stacks though nobody may hold them.

    1. pages whose reference count is not the number of table entries that name them;
    2. pages that are free and owned, or neither, or twice in a stack, or not in that of their tier;
    3. entries up to a row's last page that name no page, or after it that are not `NULL_PAGE`;
    4. pages that a row names twice, or that share a place with another;
    5. lengths or counts out of range, or a wrong count of pages on the host.
    """
    pages_per_slot = table.page_indices.shape[1]
    null, P, tier = table.null, table.num_pages, table.tier
    columns = jnp.arange(pages_per_slot, dtype=jnp.int32)[None, :]
    named = (table.page_indices >= 0) & (table.page_indices < null)
    held = columns < table.held_pages[:, None]
    entries = jnp.where(named, table.page_indices, null)
    references = jnp.zeros((null,), jnp.int32).at[entries].add(1, mode="drop")

    def in_stack(free_pages: jax.Array, num_free: jax.Array, hosted: bool) -> jax.Array:
        stacked = jnp.arange(free_pages.shape[0], dtype=jnp.int32) < num_free
        stacked &= (free_pages >= 0) & (tier.is_hosted(free_pages) == hosted)
        return jnp.where(stacked, free_pages, null)

    times_free = jnp.zeros((null,), jnp.int32)
    stacks = (table.free_pages, table.num_free, False), (tier.free_pages, tier.num_free, True)
    for stack in stacks:
        times_free = times_free.at[in_stack(*stack)].add(1, mode="drop")

    in_order = jnp.sort(entries, axis=1)
    repeated = (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] < null)
    times_placed = jnp.zeros((null,), jnp.int32).at[tier.places].add(1, mode="drop")
    too_long = (table.lengths < 0) | (table.lengths > pages_per_slot * table.page_size)
    num_hosted = jnp.sum(held & tier.is_hosted(entries), axis=1, dtype=jnp.int32)
    out_of_range = (table.num_free < 0) | (table.num_free > P)
    host_out_of_range = (tier.num_free < 0) | (tier.num_free > tier.num_pages)

    def count(broken: jax.Array) -> jax.Array:
        return jnp.sum(broken, dtype=jnp.int32)

    return jnp.stack(
        [
            count(references != table.ref_counts),
            count(times_free != ((references == 0) & jnp.logical_not(kept)).astype(jnp.int32)),
            count(jnp.where(held, ~named, table.page_indices != null)),
            count(repeated) + count(times_placed != 1),
            count(too_long)
            + count(out_of_range)
            + count(host_out_of_range)
            + count(num_hosted != table.num_hosted),
        ]
    )
