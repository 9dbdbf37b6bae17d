"""The rate that a system sustains, by simulation, and the picture of it: latency by rate."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from jaxpage.sim.capacity import capacity
from jaxpage.sim.runs import Run


def sustained(
    serve: Callable[[float], Run], limit_s: float, start: float, precision: float = 0.03
) -> dict[str, Any]:
    """The highest rate with a mean normalized latency up to `limit_s`, and a point a simulation.

    `serve(rate)` simulates requests that come at that rate; the search begins at `start`.
    """
    points = []

    def latency_s(rate: float) -> float:
        run = serve(rate)
        points.append({"rate": rate} | measured(run))
        return points[-1]["normalized_latency_s"]

    rate = capacity(latency_s, limit_s, start, precision)
    return {"rate": rate, "points": sorted(points, key=lambda point: point["rate"])}


def measured(run: Run) -> dict[str, float]:
    """What a run says of its system: means over requests and steps."""
    steps = run.steps
    return {
        "normalized_latency_s": float(np.mean(run.timeline.normalized_latency_s)),
        "batched": float(np.mean(steps["num_running"])),
        "pages_saved_percent": float(
            100 * (1 - np.sum(steps["held_pages"]) / np.sum(steps["named_pages"]))
        ),
        "copied_pages_a_token": float(np.sum(steps["num_copied"]) / np.sum(steps["num_sampled"])),
        "preemptions": int(np.sum(run.num_preemptions)),
    }


def draw_latencies(
    axes: Axes,
    points: Mapping[str, Sequence[Mapping[str, float]]],
    limit_s: float,
    colours: Mapping[str, str],
    labels: Mapping[str, str],
) -> None:
    """Normalized latency by rate, a line a system, and the limit."""
    for system, of_system in points.items():
        axes.plot(
            [point["rate"] for point in of_system],
            [point["normalized_latency_s"] for point in of_system],
            "o-",
            ms=3,
            color=colours[system],
            label=labels[system],
        )
    axes.axhline(limit_s, color="#b9bec4", lw=0.8)
    axes.set_ylim(0, 2 * limit_s)
    axes.set_xlabel("requests/s")
    axes.set_ylabel("normalized latency, s/token")
