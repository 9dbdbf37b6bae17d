"""Quantised pages and attention sinks: the reference against NumPy, XLA against the reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import Problem, assert_close, make_problem, oracle

from pallas_kernels.paged_attention import paged_attention

QUANTISED = ("int8", "float8_e4m3fn")
LENGTHS = (70, 1, 0, 130, 200, 17)
Q_LENS = (70, 1, 0, 64, 1, 2)

run = jax.jit(
    functools.partial(paged_attention, return_residuals=True),
    static_argnames=("implementation", "sliding_window"),
)
run_xla = functools.partial(run, implementation="xla")
run_reference = functools.partial(run, implementation="reference")
every_kind = pytest.mark.parametrize("kind", QUANTISED)
decode_or_ragged = pytest.mark.parametrize("q_lens", [None, Q_LENS], ids=["decode", "ragged"])


def assert_same(got, want, problem: Problem) -> None:
    assert_close(got[0], want[0], problem)
    np.testing.assert_allclose(got[1][0], want[1][0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[1][1], want[1][1], rtol=1e-4)


def sinks_of(problem: Problem) -> jax.Array:
    """Some that take nothing, some that take nearly all."""
    num_heads = problem.q.shape[1]
    return jnp.linspace(-30.0, 9.0, num_heads, dtype=jnp.float32)


@every_kind
def test_the_reference_agrees_with_numpy_on_quantised_pages(kind):
    problem = make_problem(LENGTHS, Q_LENS, quantised=kind, head_dim=16)
    out, top, total = oracle(problem)
    assert_same(problem.call(run_reference), (out, (top, total)), problem)


@every_kind
@decode_or_ragged
@pytest.mark.parametrize("page_size", [8, 16, 128])
def test_xla_agrees_with_the_reference_on_quantised_pages(kind, q_lens, page_size):
    problem = make_problem(LENGTHS, q_lens, quantised=kind, page_size=page_size)
    assert_same(problem.call(run_xla), problem.call(run_reference), problem)


@every_kind
def test_scales_of_keys_and_of_values_are_not_mixed_up(kind):
    problem = make_problem(LENGTHS, quantised=kind)
    right, _ = problem.call(run_xla)
    swapped = {"k_scales": problem.scales["v_scales"], "v_scales": problem.scales["k_scales"]}
    for scales in (swapped, {n: jnp.roll(x, 1, axis=1) for n, x in problem.scales.items()}):
        wrong, _ = problem.call(run_reference, **scales)
        with pytest.raises(AssertionError):
            assert_close(right, wrong, problem)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@decode_or_ragged
def test_sinks_take_weight_and_have_no_value(implementation, q_lens):
    problem = make_problem(LENGTHS, q_lens, head_dim=16)
    sinks = sinks_of(problem)
    out, top, total = oracle(problem, sinks=sinks, sliding_window=50)
    got = problem.call(run, implementation=implementation, sinks=sinks, sliding_window=50)
    assert_same(got, (out, (top, total)), problem)
    plain, _ = problem.call(run, implementation=implementation, sliding_window=50)
    live = problem.token_lengths() > 0
    share = np.abs(got[0][live]).sum(-1) / np.abs(plain[live]).sum(-1)
    assert share[:, 0].min() > 0.999 and share[:, -1].max() < 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k_scales": None}, "k_scales is missing"),
        ({"v_scales": None}, "v_scales is missing"),
        ({"k_scales": jnp.ones((3, 2))}, r"k_scales: scales.shape=\(3, 2\)"),
        ({"v_scales": jnp.ones((3, 2), jnp.bfloat16)}, "bfloat16"),
        ({"sinks": jnp.ones((3,))}, r"sinks.shape=\(3,\)"),
    ],
    ids=str,
)
def test_scales_and_sinks_that_do_not_fit_are_refused(changes, message):
    problem = make_problem((5,), quantised="int8")
    with pytest.raises(ValueError, match=message):
        problem.call(paged_attention, **changes)


def test_pages_of_floats_take_no_scales():
    problem = make_problem((5,))
    with pytest.raises(ValueError, match="k_scales is given"):
        problem.call(paged_attention, k_scales=jnp.ones(problem.k_pages.shape[:2]))


def test_pages_of_integers_that_nobody_defined_are_refused():
    problem = make_problem((5,), quantised="int8")
    pages = problem.k_pages.astype(jnp.int16)
    wrong = dataclasses.replace(problem, k_pages=pages, v_pages=pages)
    with pytest.raises(ValueError, match="int16"):
        wrong.call(paged_attention)
