"""The highest rate that a system sustains within a latency, found and drawn."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from absl import flags
from matplotlib.axes import Axes

from experiments import host_overhead
from experiments.plots import INK, RUN_COLOURS
from jaxpage.sim.capacity import capacity
from jaxpage.sim.runs import Run

FLAGS = flags.FLAGS

Point = dict[str, float]  # what came of one rate
LIGHT_LOADS = (0.25, 0.5, 0.75)  # parts of the highest rate


def define_flags(num_slots: int = 256) -> None:
    flags.DEFINE_float("limit_s", 0.2, "The most normalized latency, s/token.", lower_bound=1e-6)
    host_overhead.define_flags()
    flags.adopt_module_key_flags(host_overhead)
    flags.DEFINE_integer("num_slots", num_slots, "The most sequences at once.", lower_bound=1)


def point_of(rate: float, run: Run) -> Point:
    """Means over requests, and over steps."""
    return {
        "rate": rate,
        "normalized_latency_s": float(np.mean(run.timeline.normalized_latency_s)),
        "batched": float(np.mean(run.steps["num_running"])),
    }


def search_all[C: tuple](
    cases: Iterable[C], search: Callable[[C], dict[str, Any]]
) -> dict[C, dict[str, Any]]:
    """What `search` finds in each case, two at a time; says each as it is known."""
    found = {}
    with ThreadPoolExecutor(2) as pool:
        futures = {case: pool.submit(search, case) for case in cases}
        for case, future in futures.items():
            found[case] = future.result()
            name = ", ".join(str(part) for part in case if part)
            print(f"{name}: {found[case]['rate']:.2f} requests/s", flush=True)
    return found


def highest_rate(
    measure: Callable[[float], Point],
    limit_s: float,
    start: float,
    also_at: Sequence[float] = (),
    precision: float = 0.03,
) -> dict[str, Any]:
    """The highest rate within `limit_s` of mean normalized latency, and the points on the way.

    It is as near as `precision`, a part of it.

    Then `also_at` these parts of it, for a curve from where the load is light.
    """
    points = []

    def latency_s(rate: float) -> float:
        points.append(measure(rate))
        return points[-1]["normalized_latency_s"]

    rate = capacity(latency_s, limit_s, start, precision)
    points += [measure(part * rate) for part in also_at]
    return {"rate": rate, "points": sorted(points, key=lambda point: point["rate"])}


def at_highest_rate(result: Mapping[str, Any]) -> Point:
    """The point of the rate that `highest_rate` found."""
    return next(point for point in result["points"] if point["rate"] == result["rate"])


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


def mark_paper(axes: Axes, ratio: float, other_rate: float, limit_s: float, other: str) -> None:
    """Where the line of the paper's system would cross the limit, by its gain over another."""
    rate = ratio * other_rate
    axes.plot(rate, limit_s, "D", ms=8, mfc="white", mec=INK, mew=1.4, zorder=3)
    axes.annotate(
        f"paper:\n{ratio:g} x {other}", (rate, limit_s), (0, 9), textcoords="offset points",
        ha="center", va="bottom", fontsize=10,
    )  # fmt: skip
    axes.set_xlim(right=max(axes.get_xlim()[1], 1.1 * rate))


def draw_conditions(axes: Axes, over: Mapping[str, float], paper: float, other: str) -> None:
    """What is sustained over `other`, a dot for each condition, and the paper's value as a line."""
    for y, ratio in enumerate(over.values()):
        axes.plot([0, ratio], [y, y], color="#dfe2e5", lw=1.4, zorder=1)
        axes.plot(ratio, y, "o", ms=7, color=RUN_COLOURS["paged"])
        axes.annotate(
            f"{ratio:.2f}", (ratio, y), (9, 0), textcoords="offset points", va="center",
            fontsize=10, bbox={"fc": "white", "ec": "none", "pad": 1},
        )  # fmt: skip
    axes.axvline(paper, color=INK, lw=1.2, ls=(0, (4, 3)), zorder=0)
    axes.text(paper, -0.75, f"paper {paper:g}", ha="center", va="bottom", fontsize=10)
    axes.set_yticks(range(len(over)), list(over), fontsize=10)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(over) - 0.5, -0.8)
    axes.set_xlim(0, 1.2 * max(paper, *over.values()))
    axes.set_xlabel(f"rate over {other}'s")
