"""The highest rate that a system sustains within a latency, found and drawn: Figs 12, 16 and 17."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import flags
from matplotlib.axes import Axes

from jaxpage.sim.capacity import capacity
from jaxpage.sim.runs import Run

FLAGS = flags.FLAGS

Point = dict[str, float]  # what came of one rate


def define_flags() -> None:
    flags.DEFINE_float("limit_s", 0.2, "The most normalized latency, s/token.", lower_bound=1e-6)
    flags.DEFINE_float("overhead_s", 0.0, "Seconds that the host adds to a step.", lower_bound=0.0)
    flags.DEFINE_integer("num_slots", 256, "The most sequences at once.", lower_bound=1)


def point_of(rate: float, run: Run) -> Point:
    """Means over requests, and over steps."""
    return {
        "rate": rate,
        "normalized_latency_s": float(np.mean(run.timeline.normalized_latency_s)),
        "batched": float(np.mean(run.steps["num_running"])),
    }


def highest_rate(measure: Callable[[float], Point], limit_s: float, start: float) -> dict[str, Any]:
    """The highest rate within `limit_s` of mean normalized latency, and the points on the way."""
    points = []

    def latency_s(rate: float) -> float:
        points.append(measure(rate))
        return points[-1]["normalized_latency_s"]

    rate = capacity(latency_s, limit_s, start)
    return {"rate": rate, "points": sorted(points, key=lambda point: point["rate"])}


def draw_latencies(
    axes: Axes,
    found: Mapping[str, dict[str, Any]],
    limit_s: float,
    colours: Mapping[str, str],
    labels: Mapping[str, str],
) -> None:
    """Normalized latency by rate, a line for each system of `found`, and the limit."""
    for system, result in found.items():
        rates = [point["rate"] for point in result["points"]]
        latencies = [point["normalized_latency_s"] for point in result["points"]]
        axes.plot(rates, latencies, "o-", ms=3, color=colours[system], label=labels[system])
    axes.axhline(limit_s, color="#b9bec4", lw=0.8)
    axes.set_ylim(0, 2 * limit_s)
    axes.set_xlim(0, 1.15 * max(result["rate"] for result in found.values()))
    axes.set_xlabel("requests/s")
    axes.set_ylabel("normalized latency, s/token")
