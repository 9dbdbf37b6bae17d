"""Contiguous reservation, the baseline: a buddy allocator over the same pool, as pure arrays.

Each sequence gets one aligned run of `2 ** order` pages when it is admitted and keeps it
until it ends, as in the systems that the paper compares with (Orca's three forms, section 6.1).
The table has the shape of `PageTable` to its readers (`page_indices`, `lengths`), so the same
model and kernels run on it: a run is just consecutive page numbers.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxpage.paging import host_tier, status
from jaxpage.paging.host_tier import HostTier
from jaxpage.paging.page_table import num_pages_for

# (prompt tokens, prompt + output tokens, most tokens a slot can have) -> tokens to reserve
ReserveFn = Callable[[jax.Array, jax.Array, int], jax.Array]


def reserve_max(prompt_len: jax.Array, final_len: jax.Array, max_len: int) -> jax.Array:
    """Reserves the most that any sequence may have, whatever this one needs (Orca Max)."""
    del prompt_len
    return jnp.full_like(final_len, max_len)


def reserve_pow2(prompt_len: jax.Array, final_len: jax.Array, max_len: int) -> jax.Array:
    """Over-reserves the output by at most 2x: its next power of two, 25 -> 32 (Orca Pow2)."""
    return jnp.minimum(prompt_len + next_pow2(final_len - prompt_len), max_len)


def reserve_oracle(prompt_len: jax.Array, final_len: jax.Array, max_len: int) -> jax.Array:
    """Reserves what the sequence will have at its end, known beforehand (Orca Oracle)."""
    del prompt_len, max_len
    return final_len


def next_pow2(n: jax.Array) -> jax.Array:
    """The smallest power of two that is at least `n`, for `n >= 1`."""
    return jnp.left_shift(1, log2_ceil(n))


def log2_ceil(n: jax.Array) -> jax.Array:
    """The exponent of `next_pow2(n)`."""
    return 32 - lax.clz(jnp.asarray(n - 1, jnp.int32))


class ContiguousTable(struct.PyTreeNode):
    """Runs of pages by sequence, and the buddy tree over the pool.

    The tree is a heap of `2 * 2 ** h` nodes, root at 1, leaves the pages (those past `P` are never
    free). `largest[node]` is one more than the order of the largest free run below the node, 0
    if there is none: so a node of order `o` is wholly free exactly when it holds `o + 1`.
    """

    starts: jax.Array  # i32[B], first page of the row's run
    orders: jax.Array  # i32[B], log2 of the run's pages; -1 for a row without one
    lengths: jax.Array  # i32[B], tokens written
    reserved_tokens: jax.Array  # i32[B], tokens that the rule asked for
    largest: jax.Array  # i32[2 ** (h + 1)]
    num_pages: int = struct.field(pytree_node=False)
    pages_per_slot: int = struct.field(pytree_node=False)
    page_size: int = struct.field(pytree_node=False)

    @property
    def height(self) -> int:
        """Levels of the tree below the root, `h`."""
        return self.largest.shape[0].bit_length() - 2

    @property
    def held_pages(self) -> jax.Array:
        """Pages in each row's run, buddy rounding included, `i32[B]`."""
        return jnp.where(self.orders < 0, 0, jnp.left_shift(1, jnp.maximum(self.orders, 0)))

    @property
    def num_hosted(self) -> jax.Array:
        """Pages of each row on the host, `i32[B]`: none."""
        return jnp.zeros_like(self.lengths)

    @property
    def num_cached(self) -> jax.Array:
        """Pages kept for later sequences, `i32[]`: none."""
        return jnp.asarray(0, jnp.int32)

    @property
    def null(self) -> int:
        """The number that means "no page", `P`."""
        return self.num_pages

    @property
    def tier(self) -> HostTier:
        """The host has no pages for runs."""
        return host_tier.create(self.num_pages, 0)

    @property
    def num_host_held(self) -> jax.Array:
        """Pages of the host that rows hold, `i32[]`: none."""
        return jnp.asarray(0, jnp.int32)

    @property
    def num_host_cached(self) -> jax.Array:
        """Pages of the host kept for later sequences, `i32[]`: none."""
        return jnp.asarray(0, jnp.int32)

    @property
    def in_pool(self) -> jax.Array:
        """Where each entry's page is, `i32[B, M]`, `P` for none."""
        return self.page_indices

    @property
    def is_cached(self) -> jax.Array:
        """Pages kept for later sequences, `bool[P]`: none."""
        return jnp.zeros((self.num_pages,), jnp.bool_)

    @property
    def is_shared(self) -> jax.Array:
        """Pages that several rows hold, `bool[P]`: none."""
        return jnp.zeros((self.num_pages,), jnp.bool_)

    @property
    def is_first_holder(self) -> jax.Array:
        """Rows that are the first to hold their last page, `bool[B]`: nothing is shared."""
        return jnp.ones(self.lengths.shape, jnp.bool_)

    @property
    def num_free(self) -> jax.Array:
        """Pages in no run, `i32[]`."""
        return self.num_pages - jnp.sum(self.held_pages)

    @property
    def page_indices(self) -> jax.Array:
        """The runs as a page table, `i32[B, M]`; `P` beyond a row's run."""
        columns = jnp.arange(self.pages_per_slot, dtype=jnp.int32)[None, :]
        inside = columns < self.held_pages[:, None]
        return jnp.where(inside, self.starts[:, None] + columns, self.num_pages)


