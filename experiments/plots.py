"""Draws the pictures of runs that `experiments.serve` recorded, from their result files alone.

    python -m experiments.plots --out=results/demo

DIR holds one folder a run (`summary.json`, `steps.jsonl`, `requests.jsonl`, `owners.npz`), as
`experiments.demo` leaves it; the pictures go beside them. A few seconds.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from absl import flags
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from experiments import common
from jaxpage.config import require
from jaxpage.sim.metrics import WASTE_CATEGORIES

FLAGS = flags.FLAGS

LABELS = {"max": "Max", "pow2": "Pow2", "oracle": "Oracle", "paged": "paged"}  # in drawing order
# The paper's Fig 2: average share of KV memory in percent, in the order of WASTE_CATEGORIES. It
# labels no segment of vLLM's bar but the first; Oracle knows the length, so nothing is internal.
PAPER_SHARES = {
    "max": (20.4, 13.3, 57.3, 8.9),
    "pow2": (26.8, 17.9, 13.6, 41.6),
    "oracle": (38.2, 25.2, 0.0, 36.6),
    "paged": (96.3, 0.0, 0.0, 3.7),
}
CATEGORY_LABELS = {
    "token_states": "holds tokens",
    "reservation": "reserved, used later",
    "internal": "reserved, never used",
    "external": "in no reservation:\nexternal fragmentation\nand other",
}
CATEGORY_COLOURS = {
    "token_states": "#2f7f79",
    "reservation": "#e3b85c",
    "internal": "#c8644a",
    "external": "#b9bec4",
}
RUN_COLOURS = {"max": "#c8644a", "pow2": "#d9a441", "oracle": "#6f86b0", "paged": "#2f7f79"}
# Sixteen colours of like strength, in an order that sets neighbours apart.
REQUEST_COLOURS = (
    "#2f7f79", "#d98b4a", "#5b77b5", "#b5547a", "#8aa64b", "#8063a8", "#d8b24a", "#4aa3bf",
    "#b0553f", "#4f9a62", "#c983b5", "#6b6f2f", "#3f6f9a", "#cf6f6a", "#7fb5a0", "#8f6a4a",
)  # fmt: skip
# How much of its colour a page shows: written; its request will write it; nobody ever will.
WRITTEN, LATER, NEVER = 1.0, 0.42, 0.16

CACHED_COLOUR, SHARED_COLOUR = "#dfe2e5", "#23272b"

INK, FAINT = "#2b2f33", "#7a8087"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.titlepad": 8.0,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "white",
    "savefig.dpi": 150,
}


@dataclass(frozen=True)
class Run:
    """The result files of one run; only the summary is read before it is asked for."""

    folder: Path
    summary: dict[str, Any]

    @property
    def allocator(self) -> str:
        return self.summary["allocator"]

    @property
    def label(self) -> str:
        return LABELS.get(self.allocator, self.allocator)

    @property
    def is_measured(self) -> bool:
        return "token_states_share" in self.summary

    @property
    def shares(self) -> np.ndarray:
        """Percent of the pool by waste category, `f64[4]`."""
        return np.array([100 * self.summary[f"{name}_share"] for name in WASTE_CATEGORIES])

    @cached_property
    def steps(self) -> dict[str, np.ndarray]:
        """Columns of `steps.jsonl`."""
        rows = [row for _, row in common.read_jsonl(str(self.folder / "steps.jsonl"))]
        require(bool(rows), f"{self.folder / 'steps.jsonl'} has no steps: run it again")
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}

    @cached_property
    def requests(self) -> dict[str, dict]:
        """Rows of `requests.jsonl` by id."""
        rows = common.read_jsonl(str(self.folder / "requests.jsonl"))
        return {row["id"]: row for _, row in rows}

    @cached_property
    def owners(self) -> tuple[np.ndarray, list[str]]:
        """Who owns each page, `i16[steps, P]`: a number of the requests, whose ids come with it.

        The three numbers after theirs are a page that is free, that is cached, and that is shared.
        """
        with np.load(self.folder / "owners.npz") as arrays:
            names = [str(name) for name in arrays["request_ids"]]
            owners, nobody = arrays["owners"], int(arrays["nobody"])
        return np.where(owners < nobody, owners, owners - nobody + len(names)), names


def read_run(folder: Path) -> Run:
    """The run recorded in `folder`.

    Raises:
      ConfigError: there is none.
    """
    path = folder / "summary.json"
    require(path.is_file(), f"{path} is missing: record a run with experiments.serve first")
    return Run(folder, json.loads(path.read_text()))


def read_runs(folder: Path) -> list[Run]:
    """The measured runs in the sub-folders of `folder`, in drawing order; failed ones left out."""
    names = [name for name in LABELS if (folder / name / "summary.json").is_file()]
    runs = [read_run(folder / name) for name in names]
    return [run for run in runs if run.is_measured]


def draw_all(folder: Path) -> list[Path]:
    """Draws every picture of the runs under `folder` into it; returns their paths."""
    runs = read_runs(folder)
    require(bool(runs), f"{folder} holds no run that succeeded: there is nothing to draw")
    paths = [folder / name for name in ("waste.png", "batch_size.png", "page_map.png")]
    waste_bars({run.allocator: run.shares for run in runs}, paths[0])
    batch_over_time(runs, paths[1])
    page_map(runs, paths[2])
    return paths


def waste_bars(shares: Mapping[str, np.ndarray], path: Path) -> None:
    """Where the KV memory was: a bar an allocator, and the paper's Fig 2 beside it, lighter.

    `shares` are percent by waste category, `f64[4]`.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 6.2), layout="constrained")
        axes = figure.add_subplot()
        for x, (name, ours) in enumerate(shares.items()):
            stack_bar(axes, x - 0.19, ours, alpha=1.0)
            if name in PAPER_SHARES:
                stack_bar(axes, x + 0.19, np.array(PAPER_SHARES[name]), alpha=0.4)
            for offset, whose in ((-0.19, "here"), (0.19, "paper")):
                axes.text(x + offset, -2, whose, ha="center", va="top", color=FAINT, fontsize=10)
        labels = [LABELS.get(name, name) for name in shares]
        axes.set_xticks(range(len(shares)), labels, fontsize=14)
        axes.tick_params(axis="x", length=0, pad=22)
        axes.set_ylim(0, 100)
        axes.set_yticks(range(0, 101, 25))
        axes.set_ylabel("share of the KV memory, %")
        handles = [
            Patch(color=CATEGORY_COLOURS[name], label=CATEGORY_LABELS[name])
            for name in reversed(WASTE_CATEGORIES)
        ]
        figure.legend(handles=handles, loc="outside right center", frameon=False)
        filled = {name: f"{ours[0]:.0f} %" for name, ours in shares.items()}
        _head(figure, "The share of KV memory that holds tokens: " + _compare(filled))
        _foot(
            figure,
            "Here: mean over the steps with requests waiting for memory. Paper: Fig 2, OPT-13B.",
        )
        figure.savefig(path)


