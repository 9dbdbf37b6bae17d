"""The GPU kernels on int8 and float8 pages against the reference, under the GPU interpreter."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import INTERPRET, Problem, assert_close, make_problem
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention import kernel_sm80, kernel_sm90, paged_attention
from pallas_kernels.paged_attention.config import Tile

TILE = Tile(block_tokens=64, stages=2, split_tokens=128)
INT8, FLOAT8 = jnp.dtype("int8"), jnp.dtype("float8_e4m3fn")

run_reference = functools.partial(
    paged_attention, implementation="reference", return_residuals=True
)
needs_store = pytest.mark.skipif(not hasattr(plgpu, "store"), reason="sm80 needs jax >= 0.12")
every_kind = pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        pytest.param(kernel_sm90, INT8, id="sm90-int8"),
        pytest.param(kernel_sm90, FLOAT8, id="sm90-float8"),
        pytest.param(kernel_sm80, INT8, id="sm80-int8", marks=needs_store),
        pytest.param(kernel_sm80, FLOAT8, id="sm80-float8", marks=needs_store),
    ],
)


def run_kernel(
    kernel, q, k_pages, v_pages, lengths, page_indices, *, cu_q_lens=None, k_scales, v_scales,
    soft_cap=None, sliding_window=None,
):  # fmt: skip
    out, *residuals = kernel.attend(
        q, k_pages, v_pages, lengths, page_indices, cu_q_lens, k_scales=k_scales,
        v_scales=v_scales, sm_scale=q.shape[-1] ** -0.5, soft_cap=soft_cap, window=sliding_window,
        tile=TILE, interpret=INTERPRET,
    )  # fmt: skip
    return out.astype(q.dtype), tuple(residuals)


def problem_of(kind, lengths, q_lens=None, **shape) -> Problem:
    shape = {"num_kv_heads": 2, "group": 2, "head_dim": 64, "dtype": jnp.bfloat16} | shape
    return make_problem(lengths, q_lens, quantised=kind, **shape)


def check(kernel, problem: Problem, **options):
    out, (top, total) = problem.call(functools.partial(run_kernel, kernel), **options)
    want, (want_top, want_total) = problem.call(run_reference, **options)
    # Probabilities are rounded to bfloat16 even where queries are float16.
    assert_close(out, want, problem, rounding=jnp.finfo(jnp.bfloat16).eps)
    np.testing.assert_allclose(top, want_top, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(total, want_total, rtol=1e-4)


@pytest.mark.in_ci("sm80-float8")
@every_kind
def test_lengths_at_every_edge_of_pages_blocks_and_splits(kernel, kind):
    check(kernel, problem_of(kind, (0, 1, 15, 16, 17, 64, 65, 128, 129, 5 * 64 + 3)))


@pytest.mark.in_ci("*'group': 9}-sm90-int8", "*1}-sm80-float8")
@every_kind
@pytest.mark.parametrize(
    "shape",
    [
        {"head_dim": 128, "group": 9},
        {"head_dim": 128, "page_size": 8},
        {"head_dim": 96, "page_size": 32},
        {"page_size": 128},
        {"dtype": jnp.float16, "group": 1},
    ],
    ids=str,
)
def test_shapes(kernel, kind, shape):
    check(kernel, problem_of(kind, (130, 0, 7), **shape))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [INT8, FLOAT8], ids=str)
@pytest.mark.parametrize("shape", [{"head_dim": 80}, {"head_dim": 256, "page_size": 64}], ids=str)
def test_shapes_of_hopper_alone(kind, shape):
    check(kernel_sm90, problem_of(kind, (130, 0, 7), **shape))


@pytest.mark.in_ci("sm90-float8")
@every_kind
def test_prompts_and_decodes_share_a_step(kernel, kind):
    problem = problem_of(kind, (129, 9, 0, 150), (1, 9, 0, 20))
    check(kernel, problem, soft_cap=4.0, sliding_window=70)


@pytest.mark.in_ci("sm80-float8")
@every_kind
def test_scales_of_pages_that_the_window_hides_are_not_used(kernel, kind):
    problem = problem_of(kind, (200, 150))
    window, scales = 40, {name: np.array(x) for name, x in problem.scales.items()}
    for row, length in enumerate(problem.lengths):
        for page in problem.page_indices[row, : (length - window) // 16]:
            for x in scales.values():
                x[page] = np.nan
    scales = {name: jnp.asarray(x) for name, x in scales.items()}
    check(kernel, dataclasses.replace(problem, scales=scales), sliding_window=window)


@pytest.mark.slow
@every_kind
def test_a_rows_bits_do_not_depend_on_the_others_or_on_their_order(kernel, kind):
    problem = problem_of(kind, (129, 7, 200))
    out = np.asarray(problem.call(functools.partial(run_kernel, kernel))[0])
    for rows in ([2, 1, 0], [1]):
        again, _ = run_kernel(
            kernel, problem.q[jnp.asarray(rows)], problem.k_pages, problem.v_pages,
            jnp.asarray(problem.lengths[rows]), jnp.asarray(problem.page_indices[rows]),
            **problem.scales,
        )  # fmt: skip
        assert np.asarray(again).tobytes() == out[rows].tobytes()


@pytest.mark.in_ci("*-sm90-int8", "*-sm80-float8")
@every_kind
@pytest.mark.parametrize(
    ("k_scales", "v_scales"), [("v_scales", "k_scales"), ("k_scales", "k_scales")]
)
def test_each_scale_is_that_of_its_own_pages(kernel, kind, k_scales, v_scales):
    problem = problem_of(kind, (40,))
    out, _ = problem.call(functools.partial(run_kernel, kernel))
    given = problem.scales
    swapped = {"k_scales": given[k_scales], "v_scales": given[v_scales]}
    other, _ = dataclasses.replace(problem, scales=swapped).call(run_reference)
    with pytest.raises(AssertionError):
        assert_close(out, other, problem, rounding=jnp.finfo(jnp.bfloat16).eps)


@needs_store
@pytest.mark.parametrize(
    ("kind", "shape", "named"),
    [
        (FLOAT8, {"head_dim": 512}, "head_dim=512"),
        (INT8, {"page_size": 8}, "page_size=8 is too small for head_dim=64 and 8 bits"),
        (INT8, {"head_dim": 80, "page_size": 64}, "head_dim=80 and 8 bits"),
    ],
    ids=str,
)
def test_what_ampere_cannot_do_is_refused_with_the_way_out(kind, shape, named):
    with pytest.raises(NotImplementedError, match='use implementation="xla"') as caught:
        problem_of(kind, (5,), **shape).call(functools.partial(run_kernel, kernel_sm80))
    assert named in str(caught.value)


@pytest.mark.parametrize("kind", [INT8, FLOAT8], ids=str)
def test_ampere_converts_every_code_exactly(kind):
    codes = jnp.asarray(np.arange(-128, 128, dtype=np.int8)).view(kind)
    np.testing.assert_array_equal(kernel_sm80._float_of(codes), codes.astype(jnp.float32))
