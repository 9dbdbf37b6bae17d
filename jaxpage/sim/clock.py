"""Simulated time, exact to the nanosecond: whole seconds and nanoseconds, as two integers.

A float of 32 bits knows an hour to a quarter of a millisecond. Integers add up without a rest and
in any order, so that steps taken together end at the same instant as steps taken one by one.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike

from jaxpage.config import require

_NANOS = 1_000_000_000


class Time(struct.PyTreeNode):
    """Instants, or durations; arrays of one shape. `0 <= nanos < 1e9`."""

    seconds: jax.Array  # i32
    nanos: jax.Array  # i32

    def __getitem__(self, index) -> "Time":
        return Time(self.seconds[index], self.nanos[index])


def create(seconds: ArrayLike) -> Time:
    """From seconds on the host, `float64`.

    Raises:
      ConfigError: one is negative, no number, or past 2^31 seconds.
    """
    exact = np.asarray(seconds, np.float64)
    fits = (exact >= 0) & (exact < 2**31 - 1)
    require(bool(np.all(fits)), f"times must be from 0 to 2^31 seconds, got {exact[~fits][:3]}")
    nanos = np.rint((exact % 1.0) * _NANOS).astype(np.int64)
    whole = np.floor(exact).astype(np.int64) + nanos // _NANOS
    return Time(jnp.asarray(whole, jnp.int32), jnp.asarray(nanos % _NANOS, jnp.int32))


def never(shape: tuple[int, ...] = ()) -> Time:
    """After everything."""
    return Time(jnp.full(shape, jnp.iinfo(jnp.int32).max, jnp.int32), jnp.zeros(shape, jnp.int32))


def after(time: Time, seconds: jax.Array) -> Time:
    """The instant `seconds: f32[]` later, which are rounded to nanoseconds."""
    whole = jnp.floor(seconds)
    nanos = jnp.round((seconds - whole) * _NANOS).astype(jnp.int32)
    return add(time, Time(whole.astype(jnp.int32), nanos))


def add(time: Time, duration: Time) -> Time:
    """The sum. Of two parts below 1e9 (or a rounded 1e9) the sum of nanoseconds fits 31 bits."""
    nanos = time.nanos + duration.nanos
    carry = nanos // _NANOS
    return Time(time.seconds + duration.seconds + carry, nanos - carry * _NANOS)


def is_due(time: Time, now: Time) -> jax.Array:
    """Whether `time` is not after `now`."""
    same_second = (time.seconds == now.seconds) & (time.nanos <= now.nanos)
    return (time.seconds < now.seconds) | same_second


def latest(first: Time, second: Time) -> Time:
    """The later of two instants."""
    return choose(is_due(second, first), first, second)


def choose(condition: jax.Array, first: Time, second: Time) -> Time:
    """`first` where the condition holds, and elsewhere `second`."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), first, second)


def to_seconds(time: Time) -> np.ndarray:
    """On the host, `float64`; what is `never` is not a number."""
    whole = np.asarray(time.seconds, np.float64)
    seconds = whole + np.asarray(time.nanos, np.float64) / _NANOS
    return np.where(whole == np.iinfo(np.int32).max, np.nan, seconds)
