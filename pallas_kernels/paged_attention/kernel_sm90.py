"""Attention over paged KV for Hopper: TMA page copies, wgmma, split KV (Mosaic GPU).

One thread block for each (tile of queries, KV head, split). Its producer warpgroup follows the page
table and copies KV, page by page, into a ring in shared memory; its consumer multiplies. A tile
holds queries of one row, one for decode, with all query heads of the KV head, so that a KV byte
leaves device memory once for all of them. Softmax runs in float32 and base 2. Splits are cut at
fixed positions and folded in order: see `split_kv`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention import split_kv
from pallas_kernels.paged_attention.config import (
    Q_LINES,
    Geometry,
    Tile,
    check_sm90,
    geometry_of,
)
from pallas_kernels.paged_attention.split_kv import LOG2E, Work

DEFAULT_TILE = Tile()
THREADS = 256  # of a thread block: one warpgroup copies, one multiplies
CONSUMER, PRODUCER = 0, 1
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 232, 40


def attend(
    q, k_pages, v_pages, lengths, page_indices, cu_q_lens, *, k_scales=None, v_scales=None,
    sm_scale, soft_cap, window, tile: Tile = DEFAULT_TILE, interpret=None,
):  # fmt: skip
    """The contract of `reference.attend`; `cu_q_lens` None means one query for each row.

    q and pages are bfloat16 or float16, alike. Raises as `config.check_sm90` does.
    """
    geometry = check(q, k_pages, page_indices, is_ragged=cu_q_lens is not None, tile=tile)
    launch = _launcher(geometry, tile, q.dtype, sm_scale, soft_cap, window, interpret)
    return split_kv.attend(launch, geometry, q, k_pages, v_pages, lengths, page_indices, cu_q_lens)


def check(q, k_pages, page_indices, *, is_ragged: bool, tile: Tile = DEFAULT_TILE) -> Geometry:
    """The geometry of a call with arrays of these shapes; raises as `config.check_sm90` does."""
    check_sm90(q, k_pages, tile)
    return geometry_of(q, k_pages, page_indices, is_ragged=is_ragged, tile=tile)


@functools.cache
def _launcher(geometry: Geometry, tile: Tile, dtype, sm_scale, soft_cap, window, interpret):
    """The kernel for one geometry, a launch for `split_kv.attend`."""
    heads, dim, block = geometry.num_kv_heads, geometry.head_dim, tile.block_tokens
    partials = (geometry.num_tiles, heads, geometry.num_splits, geometry.tile_lines)
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
            q_smem=plgpu.SMEM((Q_LINES, dim), dtype, transforms=_transforms(dim, dtype)),
            k_smem=plgpu.SMEM(
                (tile.stages, block, dim), dtype, transforms=_transforms(dim, dtype)
            ),
            v_smem=plgpu.SMEM(
                (tile.stages, block, dim), dtype, transforms=_transforms(dim, dtype)
            ),
            # In the layout of V, not in its own: wgmma takes both operands swizzled alike.
            p_smem=plgpu.SMEM((Q_LINES, block), dtype, transforms=_transforms(dim, dtype)),
            out_smem=plgpu.SMEM(
                (Q_LINES, dim), jnp.float32, transforms=_transforms(dim, jnp.float32)
            ),
            top_smem=plgpu.SMEM((Q_LINES,), jnp.float32),
            total_smem=plgpu.SMEM((Q_LINES,), jnp.float32),
            q_barrier=plgpu.Barrier(),
            k_barriers=plgpu.Barrier(num_arrivals=copies, num_barriers=tile.stages),
            v_barriers=plgpu.Barrier(num_arrivals=copies, num_barriers=tile.stages),
            free_barriers=plgpu.Barrier(num_barriers=tile.stages),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(geometry.num_tiles, heads, geometry.num_splits),
        grid_names=("tile", "head", "split"),
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
    q_ref, k_ref, v_ref, place_ref, table_ref, out_ref, top_ref, total_ref, *,
    q_smem, k_smem, v_smem, p_smem, out_smem, top_smem, total_smem,
    q_barrier, k_barriers, v_barriers, free_barriers,
    geometry: Geometry, tile: Tile, sm_scale, soft_cap, window,
):  # fmt: skip
    q_tile, head, split = (lax.axis_index(name) for name in ("tile", "head", "split"))
    work = split_kv.work_of(q_tile, split, place_ref, window, geometry, tile)

    @pl.when(lax.axis_index("warpgroup") == PRODUCER)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        ours = pl.ds(0, geometry.tile_lines)
        plgpu.copy_gmem_to_smem(q_ref.at[q_tile, head], q_smem.at[ours], q_barrier)

        @pl.loop(0, work.num_blocks)
        def _(step):
            stage = lax.rem(step, tile.stages)

            @pl.when(step >= tile.stages)
            def _():
                plgpu.barrier_wait(free_barriers.at[stage])

            _copy_block(
                (work.first_block + step) * tile.block_tokens, work, head,
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
            block_start = (work.first_block + step) * tile.block_tokens
            plgpu.barrier_wait(k_barriers.at[stage])
            s = pl.run_scoped(
                functools.partial(_scores, q_smem=q_smem, k_smem=k_smem.at[stage]),
                plgpu.WGMMAAccumulatorRef((Q_LINES, tile.block_tokens), jnp.float32),
            )
            s = _cap(s, sm_scale, soft_cap)
            seen = _seen(s.shape, block_start, work, window, geometry)
            s = jnp.where(seen, s, -jnp.inf)
            new_top = jnp.maximum(top, s.max(axis=1))
            # A query that sees none of the blocks so far has no largest score yet.
            base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
            decay = jnp.exp2(top - base)
            p = jnp.exp2(s - lax.broadcast_in_dim(base, s.shape, [0]))
            total = total * decay + p.sum(axis=1)

            plgpu.barrier_wait(v_barriers.at[stage])
            product = _weigh(p, work.last - block_start, acc.shape, p_smem, v_smem.at[stage])
            plgpu.barrier_arrive(free_barriers.at[stage])
            return acc * lax.broadcast_in_dim(decay, acc.shape, [0]) + product, new_top, total

        carry = _start(geometry.head_dim)
        out_smem[...], top_smem[...], total_smem[...] = lax.fori_loop(
            0, work.num_blocks, fold, carry
        )
        targets = ((out_smem, out_ref), (top_smem, top_ref), (total_smem, total_ref))
        _write(targets, (q_tile, head, split), work.count, geometry)


def _seen(shape, block_start, work: Work, window, geometry: Geometry):
    """Which keys of the block at `block_start` each line's query sees of this split."""

    def iota(axis):
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)

    key = block_start + iota(1)
    seen = (key >= work.start) & (key < work.end)
    if geometry.tile_queries > 1:
        query = work.position + lax.div(iota(0), jnp.int32(geometry.group_rows))
        seen &= key <= query
        if window is not None:
            seen &= key > query - window
    return seen


