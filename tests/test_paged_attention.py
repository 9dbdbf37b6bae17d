"""Paged attention: the XLA path against the reference, the reference against NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import Problem, assert_close, make_problem, oracle

from pallas_kernels.paged_attention import paged_attention, resolve_implementation
from pallas_kernels.paged_attention import xla as xla_path

S = 16
CHUNK = xla_path.DECODE_CHUNK
TILE = xla_path.TILE_TOKENS
EDGE_LENGTHS = (0, 1, S - 1, S, S + 1, 3 * S, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5, 0)
RAGGED_LENGTHS = (70, 1, 0, 3 * TILE, 200, TILE + 1, 33, 40, 150)
RAGGED_Q_LENS = (70, 1, 0, TILE, 1, 2, 0, 39, 110)
OPTIONS = {
    "plain": {},
    "soft cap": {"soft_cap": 1.5},
    "window of one": {"sliding_window": 1},
    "window inside a page": {"sliding_window": 7},
    "window beyond a chunk": {"sliding_window": CHUNK + 3},
    "scale, cap and window": {"sm_scale": 0.3, "soft_cap": 4.0, "sliding_window": 50},
}

run = jax.jit(
    functools.partial(paged_attention, return_residuals=True),
    static_argnames=("implementation", "sm_scale", "soft_cap", "sliding_window"),
)
run_xla = functools.partial(run, implementation="xla")
run_reference = functools.partial(run, implementation="reference")


def edges(**shape) -> Problem:
    return make_problem(EDGE_LENGTHS, **shape)


def ragged(**shape) -> Problem:
    total = sum(RAGGED_Q_LENS)
    return make_problem(RAGGED_LENGTHS, RAGGED_Q_LENS, num_tokens=total + 9, **shape)


def check(problem: Problem, **options):
    out, (top, total) = problem.call(run_xla, **options)
    want, (want_top, want_total) = problem.call(run_reference, **options)
    assert out.dtype == problem.q.dtype
    assert_close(out, want, problem)
    np.testing.assert_allclose(top, want_top, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(total, want_total, rtol=1e-4)


def bits(x) -> bytes:
    return np.asarray(x).tobytes()


def take_rows(problem: Problem, rows) -> Problem:
    """The decode problem of the rows named, in that order, over the same pool."""
    rows = np.asarray(rows)
    return dataclasses.replace(
        problem,
        q=problem.q[rows],
        lengths=problem.lengths[rows],
        page_indices=problem.page_indices[rows],
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_the_reference_agrees_with_numpy_in_float64(options):
    problem = ragged(head_dim=16)
    out, (top, total) = problem.call(run_reference, **options)
    want, want_top, want_total = oracle(problem, **options)
    assert_close(out, want, problem)
    np.testing.assert_allclose(top, want_top, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(total, want_total, rtol=1e-4)


def test_decode_is_a_ragged_step_of_one_query_a_row():
    problem = edges(head_dim=16)
    assert_close(problem.call(run_reference)[0], oracle(problem)[0], problem)


@pytest.mark.in_ci("edges-*", "ragged-plain", "ragged-scale, cap and window")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("make", [edges, ragged])
def test_xla_agrees_with_the_reference_for_every_option(make, options):
    check(make(), **options)


@pytest.mark.parametrize(
    "make, shape",
    [
        (edges, {"head_dim": 80, "num_kv_heads": 3, "group": 3}),
        (edges, {"head_dim": 128, "num_kv_heads": 1, "group": 8}),
        (edges, {"head_dim": 64, "num_kv_heads": 8, "group": 1}),
        (edges, {"page_size": 1}),
        (edges, {"page_size": 8, "group": 4}),
        (edges, {"page_size": 48}),
        (edges, {"page_size": 256}),
        (edges, {"table_pages": 40}),
        (edges, {"dtype": jnp.bfloat16, "num_kv_heads": 3, "group": 3}),
        (ragged, {"head_dim": 80, "num_kv_heads": 3, "group": 3}),
        (ragged, {"page_size": 1}),
        (ragged, {"page_size": 64, "group": 8}),
        (ragged, {"dtype": jnp.bfloat16, "num_kv_heads": 1, "head_dim": 128}),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_xla_agrees_with_the_reference_for_every_shape(make, shape):
    check(make(**shape))


def test_pages_that_the_window_has_left_may_be_freed():
    window, lengths, q_lens = 20, (300, 150), (1, 5)
    problem = make_problem(lengths, q_lens)
    want = problem.call(run_xla, sliding_window=window)
    table, k_pages, v_pages = problem.page_indices.copy(), problem.k_pages, problem.v_pages
    for row in range(2):
        left = (lengths[row] - q_lens[row] + 1 - window) // S
        k_pages = k_pages.at[table[row, :left]].set(jnp.nan)
        v_pages = v_pages.at[table[row, :left]].set(jnp.nan)
        table[row, : left - 1] = -5
    freed = dataclasses.replace(problem, k_pages=k_pages, v_pages=v_pages, page_indices=table)
    assert bits(freed.call(run_xla, sliding_window=window)[0]) == bits(want[0])
    assert_close(freed.call(run_reference, sliding_window=window)[0], want[0], problem)


def test_float32_queries_may_read_bfloat16_pages():
    problem = ragged(dtype=jnp.bfloat16)
    q = problem.q.astype(jnp.float32)
    check(dataclasses.replace(problem, q=q))


def test_the_comparison_fails_when_values_are_read_from_the_keys_pages():
    problem = edges()
    wrong = dataclasses.replace(problem, v_pages=problem.k_pages)
    out, _ = wrong.call(run_xla)
    with pytest.raises(AssertionError):
        assert_close(out, problem.call(run_reference)[0], problem)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_empty_rows_and_padding_are_zeros_with_no_weight(implementation):
    problem = make_problem((0, 20, 0), (0, 3, 0), num_tokens=8)
    out, (top, total) = problem.call(run, implementation=implementation)
    assert not out[3:].any() and (top[3:] == -jnp.inf).all() and not total[3:].any()
    problem = make_problem((0, 0))
    out, (top, total) = problem.call(run, implementation=implementation)
    assert not out.any() and (top == -jnp.inf).all() and not total.any()


def test_two_halves_of_the_cache_merge_into_the_whole():
    whole = make_problem((5 * S, 12 * S + 3, 20 * S))
    cut_pages = np.array([2, 6, 19])
    head = dataclasses.replace(whole, lengths=(cut_pages * S).astype(np.int32))
    tail_table = np.stack(
        [np.roll(row, -cut) for row, cut in zip(whole.page_indices, cut_pages, strict=True)]
    )
    tail_lengths = (whole.lengths - cut_pages * S).astype(np.int32)
    tail = dataclasses.replace(whole, lengths=tail_lengths, page_indices=tail_table)
    parts = [part.call(run_xla) for part in (head, tail)]
    m = jnp.maximum(parts[0][1][0], parts[1][1][0])
    weights = [part_l * jnp.exp(part_m - m) for _, (part_m, part_l) in parts]
    shares = [w / (weights[0] + weights[1]) for w in weights]
    outs = [out * share[..., None] for (out, _), share in zip(parts, shares, strict=True)]
    merged = outs[0] + outs[1]
    assert_close(merged, whole.call(run_reference)[0], whole)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_the_order_of_the_rows_changes_no_bit(dtype):
    problem = make_problem(EDGE_LENGTHS, dtype=dtype, num_kv_heads=3, group=3)
    out, _ = problem.call(run_xla)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(EDGE_LENGTHS))
        assert bits(take_rows(problem, order).call(run_xla)[0]) == bits(out[order])


@pytest.mark.in_ci("1", "4", "7")
@pytest.mark.parametrize("group", [1, 3, 4, 6, 7, 9])
def test_a_row_decodes_to_the_same_bits_alone_and_in_company(group):
    lengths = (*EDGE_LENGTHS, 300, 17, 90, 90, 1)
    problem = make_problem(lengths, num_kv_heads=3, group=group)
    out, (top, total) = problem.call(run_xla)
    for row in range(len(lengths)):
        got = take_rows(problem, [row]).call(run_xla)
        assert bits(got[0][0]) == bits(out[row])
        assert bits(got[1][0][0]) == bits(top[row]) and bits(got[1][1][0]) == bits(total[row])


def test_a_row_of_a_ragged_step_has_the_same_bits_alone_and_in_company():
    problem = ragged(num_kv_heads=3, group=3)
    out, _ = problem.call(run_xla)
    for row in np.flatnonzero(problem.q_lens):
        end = problem.q_lens[: row + 1].sum()
        start = end - problem.q_lens[row]
        alone = one_step(problem, row, start, end, problem.lengths[row], num_tokens=128)
        assert bits(alone.call(run_xla)[0][: end - start]) == bits(out[start:end])


def test_a_decode_row_has_the_same_bits_in_a_ragged_step():
    problem = make_problem((5, 130, 40, 300), num_kv_heads=3, group=3)
    out, _ = problem.call(run_xla)
    as_ragged = dataclasses.replace(problem, cu_q_lens=np.arange(5, dtype=np.int32))
    assert bits(as_ragged.call(run_xla)[0]) == bits(out)


def one_step(problem: Problem, row, start, end, length, num_tokens) -> Problem:
    """Tokens [start, end) of `problem` as the last ones of a lone row, with padding of NaN."""
    q = jnp.full((num_tokens, *problem.q.shape[1:]), jnp.nan, problem.q.dtype)
    return dataclasses.replace(
        problem,
        q=q.at[: end - start].set(problem.q[start:end]),
        lengths=np.array([length], np.int32),
        page_indices=problem.page_indices[row : row + 1],
        cu_q_lens=np.array([0, end - start], np.int32),
    )


def prefill_in_chunks(problem: Problem, cuts) -> jax.Array:
    """The whole prompt of a one-row problem, computed in steps that end at `cuts`."""
    outs = []
    for start, end in zip((0, *cuts[:-1]), cuts, strict=True):
        step = one_step(problem, 0, start, end, end, num_tokens=cuts[-1])
        outs.append(step.call(run_xla)[0][: end - start])
    return jnp.concatenate(outs)


def test_a_prompt_computed_in_chunks_gives_the_same_result():
    length = 5 * TILE + 3
    problem = make_problem((length,), (length,), num_kv_heads=3, group=3)
    whole = prefill_in_chunks(problem, (length,))
    assert_close(whole, problem.call(run_reference)[0], problem)
    for cuts in ((2 * TILE, length), (2, TILE + 7, 4 * TILE, length), (40, 80, length)):
        assert bits(prefill_in_chunks(problem, cuts)) == bits(whole)
    with_decode = prefill_in_chunks(problem, (2 * TILE + 5, 2 * TILE + 6, length))
    assert_close(with_decode, whole, problem)


def layered_pool(num_layers=4, num_pages=4096):
    """A pool [L*P, K, S, D] of 200 MB, as abstract values: nothing is allocated."""
    pool = jax.ShapeDtypeStruct((num_layers * num_pages, 3, S, 64), jnp.float32)
    return pool, num_layers, num_pages


@pytest.mark.parametrize("is_ragged", [False, True])
def test_the_pool_is_never_copied_even_by_a_scan_over_layers(is_ragged):
    pool, num_layers, num_pages = layered_pool()
    q = jax.ShapeDtypeStruct((64, 9, 64), jnp.float32)
    lengths = jax.ShapeDtypeStruct((64,), jnp.int32)
    table = jax.ShapeDtypeStruct((64, 128), jnp.int32)

    def step(q, k_pages, v_pages, lengths, table):
        cu_q_lens = jnp.arange(65, dtype=jnp.int32) if is_ragged else None

        def layer(q, i):
            table_i = table + i * num_pages
            out = paged_attention(q, k_pages, v_pages, lengths, table_i, cu_q_lens=cu_q_lens)
            return q + out, None

        return jax.lax.scan(layer, q, jnp.arange(num_layers, dtype=jnp.int32))[0]

    compiled = jax.jit(step).lower(q, pool, pool, lengths, table).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    pool_bytes = int(np.prod(pool.shape)) * 4
    assert analysis.temp_size_in_bytes < pool_bytes / 20


def test_layers_of_a_pool_are_addressed_by_shifting_the_table():
    layers = [make_problem((40, 7, 130), seed=seed) for seed in range(3)]
    num_pages = layers[0].k_pages.shape[0]
    k_pool = jnp.concatenate([layer.k_pages for layer in layers])
    v_pool = jnp.concatenate([layer.v_pages for layer in layers])
    tables = jnp.stack(
        [jnp.asarray(x.page_indices % num_pages) + i * num_pages for i, x in enumerate(layers)]
    )
    lengths = jnp.asarray(layers[0].lengths)

    @jax.jit
    def attend_all(q):
        def layer(_, x):
            return None, paged_attention(x[0], k_pool, v_pool, lengths, x[1])

        return jax.lax.scan(layer, None, (q, tables))[1]

    outs = attend_all(jnp.stack([layer.q for layer in layers]))
    for out, layer in zip(outs, layers, strict=True):
        assert bits(out) == bits(layer.call(run_xla)[0])


def test_none_picks_an_implementation_and_says_which():
    assert resolve_implementation() == "xla"
    assert resolve_implementation("reference") == "reference"
    problem = edges()
    assert bits(problem.call(paged_attention)) == bits(
        problem.call(paged_attention, implementation="xla")
    )


def test_an_absent_kernel_names_the_alternative():
    with pytest.raises(NotImplementedError, match='implementation="xla"'):
        edges().call(paged_attention, implementation="mosaic_gpu")


BAD_ARGUMENTS = {
    "q without heads": ({"q": jnp.zeros((2, 64))}, r"q.shape=\(2, 64\)"),
    "other head dim": ({"q": jnp.zeros((2, 4, 32))}, r"q.shape=\(2, 4, 32\) and k_pages"),
    "heads no multiple": ({"q": jnp.zeros((2, 3, 64))}, "H=3 query heads"),
    "integer q": ({"q": jnp.zeros((2, 4, 64), jnp.int32)}, "q.dtype=int32"),
    "pages of other shapes": ({"k_pages": jnp.zeros((2, 2, 16, 64))}, "must both be"),
    "no pages": (
        {"k_pages": jnp.zeros((0, 2, 16, 64)), "v_pages": jnp.zeros((0, 2, 16, 64))},
        "at least one page",
    ),
    "pages of other dtypes": ({"dtype of v": jnp.bfloat16}, "must be equal"),
    "too many queries": ({"q": jnp.zeros((3, 4, 64))}, "give cu_q_lens"),
    "lengths of rank 2": ({"lengths": np.zeros((2, 1), np.int32)}, r"lengths.shape=\(2, 1\)"),
    "table of other rows": ({"page_indices": np.zeros((3, 4), np.int32)}, "must be .B=2, M"),
    "short cu_q_lens": ({"cu_q_lens": np.zeros(2, np.int32)}, r"B \+ 1 = 3"),
    "float lengths": ({"lengths": np.zeros(2, np.float32)}, "lengths.dtype=float32"),
    "unknown implementation": ({"implementation": "triton"}, "implementation='triton'"),
    "negative cap": ({"soft_cap": -1.0}, r"soft_cap=-1\.0"),
    "no window": ({"sliding_window": 0}, "sliding_window=0"),
}


@pytest.mark.parametrize("change, message", BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_a_wrong_argument_raises_and_shows_its_value(change, message):
    arguments = dict(vars(make_problem((3, 5))))
    del arguments["scales"]  # none: these pages are floats
    if "dtype of v" in change:
        change = {"v_pages": arguments["v_pages"].astype(change["dtype of v"])}
    arguments = {**arguments, **change}
    with pytest.raises(ValueError, match=message):
        paged_attention(**arguments)