def create(num_slots: int, pages_per_slot: int, num_pages: int, page_size: int) -> ContiguousTable:
    """A table of empty rows over a pool of `num_pages` free pages."""
    height = math.ceil(math.log2(num_pages)) if num_pages > 1 else 0
    level = (jnp.arange(2**height) < num_pages).astype(jnp.int32)
    levels = [level]
    for order in range(1, height + 1):
        level = _merge(level[0::2], level[1::2], order)
        levels.append(level)
    return ContiguousTable(
        starts=jnp.zeros((num_slots,), jnp.int32),
        orders=jnp.full((num_slots,), -1, jnp.int32),
        lengths=jnp.zeros((num_slots,), jnp.int32),
        reserved_tokens=jnp.zeros((num_slots,), jnp.int32),
        largest=jnp.concatenate([jnp.zeros((1,), jnp.int32), *reversed(levels)]),
        num_pages=num_pages,
        pages_per_slot=pages_per_slot,
        page_size=page_size,
    )


def reserve(
    table: ContiguousTable, row: jax.Array, num_tokens: jax.Array
) -> tuple[ContiguousTable, jax.Array]:
    """Gives the empty `row` a run for `num_tokens` tokens: the leftmost that fits.

    Returns the table and a status, `i32[]`; on failure the table is unchanged.
    """
    order = log2_ceil(num_pages_for(num_tokens, table.page_size))
    fits = table.largest[1] > order
    status_ = jnp.where(fits, status.OK, status.OUT_OF_PAGES)
    too_long = num_tokens > table.pages_per_slot * table.page_size
    status_ = jnp.where(too_long, status.SLOT_FULL, status_)

    def take(table: ContiguousTable) -> ContiguousTable:
        def descend(_, carry):
            node, level = carry
            deeper = level > order
            left = 2 * node
            child = jnp.where(table.largest[left] > order, left, left + 1)
            return jnp.where(deeper, child, node), jnp.where(deeper, level - 1, level)

        root = (jnp.asarray(1, jnp.int32), jnp.asarray(table.height, jnp.int32))
        node, _ = lax.fori_loop(0, table.height, descend, root)
        start = (jnp.left_shift(node, order) - 2**table.height).astype(jnp.int32)
        return table.replace(
            starts=table.starts.at[row].set(start),
            orders=table.orders.at[row].set(order),
            reserved_tokens=table.reserved_tokens.at[row].set(num_tokens),
            largest=_set_node(table, node, order, jnp.asarray(0, jnp.int32)),
        )

    return lax.cond(status_ == status.OK, take, lambda table: table, table), status_


def append(table: ContiguousTable, counts: jax.Array) -> tuple[ContiguousTable, jax.Array]:
    """Counts `counts: i32[B]` more tokens as written in each row's run.

    Returns the table and a status a row; a row that would outgrow its reservation is unchanged.
    """
    lengths = table.lengths + counts
    row_status = jnp.where(lengths > table.reserved_tokens, status.SLOT_FULL, status.OK)
    return table.replace(
        lengths=jnp.where(row_status == status.OK, lengths, table.lengths)
    ), row_status


