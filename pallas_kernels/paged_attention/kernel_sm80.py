"""Attention over paged KV for Ampere: cp.async page copies, mma.sync, split KV (Mosaic GPU).

Mosaic GPU rather than the Triton backend: it compiles for sm_80 without spills, the Triton backend
is deprecated, and reading, tiling and merging stay those of the Hopper kernel. It has not run on a
card: compiled for the A100, its numerics come from the interpreter, which has no rule for Ampere's
copies and products; `INTERPRETED` stands in for those three, so that what the waits wait for is
checked by nobody but the reader.

One warpgroup for each (tile of queries, KV head, split). It keeps `stages` blocks of KV in a ring
in shared memory: while it multiplies one, the next arrive, page by page. A tile holds queries of
one row, one for decode, with all query heads of the KV head, so that a KV byte leaves device memory
once for all of them. Softmax runs in float32 and base 2. Splits are cut at fixed positions and
folded in order: see `split_kv`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention import split_kv, tuning
from pallas_kernels.paged_attention.config import (
    OTHER,
    Q_LINES,
    Geometry,
    Tile,
    check_dtypes,
    geometry_of,
)
from pallas_kernels.paged_attention.split_kv import LOG2E, Work

HEAD_DIMS = (64, 80, 96, 128, 256)
LINES = 16  # the height of an mma tile; head dims of no whole 32 columns need two for four warps
DEPTH = 16  # what one mma sums over, of 16-bit numbers
SMEM_BYTES = 163 * 1024  # what a thread block of an A100 can have
COUNTER = 1.5 * 2**23  # a float32 whose last bit is 1, with room on both sides
REDUCTION_BYTES = 2048  # of it, what Mosaic takes for reductions across warps


def threads_of(geometry: Geometry) -> int:
    """Threads of a thread block: one warpgroup."""
    del geometry
    return 128


class Machine(NamedTuple):
    """What of Ampere the interpreter lacks."""

    copy: Callable  # (device, shared): starts a copy
    wait: Callable  # (n): until at most the n copies started last are under way
    product: Callable  # (acc, a, b) -> acc + a @ b


AMPERE = Machine(
    functools.partial(plgpu.copy_gmem_to_smem, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS),
    plgpu.wait_gmem_to_smem,
    plgpu.mma,
)
INTERPRETED = Machine(
    lambda device, shared: shared.__setitem__(..., device[...]),
    lambda n: None,
    lambda acc, a, b: acc + jnp.dot(a, b, preferred_element_type=jnp.float32),
)


class Ring(NamedTuple):
    """Keys or values on their way: references into shared memory."""

    pages: Any  # [stages, tokens, D], as in device memory
    wide: Any = None  # [tokens, D], where a stage of quantised pages is widened

    def block(self, stage, geometry: Geometry):
        """The tokens of a stage as 16-bit numbers."""
        block = self.pages.at[stage]
        if self.wide is None:
            return block
        num_tokens, dim = block.shape
        step = _swizzle(min(geometry.page_size, num_tokens), dim, itemsize=1)
        for first in range(0, dim, step):  # more at a time would take too many registers
            part = pl.ds(first, step)
            self.wide[:, part] = _float_of(block[:, part]).astype(self.wide.dtype)
        return self.wide


def attend(
    q, k_pages, v_pages, lengths, page_indices, cu_q_lens, *, k_scales=None, v_scales=None,
    sm_scale, soft_cap, window, tile: Tile | None = None, interpret=None,
):  # fmt: skip
    """The contract of `reference.attend`; `cu_q_lens` None means one query for each row.

    q [T, H, D] is bfloat16 or float16, pages [P, K, S, D] alike or quantised. Raises as `check`.
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
    """The smallest ring: two thread blocks share a processor's memory."""
    del q, k_pages
    return Tile(stages=2)


