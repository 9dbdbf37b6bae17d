"""What the GPU kernels share: a call around a launch, the KV that one thread block reads, the fold.

A launch computes, for each (tile of queries, KV head, split of the row's KV), a softmax in base 2:
weighted values, largest score, sum of weights. Splits are cut at fixed positions, so that a row's
bits depend on that row alone; `combine` folds them in order.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.paged_attention import tiles as query_tiles
from pallas_kernels.paged_attention.config import Geometry, Tile

LOG2E = math.log2(math.e)


class Pages(NamedTuple):
    """Keys or values, in device memory, as a launch takes them."""

    pages: Any  # [P, K, S, D]
    scales: Any  # f32[B, K, C], row b's: one for each `grain` tokens; None for unquantised pages


def attend(
    launch: Callable, geometry: Geometry, tile: Tile, q, keys, values, lengths, page_indices,
    cu_q_lens,
):  # fmt: skip
    """Packs queries, launches, folds: the result of `reference.attend`.

    `keys` and `values` are pairs of pages [P, K, S, D] and their scales f32[P, K] or None.
    `launch` takes (q, keys, values, place, page_indices), keys and values as `Pages`, and returns
    partials: out [n, K, N, lines, D], largest scores and sums [n, K, N, lines]. `place` is
    i32[3, n]: the row of each tile, the position of its first query, its queries. Lines without a
    query hold anything.
    """
    num_tokens, num_heads, head_dim = q.shape
    group = num_heads // geometry.num_kv_heads
    if cu_q_lens is None:
        tiles = query_tiles.tiles_of_decode(lengths)
    else:
        tiles = query_tiles.tiles_of_ragged(
            lengths, cu_q_lens, num_tokens, geometry.tile_queries, geometry.num_tiles
        )
    packed = query_tiles.pack(q, tiles, geometry.num_kv_heads, geometry.group_rows)
    place = jnp.stack([tiles.rows, tiles.positions, tiles.counts])
    keys, values = (
        Pages(pages, _scales_of_rows(scales, lengths, page_indices, geometry, tile))
        for pages, scales in (keys, values)
    )
    out, top, total = launch(packed, keys, values, place, page_indices)
    out, top, total = combine(
        query_tiles.unpack(out, tiles, group, 0.0),
        query_tiles.unpack(top, tiles, group, -jnp.inf),
        query_tiles.unpack(total, tiles, group, 0.0),
    )
    return (
        out.reshape(num_tokens, num_heads, head_dim),
        top.reshape(num_tokens, num_heads),
        total.reshape(num_tokens, num_heads),
    )


def _scales_of_rows(scales, lengths, page_indices, geometry: Geometry, tile: Tile):
    """f32[P, K] -> f32[B, K, C]: what a block of a row takes stands together, and is finite.

    Tokens of no live page, and of pages whose scales nobody has set, have the scale 0.
    """
    if scales is None:
        return None
    slot = jnp.arange(geometry.table_pages, dtype=jnp.int32)[None]
    live = slot * geometry.page_size < lengths[:, None]
    found = scales[jnp.clip(page_indices, 0, geometry.num_pages - 1)]  # [B, M, K]
    found = jnp.where(live[..., None] & jnp.isfinite(found), found, 0.0)
    found = jnp.repeat(found.transpose(0, 2, 1), geometry.page_size // geometry.grain, axis=2)
    grains = tile.block_tokens // geometry.grain
    return jnp.pad(found, ((0, 0), (0, 0), (0, -found.shape[2] % grains)))


def combine(out, top, total):
    """Folds splits: out [T, K, N, G, D], top and total [T, K, N, G], base 2, into the N-less.

    An empty split has top -inf and total 0 and changes nothing, whatever `out` holds there.
    """
    best = top.max(axis=2)
    finite = jnp.where(jnp.isfinite(best), best, 0.0)
    weight = jnp.exp2(top - finite[:, :, None])
    total = jnp.sum(total * weight, axis=2)
    out = jnp.where(weight[..., None] > 0, out, 0.0)
    out = jnp.sum(out * weight[..., None], axis=2)
    return out / jnp.where(total > 0, total, 1.0)[..., None], best / LOG2E, total


class Work(NamedTuple):
    """What a thread block does: queries of one row, and the part of its KV that they look at."""

    row: jax.Array  # i32[], as all of these
    position: jax.Array  # of the first query in the row
    count: jax.Array  # of queries
    first: jax.Array  # key that any query sees, in any split
    last: jax.Array  # key that any query sees, in any split, and one
    start: jax.Array  # key of this split, at least `first`
    end: jax.Array  # of this split, at most `last`
    first_block: jax.Array
    num_blocks: jax.Array


def work_of(q_tile, split, place_ref, window: int | None, geometry: Geometry, tile: Tile) -> Work:
    """The work of a thread block, in a kernel; `place_ref` as in `attend`."""
    row, position, count = (place_ref[i, q_tile] for i in range(3))
    # A query beyond the table would walk off it.
    last = jnp.where(count > 0, jnp.clip(position + count, 0, geometry.table_tokens), 0)
    first = jnp.int32(0) if window is None else jnp.maximum(position + 1 - window, 0)
    start = jnp.maximum(split * tile.split_tokens, first)
    end = jnp.minimum((split + 1) * tile.split_tokens, last)
    first_block = lax.div(start, tile.block_tokens)
    num_blocks = jnp.where(start < end, pl.cdiv(end, tile.block_tokens) - first_block, 0)
    return Work(row, position, count, first, last, start, end, first_block, num_blocks)


def seen_keys(lines: Callable, work: Work, window: int | None, geometry: Geometry):
    """The first key that the query of each line sees of this split, and one beyond its last.

    `lines` makes i32[lines], each line's number; where a tile holds one query, all see the same,
    and the keys are scalars.
    """
    if geometry.tile_queries == 1:
        return work.start, work.end
    query = work.position + lax.div(lines(), jnp.int32(geometry.group_rows))
    first = work.start if window is None else jnp.maximum(work.start, query + 1 - window)
    return first, jnp.minimum(work.end, query + 1)


def mask(s, key, first, end):
    """Scores [lines, tokens], -inf where a line's query does not look.

    `key` is i32[lines, tokens], each column's key; `first` and `end` as from `seen_keys`, counted
    like `key`.
    """

    def of_line(bound):
        return bound if bound.ndim == 0 else lax.broadcast_in_dim(bound, s.shape, [0])

    return jnp.where((key >= of_line(first)) & (key < of_line(end)), s, -jnp.inf)
