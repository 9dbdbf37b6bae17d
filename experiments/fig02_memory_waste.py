"""What share of KV memory holds tokens, under four allocators? The paper's Fig 2.

    python -m experiments.fig02_memory_waste --out=DIR

OPT-13B on one A100 with the 12 GiB of KV that the paper gives it, simulated with the engine's own
scheduler: ShareGPT's requests, all there from the start, so that memory is full. Shares are means
over the steps in which requests wait for memory. DIR gets `fig02.jsonl`, a row an allocator, and
`fig02.png`. A minute and a half on one core; --quick is seconds, of fewer requests. Expected: Max
within 2 percentage points of the paper in each share, the others within 4. Refuted if not. The
shares depend on how lengths are spread: beside those of --pairs and --rescale stand those of the
other pairing rule, and of lengths as they were counted (--others).
"""

import json
from typing import Any, TextIO

import numpy as np
from absl import flags

from experiments import common, paper_setups
from experiments.comparisons import Comparison
from experiments.plots import CATEGORY_LABELS, LABELS, PAPER_SHARES, waste_bars
from jaxpage.sim import lengths as length_sets
from jaxpage.sim.lengths import Lengths
from jaxpage.sim.metrics import WASTE_CATEGORIES, steps_of_note, waste_shares

FLAGS = flags.FLAGS


def define_flags() -> None:
    paper_setups.define_length_flags()
    flags.adopt_module_key_flags(paper_setups)
    flags.DEFINE_integer("requests", 2000, "How many requests wait at the start.", lower_bound=1)
    flags.DEFINE_bool("others", True, "Take lengths by the other rules as well.")
    flags.DEFINE_bool("quick", False, "Take a tenth of the requests, by one rule.")
    flags.DEFINE_string("out", None, "The folder to write to.", required=True)


def main(_: list[str]) -> None:
    out = common.make_folder(FLAGS.out)
    lengths, source = paper_setups.lengths_by_flags("sharegpt")
    num = FLAGS.requests // 10 if FLAGS.quick else FLAGS.requests
    others: dict[str, dict[str, dict[str, float]]] = {}
    with (out / "fig02.jsonl").open("w") as file:
        chosen = some_of(lengths, num)
        shares = measure(chosen, "", file)
        if FLAGS.others and not FLAGS.quick:
            for name, other in paper_setups.other_lengths("sharegpt"):
                others[name] = measure(some_of(other, num), name, file)
    waste_bars(
        {name: np.array(list(row.values())) for name, row in shares.items()}, out / "fig02.png"
    )
    means = dict(zip(("prompt_tokens", "output_tokens"), chosen.means, strict=True))
    common.print_last_line(
        shares | {"others": others, "lengths": source, **means, **common.provenance()}
    )


def some_of(lengths: Lengths, num: int) -> Lengths:
    return lengths.take(np.random.default_rng(FLAGS.seed).choice(len(lengths.prompts), num))


def measure(lengths: Lengths, name: str, file: TextIO) -> dict[str, dict[str, float]]:
    """Per cent by allocator; the rows go to `file`. `name` is of other lengths than by flags."""
    requests = length_sets.requests_of(lengths, np.zeros(len(lengths.prompts)))
    shares: dict[str, dict[str, float]] = {}
    for allocator in LABELS:
        run, config = paper_setups.SETUPS["opt-13b"].run(allocator, requests)
        steps = steps_of_note(run.steps, config)
        found = waste_shares(steps)
        shares[allocator] = {name: 100 * share for name, share in found.items()}
        row = {
            "allocator": allocator,
            "lengths": name,
            **shares[allocator],
            "batched_requests": float(np.mean(steps["num_running"])),
            "paper": dict(zip(WASTE_CATEGORIES, PAPER_SHARES[allocator], strict=True)),
        }
        file.write(json.dumps(row) + "\n")
        print(sentence(row), flush=True)
    return shares


def sentence(row: dict) -> str:
    """A row for people."""
    parts = ", ".join(f"{row[name]:.1f} ({row['paper'][name]})" for name in WASTE_CATEGORIES)
    return (
        f"{row['lengths']:>23} {row['allocator']:>6}: {parts} % tokens, reserved, internal, "
        f"external (paper); {row['batched_requests']:.2f} requests batched"
    )


def comparison(last: dict[str, Any]) -> list[Comparison]:
    """All shares that the figure prints; of vLLM it prints one, of Oracle none in `internal`.

    Of other lengths only the first.
    """
    rows = [
        Comparison(
            f"{LABELS[allocator]}: {' '.join(CATEGORY_LABELS[name].split())}",
            paper,
            last[allocator][name],
            "%",
        )
        for allocator, shares in PAPER_SHARES.items()
        for name, paper in zip(WASTE_CATEGORIES, shares, strict=True)
        if paper > 0 and (allocator, name) != ("paged", "external")
    ]
    for name, shares in last["others"].items():
        for allocator, (paper, *_) in PAPER_SHARES.items():
            what = f"{LABELS[allocator]}: {CATEGORY_LABELS[WASTE_CATEGORIES[0]]} ({name})"
            rows.append(Comparison(what, paper, shares[allocator][WASTE_CATEGORIES[0]], "%"))
    return rows


if __name__ == "__main__":
    define_flags()
    common.run(main)