def _copy_block(token, work: Work, head, keys, values, *, table_ref, geometry, tile):
    """Starts the copies of the block at `token`, page by page, of each (pages, target, barrier)."""
    rows = min(geometry.page_size, tile.block_tokens)
    for copy in range(tile.block_tokens // rows):
        slot = lax.div(token, geometry.page_size)
        page = table_ref[work.row, jnp.minimum(slot, geometry.table_pages - 1)]
        # Where no query may look, page P: beyond the pool, a copy writes zeros and reads nothing.
        live = (token < work.last) & ((slot + 1) * geometry.page_size > work.first)
        page = jnp.where(live, page, geometry.num_pages)
        inside = pl.ds(lax.rem(token, geometry.page_size), rows)
        for pages, target, barrier in (keys, values):
            plgpu.copy_gmem_to_smem(
                pages.at[page, head, inside], target.at[pl.ds(copy * rows, rows)], barrier
            )
        token += rows


def _write(targets, where, count, geometry: Geometry):
    """Copies the lines that hold queries of each (shared, device) pair out."""
    plgpu.commit_smem()

    def copy(lines: int):
        for smem, ref in targets:
            target = ref.at[where]
            plgpu.copy_smem_to_gmem(smem.at[pl.ds(0, lines)], target.at[pl.ds(0, lines)])

    if geometry.tile_queries == 1:
        copy(geometry.tile_lines)
    else:  # a row that decodes among prompts writes no more than it must
        pl.when(count == 1)(lambda: copy(geometry.group_rows))
        pl.when(count > 1)(lambda: copy(geometry.tile_lines))
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
        full(0.0, (Q_LINES, head_dim), plgpu.Layout.WGMMA),
        full(-jnp.inf, (Q_LINES,), plgpu.Layout.WGMMA.reduce(1)),
        full(0.0, (Q_LINES,), plgpu.Layout.WGMMA.reduce(1)),
    )


def _scores(acc_ref, q_smem, k_smem):
    plgpu.wgmma(acc_ref, q_smem, k_smem.transpose((1, 0)))
    return acc_ref[...]


def _product(acc_ref, p_smem, v_smem):
    plgpu.wgmma(acc_ref, p_smem, v_smem)
    return acc_ref[...]


def _weigh(p, num_live, out_shape, p_smem, v_smem):
    """Probabilities [Q_LINES, tokens] times values, of which the first `num_live` rows are live."""

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
