"""The choice of the next token against NumPy: cuts by sorting, frequencies by chi-square, and rows
that never look at each other, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import ArrayLike

from jaxpage.model import sampling
from jaxpage.scheduling.state import Sampling

V = 16
INF = float("inf")

sample = jax.jit(sampling.sample)
keep_top_k = jax.jit(sampling.keep_top_k)
keep_top_p = jax.jit(sampling.keep_top_p)
penalise = jax.jit(sampling.penalise_repetition)


def settings_of(n: int, *, temperature=0.0, top_k=0, top_p=1.0, penalty=1.0, seed=0) -> Sampling:
    """Settings of `n` rows, each a number for all of them or a list."""

    def rows(value, dtype):
        return jnp.asarray(np.broadcast_to(np.asarray(value, dtype), (n,)))

    return Sampling(
        temperature=rows(temperature, np.float32),
        top_k=rows(top_k, np.int32),
        top_p=rows(top_p, np.float32),
        repetition_penalty=rows(penalty, np.float32),
        seed=rows(seed, np.uint32),
    )


def choose(
    logits, positions: ArrayLike = 0, seen=None, **how
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, log-probabilities and failures of `sample` for rows of logits."""
    logits = np.asarray(logits, np.float32)
    n, vocab = logits.shape
    positions = np.broadcast_to(np.asarray(positions, np.int32), (n,))
    seen = np.full((n, 1), vocab, np.int32) if seen is None else np.asarray(seen, np.int32)
    tokens, logprobs, failed = sample(logits, settings_of(n, **how), positions, seen)
    return np.asarray(tokens), np.asarray(logprobs), np.asarray(failed)


