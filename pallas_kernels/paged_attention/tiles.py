"""A ragged step's queries, packed into tiles of one row each for a kernel, and back.

A tile is up to `Q` consecutive queries of one row with all query heads of one KV head: `Q * G`
lines of one matrix product. Tiles begin at the row's first query of the step, so no tile is shared
by two rows, and a kernel may write whole tiles.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class QueryTiles(NamedTuple):
    """Which queries stand in which tile; `n` tiles, of which those without queries come last."""

    rows: jax.Array  # i32[n]     the row of the tile, 0 for a tile without queries
    positions: jax.Array  # i32[n]     where its first query stands in the row
    counts: jax.Array  # i32[n]     queries in it
    tokens: jax.Array  # i32[n, Q]  the step's token in each place, T for none
    places: jax.Array  # i32[T]     the place of each token, tile * Q + slot; n * Q for padding


def tiles_of_decode(lengths: jax.Array) -> QueryTiles:
    """One tile for each row, with its one query; an empty row's has none."""
    token = jnp.arange(lengths.shape[0], dtype=jnp.int32)
    return QueryTiles(
        rows=token,
        positions=lengths - 1,
        counts=(lengths > 0).astype(jnp.int32),
        tokens=token[:, None],
        places=token,
    )


def tiles_of_ragged(
    lengths: jax.Array, cu_q_lens: jax.Array, num_tokens: int, tile_queries: int, num_tiles: int
) -> QueryTiles:
    """Tiles of `tile_queries` queries for rows with any number of queries.

    `num_tokens` is T, padding included; `num_tiles` must hold the sum of the rows' tiles.
    """
    (num_rows,) = lengths.shape
    q_lens = jnp.diff(cu_q_lens)
    ends = jnp.cumsum(-(-q_lens // tile_queries))
    starts = jnp.concatenate([jnp.zeros((1,), jnp.int32), ends[:-1]])

    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    row = _num_ends_by(ends, num_tiles)
    is_used = row < num_rows
    row = jnp.where(is_used, row, 0)
    first = (tile - starts[row]) * tile_queries
    count = jnp.where(is_used, jnp.minimum(q_lens[row] - first, tile_queries), 0)
    slot = jnp.arange(tile_queries, dtype=jnp.int32)[None]
    token = (cu_q_lens[row] + first)[:, None] + slot

    index = jnp.arange(num_tokens, dtype=jnp.int32)
    owner = _num_ends_by(cu_q_lens[1:], num_tokens)
    at = index - cu_q_lens.at[owner].get(mode="clip")
    place = starts.at[owner].get(mode="clip") * tile_queries + at
    return QueryTiles(
        rows=row,
        positions=lengths[row] - q_lens[row] + first,
        counts=count,
        tokens=jnp.where(slot < count[:, None], token, num_tokens),
        places=jnp.where(owner < num_rows, place, num_tiles * tile_queries).astype(jnp.int32),
    )


def _num_ends_by(ends: jax.Array, num: int) -> jax.Array:
    """How many of the ascending `ends` are at most i, for i below `num`: i32[num].

    A search that compares all with all would be the same, but XLA leaves it in a loop over layers.
    """
    counts = jnp.zeros((num,), jnp.int32).at[ends].add(1, mode="drop")
    return jnp.cumsum(counts)


def pack(q: jax.Array, tiles: QueryTiles, num_kv_heads: int, group_rows: int) -> jax.Array:
    """q [T, H, D] -> [n, K, Q * group_rows, D]; lines without a query or a head are zeros."""
    num_tiles, tile_queries = tiles.tokens.shape
    num_tokens, num_heads, head_dim = q.shape
    group = num_heads // num_kv_heads
    q = q.reshape(num_tokens, num_kv_heads, group, head_dim)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, group_rows - group), (0, 0)))
    q = q.at[tiles.tokens].get(mode="fill", fill_value=0)
    q = q.transpose(0, 2, 1, 3, 4)
    return q.reshape(num_tiles, num_kv_heads, tile_queries * group_rows, head_dim)


def unpack(partials: jax.Array, tiles: QueryTiles, group: int, fill_value: float) -> jax.Array:
    """partials [n, K, N, Q * group_rows, ..] -> [T, K, N, G, ..], `fill_value` for padding."""
    tile_queries = tiles.tokens.shape[1]
    num_tiles, num_kv_heads, num_splits, _, *rest = partials.shape
    partials = partials.reshape(num_tiles, num_kv_heads, num_splits, tile_queries, -1, *rest)
    tile, slot = jnp.divmod(tiles.places, tile_queries)
    return partials.at[tile, :, :, slot, :group].get(mode="fill", fill_value=fill_value)
