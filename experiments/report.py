"""Builds the report: one page of all figures and claims, from the result files alone.

    python -m experiments.report --results=results/figures --out=report/index.html

--results holds a folder a script, as `experiments.figures` leaves it. The page is one file without
links to others: pictures, style, script and the recorded page tables are in it. What failed or was
not run is said. If --demo holds the runs of `experiments.demo`, its page map offers them, too.
Seconds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments import common, plots, report_html
from experiments.figure_list import EXPERIMENTS, Experiment
from experiments.outcomes import read_outcome

FLAGS = flags.FLAGS

MOST_DEMO_STEPS = 240  # of each run, so that the page stays small


def define_flags() -> None:
    flags.DEFINE_string("results", "results/figures", "The folder with a folder a script.")
    flags.DEFINE_string("demo", "results/demo", "The folder of the demo's runs, if there are any.")
    flags.DEFINE_string("out", "report/index.html", "The page to write.")


def main(_: list[str]) -> None:
    print(write(EXPERIMENTS, Path(FLAGS.results), Path(FLAGS.out), Path(FLAGS.demo)))


def write(
    experiments: Sequence[Experiment],
    results: Path,
    path: Path,
    demo: Path = Path("results/demo"),
) -> Path:
    """Writes the page to `path`, which is returned."""
    outcomes = [read_outcome(each, results / each.name) for each in experiments]
    common.make_folder(str(path.parent))
    path.write_text(report_html.page(outcomes, demo_recordings(demo)), encoding="utf-8")
    return path


def demo_recordings(folder: Path) -> list[dict[str, Any]]:
    """The demo's runs in the form that the page map reads: a number a page, of its one owner."""
    return [demo_recording(run) for run in plots.read_runs(folder)]


def demo_recording(run: plots.Run) -> dict[str, Any]:
    """At most `MOST_DEMO_STEPS` steps of it; each holds what changed, as [first, pages, owner]."""
    owners, ids = run.owners
    steps = np.unique(np.linspace(0, len(owners) - 1, MOST_DEMO_STEPS).astype(int))
    before = np.full(owners.shape[1], len(ids))
    recorded = []
    for step in steps:
        recorded.append(
            {"end_s": round(float(run.steps["time_s"][step]), 3)}
            | {"owners": runs_of_changes(before, owners[step])}
        )
        before = owners[step]
    return {
        "name": f"demo: {run.label}",
        "num_pages": owners.shape[1],
        "page_size": run.summary["page_size"],
        "num_sequences": len(ids),
        "steps": recorded,
    }


def runs_of_changes(before: np.ndarray, after: np.ndarray) -> list[list[int]]:
    """Where `i16[P]` differs, as runs of neighbours with one value: first, count, value."""
    changed = np.flatnonzero(before != after)
    if not len(changed):
        return []
    ends = (np.diff(changed) != 1) | (np.diff(after[changed]) != 0)
    return [
        [int(run[0]), len(run), int(after[run[0]])]
        for run in np.split(changed, np.flatnonzero(ends) + 1)
    ]


if __name__ == "__main__":
    define_flags()
    common.run(main)