def check(q, k_pages, page_indices, *, is_ragged: bool, tile: Tile | None = None) -> Geometry:
    """The geometry of a call with arrays of these shapes: tiles of 16, 32, 48 or 64 lines.

    Raises:
      NotImplementedError: a dtype, head dim, page size, number of heads or version of JAX that the
        kernel does not do; the message names the way out.
      ValueError: `tile` cannot be launched.
    """
    tile = tile_of(q, k_pages) if tile is None else tile
    if not hasattr(plgpu, "store"):
        raise NotImplementedError(f"jax {jax.__version__} lacks plgpu.store, as of 0.12: {OTHER}.")
    head_dim = q.shape[2]
    check_dtypes(q, k_pages)
    if head_dim not in HEAD_DIMS:
        raise NotImplementedError(f"{head_dim=} must be one of {HEAD_DIMS}: {OTHER}.")
    most = Q_LINES if head_dim <= 128 else LINES  # more would not fit in registers
    if q.shape[1] // k_pages.shape[1] > most:
        raise NotImplementedError(
            f"More than {most} query heads share a KV head of {head_dim=}: {OTHER}."
        )
    geometry = geometry_of(q, k_pages, page_indices, is_ragged=is_ragged, tile=tile, lines=most)
    lines = LINES if head_dim % 32 == 0 else 2 * LINES
    if geometry.tile_lines % lines:
        geometry = geometry._replace(group_rows=pl.cdiv(geometry.group_rows, lines) * lines)
    _check_tile(geometry, tile, k_pages.dtype.itemsize)
    return geometry


def _check_tile(geometry: Geometry, tile: Tile, itemsize: int) -> None:
    """Raises ValueError for a `tile` that cannot be launched, NotImplementedError for a page."""
    page_size, block, dim = geometry.page_size, tile.block_tokens, geometry.head_dim
    if block % 64 or tile.split_tokens % block or tile.stages < 2:
        raise ValueError(
            f"{tile}: block_tokens must be a multiple of 64, split_tokens one of block_tokens, and "
            "stages at least 2."
        )
    kv = 2 * tile.stages * block * dim * itemsize
    wide = 0 if itemsize == 2 else 2 * block * dim
    needed = kv + wide + 2 * geometry.tile_lines * block + REDUCTION_BYTES
    if needed > SMEM_BYTES:
        raise ValueError(
            f"{tile} needs {needed} bytes of shared memory for head_dim={dim}, more than "
            f"{SMEM_BYTES}: take fewer stages or smaller blocks."
        )
    if page_size % 8 or max(page_size, block) % min(page_size, block):
        raise NotImplementedError(
            f"{page_size=} must be a multiple of 8 that divides {block} or is a multiple of it: "
            f"{OTHER}."
        )
    _swizzle(min(page_size, block), dim, itemsize)


