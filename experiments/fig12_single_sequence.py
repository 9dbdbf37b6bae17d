"""What rate of requests does each system sustain? The paper's Fig 12.

    python -m experiments.fig12_single_sequence --out=DIR

OPT-13B, 66B and 175B on the paper's A100s, ShareGPT and Alpaca, Poisson arrivals, simulated with
the engine's own scheduler under five rules of memory: pages, the three contiguous ones, and static
batches of the longest sequences (`static`: what FasterTransformer does, with the largest batch that
fits). A system sustains a rate while the mean normalized latency is at most `--limit_s`; the
highest is found by bisection, to 3 %. Traces have an end, and the longer they are the less a rate
can be above what is sustained for good. DIR gets `fig12.jsonl`, a row a simulation, and
`fig12.png`. About four minutes on two cores; --quick is OPT-13B with few requests. Expected on
ShareGPT: paged 1.7 to 2.7 times Oracle, 2.7 to 8 times Max, and up to 22 times FasterTransformer.
Refuted outside. What is not known: lengths (--turns, --alpaca), and the overhead of a step in an
engine of 2023, none here unless --overhead_s.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from experiments import common, host_overhead, paper_setups, rate_search
from experiments.comparisons import Comparison
from experiments.paper_setups import SETUPS
from experiments.plots import LABELS, RUN_COLOURS, STYLE
from experiments.rate_search import Point
from jaxpage.config import require
from jaxpage.sim import arrivals
from jaxpage.sim import lengths as length_sets
from jaxpage.sim.lengths import Lengths

FLAGS = flags.FLAGS

SYSTEMS = ("paged", "oracle", "pow2", "max", "static")
NUM_REQUESTS = {"sharegpt": 2048, "alpaca": 8192}
# The paper's rate axes end there: where the search begins.
STARTS = {
    ("opt-13b", "sharegpt"): 2.0,
    ("opt-66b", "sharegpt"): 1.0,
    ("opt-175b", "sharegpt"): 2.5,
    ("opt-13b", "alpaca"): 30.0,
    ("opt-66b", "alpaca"): 20.0,
    ("opt-175b", "alpaca"): 20.0,
}
OTHERS = LABELS | {"static": "static batches"}
# Its text, of ShareGPT: paged over the others.
PAPER = {"oracle": (1.7, 2.7), "max": (2.7, 8.0), "static": (1.0, 22.0)}


def define_flags() -> None:
    paper_setups.define_length_flags()
    flags.adopt_module_key_flags(paper_setups)
    flags.DEFINE_list("models", list(SETUPS), "Which models to serve.")
    flags.DEFINE_list("datasets", list(NUM_REQUESTS), "Whose requests.")
    rate_search.define_flags()
    flags.adopt_module_key_flags(rate_search)
    flags.DEFINE_bool("quick", False, "OPT-13B alone, a quarter of the requests.")
    flags.DEFINE_string("out", None, "The folder to write to.", required=True)


def main(_: list[str]) -> None:
    out = common.make_folder(FLAGS.out)
    panels = panels_by_flags()
    length_sets_of = {name: paper_setups.lengths_by_flags(name) for name in NUM_REQUESTS}
    cases = [(*panel, system) for panel in panels for system in SYSTEMS]
    found = rate_search.search_all(cases, lambda case: search(*case, length_sets_of[case[1]][0]))
    with (out / "fig12.jsonl").open("w") as file:
        for (model, dataset, system), result in found.items():
            for point in result["points"]:
                row = {"model": model, "dataset": dataset, "system": system, **point}
                file.write(json.dumps(row) + "\n")
    draw(found, panels, out / "fig12.png")
    common.print_last_line(
        {
            "rates": nested(found, panels),
            "paged_over": ratios(found, panels),
            "limit_s": FLAGS.limit_s,
            "lengths": {name: source for name, (_, source) in length_sets_of.items()},
            **common.provenance(),
        }
    )


def panels_by_flags() -> list[tuple[str, str]]:
    """Models and data sets."""
    models, datasets = ["opt-13b"] if FLAGS.quick else FLAGS.models, FLAGS.datasets
    for flag, values, known in (("models", models, SETUPS), ("datasets", datasets, NUM_REQUESTS)):
        wrong = [value for value in values if value not in known]
        require(
            len(values) > 0 and not wrong,
            f"--{flag}={','.join(values)}: take of {', '.join(known)}",
        )
    return [panel for panel in STARTS if panel[0] in models and panel[1] in datasets]


def search(model: str, dataset: str, system: str, lengths: Lengths) -> dict[str, Any]:
    """The highest rate, and what was simulated on the way to it."""
    num = NUM_REQUESTS[dataset] // (4 if FLAGS.quick else 1)
    rng = np.random.default_rng(FLAGS.seed)
    chosen = lengths.take(rng.choice(len(lengths.prompts), num))
    # The same users at every rate, in faster or slower time.
    times_s = arrivals.poisson(rng, num, 1.0)

    def measure(rate: float) -> Point:
        run, _ = SETUPS[model].run(
            "max" if system == "static" else system,
            length_sets.requests_of(chosen, times_s / rate),
            num_slots=FLAGS.num_slots,
            static_batches=system == "static",
            overhead=host_overhead.by_flags(),
        )
        return rate_search.point_of(rate, run)

    return rate_search.highest_rate(measure, FLAGS.limit_s, STARTS[model, dataset])


def nested(found: Mapping, panels: list[tuple[str, str]]) -> dict[str, dict[str, float]]:
    """Rates by panel and system."""
    return {
        " ".join(panel): {system: found[*panel, system]["rate"] for system in SYSTEMS}
        for panel in panels
    }


def ratios(found: Mapping, panels: list[tuple[str, str]]) -> dict[str, dict[str, float]]:
    """What paged sustains over what each other does."""
    return {
        name: {system: rates["paged"] / rates[system] for system in SYSTEMS[1:]}
        for name, rates in nested(found, panels).items()
    }


def comparison(last: dict[str, Any]) -> list[Comparison]:
    """What paged sustains over the others; the text gives ranges for ShareGPT alone."""
    return [
        Comparison(
            f"{panel}: paged over {OTHERS[system]}",
            PAPER.get(system) if panel.endswith("sharegpt") else None,
            ratio,
            "x",
        )
        for panel, ratios in last["paged_over"].items()
        for system, ratio in ratios.items()
    ]


def draw(found: Mapping, panels: list[tuple[str, str]], path: Path) -> None:
    """Normalized latency by rate, a panel a model and data set."""
    colours = RUN_COLOURS | {"static": "#7a8087"}
    with matplotlib.rc_context(STYLE):
        columns = min(len(panels), 3)
        figure = Figure(
            figsize=(5 * columns, 3.6 * -(-len(panels) // columns)), layout="constrained"
        )
        grid = figure.subplots(-(-len(panels) // columns), columns, squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=True):
            results = {system: found[*panel, system] for system in SYSTEMS}
            rate_search.draw_latencies(axes, results, FLAGS.limit_s, colours, OTHERS)
            axes.set_title(", ".join(panel))
        grid.flat[0].legend(frameon=False, fontsize=10)
        figure.savefig(path)


if __name__ == "__main__":
    define_flags()
    common.run(main)
