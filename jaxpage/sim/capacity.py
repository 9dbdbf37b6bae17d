"""The highest rate that a system sustains: how many requests a second it serves in time."""

import math
from collections.abc import Callable

from jaxpage.config import require


def capacity(
    latency_s: Callable[[float], float], limit_s: float, start: float, precision: float = 0.03
) -> float:
    """The highest rate at which `latency_s(rate)` stays within `limit_s`, by bisection.

    From `start`, a rate of any size, it doubles or halves until it stands between two; then it
    narrows them to `precision`, relative. Latency must not fall with the rate.

    Raises:
      ConfigError: a number is not positive, or no rate within nine orders of `start` is between.
    """
    for name, value in {"limit_s": limit_s, "start": start, "precision": precision}.items():
        require(0 < value < math.inf, f"{name}={value} must be a positive number")
    low = high = start
    if latency_s(start) <= limit_s:
        while latency_s(high := 2 * low) <= limit_s:
            low = high
            require(low < start * 1e9, f"no rate takes longer than {limit_s} s: take more requests")
    else:
        while latency_s(low := high / 2) > limit_s:
            high = low
            require(high > start / 1e9, f"even at rate {high} latency is more than {limit_s} s")
    while high > low * (1 + precision):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if latency_s(middle) <= limit_s else (low, middle)
    return low
