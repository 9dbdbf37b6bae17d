"""Page copies for Hopper: TMA into shared memory and out again, in place (Mosaic GPU)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.page_copy.api import is_live

PIECE_BYTES = 16 * 1024  # what one thread block copies; small, that few pages busy the whole card
MOST_LINES = 256  # of a TMA copy, in each dimension
THREADS = 128  # of a thread block: one warpgroup


class Pieces(NamedTuple):
    """A page as TMA copies see it: `count` pieces of `rows` lines of `columns` elements."""

    count: int
    rows: int
    columns: int


def copy(pages: jax.Array, sources: jax.Array, targets: jax.Array, *, interpret=None) -> jax.Array:
    """The contract of `api.copy_pages`. Raises as `pieces_of` does."""
    num_pages, pieces = pages.shape[0], pieces_of(pages)

    def kernel(pages_ref, sources_ref, targets_ref, *, smem, barrier):
        pair, piece = lax.axis_index("pair"), lax.axis_index("piece")
        source, target = sources_ref[pair], targets_ref[pair]

        @pl.when(is_live(source, target, num_pages))
        def _():
            rows = pl.ds(piece * pieces.rows, pieces.rows)
            plgpu.copy_gmem_to_smem(pages_ref.at[source, rows], smem, barrier)
            plgpu.barrier_wait(barrier)
            plgpu.copy_smem_to_gmem(smem, pages_ref.at[target, rows])
            plgpu.wait_smem_to_gmem(0)

    launch = plgpu.kernel(
        kernel,
        scratch_types=dict(
            smem=plgpu.SMEM((pieces.rows, pieces.columns), pages.dtype), barrier=plgpu.Barrier()
        ),
        grid=(sources.shape[0], pieces.count),
        grid_names=("pair", "piece"),
        **({} if interpret is None else {"interpret": interpret}),
    )
    lines = (num_pages, pieces.count * pieces.rows, pieces.columns)
    pages_ref = jax.new_ref(pages.reshape(lines))
    launch(pages_ref, sources, targets)
    return jax.freeze(pages_ref).reshape(pages.shape)


def pieces_of(pages) -> Pieces:
    """How the pages of an array of this shape are cut.

    Raises:
      NotImplementedError: a page is no multiple of 16 bytes.
    """
    elements, itemsize = pages.size // pages.shape[0], jnp.dtype(pages.dtype).itemsize
    if elements * itemsize % 16:
        raise NotImplementedError(
            f"a page of {pages.shape=} {pages.dtype} has {elements * itemsize} bytes, which must "
            'be a multiple of 16: use implementation="xla".'
        )
    columns = largest_divisor(elements, MOST_LINES, 16 // itemsize)
    most = min(MOST_LINES, max(1, PIECE_BYTES // (columns * itemsize)))
    rows = largest_divisor(elements // columns, most)
    return Pieces(elements // columns // rows, rows, columns)


def largest_divisor(number: int, most: int, multiple_of: int = 1) -> int:
    """The largest divisor of `number` up to `most` that is a multiple of `multiple_of`."""
    step = multiple_of
    return max(d for d in range(step, max(most, step) + 1, step) if number % d == 0)
