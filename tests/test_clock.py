"""Simulated time: exact, whatever is added in whatever order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpage.config import ConfigError
from jaxpage.sim import clock

NANOS = st.integers(0, 10**15)


def exactly(time: clock.Time) -> int:
    return int(time.seconds) * 10**9 + int(time.nanos)


def of_nanos(nanos: int) -> clock.Time:
    return clock.Time(jnp.int32(nanos // 10**9), jnp.int32(nanos % 10**9))


@settings(deadline=None)
@given(NANOS, NANOS)
def test_sums_and_order_are_those_of_integers(first, second):
    one, other = of_nanos(first), of_nanos(second)
    assert exactly(clock.add(one, other)) == first + second
    assert bool(clock.is_due(one, other)) == (first <= second)
    assert exactly(clock.latest(one, other)) == max(first, second)


@settings(deadline=None)
@given(st.lists(st.floats(0, 100, width=32), min_size=1, max_size=20), st.randoms())
def test_steps_add_up_in_any_order(durations, random):
    def total(durations):
        now = clock.create(0.0)
        for seconds in durations:
            now = clock.after(now, jnp.float32(seconds))
        return exactly(now)

    shuffled = list(durations)
    random.shuffle(shuffled)
    assert total(shuffled) == total(durations)
    assert total(durations) == pytest.approx(sum(durations) * 1e9, rel=1e-6, abs=len(durations))


def test_what_rounds_to_a_second_is_one():
    assert exactly(clock.create(1.9999999999)) == 2 * 10**9
    almost = jnp.float32(np.nextafter(np.float32(1), np.float32(0)))  # 60 ns less
    later = clock.after(of_nanos(999_999_999), almost)
    assert 0 <= int(later.nanos) < 10**9
    # Near a second a float of 32 bits knows multiples of 64 ns.
    assert abs(exactly(later) - (999_999_999 + 999_999_940)) <= 32


def test_times_come_back_and_never_is_no_number():
    seconds = np.array([0.0, 0.25, 3599.999999999, 2e9])
    np.testing.assert_array_equal(clock.to_seconds(clock.create(seconds)), seconds)
    assert np.isnan(clock.to_seconds(clock.never((2,)))).all()
    assert bool(jnp.all(clock.is_due(clock.create(seconds), clock.never((4,)))))


@pytest.mark.parametrize("wrong", [-1e-9, float("nan"), float("inf"), 2.0**31])
def test_what_is_no_time_is_refused(wrong):
    with pytest.raises(ConfigError, match="times must be from 0 to 2"):
        clock.create(np.array([1.0, wrong]))


def test_times_are_arrays_of_one_shape():
    times = clock.create(np.array([1.5, 2.5]))
    assert exactly(times[1]) == 2_500_000_000
    assert [leaf.dtype for leaf in jax.tree.leaves(times)] == [jnp.int32] * 2