def random_logits(n: int, seed: int, vocab: int = V) -> np.ndarray:
    """Rows with ties, signs, zeros of both signs and impossible tokens."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0.0, 2.0, (n, vocab)).astype(np.float32)
    rounded = np.round(logits)  # ties, 0.0 and -0.0
    logits = np.where(rng.random((n, 1)) < 0.5, rounded, logits)
    logits = np.where(rng.random((n, vocab)) < 0.15, -INF, logits)
    logits[:, 0] = rng.choice([0.0, -0.0, 1.5], n)  # never all impossible
    return logits.astype(np.float32)


def log_softmax(logits) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    peak = logits.max(-1, keepdims=True)
    return logits - peak - np.log(np.sum(np.exp(logits - peak), -1, keepdims=True))


# --- greedy --------------------------------------------------------------------------------------


def test_greedy_takes_the_first_of_the_largest():
    logits = random_logits(200, seed=0)
    logits[:50, 7] = logits[:50, 11] = 9.0
    tokens, _, failed = choose(logits)
    assert tokens.tolist() == np.argmax(logits, axis=-1).tolist()
    assert set(tokens[:50].tolist()) == {7}
    assert not failed.any()


def test_greedy_does_not_depend_on_seed_position_or_cuts():
    logits = random_logits(50, seed=1)
    tokens, _, _ = choose(logits, positions=np.arange(50), seed=np.arange(50), top_k=3, top_p=0.2)
    assert tokens.tolist() == choose(logits)[0].tolist()


def test_temperature_with_a_top_k_of_one_is_greedy_where_there_is_no_tie():
    logits = np.random.default_rng(2).permuted(np.tile(np.arange(V) / 4, (100, 1)), axis=1)
    tokens, _, _ = choose(logits, temperature=1.7, top_k=1, seed=np.arange(100))
    assert tokens.tolist() == np.argmax(logits, axis=-1).tolist()


@pytest.mark.parametrize("temperature", (1e-3, 1e-9, 1e-30, 1e-37))
def test_a_temperature_near_zero_is_nearly_greedy_and_never_overflows(temperature):
    logits = np.array([[40.0, 50.0, -20.0, 3.0], [-90.0, -80.0, -70.0, -95.0]])
    for cuts in ({}, {"top_k": 3}, {"top_p": 0.9}):
        tokens, _, failed = choose(logits, temperature=temperature, **cuts)
        assert tokens.tolist() == [1, 2]
        assert not failed.any()


# --- cuts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", (1, 2, 5, V - 1, V, V + 3))
def test_top_k_keeps_what_sorting_keeps_and_ties(k):
    logits = random_logits(300, seed=k)
    kept = np.asarray(keep_top_k(logits, np.full(300, k, np.int32)))
    smallest = np.sort(logits, axis=-1)[:, ::-1][:, min(k, V) - 1]
    expected = np.where(logits >= smallest[:, None], logits, -INF)
    np.testing.assert_array_equal(kept, expected)


def test_top_k_of_zero_keeps_all():
    logits = random_logits(50, seed=3)
    np.testing.assert_array_equal(keep_top_k(logits, np.zeros(50, np.int32)), logits)


def top_p_by_sorting(row: np.ndarray, p: float) -> tuple[np.ndarray, float]:
    """What is kept of a row, and how near its probability comes to `p` without being it."""
    probabilities = np.exp(log_softmax(row))
    values = np.unique(row)[::-1]  # ties are one value
    mass = np.cumsum([probabilities[row == value].sum() for value in values])
    last = values[np.argmax(mass >= p)]
    return np.where(row >= last, row, -INF), float(np.min(np.abs(mass - p)))


@pytest.mark.parametrize("p", (1e-6, 0.1, 0.5, 0.9, 0.99))
def test_top_p_keeps_what_sorting_keeps_and_ties(p):
    logits = random_logits(300, seed=int(100 * p))
    kept = np.asarray(keep_top_p(logits, np.full(300, p, np.float32)))
    num_checked = 0
    for row, found in zip(logits, kept, strict=True):
        expected, margin = top_p_by_sorting(row, p)
        if margin > 1e-5:  # else float32 decides
            np.testing.assert_array_equal(found, expected)
            num_checked += 1
    assert num_checked > 290


def test_top_p_of_one_keeps_even_what_is_improbable():
    logits = np.array([[0.0, -200.0, -INF, 3.0]], np.float32)
    np.testing.assert_array_equal(keep_top_p(logits, np.ones(1, np.float32)), logits)


def test_top_p_counts_after_top_k_and_temperature():
    # Of 0.4, 0.3, 0.2, 0.1, the two largest are 4/7 and 3/7: with p = 0.5 only the first is left,
    # while of all four it would be two. At temperature 2 they are 0.536 and 0.464: the first still.
    logits = np.log(np.tile([0.3, 0.1, 0.4, 0.2], (400, 1)))
    seeds = np.arange(400)
    both, _, _ = choose(logits, temperature=1.0, top_k=2, top_p=0.5, seed=seeds)
    assert set(both.tolist()) == {2}
    only_p, _, _ = choose(logits, temperature=1.0, top_p=0.5, seed=seeds)
    assert set(only_p.tolist()) == {0, 2}
    # Hot enough, the first has less than half of the two.
    hot, _, _ = choose(logits, temperature=8.0, top_k=2, top_p=0.55, seed=seeds)
    assert set(hot.tolist()) == {0, 2}


# --- draws ---------------------------------------------------------------------------------------


def chi_square(tokens: np.ndarray, probabilities: np.ndarray) -> float:
    """Pearson's statistic over the possible tokens; impossible ones must not occur."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    possible = probabilities > 0
    assert not counts[~possible].any()
    expected = len(tokens) * probabilities[possible]
    assert expected.min() > 20
    return float(np.sum((counts[possible] - expected) ** 2 / expected))


DRAWS = 20_000
ROW = np.array([1.0, -0.5, 0.25, 0.25, -1.5, 0.0, -INF, 0.75], np.float32)
BOUND = 24.3  # chi-square of 7 degrees is above it once in a thousand times