def release(table: ContiguousTable, rows: jax.Array) -> ContiguousTable:
    """Empties `rows: bool[B]` and merges their runs with free buddies."""

    def release_row(carry):
        table, rows = carry
        row = jnp.argmax(rows)
        order = table.orders[row]
        node = jnp.right_shift(table.starts[row] + 2**table.height, jnp.maximum(order, 0))
        largest = lax.cond(
            order >= 0,
            lambda: _set_node(table, node, order, order + 1),
            lambda: table.largest,
        )
        table = table.replace(
            orders=table.orders.at[row].set(-1),
            lengths=table.lengths.at[row].set(0),
            reserved_tokens=table.reserved_tokens.at[row].set(0),
            largest=largest,
        )
        return table, rows.at[row].set(False)

    return lax.while_loop(lambda carry: jnp.any(carry[1]), release_row, (table, rows))[0]


def violations(table: ContiguousTable) -> jax.Array:
    """Counts broken invariants, `i32[4]`; a sound table gives zeros.

    1. pages in two runs, and pages of runs that lie outside the pool; 2. tree leaves and nodes
    that disagree with the runs; 3. runs that are not aligned to their size; 4. lengths beyond the
    reservation, or reservations beyond the run.
    """
    P, leaves = table.num_pages, 2**table.height
    pages = jnp.arange(leaves, dtype=jnp.int32)[None, :]
    starts, ends = table.starts, table.starts + table.held_pages
    owners = jnp.sum((pages >= starts[:, None]) & (pages < ends[:, None]), 0, dtype=jnp.int32)
    inside = jnp.maximum(jnp.minimum(ends, P) - jnp.maximum(starts, 0), 0)
    twice = (owners[:P] > 1).astype(jnp.int32)
    misplaced = jnp.concatenate([twice, table.held_pages - inside])

    level = ((owners == 0) & (pages[0] < P)).astype(jnp.int32)
    expected = [level]
    for order in range(1, table.height + 1):
        level = _merge(level[0::2], level[1::2], order)
        expected.append(level)
    tree = jnp.concatenate(list(reversed(expected)))
    wrong = tree != _visible(table)

    unaligned = (table.orders >= 0) & (starts % jnp.maximum(table.held_pages, 1) != 0)
    bad_length = (table.lengths < 0) | (table.lengths > table.reserved_tokens)
    bad_length |= table.reserved_tokens > table.held_pages * table.page_size
    return jnp.stack(
        [jnp.sum(x, dtype=jnp.int32) for x in (misplaced, wrong, unaligned, bad_length)]
    )


def _merge(left: jax.Array, right: jax.Array, order: jax.Array | int) -> jax.Array:
    """The `largest` of a node of `order` from its children's."""
    whole = (left == order) & (right == order)
    return jnp.where(whole, order + 1, jnp.maximum(left, right))


def _set_node(
    table: ContiguousTable, node: jax.Array, order: jax.Array, value: jax.Array
) -> jax.Array:
    """`largest` with `node`, which is of `order`, set to `value`, and its ancestors made true."""

    def climb(carry):
        largest, node, order = carry
        parent = node // 2
        merged = _merge(largest[2 * parent], largest[2 * parent + 1], order + 1)
        return largest.at[parent].set(merged), parent, order + 1

    largest = table.largest.at[node].set(value)
    return lax.while_loop(lambda carry: carry[1] > 1, climb, (largest, node, order))[0]


def _visible(table: ContiguousTable) -> jax.Array:
    """`largest` with every node inside a run shown as 0, root first: a run's inner nodes keep
    stale values, since nothing descends below a node that holds 0."""
    levels = [table.largest[1:2]]
    for depth in range(1, table.height + 1):
        above = jnp.repeat(levels[-1], 2, total_repeat_length=2**depth)
        level = table.largest[2**depth : 2 ** (depth + 1)]
        levels.append(jnp.where(above == 0, 0, level))
    return jnp.concatenate(levels)
