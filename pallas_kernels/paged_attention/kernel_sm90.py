"""Decode attention over paged KV for Hopper: TMA page copies, wgmma, split KV (Mosaic GPU).

One thread block for each (row, KV head, split). Its producer warpgroup follows the page table and
copies KV, page by page, into a ring in shared memory; its consumer multiplies. The query heads
of the KV head are rows of one tile, so that a KV byte leaves device memory once. Softmax runs in
float32 and base 2. Splits are cut at fixed positions, so that a row's bits depend on that row
alone; `combine` folds them in order.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2E = math.log2(math.e)
HEAD_DIMS = (64, 128)  # those that lower; 80, 96 and 256 pass the interpreter and find no layout
Q_ROWS = 64  # the height of a wgmma tile; query heads beyond the group's compute what nobody reads
SMEM_BYTES = 226 * 1024  # of the 227 KiB that a thread block can have; 1 for barriers
CONSUMER, PRODUCER = 0, 1
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 232, 40


class Tile(NamedTuple):
    """The static shape of a launch."""

    block_tokens: int = 64  # KV tokens in one stage of the ring, a multiple of 64
    stages: int = 4
    split_tokens: int = 1024  # KV tokens of one split, a multiple of `block_tokens`

    def smem_bytes(self, head_dim: int, itemsize: int = 2) -> int:
        """Shared memory of a thread block, barriers and rounding aside."""
        q, p = Q_ROWS * head_dim * itemsize, Q_ROWS * self.block_tokens * itemsize
        ring = 2 * self.stages * self.block_tokens * head_dim * itemsize
        out = Q_ROWS * (head_dim + 2) * 4
        return q + p + ring + out


DEFAULT_TILE = Tile()


class Geometry(NamedTuple):
    """Sizes that the kernel needs, in the letters of `paged_attention`."""

    num_rows: int
    num_pages: int
    num_kv_heads: int
    group_rows: int  # G rounded up to the 8 rows of a shared-memory tile
    head_dim: int
    page_size: int
    table_pages: int  # M
    num_splits: int

    @property
    def table_tokens(self) -> int:
        return self.table_pages * self.page_size


def attend(
    q, k_pages, v_pages, lengths, page_indices, cu_q_lens, *, sm_scale, soft_cap, window,
    tile: Tile = DEFAULT_TILE, interpret=None,
):  # fmt: skip
    """The contract of `reference.attend` for decode, one query a row: `cu_q_lens` must be None.

    q and pages are bfloat16 or float16, alike. Raises as `check_supported` does.
    """
    num_rows, num_heads, head_dim = q.shape
    check_supported(q, k_pages, cu_q_lens, tile)
    num_pages, num_kv_heads, page_size, _ = k_pages.shape
    group = num_heads // num_kv_heads
    table_tokens = page_indices.shape[1] * page_size
    geometry = Geometry(
        num_rows=num_rows,
        num_pages=num_pages,
        num_kv_heads=num_kv_heads,
        group_rows=-(-group // 8) * 8,
        head_dim=head_dim,
        page_size=page_size,
        table_pages=page_indices.shape[1],
        num_splits=-(-table_tokens // tile.split_tokens),
    )
    q = q.reshape(num_rows, num_kv_heads, group, head_dim)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, geometry.group_rows - group), (0, 0)))
    launch = _launcher(geometry, tile, q.dtype, sm_scale, soft_cap, window, interpret)
    out, top, total = launch(q, k_pages, v_pages, lengths, page_indices)
    out, top, total = combine(out[..., :group, :], top[..., :group], total[..., :group])
    return (
        out.reshape(num_rows, num_heads, head_dim),
        top.reshape(num_rows, num_heads),
        total.reshape(num_rows, num_heads),
    )


def check_supported(q, k_pages, cu_q_lens, tile: Tile) -> None:
    """Raises NotImplementedError, with the way out, for what the kernel does not do.

    A `tile` that cannot be launched is a ValueError.
    """
    page_size, head_dim = k_pages.shape[2:]
    other = 'use implementation="xla"'
    if cu_q_lens is not None:
        raise NotImplementedError(f"The Hopper kernel decodes only, without cu_q_lens: {other}.")
    if q.dtype not in (jnp.bfloat16, jnp.float16) or q.dtype != k_pages.dtype:
        raise NotImplementedError(
            f"{q.dtype=} and {k_pages.dtype=} must both be bfloat16 or both float16: {other}."
        )
    if page_size % 8 or max(page_size, tile.block_tokens) % min(page_size, tile.block_tokens):
        raise NotImplementedError(
            f"{page_size=} must be a multiple of 8 that divides {tile.block_tokens} or is a "
            f"multiple of it: {other}."
        )
    if head_dim not in HEAD_DIMS:
        raise NotImplementedError(f"{head_dim=} must be one of {HEAD_DIMS}: {other}.")
    if q.shape[1] // k_pages.shape[1] > Q_ROWS:
        raise NotImplementedError(f"More than {Q_ROWS} query heads share a KV head: {other}.")
    if tile.block_tokens % 64 or tile.split_tokens % tile.block_tokens:
        raise ValueError(
            f"{tile}: block_tokens must be a multiple of 64 and split_tokens one of block_tokens."
        )
    if (needed := tile.smem_bytes(head_dim)) > SMEM_BYTES:
        raise ValueError(
            f"{tile} needs {needed} bytes of shared memory for {head_dim=}, more than "
            f"{SMEM_BYTES}: take fewer stages or smaller blocks."
        )


def combine(out, top, total):
    """Folds splits: out [B, K, N, G, D], top and total [B, K, N, G], base 2, into the N-less.

    An empty split has top -inf and total 0 and changes nothing.
    """
    best = top.max(axis=2)
    finite = jnp.where(jnp.isfinite(best), best, 0.0)
    weight = jnp.exp2(top - finite[:, :, None])
    total = jnp.sum(total * weight, axis=2)
    out = jnp.sum(out * weight[..., None], axis=2)
    return out / jnp.where(total > 0, total, 1.0)[..., None], best / LOG2E, total


@functools.cache
def _launcher(geometry: Geometry, tile: Tile, dtype, sm_scale, soft_cap, window, interpret):
    """The kernel for one geometry: (q, k_pages, v_pages, lengths, page_indices) -> partials."""
    rows, heads, group, dim = (
        geometry.num_rows, geometry.num_kv_heads, geometry.group_rows, geometry.head_dim,
    )  # fmt: skip
    partials = (rows, heads, geometry.num_splits, group)
    copies = max(1, tile.block_tokens // geometry.page_size)
    return plgpu.kernel(
        functools.partial(
            _kernel, geometry=geometry, tile=tile, sm_scale=sm_scale, soft_cap=soft_cap,
            window=window,
        ),
        out_type=(
            jax.ShapeDtypeStruct((*partials, dim), jnp.float32),
            jax.ShapeDtypeStruct(partials, jnp.float32),
            jax.ShapeDtypeStruct(partials, jnp.float32),
        ),
        scratch_types=dict(
            q_smem=plgpu.SMEM((Q_ROWS, dim), dtype, transforms=_transforms(dim, dtype)),
            k_smem=plgpu.SMEM(
                (tile.stages, tile.block_tokens, dim), dtype, transforms=_transforms(dim, dtype)
            ),
            v_smem=plgpu.SMEM(
                (tile.stages, tile.block_tokens, dim), dtype, transforms=_transforms(dim, dtype)
            ),
            p_smem=plgpu.SMEM(
                (Q_ROWS, tile.block_tokens), dtype, transforms=_transforms(tile.block_tokens, dtype)
            ),
            out_smem=plgpu.SMEM(
                (Q_ROWS, dim), jnp.float32, transforms=_transforms(dim, jnp.float32)
            ),
            top_smem=plgpu.SMEM((Q_ROWS,), jnp.float32),
            total_smem=plgpu.SMEM((Q_ROWS,), jnp.float32),
            q_barrier=plgpu.Barrier(),
            k_barriers=plgpu.Barrier(num_arrivals=copies, num_barriers=tile.stages),
            v_barriers=plgpu.Barrier(num_arrivals=copies, num_barriers=tile.stages),
            free_barriers=plgpu.Barrier(num_barriers=tile.stages),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(rows, heads, geometry.num_splits),
        grid_names=("row", "head", "split"),
        num_threads=2,
        thread_name="warpgroup",
        **({} if interpret is None else {"interpret": interpret}),
    )  # fmt: skip


def _transforms(dim: int, dtype):
    """The swizzled layout in which wgmma reads rows of `dim` elements."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(dim * bits)
    # Complete classes, but an optional method of their base is abstract to pyright.
    tiling = plgpu.TilingTransform((8, swizzle * 8 // bits))  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]


def _kernel(
    q_ref, k_ref, v_ref, lengths_ref, table_ref, out_ref, top_ref, total_ref, *,
    q_smem, k_smem, v_smem, p_smem, out_smem, top_smem, total_smem,
    q_barrier, k_barriers, v_barriers, free_barriers,
    geometry: Geometry, tile: Tile, sm_scale, soft_cap, window,
):  # fmt: skip
    row, head, split = (lax.axis_index(name) for name in ("row", "head", "split"))
    # A length beyond the table would walk off it.
    length = jnp.clip(lengths_ref[row], 0, geometry.table_tokens)
    first = jnp.int32(0) if window is None else jnp.maximum(length - window, 0)
    start = jnp.maximum(split * tile.split_tokens, first)
    end = jnp.minimum((split + 1) * tile.split_tokens, length)
    first_block = lax.div(start, tile.block_tokens)
    num_blocks = jnp.where(start < end, pl.cdiv(end, tile.block_tokens) - first_block, 0)

    @pl.when(lax.axis_index("warpgroup") == PRODUCER)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        ours = pl.ds(0, geometry.group_rows)
        plgpu.copy_gmem_to_smem(q_ref.at[row, head], q_smem.at[ours], q_barrier)

        @pl.loop(0, num_blocks)
        def _(step):
            stage = lax.rem(step, tile.stages)

            @pl.when(step >= tile.stages)
            def _():
                plgpu.barrier_wait(free_barriers.at[stage])

            _copy_block(
                (first_block + step) * tile.block_tokens, first, length, (row, head),
                (k_ref, k_smem.at[stage], k_barriers.at[stage]),
                (v_ref, v_smem.at[stage], v_barriers.at[stage]),
                table_ref=table_ref, geometry=geometry, tile=tile,
            )  # fmt: skip

    @pl.when(lax.axis_index("warpgroup") == CONSUMER)
    def _consume():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        plgpu.barrier_wait(q_barrier)

        def fold(step, carry):
            acc, top, total = carry
            stage = lax.rem(step, tile.stages)
            block_start = (first_block + step) * tile.block_tokens
            plgpu.barrier_wait(k_barriers.at[stage])
            s = pl.run_scoped(
                functools.partial(_scores, q_smem=q_smem, k_smem=k_smem.at[stage]),
                plgpu.WGMMAAccumulatorRef((Q_ROWS, tile.block_tokens), jnp.float32),
            )
            s = _cap(s, sm_scale, soft_cap)
            position = block_start + plgpu.broadcasted_iota(
                jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA
            )
            s = jnp.where((position >= start) & (position < end), s, -jnp.inf)
            new_top = jnp.maximum(top, s.max(axis=1))
            decay = jnp.exp2(top - new_top)
            p = jnp.exp2(s - lax.broadcast_in_dim(new_top, s.shape, [0]))
            total = total * decay + p.sum(axis=1)

            plgpu.barrier_wait(v_barriers.at[stage])

            product = _weigh(p, length - block_start, acc.shape, p_smem, v_smem.at[stage])
            plgpu.barrier_arrive(free_barriers.at[stage])
            return acc * lax.broadcast_in_dim(decay, acc.shape, [0]) + product, new_top, total

        carry = _start(geometry.head_dim)
        out_smem[...], top_smem[...], total_smem[...] = lax.fori_loop(0, num_blocks, fold, carry)
        targets = ((out_smem, out_ref), (top_smem, top_ref), (total_smem, total_ref))
        _write(targets, (row, head, split), geometry.group_rows)


def _copy_block(token, first, length, where, keys, values, *, table_ref, geometry, tile):
    """Starts the copies of the block at `token`, page by page, of each (pages, target, barrier)."""
    row, head = where
    rows = min(geometry.page_size, tile.block_tokens)
    for copy in range(tile.block_tokens // rows):
        slot = lax.div(token, geometry.page_size)
        page = table_ref[row, jnp.minimum(slot, geometry.table_pages - 1)]
        # Where no query may look, page P: beyond the pool, a copy writes zeros and reads nothing.
        live = (token < length) & ((slot + 1) * geometry.page_size > first)
        page = jnp.where(live, page, geometry.num_pages)
        inside = pl.ds(lax.rem(token, geometry.page_size), rows)
        for pages, target, barrier in (keys, values):
            plgpu.copy_gmem_to_smem(
                pages.at[page, head, inside], target.at[pl.ds(copy * rows, rows)], barrier
            )
        token += rows


def _write(targets, where, group_rows):
    """Copies the query heads' rows of each (shared, device) pair out."""
    plgpu.commit_smem()
    for smem, ref in targets:
        plgpu.copy_smem_to_gmem(smem.at[pl.ds(0, group_rows)], ref.at[where])
    plgpu.wait_smem_to_gmem(0)


def _cap(products, sm_scale, soft_cap):
    """Scores in base 2."""
    if soft_cap is None:
        return products * (sm_scale * LOG2E)
    return (soft_cap * LOG2E) * jnp.tanh(products * (sm_scale / soft_cap))


def _start(head_dim: int):
    """The softmax over nothing: weighted values, largest score, sum of weights."""

    def full(value, shape, layout):
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    return (
        full(0.0, (Q_ROWS, head_dim), plgpu.Layout.WGMMA),
        full(-jnp.inf, (Q_ROWS,), plgpu.Layout.WGMMA.reduce(1)),
        full(0.0, (Q_ROWS,), plgpu.Layout.WGMMA.reduce(1)),
    )


def _scores(acc_ref, q_smem, k_smem):
    plgpu.wgmma(acc_ref, q_smem, k_smem.transpose((1, 0)))
    return acc_ref[...]


def _product(acc_ref, p_smem, v_smem):
    plgpu.wgmma(acc_ref, p_smem, v_smem)
    return acc_ref[...]


def _weigh(p, num_live, out_shape, p_smem, v_smem):
    """Probabilities [Q_ROWS, tokens] times values, of which the first `num_live` rows are live."""

    @pl.when(num_live < p.shape[1])
    def _():  # 0 * NaN is NaN: what lies in dead slots of the last page must not be read
        _zero_rows_from(v_smem, num_live)

    # By way of shared memory, and into an accumulator of its own: the interpreter, and so the race
    # detector, knows no product from registers and none that goes on in an old accumulator.
    p_smem[...] = p.astype(p_smem.dtype)
    plgpu.commit_smem()
    return pl.run_scoped(
        functools.partial(_product, p_smem=p_smem, v_smem=v_smem),
        plgpu.WGMMAAccumulatorRef(out_shape, jnp.float32),
    )


def _zero_rows_from(smem, first_dead):
    """Zeroes rows `first_dead` and on of a [tokens, D] tile."""
    values = plgpu.load(smem, layout=plgpu.Layout.WGMMA)
    row = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=plgpu.Layout.WGMMA)
    smem[...] = jnp.where(row < first_dead, values, jnp.zeros_like(values))
    plgpu.commit_smem()
