"""Attention over paged KV for Hopper: TMA page copies, wgmma, split KV (Mosaic GPU).

One thread block for each (tile of queries, KV head, split). Its producer warpgroup follows the page
table and copies KV, page by page, into a ring in shared memory; its consumer multiplies. A tile
holds queries of one row, one for decode, with all query heads of the KV head, so that a KV byte
leaves device memory once for all of them. Two consumers share values of 256 columns, each with the
scores of all keys: registers hold no two products of 256. Softmax runs in float32 and base 2.
Splits are cut at fixed positions and folded in order: see `split_kv`.

Quantised pages stay so in device memory and in the ring. The consumer widens a block, exactly, to
the numbers that wgmma takes; the scale of a key's page multiplies its scores, the scale of a
value's page its probabilities, which are rounded once, after it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention import split_kv, tuning
from pallas_kernels.paged_attention.config import (
    Q_LINES,
    SM90_SMEM_BYTES,
    WIDEST,
    Geometry,
    Tile,
    check_sm90,
    geometry_of,
)
from pallas_kernels.paged_attention.split_kv import LOG2E, Work

WARPGROUP = 128  # threads; one warpgroup copies, the others multiply
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 232, 40
WIDENED_COLUMNS = 64  # of 8 bits at a time: more would take too many registers
SCALE_BYTES = 128  # a TMA copy's target in shared memory begins at a multiple of it


class Ring(NamedTuple):
    """Keys or values on their way: references into shared memory, and barriers."""

    pages: Any  # [stages, tokens, D], as in device memory
    arrived: Any  # a barrier for each stage
    scales: Any = None  # f32[stages, ..], one for each `grain` tokens, of quantised pages
    wide: Any = None  # [consumers, tokens, columns], where quantised ones are widened

    def block(self, stage, columns: slice, consumer: int, num_live=None):
        """Columns of a stage's tokens as wgmma takes them; tokens from `num_live` on are zeros."""
        block = self.pages.at[stage, :, columns]
        if self.wide is not None:
            _widen(block, self.wide.at[consumer], num_live)
            return self.wide.at[consumer]
        if num_live is not None:
            # 0 * NaN is NaN: what lies in dead slots of the last page must not be read.
            pl.when(num_live < block.shape[0])(lambda: _zero_rows_from(block, num_live))
        return block


def threads_of(geometry: Geometry) -> int:
    """Threads of a thread block."""
    return WARPGROUP * (len(_columns(geometry.head_dim)) + 1)


def attend(
    q, k_pages, v_pages, lengths, page_indices, cu_q_lens, *, k_scales=None, v_scales=None,
    sm_scale, soft_cap, window, tile: Tile | None = None, interpret=None,
):  # fmt: skip
    """The contract of `reference.attend`; `cu_q_lens` None means one query for each row.

    q is bfloat16 or float16, pages alike or quantised. Raises as `config.check_sm90` does.
    """
    tile = tile_of(q, k_pages) if tile is None else tile
    geometry = check(q, k_pages, page_indices, is_ragged=cu_q_lens is not None, tile=tile)
    types = q.dtype, k_pages.dtype
    launch = _launcher(geometry, tile, types, sm_scale, soft_cap, window, interpret)
    keys, values = (k_pages, k_scales), (v_pages, v_scales)
    return split_kv.attend(
        launch, geometry, tile, q, keys, values, lengths, page_indices, cu_q_lens
    )


def tile_of(q, k_pages) -> Tile:
    """The tile that a call with arrays of these shapes takes unless it names one."""
    return tuning.tuned_tile(__name__, q, k_pages) or heuristic_tile(q, k_pages)


def heuristic_tile(q, k_pages) -> Tile:
    """As many stages as shared memory holds, up to 4."""
    head_dim, itemsize = q.shape[2], k_pages.dtype.itemsize
    tiles = (Tile(stages=stages) for stages in (4, 3, 2))
    fitting = (t for t in tiles if t.sm90_bytes(head_dim, itemsize) <= SM90_SMEM_BYTES)
    return next(fitting, Tile())


