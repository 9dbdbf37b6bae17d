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
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention import split_kv
from pallas_kernels.paged_attention.config import OTHER, Q_LINES, Geometry, Tile, geometry_of
from pallas_kernels.paged_attention.split_kv import LOG2E, Work

THREADS = 128  # of a thread block: one warpgroup
HEAD_DIMS = (64, 96, 128)
LINES = 16  # the height of an mma tile
DEPTH = 16  # what one mma sums over, of 16-bit numbers
SMEM_BYTES = 163 * 1024  # what a thread block of an A100 can have
REDUCTION_BYTES = 2048  # of it, what Mosaic takes for reductions across warps
DEFAULT_TILE = Tile(block_tokens=64, stages=2, split_tokens=1024)


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


def attend(
    q, k_pages, v_pages, lengths, page_indices, cu_q_lens, *, k_scales=None, v_scales=None,
    sm_scale, soft_cap, window, tile: Tile = DEFAULT_TILE, interpret=None,
):  # fmt: skip
    """The contract of `reference.attend`; `cu_q_lens` None means one query for each row.

    q [T, H, D] and pages [P, K, S, D] are bfloat16 or float16, alike, and without scales. Raises as
    `check` does.
    """
    if k_scales is not None or v_scales is not None:
        raise NotImplementedError(f"k_scales and v_scales must be None: {OTHER}.")
    geometry = check(q, k_pages, page_indices, is_ragged=cu_q_lens is not None, tile=tile)
    launch = _launcher(geometry, tile, q.dtype, sm_scale, soft_cap, window, interpret)
    return split_kv.attend(launch, geometry, q, k_pages, v_pages, lengths, page_indices, cu_q_lens)


def check(q, k_pages, page_indices, *, is_ragged: bool, tile: Tile = DEFAULT_TILE) -> Geometry:
    """The geometry of a call with arrays of these shapes: tiles of 16, 32, 48 or 64 lines.

    Raises:
      NotImplementedError: a dtype, head dim, page size, number of heads or version of JAX that the
        kernel does not do; the message names the way out.
      ValueError: `tile` cannot be launched.
    """
    if not hasattr(plgpu, "store"):
        raise NotImplementedError(f"jax {jax.__version__} lacks plgpu.store, as of 0.12: {OTHER}.")
    head_dim = q.shape[2]
    if q.dtype not in (jnp.bfloat16, jnp.float16) or q.dtype != k_pages.dtype:
        raise NotImplementedError(
            f"{q.dtype=!s} and {k_pages.dtype=!s} must both be bfloat16 or both float16: {OTHER}."
        )
    if head_dim not in HEAD_DIMS:
        raise NotImplementedError(f"{head_dim=} must be one of {HEAD_DIMS}: {OTHER}.")
    if q.shape[1] // k_pages.shape[1] > Q_LINES:
        raise NotImplementedError(f"More than {Q_LINES} query heads share a KV head: {OTHER}.")
    geometry = geometry_of(q, k_pages, page_indices, is_ragged=is_ragged, tile=tile)
    if geometry.tile_queries == 1:  # more fill 16, 32, 48 or 64 lines as they are
        geometry = geometry._replace(group_rows=pl.cdiv(geometry.group_rows, LINES) * LINES)
    _check_tile(geometry, tile)
    return geometry


def _check_tile(geometry: Geometry, tile: Tile) -> None:
    """Raises ValueError for a `tile` that cannot be launched, NotImplementedError for a page."""
    page_size, block, dim = geometry.page_size, tile.block_tokens, geometry.head_dim
    if block % 64 or tile.split_tokens % block or tile.stages < 2:
        raise ValueError(
            f"{tile}: block_tokens must be a multiple of 64, split_tokens one of block_tokens, and "
            "stages at least 2."
        )
    needed = 2 * (2 * tile.stages * block * dim + geometry.tile_lines * block) + REDUCTION_BYTES
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
    if _swizzle(page_size, dim) is None:
        raise NotImplementedError(f"{page_size=} is too small for head_dim={dim}: {OTHER}.")


