"""What fills a card that serves, and what does its batch cost in memory? The paper's Fig 1.

    python -m experiments.fig01_memory_layout --out=DIR

Left: OPT-13B on one A100-40GB, by arithmetic: parameters, the KV cache of Table 1, and the rest.
Right: ShareGPT's requests at growing rates, Poisson, simulated with the engine's own scheduler
until a system has a queue always: then its memory is full. Batch, memory (parameters, and KV that
is held or reserved) and output tokens a second are means over the steps of the second half of the
time until the last arrival. The paper draws this without numbers, so that only the shares of the
left have one to be held against. DIR gets `fig01.jsonl`, a row a system and rate, and `fig01.png`.
A minute on one core; --quick is seconds. Expected: 65 % parameters and more than 30 % KV; the
existing systems' memory is full with a few requests, and paged goes on to several times as many
and as much throughput. Refuted if paged does not batch more than Oracle in the same memory.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from absl import flags
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import common, paper_setups
from experiments.comparisons import Comparison
from experiments.paper_setups import SETUPS, Setup
from experiments.plots import FAINT, INK, LABELS, RUN_COLOURS, STYLE
from jaxpage.sim import arrivals
from jaxpage.sim import lengths as length_sets
from jaxpage.sim.lengths import Lengths

FLAGS = flags.FLAGS

MODEL = "opt-13b"
SYSTEMS = ("max", "oracle", "paged")  # the first two are the paper's existing systems
RATES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)  # requests a second
NUM_REQUESTS = 512
# The figure's left: percent of memory. Of KV it prints "> 30 %", and the parameters leave 35.
PAPER = {"parameters": 65.0, "kv": (30.0, 35.0)}
PAPER_PARAMETERS_GB = 26.0
QUEUED = 0.99  # share of steps with a queue from which memory decides the batch
COLOURS = {"parameters": "#6f86b0", "kv": "#2f7f79", "other": "#d5d8dc"}
PARTS = {"parameters": "parameters", "kv": "KV cache", "other": "other"}


def define_flags() -> None:
    paper_setups.define_length_flags()
    flags.adopt_module_key_flags(paper_setups)
    flags.DEFINE_bool("quick", False, "Max and paged at two rates, with a quarter of the requests.")
    flags.DEFINE_string("out", None, "The folder to write to.", required=True)


def main(_: list[str]) -> None:
    out = common.make_folder(FLAGS.out)
    setup = SETUPS[MODEL]
    memory = shares_of(setup)
    lengths, source = paper_setups.lengths_by_flags("sharegpt")
    num = NUM_REQUESTS // (4 if FLAGS.quick else 1)
    points: dict[str, list[dict]] = {}
    with (out / "fig01.jsonl").open("w") as file:
        for system in ("max", "paged") if FLAGS.quick else SYSTEMS:
            points[system] = []
            for rate in (0.5, 8.0) if FLAGS.quick else RATES:
                point = measure(setup, system, rate, lengths, num, FLAGS.seed)
                points[system].append(point)
                file.write(json.dumps({"system": system, **point}) + "\n")
                print(sentence(system, point), flush=True)
                if point["steps_with_a_queue"] > QUEUED:
                    break  # memory is full: a higher rate changes nothing
    draw(memory, points, out / "fig01.png")
    full = {system: rows[-1] for system, rows in points.items()}
    common.print_last_line(
        {"memory": memory, "full": full, "lengths": source, **common.provenance()}
    )


def parameter_bytes(setup: Setup) -> int:
    return setup.shape.num_params * setup.shape.itemsize


def shares_of(setup: Setup) -> dict[str, float]:
    """Where the device's memory goes: bytes of each part, and percent of all."""
    parts: dict[str, float] = {"parameters": parameter_bytes(setup), "kv": setup.kv_bytes}
    total = setup.device.memory_bytes * setup.num_devices
    parts["other"] = total - sum(parts.values())
    return {f"{name}_bytes": size for name, size in parts.items()} | {
        f"{name}_percent": 100 * size / total for name, size in parts.items()
    }


