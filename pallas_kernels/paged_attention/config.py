"""The static shape of a launch: what a kernel may be asked for, and the shared memory it takes."""

from typing import NamedTuple

import jax.numpy as jnp

Q_LINES = 64  # the height of a wgmma tile; lines beyond those used compute what nobody reads
SM90_SMEM_BYTES = 226 * 1024  # of the 227 KiB that a thread block can have; 1 for barriers
WIDEST = 128  # columns of values that one warpgroup weighs
SM90_HEAD_DIMS = (64, 80, 96, 128, 256)
QUANTISED = ("int8", "float8_e4m3fn")  # dtypes of pages that come with scales
OTHER = 'use implementation="xla"'


class Tile(NamedTuple):
    """How a kernel cuts the KV of a row."""

    block_tokens: int = 64  # KV tokens in one stage of the ring, a multiple of 64
    stages: int = 4
    split_tokens: int = 1024  # KV tokens of one split, a multiple of `block_tokens`

    def sm90_bytes(self, head_dim: int, page_itemsize: int = 2) -> int:
        """Shared memory of a thread block on Hopper, barriers and rounding aside."""
        block = 2 * self.block_tokens * head_dim  # keys and values
        q = 2 * Q_LINES * head_dim
        p = 2 * Q_LINES * self.block_tokens * max(1, head_dim // WIDEST)
        ring = self.stages * block * page_itemsize
        wide = 2 * block if page_itemsize == 1 else 0
        out = 4 * Q_LINES * (min(head_dim, WIDEST) + 2)
        return q + p + ring + wide + out


class Geometry(NamedTuple):
    """Sizes that a kernel needs, in the letters of `paged_attention`."""

    num_tiles: int  # of queries
    tile_queries: int
    group_rows: int  # G rounded up to the 8 lines of a shared-memory tile
    num_pages: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    table_pages: int  # M
    num_splits: int

    @property
    def tile_lines(self) -> int:
        """Lines of the product that hold a query head."""
        return self.tile_queries * self.group_rows

    @property
    def grain(self) -> int:
        """Tokens to a scale of quantised pages, as the kernel reads them: a block has 4 or more,
        which is the least that a TMA copy moves."""
        return min(self.page_size, 16)

    @property
    def table_tokens(self) -> int:
        return self.table_pages * self.page_size

    @property
    def num_thread_blocks(self) -> int:
        return self.num_tiles * self.num_kv_heads * self.num_splits


def geometry_of(
    q, k_pages, page_indices, *, is_ragged: bool, tile: Tile, lines: int = Q_LINES
) -> Geometry:
    """The geometry of a call with arrays of these shapes, of up to `lines` lines a product.

    A ragged step gets as many tiles as any split of its tokens over the rows can need.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_pages, num_kv_heads, page_size, _ = k_pages.shape
    num_rows, table_pages = page_indices.shape
    group_rows = -(-num_heads // num_kv_heads // 8) * 8
    tile_queries = max(lines // group_rows, 1) if is_ragged else 1
    return Geometry(
        num_tiles=num_tokens // tile_queries + min(num_rows, num_tokens) if is_ragged else num_rows,
        tile_queries=tile_queries,
        group_rows=group_rows,
        num_pages=num_pages,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        table_pages=table_pages,
        num_splits=-(-table_pages * page_size // tile.split_tokens),
    )


def check_dtypes(q, k_pages) -> None:
    """Raises NotImplementedError for dtypes that no kernel for GPUs takes."""
    is_alike = k_pages.dtype.name in (q.dtype.name, *QUANTISED)
    if q.dtype not in (jnp.bfloat16, jnp.float16) or not is_alike:
        raise NotImplementedError(
            f"{q.dtype=!s} and {k_pages.dtype=!s} must both be bfloat16 or both float16, or the "
            f"pages one of {QUANTISED}: {OTHER}."
        )


def check_sm90(q, k_pages, tile: Tile) -> None:
    """Raises NotImplementedError, with the way out, for what the Hopper kernel does not do.

    A `tile` that cannot be launched is a ValueError.
    """
    page_size, head_dim = k_pages.shape[2:]
    check_dtypes(q, k_pages)
    if page_size % 8 or max(page_size, tile.block_tokens) % min(page_size, tile.block_tokens):
        raise NotImplementedError(
            f"{page_size=} must be a multiple of 8 that divides {tile.block_tokens} or is a "
            f"multiple of it: {OTHER}."
        )
    if head_dim not in SM90_HEAD_DIMS:
        raise NotImplementedError(f"{head_dim=} must be one of {SM90_HEAD_DIMS}: {OTHER}.")
    if q.shape[1] // k_pages.shape[1] > Q_LINES:
        raise NotImplementedError(f"More than {Q_LINES} query heads share a KV head: {OTHER}.")
    if tile.block_tokens % 64 or tile.split_tokens % tile.block_tokens:
        raise ValueError(
            f"{tile}: block_tokens must be a multiple of 64 and split_tokens one of block_tokens."
        )
    if (needed := tile.sm90_bytes(head_dim, k_pages.dtype.itemsize)) > SM90_SMEM_BYTES:
        raise ValueError(
            f"{tile} needs {needed} bytes of shared memory for {head_dim=}, more than "
            f"{SM90_SMEM_BYTES}: take fewer stages or smaller blocks."
        )
