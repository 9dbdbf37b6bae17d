"""The Hopper kernel against the reference, under the interpreter that finds races, or on a card.

The interpreter is thousands of times slower than a GPU: problems here are tiny, and all differ.
Whether the kernel compiles for a card is another question.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import INTERPRET, Problem, assert_close, make_problem, needs_no_gpu

from pallas_kernels.paged_attention import kernel_sm90, paged_attention
from pallas_kernels.paged_attention.config import Tile

S = 16
TILE = Tile(block_tokens=64, stages=2, split_tokens=128)
EDGES = (0, 1, S - 1, S, S + 1, 64, 65, 128, 129, 5 * 64 + 3)

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


def problem_of(lengths, q_lens=None, **shape) -> Problem:
    shape = {"num_kv_heads": 1, "group": 2, "head_dim": 64, "dtype": jnp.bfloat16} | shape
    return make_problem(lengths, q_lens, **shape)


def check(problem: Problem, tile: Tile = TILE, **options):
    out, (top, total) = problem.call(functools.partial(run_kernel, tile=tile), **options)
    want, (want_top, want_total) = problem.call(run_reference, **options)
    assert_close(out, want, problem)
    np.testing.assert_allclose(top, want_top, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(total, want_total, rtol=1e-4)


def test_lengths_at_every_edge_of_pages_blocks_and_splits():
    check(problem_of(EDGES))


@pytest.mark.in_ci("{'sm_scale'*")
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


@pytest.mark.in_ci(
    "{'group': 40}-*",
    "{'head_dim': 256, 'group': 9}-*",
    "*stages=3*",
)
@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ({"num_kv_heads": 2, "group": 3}, TILE),
        ({"group": 16, "head_dim": 128}, TILE),
        ({"group": 40}, TILE),
        ({"group": 1, "head_dim": 128, "dtype": jnp.float16}, TILE),
        ({"page_size": 8, "head_dim": 80}, TILE),
        ({"head_dim": 96}, TILE),
        ({"head_dim": 256, "group": 9}, TILE),
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
        ({"head_dim": 72}, "head_dim=72"),
        ({"head_dim": 512}, "head_dim=512"),
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


# --- ragged steps: tiles of 64 lines, here eight queries of eight lines each ----------------------


def test_prompts_of_all_lengths_and_decodes_share_a_step():
    q_lens = (1, 8, 0, 9, 17, 1, 40, 3)
    lengths = (129, 8, 0, 9, 150, 1, 64, 131)
    check(problem_of(lengths, q_lens, num_tokens=sum(q_lens) + 5))


@pytest.mark.in_ci("{'sm_scale'*")
@pytest.mark.parametrize(
    "options",
    [
        {"soft_cap": 1.5},
        {"sliding_window": 1},
        {"sliding_window": 11},
        {"sm_scale": 0.3, "soft_cap": 4.0, "sliding_window": 129},
    ],
    ids=str,
)
def test_options_of_ragged_steps(options):
    check(problem_of((150, 12, 71), (20, 12, 1)), **options)


@pytest.mark.in_ci("{'group': 24}")
@pytest.mark.parametrize(
    "shape",
    [
        {"num_kv_heads": 2, "group": 3, "page_size": 8},
        {"group": 24},  # two queries a tile, of 48 lines
        {"group": 40, "head_dim": 128},  # one query a tile
        {"head_dim": 256},  # two consumers
        {"group": 1, "dtype": jnp.float16, "page_size": 128},
    ],
    ids=str,
)
def test_shapes_of_ragged_steps(shape):
    check(problem_of((70, 3, 130), (13, 3, 1), **shape))


def test_a_querys_bits_do_not_depend_on_the_step_that_computes_it():
    whole = problem_of((150, 40), (31, 1))
    out, _ = whole.call(run_kernel)
    args = whole.k_pages, whole.v_pages
    # The prompt's end, cut into three chunks, in steps of as many tokens as before and of fewer.
    for first, count, num_tokens in ((0, 5, 32), (5, 16, 16), (21, 10, 32)):
        part, _ = run_kernel(
            jnp.roll(whole.q, -first, 0)[:num_tokens], *args,
            jnp.asarray([119 + first + count, 0], jnp.int32), jnp.asarray(whole.page_indices),
            cu_q_lens=jnp.asarray([0, count, count], jnp.int32),
        )  # fmt: skip
        want = np.asarray(out[first : first + count])
        assert np.asarray(part[:count]).tobytes() == want.tobytes()
    alone, _ = run_kernel(
        whole.q[31:], *args, jnp.asarray([40], jnp.int32), jnp.asarray(whole.page_indices[1:])
    )
    assert np.asarray(alone).tobytes() == np.asarray(out[31:]).tobytes()


@needs_no_gpu
def test_without_a_gpu_the_kernel_is_refused_by_name():
    problem = problem_of((5,))
    with pytest.raises(NotImplementedError, match=jax.default_backend()):
        problem.call(functools.partial(paged_attention, implementation="mosaic_gpu"))
