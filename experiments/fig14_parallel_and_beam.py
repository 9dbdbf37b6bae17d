"""What rate does each system sustain with several samples, or beams, a request? The paper's Fig 14.

    python -m experiments.fig14_parallel_and_beam --out=DIR

OPT-13B on one A100, Alpaca's lengths, Poisson arrivals, simulated with the engine's own scheduler:
basic sampling, 2, 4 and 6 samples, and beam search with 2, 4 and 6 beams. A system sustains a rate
while the mean normalized latency is at most `--limit_s`, as in `fig12_single_sequence`.

With pages, samples and beams share what they have in common. What may follow a beam is drawn by
`sim.branching`, whose numbers SmolLM2-135M gave (`measure_branching`); which beams live the
scheduler decides. Contiguous memory shares nothing: each sequence reserves its own, and computes
its prompt by itself. So its beams are independent sequences here, priced twice: as if it cost
nothing that a row whose beam dies takes over another's KV ("no copies"), and with copies of all
that KV, as many as pages see: their rows that change hands copy one page each, but where the last
page is full, one time in 16.

DIR gets `fig14.jsonl`, a row a simulation, and `fig14.png`. Two to four minutes on two cores;
--quick is less than one. Expected by the paper's text: over Oracle 1.3 with basic sampling and 2.3
with 6 beams. Refuted if the gain does not grow with samples and beams. Pages saved stand beside
those of its Fig 15.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from experiments import common, host_overhead, paper_setups, rate_search
from experiments.comparisons import Comparison
from experiments.fig15_sharing_savings import PAPER as FIG_15
from experiments.fig15_sharing_savings import WIDTHS
from experiments.paper_setups import PAGE_SIZE, SETUPS
from experiments.plots import FAINT, LABELS, RUN_COLOURS, STYLE
from experiments.rate_search import Point
from jaxpage.config import require
from jaxpage.sim import arrivals
from jaxpage.sim import lengths as length_sets
from jaxpage.sim.lengths import Lengths
from jaxpage.sim.runs import Run

FLAGS = flags.FLAGS

CONTIGUOUS = ("oracle", "pow2", "max")
SYSTEMS = ("paged", *CONTIGUOUS)
START = 56.0  # sequences a second: what pages sustain in Fig 12
GAINS = {("parallel", 1): 1.3, ("beam", 6): 2.3}  # the text: over Oracle


class Case(NamedTuple):
    """A simulated system; in `copied_share` what `CostModel` calls so."""

    method: str
    width: int
    system: str
    copied_share: float = 0.0


def define_flags() -> None:
    paper_setups.define_length_flags()
    rate_search.define_flags(num_slots=512)
    for module in (paper_setups, rate_search):
        flags.adopt_module_key_flags(module)
    flags.DEFINE_list("widths", list(map(str, WIDTHS)), "Samples and beams, beside basic sampling.")
    flags.DEFINE_list("systems", list(SYSTEMS), "Which memories.")
    flags.DEFINE_integer("sequences", 8192, "Requests times their width.", lower_bound=1)
    flags.DEFINE_bool("quick", False, "Width 4, paged and Oracle, and few requests.")
    flags.DEFINE_string("out", None, "The folder to write to.", required=True)


def main(_: list[str]) -> None:
    out = common.make_folder(FLAGS.out)
    widths, systems = widths_and_systems()
    lengths, source = paper_setups.lengths_by_flags("alpaca")
    found = search_all(widths, systems, lengths)
    common.write_jsonl(
        out / "fig14.jsonl",
        (case._asdict() | point for case, result in found.items() for point in result["points"]),
    )
    last = summary(found)
    draw(found, out / "fig14.png")
    common.print_last_line(
        {**last, "limit_s": FLAGS.limit_s, "lengths": source, **common.provenance()}
    )


def widths_and_systems() -> tuple[tuple[int, ...], tuple[str, ...]]:
    if FLAGS.quick:
        return (4,), ("paged", "oracle")
    widths = tuple(int(width) if width.isdigit() else 0 for width in FLAGS.widths)
    require(
        len(widths) > 0 and min(widths) > 1,
        f"--widths={','.join(FLAGS.widths)}: whole numbers from 2 on",
    )
    wrong = [system for system in FLAGS.systems if system not in SYSTEMS]
    require(
        not wrong and {"paged", "oracle"} <= set(FLAGS.systems),
        f"--systems={','.join(FLAGS.systems)}: take paged, oracle, and of {', '.join(SYSTEMS)}",
    )
    return widths, tuple(system for system in SYSTEMS if system in FLAGS.systems)


def search_all(
    widths: tuple[int, ...], systems: tuple[str, ...], lengths: Lengths
) -> dict[Case, dict[str, Any]]:
    """What each sustains; beams that copy come last, since pages say how much."""
    cases = [Case("parallel", width, system) for width in (1, *widths) for system in systems]
    cases += [Case("beam", width, "paged") for width in widths]
    found = rate_search.search_all(cases, lambda case: search(case, lengths))
    copying = [
        Case("beam", width, system, moved_share(found[Case("beam", width, "paged")]))
        for width in widths
        for system in systems
        if system in CONTIGUOUS
    ]
    return found | rate_search.search_all(copying, lambda case: search(case, lengths))


def search(case: Case, lengths: Lengths) -> dict[str, Any]:
    num = FLAGS.sequences // (4 if FLAGS.quick else 1) // case.width
    rng = np.random.default_rng(FLAGS.seed)
    chosen = lengths.take(rng.choice(len(lengths.prompts), num))
    times_s = arrivals.poisson(rng, num, 1.0)
    # Contiguous memory knows no beams: they are sequences like any others.
    is_search = case.method == "beam" and case.system == "paged"
    several: dict[str, Any] = {"num_beams" if is_search else "num_samples": case.width}

    def measure(rate: float) -> Point:
        run, _ = SETUPS["opt-13b"].run(
            case.system,
            length_sets.requests_of(chosen, times_s / rate, **several),
            overhead=host_overhead.by_flags(),
            copied_share=case.copied_share,
            num_slots=FLAGS.num_slots,
            max_beams=case.width if is_search else 1,
        )
        return rate_search.point_of(rate, run) | sharing_of(run)

    precision = 0.5 if FLAGS.quick else 0.03
    start = START / case.width
    return rate_search.highest_rate(measure, FLAGS.limit_s, start, precision=precision)


def sharing_of(run: Run) -> dict[str, float]:
    """What sharing saved, and what it copied."""
    steps = run.steps
    saved = 1 - np.sum(steps["held_pages"]) / np.sum(steps["named_pages"])
    return {
        "pages_saved_percent": float(100 * saved),
        "copied_pages_a_token": float(np.sum(steps["num_copied"]) / np.sum(steps["num_sampled"])),
    }


def moved_share(paged: Mapping[str, Any]) -> float:
    """Rows that go over to another beam in a step, of all that take it: see the docstring."""
    return rate_search.at_highest_rate(paged)["copied_pages_a_token"] * PAGE_SIZE / (PAGE_SIZE - 1)


def summary(found: Mapping[Case, dict[str, Any]]) -> dict[str, Any]:
    """Rates, what paged sustains over others, and pages saved; by names like `beam 6`."""
    rates: dict[str, dict[str, float]] = {}
    saved: dict[str, float] = {}
    shares: dict[str, float] = {}
    for case, result in found.items():
        name = f"{case.method} {case.width}"
        rates.setdefault(name, {})[case.system] = result["rate"]
        if case.system == "paged":
            saved[name] = rate_search.at_highest_rate(result)["pages_saved_percent"]
        elif case.method == "beam":
            shares[name] = case.copied_share
            without = found[Case("parallel", case.width, case.system)]
            rates[name][f"{case.system}, no copies"] = without["rate"]
    over = {
        name: {system: of["paged"] / rate for system, rate in of.items() if system != "paged"}
        for name, of in rates.items()
    }
    return {"rates": rates, "paged_over": over, "pages_saved_percent": saved, "copied": shares}


def comparison(last: dict[str, Any]) -> list[Comparison]:
    """The text's gains over Oracle, and Fig 15's savings."""
    rows = []
    for name, over in last["paged_over"].items():
        method, width = name.split()
        for system in ("oracle", "oracle, no copies"):
            if system in over:
                what = f"{name}: requests/s of paged over {system}"
                paper = GAINS.get((method, int(width)))
                rows.append(Comparison(what, paper, over[system]))
    for name, percent in last["pages_saved_percent"].items():
        method, width = name.split()
        printed = FIG_15["alpaca", method]
        paper = printed.get(int(width)) if isinstance(printed, dict) else None
        if int(width) > 1:
            rows.append(Comparison(f"{name}: pages saved (Fig 15)", paper, percent, "%"))
    return rows


def draw(found: Mapping[Case, dict[str, Any]], path: Path) -> None:
    """Latency by rate: samples above, beams below, a panel a width."""
    widths = sorted({case.width for case in found if case.width > 1})
    uncopied = {f"{system}, no copies": f"{LABELS[system]}, no copies" for system in CONTIGUOUS}
    labels = LABELS | uncopied
    colours = RUN_COLOURS | {name: RUN_COLOURS[name.split(",")[0]] for name in uncopied}
    over = summary(found)["paged_over"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4 * len(widths) + 1, 7.2), layout="constrained")
        grid = figure.subplots(2, len(widths), squeeze=False)
        for row, method in zip(grid, ("parallel", "beam"), strict=True):
            for axes, width in zip(row, widths, strict=True):
                cases = [case for case in found if (case.method, case.width) == (method, width)]
                results = {case.system: found[case] for case in cases}
                rate_search.draw_latencies(axes, results, FLAGS.limit_s, colours, labels)
                name = f"{method} {width}"
                paper = GAINS.get((method, width))
                said = "" if paper is None else f" (paper {paper})"
                axes.set_title(f"{name}: {over[name]['oracle']:.2f} x Oracle{said}")
        handles, names = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper left", ncols=4, frameon=False)
        gain = over["parallel 1"]["oracle"]
        figure.supxlabel(
            f"Simulated, OPT-13B, Alpaca. Basic sampling: {gain:.2f} x Oracle (paper 1.3). "
            "Beams in contiguous memory copy what they take over.",
            x=0.01,
            ha="left",
            fontsize=10,
            color=FAINT,
        )
        figure.savefig(path)


if __name__ == "__main__":
    define_flags()
    common.run(main)
