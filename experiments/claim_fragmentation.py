"""How much of reserved memory is wasted? The article: reserve 4,096 tokens, use 300, waste 93 %.

    python -m experiments.claim_fragmentation --out=DIR

By arithmetic 1 - 300 / 4,096 = 92.7 %, of one reservation at its end. Beside it what allocators
waste of a whole pool: Llama 3.1 70B on four A100-80GB, sequences of 4,096 tokens at the most and of
300 on average (100 of prompt, 200 of answer), all there from the start, simulated with the engine's
own scheduler; means over the steps in which requests wait for memory, as in Fig 2. Lengths are
log-normal with deviations as large as the means (`spread`: at any moment long sequences are more
than their share, and waste less), and for Max equal as well (`equal`: what the arithmetic says).
Then pages of several sizes: what they waste is the rest of each sequence's last page. DIR gets
`fragmentation.jsonl`, a row a case, and `fragmentation.png`. Three minutes on one core; --quick is
seconds, in an eighth of the memory. Expected: Max wastes 92 to 93 % of what it reserves for equal
lengths, and paged less than a page a sequence at every size. Refuted if not.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from absl import flags
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from experiments import common
from experiments.comparisons import Comparison
from experiments.plots import CATEGORY_COLOURS, CATEGORY_LABELS, FAINT, LABELS, STYLE, stack_bar
from jaxpage.config import EngineConfig, require
from jaxpage.paging.allocator import ALLOCATORS
from jaxpage.scheduling.policies import POLICIES
from jaxpage.sim import cost_model, runs
from jaxpage.sim import lengths as length_sets
from jaxpage.sim.device import DEVICES
from jaxpage.sim.lengths import Lengths
from jaxpage.sim.metrics import WASTE_CATEGORIES, steps_of_note, steps_short_of_memory, waste_shares
from jaxpage.sim.shapes import SHAPES

FLAGS = flags.FLAGS

SHAPE, DEVICE, NUM_DEVICES = SHAPES["llama-3.1-70b"], DEVICES["a100-80gb"], 4
MAX_TOKENS, PROMPT_TOKENS, OUTPUT_TOKENS = 4096, 100, 200  # the article's: 300 of 4,096 are used
PAGE_SIZE = 16
PAGE_SIZES = (4, 16, 64, 256)
TOKEN_BUDGET = 8192  # of a step; with fewer, prompts would limit the batch before memory does
PAPER_WASTE = 93.0  # percent, of the article
WORKLOADS = {"equal": 0.0, "spread": 1.0}  # deviations of lengths over their means


def define_flags() -> None:
    flags.DEFINE_integer("num_slots", 2048, "The most sequences at once.", lower_bound=1)
    flags.DEFINE_integer("requests", 8192, "How many wait at the start.", lower_bound=16)
    flags.DEFINE_integer("seed", 0, "The seed of lengths.")
    flags.DEFINE_bool(
        "quick", False, "Max and paged alone, in an eighth of the memory, for spread lengths."
    )
    flags.DEFINE_string("out", None, "The folder to write to.", required=True)


def main(_: list[str]) -> None:
    out = common.make_folder(FLAGS.out)
    cases = cases_by_flags()
    rows = []
    with (out / "fragmentation.jsonl").open("w") as file:
        for case in cases:
            rows.append(measure(*case))
            file.write(json.dumps(rows[-1]) + "\n")
            print(sentence(rows[-1]), flush=True)
    draw(rows, out / "fragmentation.png")
    common.print_last_line(
        {
            "arithmetic_percent": 100 * (1 - (PROMPT_TOKENS + OUTPUT_TOKENS) / MAX_TOKENS),
            "rows": rows,
            **common.provenance(),
        }
    )


def cases_by_flags() -> list[tuple[str, str, int]]:
    """Workload, allocator, and tokens a page."""
    if FLAGS.quick:
        return [("spread", "max", PAGE_SIZE), ("spread", "paged", PAGE_SIZE)]
    by_allocator = [("spread", allocator, PAGE_SIZE) for allocator in LABELS]
    by_size = [("spread", "paged", size) for size in PAGE_SIZES if size != PAGE_SIZE]
    return [("equal", "max", PAGE_SIZE), *by_allocator, *by_size]


def lengths_of(workload: str, num: int) -> Lengths:
    """Of so many requests, by lot unless they are equal."""
    cv = WORKLOADS[workload]
    if cv == 0:
        return Lengths(np.full(num, PROMPT_TOKENS), np.full(num, OUTPUT_TOKENS))
    rng = np.random.default_rng(FLAGS.seed)
    found = length_sets.drawn(rng, 2 * num, PROMPT_TOKENS, OUTPUT_TOKENS, cv)
    return length_sets.within(found, MAX_TOKENS).take(slice(num))


def measure(workload: str, allocator: str, page_size: int) -> dict[str, Any]:
    """`waste_of` the requests of a workload under an allocator."""
    scale = 8 if FLAGS.quick else 1
    num, num_slots = FLAGS.requests // scale, max(FLAGS.num_slots // scale, 1)
    memory = ALLOCATORS[allocator]
    config = EngineConfig(
        num_slots=num_slots,
        num_pages=runs.kv_tokens_in(SHAPE, DEVICE, NUM_DEVICES) // scale // page_size,
        page_size=page_size,
        pages_per_slot=MAX_TOKENS // page_size,
        num_requests=2 * num_slots,
        token_buckets=(TOKEN_BUDGET,),
        headroom_pages=int(memory.grows),
        log_steps=2048,
    )
    cost = cost_model.create(SHAPE, DEVICE, num_devices=NUM_DEVICES, page_size=page_size)
    requests = length_sets.requests_of(lengths_of(workload, num), np.zeros(num))
    run = runs.run(requests, cost, config, memory, POLICIES["fcfs"])
    case = {"workload": workload, "allocator": allocator, "page_size": page_size}
    return case | waste_of(run, config)


def waste_of(run: runs.Run, config: EngineConfig) -> dict[str, float]:
    """Shares of the pool in percent, and of what is reserved or held, what no token will fill.

    Raises:
      ConfigError: memory was never short, so that something else limited the batch.
    """
    require(
        bool(steps_short_of_memory(run.steps, config).any()),
        f"requests were never short of memory: raise --num_slots={config.num_slots} or --requests",
    )
    steps = steps_of_note(run.steps, config)
    shares = {name: 100 * share for name, share in waste_shares(steps).items()}
    batched = float(np.mean(steps["num_running"]))
    return shares | {
        "batched_requests": batched,
        "kv_tokens": config.num_pages * config.page_size,
        "never_used_percent": 100 * shares["internal"] / (100 - shares["external"]),
        "last_pages_percent": shares["reservation"] + shares["internal"],
        "page_a_sequence_percent": 100 * batched / config.num_pages,
    }


def sentence(row: dict[str, Any]) -> str:
    """A row for people."""
    parts = ", ".join(f"{row[name]:.1f}" for name in WASTE_CATEGORIES)
    return (
        f"{row['workload']:>6}, {row['allocator']:>6}, pages of {row['page_size']:>3}: {parts} % "
        f"tokens, reserved, internal, external; {row['never_used_percent']:.1f} % of reservations "
        f"never used; {row['batched_requests']:.1f} requests batched"
    )


def comparison(last: dict[str, Any]) -> list[Comparison]:
    """The article's number beside the arithmetic's, and what each allocator wastes."""
    found = [Comparison("wasted, by arithmetic", PAPER_WASTE, last["arithmetic_percent"], "%")]
    for row in last["rows"]:
        if row["allocator"] == "paged":
            what = f"paged, pages of {row['page_size']}: rest of last pages"
            most = (0.0, row["page_a_sequence_percent"])  # a page a sequence
            found.append(Comparison(what, most, row["last_pages_percent"], "%"))
        else:
            paper = PAPER_WASTE if row["workload"] == "equal" else None
            what = f"{LABELS[row['allocator']]}, {row['workload']} lengths: reserved, never used"
            found.append(Comparison(what, paper, row["never_used_percent"], "%"))
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The pool by allocator; and the last pages by page size."""
    by_allocator = [row for row in rows if row["page_size"] == PAGE_SIZE]
    by_size = [row for row in rows if (row["workload"], row["allocator"]) == ("spread", "paged")]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 5.6), layout="constrained")
        pool, sizes = figure.subplots(1, 2, width_ratios=(1.5, 1))
        for x, row in enumerate(by_allocator):
            stack_bar(pool, x, np.array([row[name] for name in WASTE_CATEGORIES]), 1.0, width=0.7)
        names = [f"{LABELS[row['allocator']]},\n{row['workload']}" for row in by_allocator]
        pool.set_xticks(range(len(names)), names)
        pool.axhline(100 - PAPER_WASTE, color=FAINT, lw=1, ls="--")
        pool.set_ylim(0, 100)
        pool.set_ylabel("share of the KV memory, %")
        pool.set_title("Reserved up to 4,096 tokens, used 300")
        _draw_sizes(sizes, sorted(by_size, key=lambda row: row["page_size"]))
        handles: list[Artist] = [
            Patch(color=CATEGORY_COLOURS[name], label=CATEGORY_LABELS[name].replace("\n", " "))
            for name in WASTE_CATEGORIES
        ]
        handles.append(Line2D([], [], color=FAINT, ls="--", label="article: 7 % are used"))
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path)


def _draw_sizes(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """What the last pages waste, and what they could at the most."""
    sizes = [row["page_size"] for row in rows]
    for name, label, style in (
        ("page_a_sequence_percent", "a page a sequence", "--"),
        ("last_pages_percent", "not filled (yet)", "o-"),
    ):
        colour = FAINT if style == "--" else CATEGORY_COLOURS["token_states"]
        axes.plot(sizes, [row[name] for row in rows], style, color=colour, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens a page")
    axes.set_title("paged: waste in last pages, %")
    axes.legend(frameon=False, loc="upper left")


if __name__ == "__main__":
    define_flags()
    common.run(main)