def _swizzle(rows: int, dim: int) -> int | None:
    """The bytes of a swizzled line for copies of [rows, dim], the widest first; None for none.

    A copy moves shared-memory tiles of 8 such lines, and its four warps share them out evenly.
    """
    for swizzle in (128, 64, 32):
        columns, rest = divmod(2 * dim, swizzle)
        if rest == 0 and columns % (4 // math.gcd(rows // 8, 4)) == 0:
            return swizzle
    return None


def _transforms(swizzle: int):
    """A shared-memory layout without bank conflicts, for 16-bit numbers."""
    # Complete classes, but an optional method of their base is abstract to pyright.
    tiling = plgpu.TilingTransform((8, swizzle // 2))  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]


@functools.cache
def _launcher(geometry: Geometry, tile: Tile, dtype, sm_scale, soft_cap, window, interpret):
    """The kernel for one geometry, a launch for `split_kv.attend`."""
    heads, dim, block = geometry.num_kv_heads, geometry.head_dim, tile.block_tokens
    partials = (geometry.num_tiles, heads, geometry.num_splits, geometry.tile_lines)
    swizzle = _swizzle(min(geometry.page_size, block), dim)
    assert swizzle is not None
    ring = plgpu.SMEM((tile.stages, block, dim), dtype, transforms=_transforms(swizzle))
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
            k_smem=ring,
            v_smem=ring,
            # In lines of one mma's depth, for that is how they are read.
            p_smem=plgpu.SMEM(
                (geometry.tile_lines, block), dtype, transforms=_transforms(2 * DEPTH)
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
    k_smem, v_smem, p_smem, geometry: Geometry, tile: Tile, sm_scale, soft_cap, window,
    machine: Machine,
):  # fmt: skip
    q_tile, head, split = (lax.axis_index(name) for name in ("tile", "head", "split"))
    work = split_kv.work_of(q_tile, split, place_ref, window, geometry, tile)
    ahead = tile.stages - 1  # blocks under way while one is multiplied

    def copy(step):
        stage = lax.rem(step, tile.stages)
        _copy_block(
            (work.first_block + step) * tile.block_tokens, work, head,
            ((k_ref, k_smem.at[stage]), (v_ref, v_smem.at[stage])),
            table_ref=table_ref, geometry=geometry, tile=tile, machine=machine,
        )  # fmt: skip

    for step in range(ahead):
        pl.when(step < work.num_blocks)(functools.partial(copy, jnp.int32(step)))

    q = plgpu.load(q_ref.at[q_tile, head], optimized=False)

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
        s = _scores(q, k_smem.at[stage], tile.block_tokens, machine)
        s = _cap(s, sm_scale, soft_cap)
        seen = _seen(s.shape, block_start, work, window, geometry)
        s = jnp.where(seen, s, -jnp.inf)
        new_top = jnp.maximum(top, s.max(axis=1))
        # A query that sees none of the blocks so far has no largest score yet.
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        decay = jnp.exp2(top - base)
        p = jnp.exp2(s - lax.broadcast_in_dim(base, s.shape, [0]))
        total = total * decay + p.sum(axis=1)
        acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
        live = (work.start - block_start, work.end - block_start)
        acc = _weigh(acc, p, live, p_smem, v_smem.at[stage], machine)
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


def _seen(shape, block_start, work: Work, window, geometry: Geometry):
    """Which keys of the block at `block_start` each line's query sees of this split."""
    key = block_start + lax.broadcasted_iota(jnp.int32, shape, 1)
    seen = (key >= work.start) & (key < work.end)
    if geometry.tile_queries > 1:
        line = lax.broadcasted_iota(jnp.int32, shape, 0)
        query = work.position + lax.div(line, jnp.int32(geometry.group_rows))
        seen &= key <= query
        if window is not None:
            seen &= key > query - window
    return seen


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


def _weigh(acc, p, live, p_smem, v_smem, machine: Machine):
    """acc + probabilities [lines, tokens] times values, of which only [live[0], live[1]) live."""
    first, end = live

    @pl.when((first > 0) | (end < p.shape[1]))
    def _():  # 0 * NaN is NaN: what lies in dead slots and unseen pages must not be read
        values = v_smem[...]
        token = lax.broadcasted_iota(jnp.int32, values.shape, 0)
        seen = (token >= first) & (token < end)
        v_smem[...] = jnp.where(seen, values, jnp.zeros_like(values))

    p_smem[...] = p.astype(p_smem.dtype)  # a warp needs the probabilities of all tokens
    for token in range(0, p.shape[1], DEPTH):  # a few values at a time, for want of registers
        ours = pl.ds(token, DEPTH)
        acc = machine.product(acc, p_smem[:, ours], v_smem[ours])
    return acc
