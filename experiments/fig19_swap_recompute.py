"""Is it better to compute a preempted sequence again, or to move its pages? The paper's Fig 19.

    python -m experiments.fig19_swap_recompute --out=DIR

(a) What it takes, by page size, to compute one sequence of OPT-13B again, and to move its KV out
and in; the paper does not say how long its sequence is (--tokens). By the cost model, for an A100
or --device, which may be a JSON file of `measure_device`, with the --efficiencies that `calibrate`
makes of its rows. Moves are priced with a copy for each page, and with one for each page and layer
of keys and of values (`swap_by_layer`), which is how vLLM's cache engine copied in 2023
(csrc/cache_kernels.cu, `swap_blocks`). What starting a copy costs nobody measured: 10 us are
assumed (`sim.efficiencies`).
(b) Mean normalized latency under each, simulated with the engine's own scheduler on the paper's
A100, at rates at which sequences are preempted; the paper does not state its. Admission keeps no
headroom, so that it preempts as often as it can.

DIR gets `fig19.jsonl`, a row a case, and `fig19.png`. Ten minutes on two cores, most of them
compilation; --quick is seconds. Expected by the paper's text: moving is dear with small pages,
computing again never takes more than a fifth longer than moving, and at 16 to 64 tokens a page
the two end as good. Refuted if not.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib
import numpy as np
from absl import flags
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import common, paper_setups
from experiments.comparisons import Comparison
from experiments.paper_setups import SETUPS
from experiments.plots import FAINT, STYLE
from jaxpage.config import require
from jaxpage.paging.page_table import num_pages_for
from jaxpage.sim import cost_model
from jaxpage.sim.cost_model import CostModel
from jaxpage.sim.device import DEVICES, find_device
from jaxpage.sim.efficiencies import A100_MEASURED, read_efficiencies
from jaxpage.sim.kernels import Efficiency
from jaxpage.sim.trace import Arrival

FLAGS = flags.FLAGS

SETUP = SETUPS["opt-13b"]
# Nine tenths of what pages of 16 sustain on ShareGPT, as in `fig18_ablation`, and all of it on
# Alpaca, where memory is not short before.
RATES = {"sharegpt": 2.65, "alpaca": 56.0}  # requests a second
NUM_REQUESTS = {"sharegpt": 1024, "alpaca": 8192}
# As many as ever ran at once, and some: a step's cost follows them.
NUM_SLOTS = {"sharegpt": 64, "alpaca": 256}
MODES = ("recompute", "swap", "swap_by_layer")
LABELS = {
    "recompute": "compute again",
    "swap": "swap, a copy a page",
    "swap_by_layer": "swap, a copy a page and layer (vLLM)",
}
COLOURS = {"recompute": "#2f7f79", "swap": "#6f86b0", "swap_by_layer": "#c8644a"}
MEDIUM_PAGES = (16, 32, 64)  # where the text finds both as good


def define_flags() -> None:
    paper_setups.define_length_flags()
    paper_setups.define_page_sizes_flag()
    flags.adopt_module_key_flags(paper_setups)
    flags.DEFINE_list("datasets", list(RATES), "Whose requests (b) serves.")
    flags.DEFINE_integer("tokens", 256, "Tokens of the sequence of (a).", lower_bound=1)
    flags.DEFINE_string(
        "device",
        SETUP.device.name,
        f"Whose times (a) gives: one of {', '.join(DEVICES)}, or a JSON file of measure_device.",
    )
    flags.DEFINE_string(
        "efficiencies", None, "A file of calibrate, for (a); by default those that A100s measured."
    )
    flags.DEFINE_bool("quick", False, "(b) for ShareGPT and pages of 16, few requests at once.")
    flags.DEFINE_string("out", None, "The folder to write to.", required=True)


def main(_: list[str]) -> None:
    out = common.make_folder(FLAGS.out)
    sizes = paper_setups.page_sizes_by_flag()
    rows = list(times_of_sizes(sizes))
    traces = {name: requests_of(name) for name in datasets_by_flag()}
    for row in served(traces, (16,) if FLAGS.quick else sizes):
        rows.append(row)
        print(
            f"{row['dataset']:>8}, pages of {row['page_size']:>3}, {row['mode']}: "
            f"{row['normalized_latency_s']:.4f} s/token, {row['preemptions']} preemptions",
            flush=True,
        )
    common.write_jsonl(out / "fig19.jsonl", rows)
    last = summary(rows) | {"lengths": {name: source for name, (_, source) in traces.items()}}
    draw(last, out / "fig19.png")
    common.print_last_line(last | common.provenance())


def datasets_by_flag() -> list[str]:
    wrong = [name for name in FLAGS.datasets if name not in RATES]
    require(
        len(FLAGS.datasets) > 0 and not wrong,
        f"--datasets={','.join(FLAGS.datasets)}: take of {', '.join(RATES)}",
    )
    return ["sharegpt"] if FLAGS.quick else FLAGS.datasets


def requests_of(dataset: str) -> tuple[list[Arrival], str]:
    num, rate = NUM_REQUESTS[dataset], RATES[dataset]
    if FLAGS.quick:  # so many at once that pages run out although they are few
        num, rate = num // 8, 8 * rate
    return paper_setups.poisson_requests(dataset, num, rate)


def copies_by_layer(known: Efficiency) -> dict[str, Efficiency]:
    """Where a page is copied in parts: keys and values, layer by layer."""
    return {"host_copy": known._replace(item_s=2 * SETUP.shape.num_layers * known.item_s)}


def times_of_sizes(sizes: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """A row a page size: what one sequence takes, in each way."""
    device = find_device(FLAGS.device)
    known = A100_MEASURED
    if FLAGS.efficiencies is not None:
        known = known | read_efficiencies(Path(FLAGS.efficiencies))
    for page_size in sizes:
        whole, in_parts = (
            cost_model.create(SETUP.shape, device, page_size=page_size, efficiencies=efficiencies)
            for efficiencies in (known, known | copies_by_layer(known["host_copy"]))
        )
        yield {
            "figure": "19a",
            "source": source_of_times(),
            "page_size": page_size,
            "tokens": FLAGS.tokens,
            "recompute_s": seconds(whole, computed=FLAGS.tokens),
            # Out and in take equally long: the bus has one rate for both.
            "swap_one_way_s": seconds(whole, moved=FLAGS.tokens),
            "swap_by_layer_one_way_s": seconds(in_parts, moved=FLAGS.tokens),
        }


def source_of_times() -> str:
    """How far the times of (a) are measured."""
    if FLAGS.device in DEVICES:
        return "cost model"
    if FLAGS.efficiencies is None:
        return f"cost model, at the rates measured in {Path(FLAGS.device).name}"
    return f"measured: {Path(FLAGS.device).name} and {Path(FLAGS.efficiencies).name}"


def seconds(cost: CostModel, computed: int = 0, moved: int = 0) -> float:
    """Of a step that computes the first tokens of a sequence, and moves the pages of some."""
    pages = num_pages_for(jnp.asarray([moved]), cost.page_size)[0]
    load = cost_model.load_of(
        jnp.asarray([computed]),
        jnp.asarray([computed]),
        jnp.asarray([computed > 0]),
        moved_pages=pages,
        copied_pages=jnp.asarray(0),
    )
    return float(cost_model.step_seconds(cost, load))


def served(traces: dict[str, Any], sizes: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """A row a simulation, in order."""
    cases = [(name, size) for name in traces for size in sizes]

    def all_modes(case: tuple[str, int]) -> list[dict[str, Any]]:
        # One after the other: both ways to swap are one program.
        return [serve(traces[case[0]][0], *case, mode) for mode in MODES]

    with ThreadPoolExecutor(2) as pool:
        for rows in pool.map(all_modes, cases):
            yield from rows


def serve(requests: list[Arrival], dataset: str, page_size: int, mode: str) -> dict[str, Any]:
    by_layer = copies_by_layer(A100_MEASURED["host_copy"])
    run, _ = SETUP.run(
        "paged",
        requests,
        efficiencies=by_layer if mode == "swap_by_layer" else None,
        num_slots=NUM_SLOTS[dataset],
        page_size=page_size,
        headroom_pages=0,
        preemption="recompute" if mode == "recompute" else "swap",
    )
    return {
        "figure": "19b",
        "source": "simulated",
        "dataset": dataset,
        "page_size": page_size,
        "mode": mode,
        "normalized_latency_s": float(np.mean(run.timeline.normalized_latency_s)),
        "preemptions": int(np.sum(run.num_preemptions)),
        "moved_pages": int(np.sum(run.steps["moved_out"]) + np.sum(run.steps["moved_in"])),
        "recomputed_tokens": int(np.sum(run.steps["num_recomputed"])),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figure's numbers: milliseconds by kind and page size, and s/token by data set as well.

    Keys are strings, as they are once read back.
    """
    times = [row for row in rows if row["figure"] == "19a"]
    both = {
        f"{mode}_in_and_out": {
            str(row["page_size"]): 2e3 * row[f"{mode}_one_way_s"] for row in times
        }
        for mode in MODES[1:]
    }
    recompute = {str(row["page_size"]): 1e3 * row["recompute_s"] for row in times}
    latencies: dict[str, dict[str, dict[str, float]]] = {}
    preemptions: dict[str, dict[str, dict[str, int]]] = {}
    for row in rows:
        if row["figure"] == "19b":
            for table, column in (
                (latencies, "normalized_latency_s"),
                (preemptions, "preemptions"),
            ):
                of_mode = table.setdefault(row["dataset"], {}).setdefault(row["mode"], {})
                of_mode[str(row["page_size"])] = row[column]
    return {
        "times_ms": {"recompute": recompute, **both},
        "source": times[0]["source"],
        "tokens": FLAGS.tokens,
        "normalized_latency_s": latencies,
        "preemptions": preemptions,
        "rates": {name: RATES[name] for name in latencies},
    }


