"""When requests arrive: random processes of a given mean rate, in seconds, ascending."""

import numpy as np

from jaxpage.config import require


def poisson(rng: np.random.Generator, num: int, rate: float) -> np.ndarray:
    """`num` arrivals of users who know nothing of each other, `rate` a second: `f64[num]`."""
    return gamma(rng, num, rate, cv=1.0)


def gamma(rng: np.random.Generator, num: int, rate: float, cv: float) -> np.ndarray:
    """With gaps of a gamma distribution whose deviation is `cv` of their mean; 1 is `poisson`."""
    _check(num, rate=rate, cv=cv)
    shape = cv**-2
    return np.cumsum(rng.gamma(shape, 1 / (rate * shape), num))


def bursty(rng: np.random.Generator, num: int, rate: float, burst: float) -> np.ndarray:
    """In bursts of `burst` requests on average (geometric), all at once, as `poisson` comes."""
    _check(num, rate=rate, burst=burst)
    require(burst >= 1, f"burst={burst} must be at least one request")
    starts = rng.random(num) < 1 / burst
    starts[0] = True
    instants = poisson(rng, int(np.sum(starts)), rate / burst)
    return instants[np.cumsum(starts) - 1]


def _check(num: int, **positive: float) -> None:
    require(num > 0, f"num={num} must be positive")
    for name, value in positive.items():
        require(0 < value < np.inf, f"{name}={value} must be a positive number")
