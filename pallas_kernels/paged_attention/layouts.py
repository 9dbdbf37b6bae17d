"""Other projects' layouts of paged KV, to ours and back.

Ours is pages [P, K, S, D] with a table i32[B, M] and lengths i32[B]. JAX's own Pallas kernels keep
heads first; FlashAttention, FlashInfer and vLLM's GPU backends keep tokens before heads (NHD), and
FlashInfer names the pages of all rows in one list (CSR). All are pure and may be jitted.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class CsrTable(NamedTuple):
    """Pages of all rows in one list, as FlashInfer's `paged_kv_*` arrays."""

    indptr: jax.Array  # i32[B + 1], where each row's pages begin in `indices`
    indices: jax.Array  # i32[n], pages; whatever stands from indptr[B] on is nobody's
    last_page_len: jax.Array  # i32[B], tokens in each row's last page, 1 to S; 0 for an empty row


def from_head_major(pages: jax.Array) -> jax.Array:
    """[K, P, S, D] -> [P, K, S, D]."""
    return jnp.swapaxes(pages, 0, 1)


def to_head_major(pages: jax.Array) -> jax.Array:
    """[P, K, S, D] -> [K, P, S, D]."""
    return jnp.swapaxes(pages, 0, 1)


def from_nhd(pages: jax.Array) -> jax.Array:
    """[P, S, K, D] -> [P, K, S, D]."""
    return jnp.swapaxes(pages, 1, 2)


def to_nhd(pages: jax.Array) -> jax.Array:
    """[P, K, S, D] -> [P, S, K, D]."""
    return jnp.swapaxes(pages, 1, 2)


def from_csr(table: CsrTable, page_size: int, pages_per_row: int) -> tuple[jax.Array, jax.Array]:
    """(lengths i32[B], page_indices i32[B, M]) of a CSR table, M being `pages_per_row`.

    Entries beyond a row's pages are the largest i32, which names no page. A row with more than
    `pages_per_row` pages cannot be told at trace time: see `csr_rows_too_long`.
    """
    counts = jnp.diff(table.indptr)
    lengths = jnp.where(counts > 0, (counts - 1) * page_size + table.last_page_len, 0)
    column = jnp.arange(pages_per_row, dtype=jnp.int32)[None]
    nobody = jnp.iinfo(jnp.int32).max
    at = jnp.where(column < counts[:, None], table.indptr[:-1, None] + column, nobody)
    return lengths, table.indices.at[at].get(mode="fill", fill_value=nobody)


def csr_rows_too_long(table: CsrTable, pages_per_row: int) -> jax.Array:
    """Rows that `from_csr` would cut short, `bool[B]`."""
    return jnp.diff(table.indptr) > pages_per_row


def to_csr(lengths: jax.Array, page_indices: jax.Array, page_size: int) -> CsrTable:
    """The CSR table of (lengths, page_indices), its `indices` padded to B * M."""
    counts = -(-lengths // page_size)
    indptr = jnp.concatenate([jnp.zeros((1,), jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])
    num_rows, pages_per_row = page_indices.shape
    column = jnp.arange(pages_per_row, dtype=jnp.int32)[None]
    end = num_rows * pages_per_row
    at = jnp.where(column < counts[:, None], indptr[:-1, None] + column, end)
    indices = jnp.full((end,), jnp.iinfo(jnp.int32).max, jnp.int32)
    return CsrTable(
        indptr=indptr,
        indices=indices.at[at].set(page_indices, mode="drop"),
        last_page_len=jnp.where(lengths > 0, lengths - (counts - 1) * page_size, 0),
    )
