"""How long are prompts and answers? The paper's Fig 11.

    python -m experiments.fig11_lengths --out=DIR

Nothing is simulated: these are the lengths from which the other figures' requests are drawn. Of
ShareGPT by two rules, since the paper does not say which turns are a request: what opens each
conversation (`first`), or every turn of a human with its answer (`all`); of Alpaca by --alpaca.
`recorded` are those of up to 2,048 tokens in all, OPT's longest, as they are; `used` what the
figures take: in proportion to the printed means (unless --norescale). DIR gets `fig11.jsonl`, a row
a case, and `fig11.png`. Seconds, and two minutes more when the installed conversations are counted
for the first time. Expected: recorded means within a fifth of the printed ones by the rule `first`.
Refuted if not. Drawn lengths have the printed means by design: they show nothing, and say so.
"""

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from absl import flags
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import common, paper_setups
from experiments.comparisons import Comparison
from experiments.paper_setups import MAX_TOKENS, PRINTED_MEANS
from experiments.plots import FAINT, STYLE
from jaxpage.sim import lengths as length_sets
from jaxpage.sim.lengths import PAIRING_RULES, Lengths

FLAGS = flags.FLAGS

# A data set by each rule; Alpaca has single requests.
CASES = (*(("sharegpt", rule) for rule in PAIRING_RULES), ("alpaca", None))
SIDES = ("prompt", "output")
COLOURS = {"prompt": "#6f86b0", "output": "#2f7f79"}
PERCENTILES = (50, 90, 99)
WIDEST = 2048  # tokens that the picture shows


def define_flags() -> None:
    paper_setups.define_length_flags()
    flags.adopt_module_key_flags(paper_setups)
    flags.DEFINE_bool("quick", False, "As without: it takes seconds.")
    flags.DEFINE_string("out", None, "The folder to write to.", required=True)


class Case(NamedTuple):
    """The lengths of a data set by one rule."""

    title: str
    recorded: Lengths | None  # None where lengths are drawn
    used: Lengths
    source: str


def main(_: list[str]) -> None:
    out = common.make_folder(FLAGS.out)
    cases = {
        " ".join(filter(None, (dataset, rule))): case_of(dataset, rule) for dataset, rule in CASES
    }
    rows = {name: row_of(case) for name, case in cases.items()}
    common.write_jsonl(out / "fig11.jsonl", ({"case": name, **row} for name, row in rows.items()))
    for name, row in rows.items():
        print(sentence(name, row))
    draw(cases, out / "fig11.png")
    sources = {name: row.pop("lengths") for name, row in rows.items()}
    common.print_last_line({"cases": rows, "lengths": sources, **common.provenance()})


def case_of(dataset: str, rule: str | None) -> Case:
    """What the flags give, as it is and as the figures use it."""
    used, source = paper_setups.lengths_by_flags(dataset, rule)
    recorded, _ = paper_setups.recorded_lengths(dataset, rule)
    if recorded is not None:
        recorded = length_sets.within(recorded, MAX_TOKENS)
    title = "Alpaca" if dataset == "alpaca" else f"ShareGPT, {rule} pairs"
    return Case(title, recorded, used, source)


def row_of(case: Case) -> dict[str, Any]:
    """Means and percentiles of tokens."""
    row: dict[str, Any] = {"lengths": case.source, "recorded": None}
    for kind in ("recorded", "used"):
        found: Lengths | None = getattr(case, kind)
        if found is not None:
            row[kind] = {"requests": len(found.prompts)} | {
                f"{side}_tokens": {"mean": float(np.mean(values))}
                | {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}
                for side, values in zip(SIDES, found, strict=True)
            }
    return row


def sentence(name: str, row: dict[str, Any]) -> str:
    """A row for people."""
    paper = PRINTED_MEANS[name.split()[0]]
    parts = [
        f"{kind} {' / '.join(f'{row[kind][f"{side}_tokens"]["mean"]:.1f}' for side in SIDES)}"
        for kind in ("recorded", "used")
        if row[kind] is not None
    ]
    return f"{name:>14}: {', '.join(parts)} (paper {paper[0]} / {paper[1]}); {row['lengths']}"


def comparison(last: dict[str, Any]) -> list[Comparison]:
    """Means as recorded; where lengths are drawn about the printed ones there is nothing to say."""
    found = []
    for name, row in last["cases"].items():
        for side, paper in zip(SIDES, PRINTED_MEANS[name.split()[0]], strict=True):
            if row["recorded"] is not None:
                mean = row["recorded"][f"{side}_tokens"]["mean"]
                found.append(Comparison(f"{name}: mean {side}, as recorded", paper, mean, "tokens"))
    return found


def draw(cases: dict[str, Case], path: Path) -> None:
    """The density of prompts and outputs, a panel a case."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4 * len(cases), 4.6), layout="constrained")
        panels = figure.subplots(1, len(cases))
        for axes, (name, case) in zip(panels, cases.items(), strict=True):
            _draw_case(axes, case, PRINTED_MEANS[name.split()[0]])
        panels[0].set_ylabel("share of the requests, % a bar")
        panels[0].legend(frameon=False)
        figure.supxlabel(
            "Solid line: the mean here, as recorded (or drawn). Dashed: the paper's Fig 11.",
            fontsize=10,
            color=FAINT,
        )
        figure.savefig(path)


def _draw_case(axes: Axes, case: Case, printed: tuple[float, float]) -> None:
    shown = case.used if case.recorded is None else case.recorded
    widest = WIDEST if max(printed) > 100 else 256
    edges = np.linspace(0, widest, 33)
    for index, (side, values) in enumerate(zip(SIDES, shown, strict=True)):
        weights = [100 / len(values)] * len(values)
        colour, mean = COLOURS[side], float(np.mean(values))
        axes.hist(values, edges.tolist(), weights=weights, color=colour, alpha=0.5, label=side)
        axes.axvline(mean, color=colour, lw=1.6)
        axes.axvline(printed[index], color=colour, lw=1.6, ls="--")
        text = f"{side}: mean {mean:.1f} (paper {printed[index]})"
        axes.text(
            0.98, 0.62 - 0.09 * index, text, ha="right", transform=axes.transAxes, fontsize=10.5
        )
    drawn = ", drawn" if case.recorded is None else ""
    axes.set_title(case.title + drawn)
    axes.set_xlabel("tokens")
    axes.set_xlim(0, widest)


if __name__ == "__main__":
    define_flags()
    common.run(main)
