"""Fits the cost model's efficiencies to measured kernels, and says how far off they are.

The parameters are exponentials, so they stay positive; the loss is Huber's of the logarithm of
predicted over measured, so that microseconds count as much as milliseconds and single outliers
little. A part of the rows is held out, by lot, and the errors are of those.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.optimize import nnls

from jaxpage.config import require
from jaxpage.sim.cost_model import Overhead
from jaxpage.sim.device import DeviceSpec
from jaxpage.sim.kernels import KINDS, Efficiency, Work, kernel_seconds, roofs
from jaxpage.sim.profiles import Rows

NUM_STEPS = 1500  # of Adam; the loss does not change in its fourth digit after a thousand
OUTLIER = 0.1  # relative error from which on a row's pull no longer grows
START = Efficiency(compute=0.7, memory=0.7, launch_s=5e-6, item_s=1e-7, sharpness=1.0)


class Errors(NamedTuple):
    """Absolute relative errors of some rows."""

    num_rows: int
    median: float
    p90: float


class Fit(NamedTuple):
    """One kind of kernel on one device."""

    efficiency: Efficiency  # f32[] each
    held_out: Errors
    held_out_nnls: Errors  # of non-negative least squares on the same rows


def split(rows: Rows, seed: int, held_out: float = 0.2) -> tuple[Rows, Rows]:
    """The rows to fit and those held out, by lot."""
    chosen = np.random.default_rng(seed).random(len(rows.kinds)) < held_out
    require(
        bool(chosen.any() and not chosen.all()),
        f"{len(rows.kinds)} rows are too few to hold out {held_out:g} of them: give more",
    )
    return rows.take(~chosen), rows.take(chosen)


def calibrate(rows: Rows, device: DeviceSpec, seed: int = 0) -> dict[str, Fit]:
    """The fit of each of `KINDS` that has rows."""
    return {
        kind: fit(rows.take(rows.kinds == number), device, seed)
        for number, kind in enumerate(KINDS)
        if (rows.kinds == number).any()
    }


def fit(rows: Rows, device: DeviceSpec, seed: int = 0) -> Fit:
    """Fits rows of one kind, but for those held out."""
    fitted, held_out = split(rows, seed)
    efficiency = _fit(fitted, device)
    linear = nnls_seconds(fitted, held_out)
    return Fit(
        efficiency,
        errors(predict(efficiency, held_out, device), held_out.seconds),
        errors(linear, held_out.seconds),
    )


def fit_host(num_rows: np.ndarray, seconds: np.ndarray) -> tuple[Overhead, Errors]:
    """A host's seconds a step and a row, from steps of `num_rows: f64[n]` that took `seconds`.

    Non-negative least squares of the relative error. Errors are those of each step by the fit of
    all others.
    """
    require(len(seconds) > 2, f"{len(seconds)} steps of a host are too few: give three or more")
    features = np.stack([np.ones_like(num_rows), num_rows], axis=1)
    relative = features / seconds[:, None]

    def weights(chosen: np.ndarray) -> np.ndarray:
        return nnls(relative[chosen], np.ones(np.count_nonzero(chosen)))[0]

    numbers = np.arange(len(seconds))
    predicted = [features[i] @ weights(numbers != i) for i in numbers]
    step_s, row_s = weights(numbers >= 0).tolist()
    return Overhead(step_s, row_s), errors(np.asarray(predicted), seconds)


def predict(efficiency: Efficiency, rows: Rows, device: DeviceSpec) -> np.ndarray:
    """Seconds of rows of one kind, `f32[n]`."""
    flops_per_s, bytes_per_s = (rate[rows.kinds] for rate in roofs(device))
    return np.asarray(kernel_seconds(efficiency, flops_per_s, bytes_per_s, rows.work))


def errors(predicted: np.ndarray, measured: np.ndarray) -> Errors:
    """How far off predictions are, relative to what was measured."""
    off = np.abs(predicted / measured - 1)
    return Errors(len(off), float(np.median(off)), float(np.quantile(off, 0.9)))


def errors_by_region(
    predicted: np.ndarray, rows: Rows, bounds: Iterable[int] = (64, 512)
) -> dict[str, Errors]:
    """Errors by how many tokens were computed: up to each bound, and beyond the last."""
    regions, lower = {}, 0
    for upper in (*bounds, None):
        chosen = (rows.tokens > lower) & (rows.tokens <= (upper or np.inf))
        name = f"{lower + 1} to {upper} tokens" if upper else f"more than {lower} tokens"
        if chosen.any():
            regions[name] = errors(predicted[chosen], rows.seconds[chosen])
        lower = upper or lower
    return regions


def nnls_seconds(fitted: Rows, asked: Rows) -> np.ndarray:
    """What non-negative least squares predicts, of the relative error: a sum of the terms."""

    def features(rows: Rows) -> np.ndarray:
        return np.stack([*rows.work, np.ones_like(rows.seconds)], axis=1).astype(np.float64)

    scale = features(fitted).max(axis=0)
    scale[scale == 0] = 1
    weights, _ = nnls(
        features(fitted) / scale / fitted.seconds[:, None], np.ones(len(fitted.seconds))
    )
    return features(asked) / scale @ weights


def _fit(rows: Rows, device: DeviceSpec) -> Efficiency:
    flops_per_s, bytes_per_s = (rate[rows.kinds] for rate in roofs(device))
    work = Work(*map(jnp.asarray, rows.work))
    measured = jnp.log(jnp.asarray(rows.seconds))

    def loss(logs: Efficiency) -> jax.Array:
        efficiency = jax.tree.map(jnp.exp, logs)
        predicted = jnp.log(kernel_seconds(efficiency, flops_per_s, bytes_per_s, work))
        return jnp.mean(optax.huber_loss(predicted, measured, delta=OUTLIER))

    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, NUM_STEPS))

    def step(_, carry):
        logs, state = carry
        updates, state = optimizer.update(jax.grad(loss)(logs), state)
        return optax.apply_updates(logs, updates), state

    @jax.jit
    def run(logs):
        return jax.lax.fori_loop(0, NUM_STEPS, step, (logs, optimizer.init(logs)))[0]

    logs = jax.tree.map(lambda x: jnp.log(jnp.float32(x)), START)
    with jax.numpy_dtype_promotion("standard"):  # optax promotes its counters
        return jax.tree.map(jnp.exp, run(logs))
