"""Who can go on when pages are short: how far down an order of rows the pages reach."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxpage.paging.page_table import PageTable, num_pages_for


def fitting(
    table: PageTable, order: jax.Array, counts: jax.Array, num_cached: jax.Array | int = 0
) -> jax.Array:
    """Which rows could append `counts` at once if all rows after them gave up their pages.

    "After" is meant by `order: i32[B]`, a permutation of the rows, and the rows that fit are its
    first few: `bool[B]`. `num_cached` pages that nobody holds are kept off the stack, and are as
    good as free. The work follows the pool's size only where pages are shared and too few.
    """
    held, num_free = table.held_pages - table.num_hosted, table.num_free + num_cached
    demand = num_pages_for(table.lengths + counts, table.page_size) - table.held_pages
    writes = (counts > 0) & (table.lengths % table.page_size != 0)
    is_shared = jnp.sum(held) > table.num_pages - num_free
    is_short = jnp.sum(demand) + jnp.sum(writes, dtype=jnp.int32) > num_free

    def unshared():
        # Row i fits if what rows 0..i hold and demand is no more than all pages in use or free.
        return jnp.cumsum((held + demand)[order]) <= num_free + jnp.sum(held)

    def shared():
        last = jnp.where(writes, held - 1, -1)
        kept, copied = _kept_and_copied(table.in_pool[order], last[order], table.num_pages)
        used = table.num_pages - num_free
        return jnp.cumsum(demand[order]) + copied <= num_free + used - kept

    fits = lax.cond(is_shared & is_short, shared, unshared)
    return jnp.zeros_like(fits).at[order].set(fits)


def _kept_and_copied(
    page_indices: jax.Array, columns: jax.Array, num_pages: int
) -> tuple[jax.Array, jax.Array]:
    """For rows 0..i alone, each i: the pages that they hold, and those they copy; two `i32[B]`.

    Row `b` writes to its page in column `columns[b]`, -1 for none. Of the owners of a page those
    that write copy it, all but one if all do. So a row that joins adds a copy if it writes and is
    not the page's first owner, or if it is the first that does not write and not the first owner.
    """
    num_rows, pages_per_slot = page_indices.shape
    row = jnp.broadcast_to(jnp.arange(num_rows, dtype=jnp.int32)[:, None], page_indices.shape)
    is_written = jnp.arange(pages_per_slot, dtype=jnp.int32)[None] == columns[:, None]

    def first_row(rows):
        nobody = jnp.full((num_pages,), num_rows, jnp.int32)
        return nobody.at[page_indices].min(rows, mode="drop")

    def by_row(rows, adds):
        """How many of `rows` that `adds` are at most each row."""
        added = jnp.zeros((num_rows,), jnp.int32)
        return jnp.cumsum(added.at[jnp.where(adds, rows, num_rows)].add(1, mode="drop"))

    owner, reader = first_row(row), first_row(jnp.where(is_written, num_rows, row))
    writers = is_written & (owner.at[page_indices].get(mode="fill", fill_value=0) != row)
    return (
        by_row(owner, owner < num_rows),
        by_row(row.reshape(-1), writers.reshape(-1))
        + by_row(reader, (reader < num_rows) & (reader != owner)),
    )
