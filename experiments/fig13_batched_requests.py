"""How many requests run at once under four allocators? The paper's Fig 13.

    python -m experiments.fig13_batched_requests --out=DIR

OPT-13B on one A100, simulated with the engine's own scheduler: ShareGPT's requests at 2 a second
and Alpaca's at 30, Poisson, for `--minutes`. Batches are means over the steps until the last
arrival; under the contiguous allocators of ShareGPT, and Max of both, memory alone decides them.
Under the others it hangs on how long a step takes, which was another engine's in 2023: beside what
the calibrated model gives stands the overhead of a step with which it would give the printed value,
found by bisection (`--search`); then one host, with so much a step and so much a row, with which
pages would give both of theirs, and what all would batch with it. Lengths by the other pairing
rule, and as they were counted, stand beside those of --pairs and --rescale (`--others`). DIR gets
`fig13.jsonl`, a row a case, and `fig13.png`. Five minutes on one core; --quick is seconds.
Expected: Max 7.00 in both, Pow2 and Oracle on ShareGPT within a tenth of the paper. Refuted if not.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import matplotlib
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from experiments import common, paper_setups
from experiments.comparisons import Comparison
from experiments.plots import INK, LABELS, RUN_COLOURS, STYLE
from jaxpage.sim.cost_model import NO_OVERHEAD, Overhead
from jaxpage.sim.trace import Arrival

FLAGS = flags.FLAGS

RATES = {"sharegpt": 2.0, "alpaca": 30.0}  # requests a second
PAPER = {
    "sharegpt": {"max": 7.00, "pow2": 9.81, "oracle": 13.62, "paged": 30.42},
    "alpaca": {"max": 7.00, "pow2": 43.24, "oracle": 72.75, "paged": 132.44},
}
MOST_OVERHEAD_S = 0.2  # where the search begins


def define_flags() -> None:
    paper_setups.define_length_flags()
    flags.adopt_module_key_flags(paper_setups)
    flags.DEFINE_float("minutes", 20.0, "For how long requests arrive.", lower_bound=0.1)
    flags.DEFINE_bool("search", True, "Find the overhead that would give the paper's batch.")
    flags.DEFINE_bool("others", True, "Take lengths by the other rules as well.")
    flags.DEFINE_bool("quick", False, "Take a twentieth of the time, one rule, and no search.")
    flags.DEFINE_string("out", None, "The folder to write to.", required=True)


def main(_: list[str]) -> None:
    out = common.make_folder(FLAGS.out)
    span_s = 60 * FLAGS.minutes / (20 if FLAGS.quick else 1)
    batches: dict[str, dict[str, float]] = {}
    overheads: dict[str, dict[str, float | None]] = {}
    others: dict[str, dict[str, dict[str, float]]] = {}
    sources = {}
    paged: dict[str, list[Arrival]] = {}  # what pages served
    with (out / "fig13.jsonl").open("w") as file:
        for dataset in PAPER:
            rate = RATES[dataset]
            num = max(round(rate * span_s), 1)
            requests, sources[dataset] = paper_setups.poisson_requests(dataset, num, rate)
            paged[dataset] = requests
            batches[dataset], overheads[dataset] = {}, {}
            for allocator in LABELS:
                found = measure(allocator, requests)
                overhead_s = None
                if FLAGS.search and not FLAGS.quick and found.is_by_time:
                    overhead_s = overhead_for(PAPER[dataset][allocator], allocator, requests)
                batches[dataset][allocator] = found.batch
                overheads[dataset][allocator] = overhead_s
                tell(file, dataset, allocator, found, overhead_s=overhead_s)
            others[dataset] = {}
            if FLAGS.others and not FLAGS.quick:
                for name, lengths in paper_setups.other_lengths(dataset):
                    requests = paper_setups.poisson_of(lengths, num, rate)
                    by_allocator = others[dataset].setdefault(name, {})
                    for allocator in LABELS:
                        found = measure(allocator, requests)
                        by_allocator[allocator] = found.batch
                        tell(file, dataset, allocator, found, name)
    host = host_for_both({dataset: of["paged"] for dataset, of in overheads.items()}, paged)
    draw(batches, host, out / "fig13.png")
    common.print_last_line(
        batches
        | {"others": others, "overheads_s": overheads, "with_one_host": host}
        | {"lengths": sources, **common.provenance()}
    )


class Found(NamedTuple):
    """Means over steps."""

    batch: float  # requests
    step_s: float
    queued: float  # share of the steps in which requests wait

    @property
    def is_by_time(self) -> bool:
        """Whether the batch hangs on the length of a step; with a queue always, on memory alone."""
        return self.queued < 0.99


def measure(allocator: str, requests: Sequence[Arrival], overhead: Overhead = NO_OVERHEAD) -> Found:
    """Over the second half of the time until the last arrival; in the first the system fills."""
    until_s = requests[-1].arrival_s
    run, _ = paper_setups.SETUPS["opt-13b"].run(
        allocator, requests, overhead=overhead, until_s=until_s
    )
    counts = (run.steps["end_s"] > until_s / 2) & (run.steps["end_s"] <= until_s)
    steps = {name: column[counts] for name, column in run.steps.items()}
    means = (steps["num_running"], steps["seconds"], steps["num_waiting"] > 0)
    return Found(*(float(np.mean(values)) for values in means))


def overhead_for(paper: float, allocator: str, requests: Sequence[Arrival]) -> float | None:
    """Seconds to add to a step for the paper's batch, to a tenth of a millisecond.

    None where no overhead up to the most would: steps are too long already, or memory too short.
    """

    def is_less(overhead_s: float) -> bool:
        return measure(allocator, requests, Overhead(overhead_s)).batch < paper

    low, high = 0.0, MOST_OVERHEAD_S
    if not is_less(low) or is_less(high):
        return None
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if is_less(middle) else (low, middle)
    return high


def host_for_both(
    overheads_s: Mapping[str, float | None], requests: Mapping[str, Sequence[Arrival]]
) -> dict[str, Any] | None:
    """One host, with seconds a step and a row, for both batches of pages; and what all batch.

    What a data set alone needs of a step, at the batch that is printed, is a point of a line. None
    where a point is not known, or the line takes less than no time.
    """
    needed = [overheads_s[dataset] for dataset in PAPER]
    if None in needed:
        return None
    printed = [of["paged"] for of in PAPER.values()]
    row_s, step_s = np.polyfit(printed, np.array(needed, np.float64), 1).tolist()
    if min(row_s, step_s) < 0:
        return None
    host = Overhead(step_s, row_s)
    print(f"with {1e3 * step_s:.1f} ms more a step and {1e3 * row_s:.2f} ms a row, batched:")
    batched: dict[str, dict[str, float]] = {}
    for dataset, of in requests.items():
        batched[dataset] = {name: measure(name, of, host).batch for name in LABELS}
        told = (f"{name} {batch:.1f}" for name, batch in batched[dataset].items())
        print(f"{dataset:>8} {', '.join(told)}", flush=True)
    return {"step_s": step_s, "row_s": row_s, "batched": batched}


def tell(
    file: TextIO,
    dataset: str,
    allocator: str,
    found: Found,
    name: str = "",
    overhead_s: float | None = None,
) -> None:
    """A row for the file and a sentence; `name` is of other lengths than by flags."""
    row = {
        "dataset": dataset,
        "lengths": name,
        "allocator": allocator,
        "batched_requests": found.batch,
        "paper": PAPER[dataset][allocator],
        "mean_step_s": found.step_s,
        "steps_with_a_queue": found.queued,
        "overhead_s_for_paper": overhead_s,
    }
    file.write(json.dumps(row) + "\n")
    print(sentence(row), flush=True)


def sentence(row: dict) -> str:
    """A row for people."""
    needs, ours = row["overhead_s_for_paper"], row["batched_requests"]
    more = "" if needs is None else f"; as printed with {1e3 * needs:.1f} ms more a step"
    return (
        f"{row['dataset']:>8} {row['lengths']:>23} {row['allocator']:>6}: {ours:.2f} batched "
        f"(paper {row['paper']:.2f}), {1e3 * row['mean_step_s']:.1f} ms a step{more}"
    )


def comparison(last: dict[str, Any]) -> list[Comparison]:
    """The batches that the figure prints, by the lengths of the flags and by others."""
    rows = []
    host = last["with_one_host"]
    for dataset, batches in PAPER.items():
        cases = {"": last[dataset], **last["others"][dataset]}
        if host is not None:
            # But for pages, to which it was fitted.
            batched = host["batched"][dataset]
            cases["one host"] = {name: batched[name] for name in batched if name != "paged"}
        for of_lengths, found in cases.items():
            for name, batch in found.items():
                what = f"{dataset}, {LABELS[name]}: requests batched"
                what += f" ({of_lengths})" if of_lengths else ""
                rows.append(Comparison(what, batches[name], batch))
    return rows


def draw(batches: dict[str, dict[str, float]], host: dict[str, Any] | None, path: Path) -> None:
    """Of each allocator ours, with the host if there is one, and the paper's; a panel each."""
    width = 0.38 if host is None else 0.28
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.6), layout="constrained")
        for axes, (dataset, ours) in zip(
            figure.subplots(1, len(batches)), batches.items(), strict=True
        ):
            for x, (name, batch) in enumerate(ours.items()):
                bars = [(batch, 1.0), (PAPER[dataset][name], 0.4)]
                if host is not None:
                    bars.insert(1, (host["batched"][dataset][name], 0.7))
                for number, (value, alpha) in enumerate(bars):
                    at = x + (number - (len(bars) - 1) / 2) * (width + 0.02)
                    axes.bar(at, value, width, color=RUN_COLOURS[name], alpha=alpha)
                    text = f"{value:.1f}" if value < 100 else f"{value:.0f}"
                    axes.text(at, value, text, ha="center", va="bottom", color=INK, fontsize=8.5)
            axes.set_xticks(range(len(ours)), [LABELS[name] for name in ours])
            axes.set_title(f"{dataset}, {RATES[dataset]:.0f} requests/s")
            axes.set_ylabel("requests batched")
        said = "Full colour: simulated here. Light: the paper's Fig 13."
        if host is not None:
            step_ms, row_ms = 1e3 * host["step_s"], 1e3 * host["row_s"]
            said += f" Between: with {step_ms:.1f} ms more a step and {row_ms:.2f} ms a row."
        figure.supxlabel(said, fontsize=10)
        figure.savefig(path)


if __name__ == "__main__":
    define_flags()
    common.run(main)