@pytest.mark.parametrize("temperature", (0.6, 1.0, 2.5))
@pytest.mark.parametrize("vary", ("seed", "positions"))
def test_draws_follow_the_softmax_over_seeds_and_over_positions(temperature, vary):
    logits = np.tile(ROW, (DRAWS, 1))
    tokens, _, _ = choose(logits, temperature=temperature, **{vary: np.arange(DRAWS)})
    right = np.exp(log_softmax(ROW / temperature))
    assert chi_square(tokens, right) < BOUND
    wrong = np.exp(log_softmax(ROW / (1.25 * temperature)))
    assert chi_square(tokens, wrong) > BOUND  # the bound would see a quarter more heat


def test_draws_follow_the_softmax_of_what_the_cuts_keep():
    logits = np.tile(ROW, (DRAWS, 1))
    tokens, _, _ = choose(logits, temperature=1.0, top_k=5, top_p=0.8, seed=np.arange(DRAWS))
    kept = np.where(ROW >= 0.25, ROW, -INF)  # top 5 without the last, which goes past 0.8
    assert chi_square(tokens, np.exp(log_softmax(kept))) < BOUND


def test_neighbouring_seeds_and_positions_draw_independently():
    logits = np.zeros((DRAWS, 4))
    first, _, _ = choose(logits, temperature=1.0, seed=np.arange(DRAWS), positions=5)
    for how in ({"seed": np.arange(DRAWS) + 1, "positions": 5},
                {"seed": np.arange(DRAWS), "positions": 6}):  # fmt: skip
        second, _, _ = choose(logits, temperature=1.0, **how)
        assert chi_square(4 * first + second, np.full(16, 1 / 16)) < 37.7  # 15 degrees, 1 in 1000


# --- repetition penalty --------------------------------------------------------------------------


@pytest.mark.parametrize("factor", (1.0, 1.3, 0.7))
def test_the_penalty_is_that_of_numpy(factor):
    n = 100
    logits = random_logits(n, seed=8)
    seen = np.random.default_rng(9).integers(0, V + 1, (n, 6)).astype(np.int32)  # V is none
    expected = logits.copy()
    for row in range(n):
        for token in set(seen[row].tolist()) - {V}:  # once, however often it was seen
            value = logits[row, token]
            expected[row, token] = value / np.float32(factor) if value > 0 else value * factor
    penalties = np.full(n, factor, np.float32)
    np.testing.assert_allclose(penalise(logits, penalties, seen), expected, rtol=1e-6)


def test_the_penalty_changes_the_choice_and_not_the_reported_probability():
    logits = np.array([[2.0, 1.9, -1.0], [-0.5, -0.6, -3.0], [2.0, 1.0, -1.0]])
    seen = [[0, 3]] * 3
    tokens, logprobs, _ = choose(logits, seen=seen, penalty=1.5)
    assert tokens.tolist() == [1, 1, 0]  # the last in spite of its penalty
    expected = log_softmax(logits)[np.arange(3), tokens]
    np.testing.assert_allclose(logprobs, expected, rtol=1e-6)
    assert choose(logits, seen=seen)[0].tolist() == [0, 0, 0]


# --- log-probabilities and failures --------------------------------------------------------------


@pytest.mark.parametrize("temperature", (0.0, 1.3))
def test_logprobs_are_those_of_the_models_own_distribution(temperature):
    logits = random_logits(200, seed=10) + 300.0  # exp(300) is not a float32
    tokens, logprobs, failed = choose(
        logits, temperature=temperature, top_k=4, top_p=0.9, seed=np.arange(200)
    )
    assert not failed.any()
    expected = log_softmax(logits)[np.arange(200), tokens]
    np.testing.assert_allclose(logprobs, expected, rtol=1e-5, atol=1e-4)


BROKEN = {
    "one NaN": lambda row: np.where(np.arange(V) == 3, np.nan, row),
    "all NaN": lambda row: np.full(V, np.nan),
    "an infinity": lambda row: np.where(np.arange(V) == 3, INF, row),
    "nothing possible": lambda row: np.full(V, -INF),
}


