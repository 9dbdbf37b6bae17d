"""Paged attention in plain XLA: loops whose trip counts follow the live lengths.

Rows with one query go through `_decode`, rows with more through `_prefill`; a loop without rows
makes no trip. Both fold fixed KV chunks into an online softmax in ascending order, in float32, and
every product has a fixed shape, so that a row's bits depend on that row alone. Only the pages of
the chunk at hand are gathered: the pool is never copied.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# KV tokens folded at a time, rounded to whole pages, and queries in one product.
DECODE_CHUNK = 128
ROWS_PER_GROUP = 8
PREFILL_CHUNK = 64
TILE_TOKENS = 64
LOWEST = float(jnp.finfo(jnp.float32).min)


class Softmax(NamedTuple):
    """A softmax under way: `out` is not yet divided by `sum`."""

    max: jax.Array  # f32[..]     largest score so far
    sum: jax.Array  # f32[..]     sum of exp(score - max)
    out: jax.Array  # f32[.., D]  sum of exp(score - max) * value


class Cache(NamedTuple):
    """The paged KV cache as one call sees it."""

    k_pages: jax.Array  # [P, K, S, D]
    v_pages: jax.Array  # [P, K, S, D]
    page_indices: jax.Array  # i32[B, M]
    k_scales: jax.Array | None  # f32[P, K]
    v_scales: jax.Array | None  # f32[P, K]

    def pages_in(self, num_tokens: int) -> int:
        """Whole pages in a chunk of about `num_tokens`."""
        return max(1, num_tokens // self.k_pages.shape[2])


class Options(NamedTuple):
    sm_scale: float
    soft_cap: float | None
    window: int | None


def attend(
    q, k_pages, v_pages, lengths, page_indices, cu_q_lens, *,
    k_scales=None, v_scales=None, sm_scale, soft_cap, window,
):  # fmt: skip
    """The contract of `reference.attend`; `cu_q_lens` None means one query for each row."""
    num_tokens, num_heads, head_dim = q.shape
    cache = Cache(k_pages, v_pages, page_indices, k_scales, v_scales)
    options = Options(sm_scale, soft_cap, window)
    q = q.astype(jnp.float32).reshape(num_tokens, k_pages.shape[1], -1, head_dim) * sm_scale
    if cu_q_lens is None:
        result = _decode(q, cache, lengths, options)
    else:
        result = _ragged(q, cache, lengths, cu_q_lens, options)
    top, total, out = (x.reshape(num_tokens, num_heads, *x.shape[3:]) for x in result)
    out = out / jnp.where(total > 0, total, 1.0)[..., None]
    return out, jnp.where(total > 0, top, -jnp.inf), total


def _ragged(q, cache: Cache, lengths, cu_q_lens, options) -> Softmax:
    """Splits the rows by their number of queries and puts the two results together by token."""
    q_lens = jnp.diff(cu_q_lens)
    first = jnp.minimum(cu_q_lens[:-1], q.shape[0] - 1)
    decoded = _decode(q[first], cache, jnp.where(q_lens == 1, lengths, 0), options)
    prefilled = _prefill(q, cache, lengths, jnp.where(q_lens > 1, q_lens, 0), first, options)

    token = jnp.arange(q.shape[0], dtype=jnp.int32)
    row = jnp.searchsorted(cu_q_lens[1:], token, side="right", method="compare_all")
    is_decode = (row < lengths.shape[0]) & (q_lens.at[row].get(mode="clip") == 1)

    def choose(d, p):
        mask = lax.broadcast_in_dim(is_decode, p.shape, (0,))
        return jnp.where(mask, d.at[row].get(mode="clip"), p)

    return jax.tree.map(choose, decoded, prefilled)


def _decode(q, cache: Cache, lengths, options: Options) -> Softmax:
    """One query per row: q [B, K, G, D] at positions lengths - 1. Empty rows cost nothing.

    With the rows sorted by their number of chunks, those that have a j-th chunk are a prefix. The
    loop goes over chunks j and, within, over the groups of rows of that prefix.
    """
    chunk_pages = cache.pages_in(DECODE_CHUNK)
    chunk = chunk_pages * cache.k_pages.shape[2]
    num_rows = -(-q.shape[0] // ROWS_PER_GROUP) * ROWS_PER_GROUP
    lengths = jnp.pad(lengths, (0, num_rows - lengths.shape[0]))
    first = _first_visible(lengths - 1, options)
    num_chunks = jnp.maximum(-(-lengths // chunk) - first // chunk, 0)
    order = jnp.argsort(-num_chunks).astype(jnp.int32)
    sorted_q = q.at[order].get(mode="clip")
    sorted_chunks = jnp.pad(num_chunks[order], (0, 1))

    def body(carry):
        j, start, state = carry
        row = lax.dynamic_slice_in_dim(order, start, ROWS_PER_GROUP)
        q_rows = lax.dynamic_slice_in_dim(sorted_q, start, ROWS_PER_GROUP)
        at = first[row] // chunk + j
        k, v, key_position = _read_chunk(cache, chunk_pages, row, at, first[row], lengths[row])
        live = _visible(lengths[row][:, None] - 1, key_position, options)[:, None, None]
        s = _scores(_product("rkgd,rkcd->rkgc", q_rows, k), live, options)
        old = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, ROWS_PER_GROUP), state)
        new = _fold(old, s, v, "rkgc,rkcd->rkgd")
        write = functools.partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        state = jax.tree.map(write, state, new)
        start += ROWS_PER_GROUP
        is_last = sorted_chunks[start] <= j
        return jnp.where(is_last, j + 1, j), jnp.where(is_last, 0, start), state

    zero = jnp.int32(0)
    _, _, state = lax.while_loop(
        lambda carry: carry[0] < sorted_chunks[0], body, (zero, zero, _start(sorted_q.shape))
    )
    place = jnp.argsort(order)[: q.shape[0]]
    return jax.tree.map(lambda x: x[place], state)


def _prefill(q, cache: Cache, lengths, q_lens, first_token, options: Options) -> Softmax:
    """Many queries per row: q [T, K, G, D], row b's from first_token[b] on. Others cost nothing.

    Tile i of a row is its positions [i * TILE, (i + 1) * TILE), wherever the step starts: a token
    takes the same place in the same product however the prompt is cut.
    """
    num_tokens, num_kv_heads, group, head_dim = q.shape
    starts = lengths - q_lens
    first_tile = starts // TILE_TOKENS
    num_tiles = jnp.where(q_lens > 0, -(-lengths // TILE_TOKENS) - first_tile, 0)
    ends = jnp.cumsum(num_tiles)
    padded = (num_tokens + 2 * TILE_TOKENS, num_kv_heads, group, head_dim)
    q = lax.dynamic_update_slice_in_dim(jnp.zeros(padded, jnp.float32), q, TILE_TOKENS, 0)

    def body(tile, state):
        row = jnp.searchsorted(ends, tile, side="right", method="compare_all").astype(jnp.int32)
        tile_start = (first_tile[row] + tile - (ends[row] - num_tiles[row])) * TILE_TOKENS
        position = tile_start + jnp.arange(TILE_TOKENS, dtype=jnp.int32)
        at = TILE_TOKENS + first_token[row] + tile_start - starts[row]
        q_tile = lax.dynamic_slice_in_dim(q, at, TILE_TOKENS).transpose(1, 0, 2, 3)
        first = _first_visible(jnp.maximum(tile_start, starts[row]), options)
        new = _attend_tile(q_tile, cache, row, position, first, lengths[row], options)
        is_ours = (position >= starts[row]) & (position < lengths[row])

        def write(x, x_new):
            x_new = jnp.swapaxes(x_new, 0, 1)
            mask = lax.broadcast_in_dim(is_ours, x_new.shape, (0,))
            x_new = jnp.where(mask, x_new, lax.dynamic_slice_in_dim(x, at, TILE_TOKENS))
            return lax.dynamic_update_slice_in_dim(x, x_new, at, 0)

        return jax.tree.map(write, state, new)

    state = lax.fori_loop(0, ends[-1], body, _start(padded))
    return jax.tree.map(lambda x: x[TILE_TOKENS:-TILE_TOKENS], state)


def _attend_tile(q_tile, cache: Cache, row, position, first, end, options: Options) -> Softmax:
    """One row's query tile [K, TILE, G, D] at `position` i32[TILE] against KV [first, end)."""
    num_kv_heads, num_queries, group, head_dim = q_tile.shape
    flat = q_tile.reshape(num_kv_heads, num_queries * group, head_dim)
    chunk_pages = cache.pages_in(PREFILL_CHUNK)
    chunk = chunk_pages * cache.k_pages.shape[2]
    end = jnp.minimum(position[-1] + 1, end)

    def body(j, state):
        where = row[None], j[None], first[None], end[None]
        k, v, key_position = _read_chunk(cache, chunk_pages, *where)
        live = _visible(position[:, None], key_position, options)  # [TILE, C]
        live = jnp.repeat(live, group, axis=0)[None]
        s = _scores(_product("kqd,kcd->kqc", flat, k[0]), live, options)
        return _fold(state, s, v[0], "kqc,kcd->kqd")

    state = lax.fori_loop(first // chunk, -(-end // chunk), body, _start(flat.shape))
    return jax.tree.map(lambda x: x.reshape(num_kv_heads, num_queries, group, *x.shape[2:]), state)


def _read_chunk(cache: Cache, chunk_pages: int, row, chunk, first, end):
    """KV chunk `chunk` i32[R] of each row i32[R]: K and V f32[R, K, C, D], positions i32[R, C].

    A chunk is `chunk_pages` pages. Whatever is outside [first, end), both i32[R], reads as zero,
    from page 0.
    """
    num_pages, num_kv_heads, page_size, head_dim = cache.k_pages.shape
    slot = jnp.arange(chunk_pages, dtype=jnp.int32)[None] + chunk[:, None] * chunk_pages
    position = slot[:, :, None] * page_size + jnp.arange(page_size, dtype=jnp.int32)[None, None]
    live = (position >= first[:, None, None]) & (position < end[:, None, None])  # [R, pages, S]
    page = cache.page_indices.at[row[:, None], slot].get(mode="clip")
    page = jnp.where(live.any(axis=2), jnp.clip(page, 0, num_pages - 1), 0)
    head = jnp.arange(num_kv_heads, dtype=jnp.int32)
    index = page[:, None, :] * num_kv_heads + head[None, :, None]  # [R, K, pages]
    mask = -live.astype(jnp.int32)[:, None, :, :, None]  # all ones in binary, or zero
    index, mask = lax.optimization_barrier((index, mask))  # or the copy computes them per element

    def read(pages, scales):
        pieces = pages.reshape(-1, page_size, head_dim)
        pieces = pieces.at[index].get(mode="promise_in_bounds").astype(jnp.float32)
        if scales is not None:
            pieces *= scales.reshape(-1)[index][..., None, None]
        # A select would be a branch for each run of D, at three times the cost of this `and`.
        pieces = lax.bitcast_convert_type(pieces, jnp.int32) & mask
        pieces = lax.bitcast_convert_type(pieces, jnp.float32)
        return pieces.reshape(row.shape[0], num_kv_heads, chunk_pages * page_size, head_dim)

    keys, values = read(cache.k_pages, cache.k_scales), read(cache.v_pages, cache.v_scales)
    return keys, values, position.reshape(row.shape[0], -1)


def _first_visible(position, options: Options):
    """The first key position that the query at `position` may see."""
    if options.window is None:
        return jnp.zeros_like(position)
    return jnp.maximum(position - options.window + 1, 0)


def _visible(position, key_position, options: Options):
    """Whether the query at `position` may see `key_position`."""
    return (key_position <= position) & (key_position >= _first_visible(position, options))


def _scores(products, live, options: Options):
    """Scaled products -> capped scores, -inf where not `live`."""
    if options.soft_cap is not None:
        products = options.soft_cap * jnp.tanh(products / options.soft_cap)
    return jnp.where(live, products, -jnp.inf)


def _product(subscripts: str, a, b):
    return jnp.einsum(subscripts, a, b, precision="highest")  # a GPU would take tf32


def _start(shape) -> Softmax:
    """The softmax over nothing for queries of `shape` [.., D]; a finite max keeps exp sane."""
    zeros = jnp.zeros(shape[:-1], jnp.float32)
    return Softmax(zeros + LOWEST, zeros, jnp.zeros(shape, jnp.float32))


def _fold(state: Softmax, s, v, subscripts: str) -> Softmax:
    """Adds one chunk with scores `s` [.., C] and values `v`; all -inf scores change nothing."""
    # Fused with what stands around it, the fold would round by the number of rows of the call.
    state, s = lax.optimization_barrier((state, s))
    top = jnp.maximum(state.max, s.max(axis=-1))
    p = jnp.exp(s - top[..., None])
    decay = jnp.exp(state.max - top)
    out = state.out * decay[..., None] + _product(subscripts, p, v)
    return lax.optimization_barrier(Softmax(top, state.sum * decay + p.sum(axis=-1), out))
