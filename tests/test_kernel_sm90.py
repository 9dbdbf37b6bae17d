"""The Hopper decode kernel against the reference, under the GPU interpreter that finds races.

The interpreter is thousands of times slower than a GPU: problems here are tiny, and all differ.
Whether the kernel compiles for a card is another question.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import Problem, assert_close, make_problem
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention import kernel_sm90, paged_attention
from pallas_kernels.paged_attention.kernel_sm90 import Tile

S = 16
TILE = Tile(block_tokens=64, stages=2, split_tokens=128)
EDGES = (0, 1, S - 1, S, S + 1, 64, 65, 128, 129, 5 * 64 + 3)
INTERPRET = plgpu.InterpretGPUParams(detect_races=True)

run_reference = functools.partial(
    paged_attention, implementation="reference", return_residuals=True
)


def run_kernel(
    q, k_pages, v_pages, lengths, page_indices, *,
    cu_q_lens=None, sm_scale=None, soft_cap=None, sliding_window=None, tile=TILE,
):  # fmt: skip
    out, *residuals = kernel_sm90.attend(
        q, k_pages, v_pages, lengths, page_indices, cu_q_lens,
        sm_scale=q.shape[-1] ** -0.5 if sm_scale is None else sm_scale,
        soft_cap=soft_cap, window=sliding_window, tile=tile, interpret=INTERPRET,
    )  # fmt: skip
    return out.astype(q.dtype), tuple(residuals)


def problem_of(lengths, **shape) -> Problem:
    shape = {"num_kv_heads": 1, "group": 2, "head_dim": 64, "dtype": jnp.bfloat16} | shape
    return make_problem(lengths, **shape)


def check(problem: Problem, tile: Tile = TILE, **options):
    out, (top, total) = problem.call(functools.partial(run_kernel, tile=tile), **options)
    want, (want_top, want_total) = problem.call(run_reference, **options)
    assert_close(out, want, problem)
    np.testing.assert_allclose(top, want_top, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(total, want_total, rtol=1e-4)


def test_lengths_at_every_edge_of_pages_blocks_and_splits():
    check(problem_of(EDGES))


@pytest.mark.parametrize(
    "options",
    [
        {"soft_cap": 1.5},
        {"sliding_window": 1},
        {"sliding_window": 70},
        {"sm_scale": 0.3, "soft_cap": 4.0, "sliding_window": 129},
    ],
    ids=str,
)
def test_options(options):
    check(problem_of((200, 1, 71)), **options)


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ({"num_kv_heads": 2, "group": 3}, TILE),
        ({"group": 16, "head_dim": 128}, TILE),
        ({"group": 40}, TILE),
        ({"group": 1, "head_dim": 128, "dtype": jnp.float16}, TILE),
        ({"page_size": 8}, TILE),
        ({"page_size": 128}, TILE),
        ({"page_size": 64}, Tile(block_tokens=128, stages=3, split_tokens=256)),
    ],
    ids=str,
)
def test_shapes(shape, tile):
    check(problem_of((130, 0, 7), **shape), tile)


def test_a_rows_bits_do_not_depend_on_the_others_or_on_their_order():
    problem = problem_of((129, 64, 7, 200))
    out = np.asarray(problem.call(run_kernel)[0])
    for rows in ([3, 1, 0, 2], [2], [1, 3]):
        args = (problem.q[jnp.asarray(rows)], problem.k_pages, problem.v_pages)
        again, _ = run_kernel(
            *args, jnp.asarray(problem.lengths[rows]), jnp.asarray(problem.page_indices[rows])
        )
        assert np.asarray(again).tobytes() == out[rows].tobytes()


def test_values_come_from_the_pages_of_values():
    problem = problem_of((40,))
    out, _ = problem.call(run_kernel)
    swapped, _ = run_reference(
        problem.q, problem.v_pages, problem.k_pages,
        jnp.asarray(problem.lengths), jnp.asarray(problem.page_indices),
    )  # fmt: skip
    with pytest.raises(AssertionError):
        assert_close(out, swapped, problem)


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        ({"dtype": jnp.float32}, "q.dtype"),
        ({"page_size": 12}, "page_size=12"),
        ({"page_size": 48}, "page_size=48"),
        ({"head_dim": 80}, "head_dim=80"),
        ({"head_dim": 256}, "head_dim=256"),
        ({"group": 65}, "64 query heads"),
    ],
    ids=str,
)
def test_what_the_kernel_cannot_do_is_refused_with_the_way_out(shape, named):
    with pytest.raises(NotImplementedError, match='use implementation="xla"') as caught:
        problem_of((5,), **shape).call(run_kernel)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("tile", "message"),
    [
        (Tile(stages=6), "needs 254464 bytes .* fewer stages"),
        (Tile(block_tokens=32), "multiple of 64"),
        (Tile(block_tokens=128, split_tokens=192), "one of block_tokens"),
    ],
    ids=str,
)
def test_a_tile_that_cannot_be_launched_is_refused_before_launch(tile, message):
    problem = problem_of((5,), head_dim=128)
    with pytest.raises(ValueError, match=message):
        problem.call(functools.partial(run_kernel, tile=tile))


def test_ragged_steps_are_refused():
    problem = problem_of((5,), q_lens=(2,))
    with pytest.raises(NotImplementedError, match="without cu_q_lens"):
        problem.call(run_kernel)


def test_without_a_gpu_the_kernel_is_refused_by_name():
    problem = problem_of((5,))
    with pytest.raises(NotImplementedError, match=jax.default_backend()):
        problem.call(functools.partial(paged_attention, implementation="mosaic_gpu"))