def _swizzle(rows: int, dim: int, itemsize: int) -> int:
    """The bytes of a swizzled line for copies of [rows, dim], the widest that there is.

    A copy moves shared-memory tiles of 8 such lines, and its four warps share them out evenly.
    """
    for swizzle in (128, 64, 32)[2 - itemsize :]:
        columns, rest = divmod(dim * itemsize, swizzle)
        if rest == 0 and columns % (4 // math.gcd(rows // 8, 4)) == 0:
            return swizzle
    raise NotImplementedError(
        f"page_size={rows} is too small for head_dim={dim} and {8 * itemsize} bits: {OTHER}."
    )


def _transforms(swizzle: int, itemsize: int = 2):
    """A shared-memory layout without bank conflicts."""
    # Complete classes, but an optional method of their base is abstract to pyright.
    tiling = plgpu.TilingTransform((8, swizzle // itemsize))  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]


@functools.cache
def _launcher(geometry: Geometry, tile: Tile, types, sm_scale, soft_cap, window, interpret):
    """The kernel for one geometry and the dtypes of q and pages, a launch for `split_kv.attend`."""
    q_type, pages_type = types
    is_quantised = q_type != pages_type
    # Probabilities times scales can be smaller than float16 goes, and 8-bit values are exact here.
    value_type = jnp.dtype(jnp.bfloat16) if is_quantised else q_type
    heads, dim, block = geometry.num_kv_heads, geometry.head_dim, tile.block_tokens
    partials = (geometry.num_tiles, heads, geometry.num_splits, geometry.tile_lines)
    rows = min(geometry.page_size, block)

    def smem(shape, dtype):
        swizzle = _swizzle(rows, dim, dtype.itemsize)
        return plgpu.SMEM(shape, dtype, transforms=_transforms(swizzle, dtype.itemsize))

    def ring(wide_type):
        wide = smem((block, dim), wide_type) if is_quantised else None
        return Ring(smem((tile.stages, block, dim), pages_type), wide)

    return plgpu.kernel(
        functools.partial(
            _kernel, geometry=geometry, tile=tile, sm_scale=sm_scale, soft_cap=soft_cap,
            window=window, machine=AMPERE if interpret is None else INTERPRETED,
        ),
        out_type=(
            jax.ShapeDtypeStruct((*partials, dim), jnp.float32),
            jax.ShapeDtypeStruct(partials, jnp.float32),
            jax.ShapeDtypeStruct(partials, jnp.float32),
        ),
        scratch_types=dict(
            keys=ring(q_type),
            values=ring(value_type),
            # In lines of one mma's depth, for that is how they are read.
            p_smem=plgpu.SMEM(
                (geometry.tile_lines, block), value_type, transforms=_transforms(2 * DEPTH)
            ),
        ),
        # The barriers that Mosaic puts around copies and stores stay: sm_80 has no `commit_smem`.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, reduction_scratch_bytes=REDUCTION_BYTES
        ),
        grid=(geometry.num_tiles, heads, geometry.num_splits),
        grid_names=("tile", "head", "split"),
        **({} if interpret is None else {"interpret": interpret}),
    )  # fmt: skip


def _kernel(
    q_ref, k_ref, v_ref, place_ref, table_ref, out_ref, top_ref, total_ref, *,
    keys: Ring, values: Ring, p_smem, geometry: Geometry, tile: Tile, sm_scale, soft_cap, window,
    machine: Machine,
):  # fmt: skip
    q_tile, head, split = (lax.axis_index(name) for name in ("tile", "head", "split"))
    work = split_kv.work_of(q_tile, split, place_ref, window, geometry, tile)
    ahead = tile.stages - 1  # blocks under way while one is multiplied

    def copy(step):
        stage = lax.rem(step, tile.stages)
        _copy_block(
            (work.first_block + step) * tile.block_tokens, work, head,
            ((k_ref.pages, keys.pages.at[stage]), (v_ref.pages, values.pages.at[stage])),
            table_ref=table_ref, geometry=geometry, tile=tile, machine=machine,
        )  # fmt: skip

    for step in range(ahead):
        pl.when(step < work.num_blocks)(functools.partial(copy, jnp.int32(step)))

    q = plgpu.load(q_ref.at[q_tile, head], optimized=False)

    lines = functools.partial(lax.iota, jnp.int32, geometry.tile_lines)
    first_key, end_key = split_kv.seen_keys(lines, work, window, geometry)

    def fold(step, carry, is_last: bool):
        acc, top, total = carry
        stage = lax.rem(step, tile.stages)
        block_start = (work.first_block + step) * tile.block_tokens
        # Of the blocks under way, the oldest has arrived. How many copies come after it must be a
        # constant, so the last few blocks wait for all. Nobody reads the block before any more:
        # the wait is a barrier, and the next copy goes there.
        machine.wait(0 if is_last else (ahead - 1) * _copies(geometry, tile))
        if not is_last:
            copy(step + ahead)
        k_scales, v_scales = (
            _scales(ref.scales, work.row, head, block_start, geometry, tile)
            for ref in (k_ref, v_ref)
        )
        s = _scores(q, keys.block(stage, geometry), tile.block_tokens, machine)
        s = _cap(_scaled(s, k_scales), sm_scale, soft_cap)
        key = lax.broadcasted_iota(jnp.int32, s.shape, 1)
        s = split_kv.mask(s, key, first_key - block_start, end_key - block_start)
        new_top = jnp.maximum(top, s.max(axis=1))
        # A query that sees none of the blocks so far has no largest score yet.
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        decay = jnp.exp2(top - base)
        p = jnp.exp2(s - lax.broadcast_in_dim(base, s.shape, [0]))
        total = total * decay + p.sum(axis=1)
        acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
        live = (work.start - block_start, work.end - block_start)
        p_smem[...] = _scaled(p, v_scales).astype(p_smem.dtype)  # a warp needs those of all tokens
        acc = _weigh(acc, p_smem, values.block(stage, geometry), live, machine)
        return acc, new_top, total

    lines = geometry.tile_lines
    carry = (
        jnp.zeros((lines, geometry.head_dim), jnp.float32),
        jnp.full((lines,), -jnp.inf, jnp.float32),
        jnp.zeros((lines,), jnp.float32),
    )
    steady = jnp.maximum(work.num_blocks - ahead, 0)
    carry = lax.fori_loop(0, steady, functools.partial(fold, is_last=False), carry)
    carry = lax.fori_loop(steady, work.num_blocks, functools.partial(fold, is_last=True), carry)
    for ref, value in zip((out_ref, top_ref, total_ref), carry, strict=True):
        plgpu.store(ref.at[q_tile, head, split], value, optimized=False)


def _copies(geometry: Geometry, tile: Tile) -> int:
    """Copies that fetch one block, keys and values."""
    return 2 * max(1, tile.block_tokens // geometry.page_size)


def _copy_block(token, work: Work, head, targets, *, table_ref, geometry, tile, machine):
    """Starts the copies of the block at `token`, page by page, of each (pages, target)."""
    rows = min(geometry.page_size, tile.block_tokens)
    for copy in range(tile.block_tokens // rows):
        slot = lax.div(token, geometry.page_size)
        page = table_ref[work.row, jnp.minimum(slot, geometry.table_pages - 1)]
        # cp.async checks no bounds. Where no query may look, any page does: one that stays cached.
        live = (token < work.last) & ((slot + 1) * geometry.page_size > work.first)
        page = jnp.clip(jnp.where(live, page, 0), 0, geometry.num_pages - 1)
        inside = pl.ds(lax.rem(token, geometry.page_size), rows)
        for pages, target in targets:
            machine.copy(pages.at[page, head, inside], target.at[pl.ds(copy * rows, rows)])
        token += rows


def _float_of(x):
    """int8 or float8_e4m3fn as float32, exactly, by way of its bits: sm_80 has no conversion.

    Mosaic's own, of int8 to bfloat16, needs sm_90, and that of float8 sm_89.
    """
    if x.dtype == jnp.int8:  # added to a number whose last bits count ones
        bits = x.astype(jnp.int32) + np.float32(COUNTER).view(np.int32)
        return lax.bitcast_convert_type(bits, jnp.float32) - COUNTER
    code = lax.bitcast_convert_type(x, jnp.int8).astype(jnp.int32)
    size = code & 0x7F  # 4 bits of exponent, 3 of fraction
    is_small = size < 8  # subnormal: as if the exponent were 1, without the leading 1
    bits = (size << 20) + ((127 - 7) << 23) + jnp.where(is_small, 1 << 23, 0)
    value = lax.bitcast_convert_type(bits, jnp.float32) - jnp.where(is_small, 2.0**-6, 0.0)
    value = jnp.where(size == 0x7F, jnp.nan, value)
    return jnp.where(code < 0, -value, value)


def _cap(products, sm_scale, soft_cap):
    """Scores in base 2."""
    if soft_cap is None:
        return products * (sm_scale * LOG2E)
    # tanh by way of exp2: the card's own approximation errs by 2**-11 of the cap.
    doubled = jnp.exp2(products * (2 * LOG2E * sm_scale / soft_cap))
    return (soft_cap * LOG2E) * (1 - 2 / (1 + doubled))


def _scores(q, k_smem, block_tokens: int, machine: Machine):
    """q [lines, D] times keys [tokens, D], transposed."""
    s = jnp.zeros((q.shape[0], block_tokens), jnp.float32)
    return machine.product(s, q, k_smem.transpose((1, 0))[...])


def _weigh(acc, p_smem, v_smem, live, machine: Machine):
    """acc + probabilities [lines, tokens] times values, of which only [live[0], live[1]) live."""
    first, end = live
    num_tokens = v_smem.shape[0]

    @pl.when((first > 0) | (end < num_tokens))
    def _():  # 0 * NaN is NaN: what lies in dead slots and unseen pages must not be read
        values = v_smem[...]
        token = lax.broadcasted_iota(jnp.int32, values.shape, 0)
        seen = (token >= first) & (token < end)
        v_smem[...] = jnp.where(seen, values, jnp.zeros_like(values))

    for token in range(0, num_tokens, DEPTH):  # a few values at a time, for want of registers
        ours = pl.ds(token, DEPTH)
        acc = machine.product(acc, p_smem[:, ours], v_smem[ours])
    return acc


def _scales(scales_ref, row, head, block_start, geometry: Geometry, tile: Tile):
    """The scale of each token of a block, f32[tokens]; None for pages without."""
    if scales_ref is None:
        return None
    grain = lax.iota(jnp.int32, tile.block_tokens) // geometry.grain
    found = jnp.zeros((tile.block_tokens,), jnp.float32)
    for i in range(tile.block_tokens // geometry.grain):
        scale = scales_ref[row, head, lax.div(block_start, geometry.grain) + i]
        found = jnp.where(grain == i, scale, found)
    return found


def _scaled(block, scales):
    """A [lines, tokens] block, each column times its token's scale."""
    return block if scales is None else block * lax.broadcast_in_dim(scales, block.shape, [1])
