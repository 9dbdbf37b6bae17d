"""What a script left in its folder of results, and how it ended; or that it was not run."""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments import recorded_pages
from experiments.comparisons import Comparison
from experiments.figure_list import Experiment

ComparisonFn = Callable[[dict[str, Any]], list[Comparison]]


@dataclass(frozen=True)
class Outcome:
    """What a script left behind."""

    experiment: Experiment
    error: str | None = None  # why there is no result although it ran
    last: dict[str, Any] | None = None  # None where it failed, or was not run
    run: dict[str, Any] = field(default_factory=dict)  # how it was called and ended
    comparisons: list[Comparison] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)
    recordings: list[dict[str, Any]] = field(default_factory=list)  # of page tables
    log: str = ""

    @property
    def status(self) -> str:
        if self.error is not None:
            return "failed"
        return "not run" if self.last is None else "ok"


def comparison_of(name: str) -> ComparisonFn | None:
    """That of the script, which not every one has."""
    return getattr(importlib.import_module(f"experiments.{name}"), "comparison", None)


def read_outcome(
    experiment: Experiment,
    folder: Path,
    find: Callable[[str], ComparisonFn | None] = comparison_of,
) -> Outcome:
    """What is in a script's folder; a file that cannot be read is an error to be shown."""
    log = folder / "log.txt"
    said = log.read_text(errors="replace") if log.is_file() else ""
    run: dict[str, Any] = {}
    try:
        if (folder / "run.json").is_file():
            run = json.loads((folder / "run.json").read_text())
        last_file = folder / f"{experiment.name}.json"
        last = json.loads(last_file.read_text()) if last_file.is_file() else None
    except ValueError as error:
        return Outcome(experiment, f"results that are no JSON ({error})", run=run, log=said)
    if run.get("error") is not None:
        return Outcome(experiment, run["error"], run=run, log=said)
    if last is None:
        return Outcome(experiment, run=run)
    try:
        compare = find(experiment.name)
        comparisons = compare(last) if compare is not None else []
        recordings = folder / recorded_pages.FILE
        return Outcome(
            experiment,
            last=last,
            run=run,
            comparisons=comparisons,
            pictures=sorted(folder.glob("*.png")),
            recordings=json.loads(recordings.read_text()) if recordings.is_file() else [],
        )
    except Exception as error:  # whatever it was, the other sections are still worth showing
        words = f"results of another form: {type(error).__name__}: {error}"
        return Outcome(experiment, words, run=run, log=said)