def measure(
    setup: Setup, system: str, rate: float, lengths: Lengths, num: int, seed: int
) -> dict[str, float]:
    """At that rate, over the second half of the time until the last of `num` requests arrives."""
    rng = np.random.default_rng(seed)
    chosen = lengths.take(rng.choice(len(lengths.prompts), num))
    arrival_s = arrivals.poisson(rng, num, 1.0) / rate  # the same users, faster or slower
    run, config = setup.run(
        system, length_sets.requests_of(chosen, arrival_s), until_s=arrival_s[-1]
    )
    end_s = run.steps["end_s"]
    counts = (end_s > arrival_s[-1] / 2) & (end_s <= arrival_s[-1])
    steps = {name: column[counts] for name, column in run.steps.items()}
    held_bytes = np.mean(steps["held_pages"]) * config.page_size * setup.shape.kv_bytes_per_token
    return {
        "rate": rate,
        "batched_requests": float(np.mean(steps["num_running"])),
        "memory_bytes": float(parameter_bytes(setup) + held_bytes),
        "output_tokens_per_s": float(np.sum(steps["num_sampled"]) / np.sum(steps["seconds"])),
        "steps_with_a_queue": float(np.mean(steps["num_waiting"] > 0)),
    }


def sentence(system: str, point: dict[str, float]) -> str:
    """A row for people."""
    return (
        f"{system:>6} at {point['rate']:g}/s: {point['batched_requests']:.1f} batched, "
        f"{point['memory_bytes'] / 1e9:.1f} GB, {point['output_tokens_per_s']:,.0f} tokens/s"
    )


def comparison(last: dict[str, Any]) -> list[Comparison]:
    """Shares of memory; and batches and speeds, of which the paper prints no number."""
    memory, full = last["memory"], last["full"]
    parts = [
        Comparison("parameters", PAPER_PARAMETERS_GB, memory["parameters_bytes"] / 1e9, "GB"),
        *(
            Comparison(f"{PARTS[name]}, share of memory", paper, memory[f"{name}_percent"], "%")
            for name, paper in PAPER.items()
        ),
    ]
    paged = full["paged"]
    for system in (name for name in SYSTEMS[:-1] if name in full):
        for name, what in (("batched_requests", "batch"), ("output_tokens_per_s", "tokens/s")):
            ours = paged[name] / full[system][name]
            parts.append(Comparison(f"paged over {LABELS[system]}, {what}", None, ours, "x"))
    return parts


def draw(memory: dict[str, float], points: dict[str, list[dict]], path: Path) -> None:
    """The card as one bar; beside it memory and speed by batch."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 5.2), layout="constrained")
        grid = figure.add_gridspec(2, 2, width_ratios=(0.62, 1))
        _draw_card(figure.add_subplot(grid[:, 0]), memory)
        bottom = figure.add_subplot(grid[1, 1])
        top = figure.add_subplot(grid[0, 1], sharex=bottom)
        for axes, name, scale in (
            (top, "memory_bytes", 1e-9),
            (bottom, "output_tokens_per_s", 1.0),
        ):
            for system, rows in points.items():
                batches = [row["batched_requests"] for row in rows]
                values = [scale * row[name] for row in rows]
                colour = RUN_COLOURS[system]
                axes.plot(batches, values, "o-", ms=3, color=colour, label=LABELS[system])
                axes.plot(batches[-1], values[-1], "o", ms=8, color=colour)  # memory is full
            axes.set_xlim(left=0)
        full = (memory["parameters_bytes"] + memory["kv_bytes"]) / 1e9
        top.axhline(full, color=FAINT, lw=0.8, ls="--")
        top.text(
            0.5, full, "parameters, and all memory for KV", va="bottom", fontsize=9.5, color=FAINT
        )
        top.set_ylim(memory["parameters_bytes"] / 1e9 - 0.6, full + 2)
        top.tick_params(labelbottom=False)
        top.set_ylabel("memory, GB")
        bottom.set_ylim(bottom=0)
        bottom.set_ylabel("output tokens/s")
        bottom.set_xlabel("requests batched; the large dot is where memory is full")
        bottom.legend(frameon=False, loc="lower right")
        top.set_title("The same memory, ShareGPT's requests")
        figure.savefig(path)


def _draw_card(axes: Axes, memory: dict[str, float]) -> None:
    """A bar of the card's memory, with the paper's shares beside it."""
    bottom = 0.0
    papers = {"parameters": "\npaper: 65 %", "kv": "\npaper: above 30 %", "other": ""}
    for name, label in PARTS.items():
        share, size = memory[f"{name}_percent"], memory[f"{name}_bytes"] / 1e9
        axes.bar(0, share, 0.8, bottom=bottom, color=COLOURS[name], edgecolor="white")
        between = " " if name == "other" else "\n"
        text = f"{label}{between}{size:.1f} GB, {share:.1f} %{papers[name]}"
        axes.text(0.5, bottom + share / 2, text, va="center", color=INK, linespacing=1.4)
        bottom += share
    axes.set_xlim(-0.45, 1.7)
    axes.set_ylim(0, 103)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.set_ylabel("share of the card's 40 GB, %")
    axes.set_title("OPT-13B on one A100")


if __name__ == "__main__":
    define_flags()
    common.run(main)