def comparison(last: dict[str, Any]) -> list[Comparison]:
    """The text: computing again never takes more than a fifth longer than moving."""
    times, rows = last["times_ms"], []
    for mode in MODES[1:]:
        both = times[f"{mode}_in_and_out"]
        most = max(times["recompute"][size] / both[size] for size in both)
        what = f"time to compute again over {LABELS[mode]}, in and out: the most of all page sizes"
        rows.append(Comparison(what, (0.0, 1.2), most))
        if "1" in both:
            what = f"{LABELS[mode]}, in and out: pages of 1 over pages of 16"
            rows.append(Comparison(what, None, both["1"] / both["16"]))
    for dataset, by_mode in last["normalized_latency_s"].items():
        for mode in MODES[1:]:
            ratios = [
                by_mode["recompute"][size] / by_mode[mode][size]
                for size in map(str, MEDIUM_PAGES)
                if size in by_mode[mode]
            ]
            what = f"{dataset}: latency, compute again over {LABELS[mode]}, pages of 16 to 64"
            if ratios:  # "comparable", says the text
                rows.append(Comparison(what, None, float(np.mean(ratios))))
    return rows


def draw(last: dict[str, Any], path: Path) -> None:
    """(a), and a panel of (b) for each data set."""
    latencies = last["normalized_latency_s"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5 * (1 + len(latencies)), 4.8), layout="constrained")
        axes, *others = figure.subplots(1, 1 + len(latencies))
        times = last["times_ms"]
        line(axes, times["recompute"], "recompute")
        for mode in MODES[1:]:
            both = times[f"{mode}_in_and_out"]
            line(axes, both, mode)
            one_way = {size: value / 2 for size, value in both.items()}
            axes.plot(list(one_way), list(one_way.values()), ":", lw=1.4, color=COLOURS[mode])
        axes.set_title(f"(a) one sequence of {last['tokens']} tokens")
        axes.set_ylabel("time, ms")
        for panel, (dataset, by_mode) in zip(others, latencies.items(), strict=True):
            for mode, by_size in by_mode.items():
                line(panel, by_size, mode)
            panel.set_title(f"(b) {dataset}, {last['rates'][dataset]:g} requests/s")
            panel.set_ylabel("normalized latency, s/token")
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:g}")
        for panel in (axes, *others):
            panel.set_xlabel("tokens a page")
        axes.set_ylim(bottom=0)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False)
        foot = f"(a): {last['source']}. Dotted: one way; full: out and in. (b): simulated."
        figure.supxlabel(foot, x=0.01, ha="left", fontsize=10, color=FAINT)
        figure.savefig(path)


def line(axes: Axes, by_size: dict[str, float], mode: str) -> None:
    # Sizes as words stand equally far from each other, as powers of two should.
    axes.plot(
        list(by_size), list(by_size.values()), "o-", ms=4, color=COLOURS[mode], label=LABELS[mode]
    )


if __name__ == "__main__":
    define_flags()
    common.run(main)