def check(q, k_pages, page_indices, *, is_ragged: bool, tile: Tile | None = None) -> Geometry:
    """The geometry of a call with arrays of these shapes; raises as `config.check_sm90` does."""
    tile = tile_of(q, k_pages) if tile is None else tile
    check_sm90(q, k_pages, tile)
    return geometry_of(q, k_pages, page_indices, is_ragged=is_ragged, tile=tile)


@functools.cache
def _launcher(geometry: Geometry, tile: Tile, types, sm_scale, soft_cap, window, interpret):
    """The kernel for one geometry and the dtypes of q and pages, a launch for `split_kv.attend`."""
    q_type, pages_type = types
    is_quantised = q_type != pages_type
    heads, dim, block = geometry.num_kv_heads, geometry.head_dim, tile.block_tokens
    consumers = len(_columns(dim))
    partials = (geometry.num_tiles, heads, geometry.num_splits, geometry.tile_lines)
    copies = max(1, block // geometry.page_size) + is_quantised
    # Probabilities times scales can be smaller than float16 goes, and 8-bit values are exact here.
    value_type = jnp.dtype(jnp.bfloat16) if is_quantised else q_type

    def smem(shape, dtype):
        return plgpu.SMEM(shape, dtype, transforms=_transforms(shape[-1], dtype))

    def ring(wide_type):
        scales = -(-block // geometry.grain * 4 // SCALE_BYTES) * SCALE_BYTES // 4
        return Ring(
            smem((tile.stages, block, dim), pages_type),
            plgpu.Barrier(num_arrivals=copies, num_barriers=tile.stages),
            plgpu.SMEM((tile.stages, scales), jnp.float32) if is_quantised else None,
            smem((consumers, block, dim // consumers), wide_type) if is_quantised else None,
        )

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
            q_smem=smem((Q_LINES, dim), q_type),
            keys=ring(q_type),
            values=ring(value_type),
            # In the layout of V, not in its own: wgmma takes both operands swizzled alike.
            p_smem=plgpu.SMEM(
                (consumers, Q_LINES, block), value_type, transforms=_transforms(dim, q_type)
            ),
            out_smem=smem((Q_LINES, dim // consumers), jnp.float32),
            top_smem=plgpu.SMEM((Q_LINES,), jnp.float32),
            total_smem=plgpu.SMEM((Q_LINES,), jnp.float32),
            q_barrier=plgpu.Barrier(),
            free_barriers=plgpu.Barrier(num_arrivals=consumers, num_barriers=tile.stages),
            turn_barriers=plgpu.Barrier(num_barriers=consumers),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(geometry.num_tiles, heads, geometry.num_splits),
        grid_names=("tile", "head", "split"),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        **({} if interpret is None else {"interpret": interpret}),
    )  # fmt: skip


def _transforms(dim: int, dtype):
    """The swizzled layout in which wgmma reads rows of `dim` elements.

    8-bit rows, which are widened first, stand in pieces of what is widened at a time.
    """
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(dim * itemsize * 8)
    if itemsize == 1:
        swizzle = min(swizzle, WIDENED_COLUMNS)
    if swizzle == 16:  # Mosaic has none, and widening does without
        return ()
    # Complete classes, but an optional method of their base is abstract to pyright.
    tiling = plgpu.TilingTransform((8, swizzle // itemsize))  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]


def _kernel(
    q_ref, k_ref, v_ref, place_ref, table_ref, out_ref, top_ref, total_ref, *,
    q_smem, keys: Ring, values: Ring, p_smem, out_smem, top_smem, total_smem,
    q_barrier, free_barriers, turn_barriers, geometry: Geometry, tile: Tile, **options,
):  # fmt: skip
    q_tile, head, split = (lax.axis_index(name) for name in ("tile", "head", "split"))
    work = split_kv.work_of(q_tile, split, place_ref, options["window"], geometry, tile)
    columns = _columns(geometry.head_dim)

    def produce():
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
                (work.first_block + step) * tile.block_tokens, work, head, stage,
                ((k_ref, keys), (v_ref, values)),
                table_ref=table_ref, geometry=geometry, tile=tile,
            )  # fmt: skip

    def consume(consumer: int):
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        plgpu.barrier_wait(q_barrier)
        acc, top, total = _attend(
            work, consumer, q_smem, keys, values, p_smem.at[consumer], free_barriers,
            geometry, tile, **options,
        )  # fmt: skip
        if consumer > 0:  # all write by way of the same shared memory
            plgpu.barrier_wait(turn_barriers.at[consumer])
        out_smem[...] = acc
        where = (q_tile, head, split)
        targets = ((out_smem, out_ref.at[(*where, slice(None), columns[consumer])]),)
        if consumer == 0:
            top_smem[...], total_smem[...] = top, total
            targets += ((top_smem, top_ref.at[where]), (total_smem, total_ref.at[where]))
        _write(targets, work.count, geometry)
        if consumer + 1 < len(columns):
            plgpu.barrier_arrive(turn_barriers.at[consumer + 1])

    def write_nothing():  # of no weight: what `out_ref` holds there is never looked at
        where = (q_tile, head, split)
        for smem, value in ((top_smem, -jnp.inf), (total_smem, 0.0)):
            smem[...] = plgpu.layout_cast(
                jnp.full((Q_LINES,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1)
            )
        targets = (top_smem, top_ref.at[where]), (total_smem, total_ref.at[where])
        _write(targets, work.count, geometry)

    warpgroup, has_work = lax.axis_index("warpgroup"), work.num_blocks > 0
    pl.when(has_work & (warpgroup == len(columns)))(produce)
    for consumer in range(len(columns)):
        pl.when(has_work & (warpgroup == consumer))(functools.partial(consume, consumer))
    pl.when(jnp.logical_not(has_work) & (warpgroup == 0))(write_nothing)


def _attend(
    work: Work, consumer: int, q_smem, keys: Ring, values: Ring, p_smem, free_barriers,
    geometry: Geometry, tile: Tile, *, sm_scale, soft_cap, window,
):  # fmt: skip
    """The softmax over a thread block's KV: a consumer's columns, largest scores, sums."""
    columns = _columns(geometry.head_dim)
    lines = functools.partial(
        plgpu.broadcasted_iota, jnp.int32, (Q_LINES,), 0, layout=plgpu.Layout.WGMMA.reduce(1)
    )
    first_key, end_key = split_kv.seen_keys(lines, work, window, geometry)

    def fold(step, carry):
        acc, top, total = carry
        stage = lax.rem(step, tile.stages)
        block_start = (work.first_block + step) * tile.block_tokens
        plgpu.barrier_wait(keys.arrived.at[stage])
        s = jnp.float32(0)
        for part in columns:
            k = keys.block(stage, part, consumer).transpose((1, 0))
            s += _product((Q_LINES, tile.block_tokens), q_smem.at[:, part], k)
        s = _cap(_scaled(s, keys, stage, geometry), sm_scale, soft_cap)
        key = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA)
        s = split_kv.mask(s, key, first_key - block_start, end_key - block_start)
        new_top = jnp.maximum(top, s.max(axis=1))
        # A query that sees none of the blocks so far has no largest score yet.
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        decay = jnp.exp2(top - base)
        p = jnp.exp2(s - lax.broadcast_in_dim(base, s.shape, [0]))
        total = total * decay + p.sum(axis=1)

        plgpu.barrier_wait(values.arrived.at[stage])
        # By way of shared memory, and each product into an accumulator of its own: the interpreter,
        # and so the race detector, knows no other form.
        p_smem[...] = _scaled(p, values, stage, geometry).astype(p_smem.dtype)
        plgpu.commit_smem()
        v = values.block(stage, columns[consumer], consumer, work.last - block_start)
        product = _product(acc.shape, p_smem, v)
        plgpu.barrier_arrive(free_barriers.at[stage])
        return acc * lax.broadcast_in_dim(decay, acc.shape, [0]) + product, new_top, total

    return lax.fori_loop(0, work.num_blocks, fold, _start(geometry.head_dim // len(columns)))


def _copy_block(token, work: Work, head, stage, sources, *, table_ref, geometry, tile):
    """Starts the copies of the block at `token`, page by page, from each (`Pages`, ring)."""
    rows = min(geometry.page_size, tile.block_tokens)
    for pages_ref, ring in sources:
        if ring.scales is not None:
            grains = tile.block_tokens // geometry.grain
            plgpu.copy_gmem_to_smem(
                pages_ref.scales.at[work.row, head, pl.ds(lax.div(token, geometry.grain), grains)],
                ring.scales.at[stage, pl.ds(0, grains)],
                ring.arrived.at[stage],
            )
    for copy in range(tile.block_tokens // rows):
        slot = lax.div(token, geometry.page_size)
        page = table_ref[work.row, jnp.minimum(slot, geometry.table_pages - 1)]
        # Where no query may look, page P: beyond the pool, a copy writes zeros and reads nothing.
        live = (token < work.last) & ((slot + 1) * geometry.page_size > work.first)
        page = jnp.where(live, page, geometry.num_pages)
        inside = pl.ds(lax.rem(token, geometry.page_size), rows)
        for pages_ref, ring in sources:
            plgpu.copy_gmem_to_smem(
                pages_ref.pages.at[page, head, inside],
                ring.pages.at[stage, pl.ds(copy * rows, rows)],
                ring.arrived.at[stage],
            )
        token += rows


def _write(targets, count, geometry: Geometry):
    """Copies the lines that hold queries of each (shared, device) pair out."""
    plgpu.commit_smem()

    def copy(lines: int):
        for smem, target in targets:
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


def _scaled(block, ring: Ring, stage, geometry: Geometry):
    """A [lines, tokens] block, each column times the scale of its token's page."""
    if ring.scales is None:
        return block
    layout = plgpu.Layout.WGMMA.reduce(0)
    tokens = block.shape[1]
    grain = lax.div(
        plgpu.broadcasted_iota(jnp.int32, (tokens,), 0, layout=layout), jnp.int32(geometry.grain)
    )
    scale = jnp.zeros((tokens,), jnp.float32)
    for i in range(tokens // geometry.grain):
        scale = jnp.where(grain == i, ring.scales[stage, i], scale)
    return block * lax.broadcast_in_dim(scale, block.shape, [1])


def _columns(head_dim: int) -> list:
    """The columns of values that each consumer weighs; keys are read in the same pieces."""
    width = min(head_dim, WIDEST)
    return [pl.ds(first, width) for first in range(0, head_dim, width)]


def _start(columns: int):
    """The softmax over nothing: weighted values, largest score, sum of weights."""

    def full(value, shape, layout):
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    return (
        full(0.0, (Q_LINES, columns), plgpu.Layout.WGMMA),
        full(-jnp.inf, (Q_LINES,), plgpu.Layout.WGMMA.reduce(1)),
        full(0.0, (Q_LINES,), plgpu.Layout.WGMMA.reduce(1)),
    )


def _product(shape, a_smem, b_smem):
    """a @ b in float32."""

    def multiply(acc_ref):
        plgpu.wgmma(acc_ref, a_smem, b_smem)
        return acc_ref[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def _widen(narrow, wide, num_live=None):
    """Converts a [tokens, columns] block, exactly; rows from `num_live` on become zeros."""
    width, layout = narrow.shape[1], plgpu.Layout.WGMMA_UPCAST_2X
    step = width if width % WIDENED_COLUMNS else WIDENED_COLUMNS
    is_swizzled = bool(_transforms(width, narrow.dtype))
    for first in range(0, width, step):
        part = pl.ds(first, step)
        values = plgpu.load(narrow.at[:, part], layout=layout, optimized=is_swizzled)
        if narrow.dtype == jnp.float8_e4m3fn:
            values = values.astype(jnp.float32)  # no instruction goes on to 16 bits directly
        values = values.astype(wide.dtype)
        if num_live is not None:
            values = _zeros_from(num_live, values, layout)
        wide[:, part] = values
    plgpu.commit_smem()


def _zero_rows_from(smem, first_dead):
    """Zeroes rows `first_dead` and on of a [tokens, D] block."""
    layout = plgpu.Layout.WGMMA
    smem[...] = _zeros_from(first_dead, plgpu.load(smem, layout=layout), layout)
    plgpu.commit_smem()


def _zeros_from(first_dead, values, layout):
    row = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=layout)
    return jnp.where(row < first_dead, values, jnp.zeros_like(values))