def batch_over_time(runs: Sequence[Run], path: Path) -> None:
    """Running requests by wall time, a line for each run."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 5.6), layout="constrained")
        axes = figure.add_subplot()
        for run in runs:
            time_s, running = run.steps["time_s"], run.steps["num_running"]
            colour = RUN_COLOURS.get(run.allocator, INK)
            edges = np.concatenate([[0.0], time_s])
            is_ours = run.allocator == "paged"
            if is_ours:
                axes.fill_between(edges[:-1], running, step="post", color=colour, alpha=0.10, lw=0)
            axes.stairs(
                np.append(running, 0),
                np.append(edges, edges[-1]),  # down to nothing when the last request ends
                color=colour,
                linewidth=2.6 if is_ours else 1.6,
                baseline=None,
                label=f"{run.label}: done after {time_s[-1]:.0f} s",
            )
            axes.plot(time_s[-1], 0, "o", color=colour, markersize=7, clip_on=False, zorder=3)
        axes.set_xlim(0, 1.01 * max(run.steps["time_s"][-1] for run in runs))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("seconds since the start of serving")
        axes.set_ylabel("requests running at once")
        figure.legend(loc="outside right center", frameon=False)
        means = {run.allocator: f"{run.summary['mean_batched_requests']:.1f}" for run in runs}
        _head(figure, "Requests running at once in the same memory: " + _compare(means))
        _foot(figure, "The means in the title are over the steps with requests waiting for memory.")
        figure.savefig(path)


def page_map(runs: Sequence[Run], path: Path) -> None:
    """Which request owns which page over time: a panel for each run, on one time axis."""
    columns = 2 if len(runs) > 1 else 1
    rows = -(-len(runs) // columns)
    last_s = max(float(run.steps["time_s"][-1]) for run in runs)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.5 * columns, 4.6 * rows + 1.0), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
        for axes, run in zip(panels, runs, strict=False):
            _draw_map(axes, run, last_s)
        for axes in panels[len(runs) :]:
            axes.remove()
        for axes in panels[max(len(runs) - columns, 0) : len(runs)]:
            axes.set_xlabel("seconds since the start of serving")
            axes.tick_params(labelbottom=True)
        for axes in panels[: len(runs) : columns]:
            axes.set_ylabel("page")
        handles = [
            Patch(facecolor=_tint("#2f7f79", strength), edgecolor=FAINT, linewidth=0.5, label=label)
            for strength, label in (
                (WRITTEN, "holds tokens"),
                (LATER, "reserved, used later"),
                (NEVER, "reserved, never used"),
                (0.0, "free"),
            )
        ]
        handles += [
            Patch(facecolor=colour, edgecolor=FAINT, linewidth=0.5, label=label)
            for number, (colour, label) in enumerate(
                ((CACHED_COLOUR, "cached, nobody's now"), (SHARED_COLOUR, "shared by several"))
            )
            if any(np.any(run.owners[0] == len(run.owners[1]) + 1 + number) for run in runs)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
        several = "Runs are reserved for tokens that come late or never; pages come with the tokens"
        one = "Which request owns which page"
        _head(figure, (several if len(runs) > 1 else one) + " (one colour a request)")
        figure.savefig(path)


def page_strengths(run: Run) -> np.ndarray:
    """How strongly to paint each page at each step, `f32[steps, P]`: WRITTEN, LATER or NEVER.

    A reservation is one run of pages for one sequence, which is never preempted: from its last step
    back each step wrote one token, down to its prompt. (For the few steps in which a prompt is
    computed in chunks it counts as written.) A paged sequence holds no page before it needs it.
    """
    owners, ids = run.owners
    strengths = np.full(owners.shape, WRITTEN, np.float32)
    if run.allocator == "paged":
        return strengths
    page_size = run.summary["page_size"]
    for number, request_id in enumerate(ids):
        held = owners == number
        steps = np.flatnonzero(held.any(axis=1))
        if not len(steps):
            continue
        row = run.requests[request_id]
        final_len = row["prompt_tokens"] + row["output_tokens"]
        pages = np.flatnonzero(held[steps[0]])
        lengths = np.maximum(row["prompt_tokens"], final_len - 1 - (steps[-1] - steps))
        offset = pages[None, :] - pages[0]
        strength = np.where(offset < -(-final_len // page_size), LATER, NEVER)
        strength = np.where(offset < -(-lengths[:, None] // page_size), WRITTEN, strength)
        strengths[np.ix_(steps, pages)] = strength
    return strengths


def _draw_map(axes: Axes, run: Run, last_s: float) -> None:
    owners, ids = run.owners
    palette = np.array([_rgb(REQUEST_COLOURS[i % len(REQUEST_COLOURS)]) for i in range(len(ids))])
    others = [np.ones(3), _rgb(CACHED_COLOUR), _rgb(SHARED_COLOUR)]  # free pages are white
    palette = np.concatenate([palette.reshape(-1, 3), others])
    strengths = page_strengths(run)
    time_s = run.steps["time_s"]
    # Steps are not equally long; the picture's columns are.
    columns = np.linspace(0, time_s[-1], 1600, endpoint=False)
    step = np.minimum(np.searchsorted(time_s, columns, side="right"), len(time_s) - 1)
    colour = palette[owners[step]]
    image = 1 - (1 - colour) * strengths[step][..., None]
    axes.imshow(
        image.transpose(1, 0, 2),
        origin="lower",
        aspect="auto",
        interpolation="antialiased",
        extent=(0, float(time_s[-1]), 0, owners.shape[1]),
    )
    axes.set_xlim(0, last_s)
    axes.set_ylim(0, owners.shape[1])
    summary = run.summary
    axes.set_title(
        f"{run.label}: {summary['mean_batched_requests']:.1f} requests run and "
        f"{run.shares[0]:.0f} % of memory holds tokens\nwhile others wait for memory"
    )


def stack_bar(axes: Axes, x: float, shares: np.ndarray, alpha: float, width: float = 0.36) -> None:
    """One bar of percents by waste category, `f64[4]`; `alpha` is how strong its colours are."""
    bottoms = np.concatenate([[0.0], np.cumsum(shares)])
    for name, share, bottom in zip(WASTE_CATEGORIES, shares, bottoms, strict=False):
        colour = _tint(CATEGORY_COLOURS[name], alpha)
        axes.bar(x, share, width, bottom=bottom, color=colour, edgecolor="white", linewidth=1.0)
        if share >= 4:
            is_dark = alpha == 1.0 and name in ("token_states", "internal")
            axes.text(
                x, bottom + share / 2, f"{share:.1f}", ha="center", va="center", fontsize=11,
                color="white" if is_dark else INK,
            )  # fmt: skip


def _head(figure: Figure, title: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=15, fontweight="bold")


def _foot(figure: Figure, text: str) -> None:
    figure.supxlabel(text, x=0.01, ha="left", fontsize=10, color=FAINT)


def _compare(values: dict[str, str]) -> str:
    """The values of `paged` and `max` in a few words; all values if one of these is missing."""
    names = ("paged", "max") if {"paged", "max"} <= set(values) else tuple(values)
    return ", ".join(f"{values[name]} {LABELS.get(name, name)}" for name in names)


def _rgb(colour: str) -> np.ndarray:
    return np.array(to_rgb(colour))


def _tint(colour: str, strength: float) -> str:
    """`colour` mixed with white: 1 is itself, 0 is white."""
    red, green, blue = 1 - (1 - _rgb(colour)) * strength
    return to_hex((red, green, blue))


def main(_: list[str]) -> None:
    for path in draw_all(Path(FLAGS.out)):
        print(path)


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "The folder of the runs, and of the pictures.", required=True)
    common.run(main)