@pytest.mark.parametrize("temperature", (0.0, 1.0))
@pytest.mark.parametrize("breaks", BROKEN.values(), ids=BROKEN.keys())
def test_a_row_that_is_not_finite_fails_alone(breaks, temperature):
    logits = random_logits(6, seed=11)
    how = {"temperature": temperature, "top_k": 5, "top_p": 0.8, "seed": np.arange(6)}
    seen = np.tile(np.arange(4), (6, 1))
    before = choose(logits, seen=seen, penalty=1.2, **how)
    logits[2] = breaks(logits[2])
    tokens, logprobs, failed = choose(logits, seen=seen, penalty=1.2, **how)
    assert failed.tolist() == [False, False, True, False, False, False]
    assert 0 <= tokens[2] < V
    others = [0, 1, 3, 4, 5]
    assert tokens[others].tolist() == before[0][others].tolist()
    assert logprobs[others].tobytes() == before[1][others].tobytes()


# --- rows do not look at each other --------------------------------------------------------------

N = 12
MIXED = {
    "temperature": np.array([0, 1, 0.5, 2, 1, 0, 0.7, 1, 1.2, 3, 1, 0.9]),
    "top_k": np.array([0, 0, 3, 0, 2, 1, 0, 1, 5, 0, 0, 40]),
    "top_p": np.array([1, 1, 1, 0.5, 0.9, 0.1, 0.05, 1, 0.7, 1, 0.99, 1]),
    "penalty": np.array([1, 1, 1.2, 1, 1, 3, 1, 1.1, 0.8, 1, 1, 1]),
    "seed": np.array([0, 1, 2, 3, 3, 3, 2**32 - 1, 0, 1, 2, 9, 8]),
    "positions": np.array([4, 4, 0, 1, 2, 3, 9, 9, 100, 5, 5, 5]),
}


def mixed_rows(rows) -> list:
    """Each row's token and the bits of its log-probability, computed with `rows` as the batch."""
    rows = np.asarray(rows)
    logits = random_logits(N, seed=12, vocab=300)
    seen = np.random.default_rng(13).integers(0, 301, (N, 8))
    how = {name: values[rows] for name, values in MIXED.items()}
    tokens, logprobs, _ = choose(logits[rows], seen=seen[rows], **how)
    return list(zip(tokens.tolist(), logprobs.view(np.uint32).tolist(), strict=True))


def test_a_row_draws_the_same_bits_alone_in_company_and_in_any_order():
    together = mixed_rows(range(N))
    for row in range(N):
        assert mixed_rows([row]) == [together[row]], row
    order = np.random.default_rng(14).permutation(N)
    assert mixed_rows(order) == [together[row] for row in order]
    assert mixed_rows([3, 3, 7]) == [together[row] for row in (3, 3, 7)]


def test_the_settings_of_one_row_never_affect_another():
    logits = random_logits(2, seed=15, vocab=300)
    seen = np.array([[0, 5], [1, 2]])
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "penalty": 1.0, "seed": 4}
    wild = {"temperature": 0.3, "top_k": 2, "top_p": 0.4, "penalty": 2.0, "seed": 5}
    alone = choose(logits, seen=seen, positions=7, **plain)
    for name, value in [*wild.items(), ("temperature", 0.0)]:
        how = plain | {name: np.array([plain[name], value])}
        tokens, logprobs, _ = choose(logits, seen=seen, positions=7, **how)
        assert tokens[0] == alone[0][0], name
        assert logprobs[0] == alone[1][0], name


def test_a_draw_depends_on_seed_and_position_and_both_matter():
    logits = np.zeros((64, 300))
    same, _, _ = choose(logits, temperature=1.0, seed=6, positions=3)
    assert len(set(same.tolist())) == 1
    by_seed, _, _ = choose(logits, temperature=1.0, seed=np.arange(64), positions=3)
    by_position, _, _ = choose(logits, temperature=1.0, seed=6, positions=np.arange(64))
    assert len(set(by_seed.tolist())) > 40
    assert len(set(by_position.tolist())) > 40
    assert by_seed[6] == by_position[3] == same[0]
    swapped, _, _ = choose(logits[:2], temperature=1.0, seed=[6, 3], positions=[3, 6])
    assert swapped[0] != swapped[1]
