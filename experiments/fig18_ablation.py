"""Which page size is best? The paper's Fig 18b.

    python -m experiments.fig18_ablation --out=DIR

OPT-13B on one A100 with the paper's 12 GiB of KV, pages of 1 to 256 tokens, simulated with the
engine's own scheduler: mean normalized latency of ShareGPT's and Alpaca's requests at fixed rates,
which the paper does not state (here nine tenths of what `fig12_single_sequence` found that pages of
16 sustain). DIR gets `fig18.jsonl`, a row a case, and `fig18.png`. Two minutes on one core; --quick
is seconds. Expected: large pages are worse, and on Alpaca, whose sequences are shorter than they
are, far sooner and by far more. Refuted if not. That small pages slow attention down the cost model
does not know, so that here they are never worse. Fig 18a, the latency of attention itself, needs a
GPU: `pallas_kernels.paged_attention.bench` measures it there.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from experiments import common, host_overhead, paper_setups
from experiments.comparisons import Comparison
from experiments.paper_setups import SETUPS
from experiments.plots import STYLE

FLAGS = flags.FLAGS

RATES = {"sharegpt": 2.65, "alpaca": 50.0}  # requests a second
NUM_REQUESTS = {"sharegpt": 2048, "alpaca": 8192}
# Its text: the tokens a page with which each data set is served best.
PAPER = {"sharegpt": (16.0, 128.0), "alpaca": (16.0, 32.0)}
COLOURS = {"sharegpt": "#2f7f79", "alpaca": "#d9a441"}


def define_flags() -> None:
    paper_setups.define_length_flags()
    paper_setups.define_page_sizes_flag()
    flags.adopt_module_key_flags(paper_setups)
    host_overhead.define_flags()
    flags.adopt_module_key_flags(host_overhead)
    flags.DEFINE_bool("quick", False, "Pages of 16 and 256 alone, and an eighth of the requests.")
    flags.DEFINE_string("out", None, "The folder to write to.", required=True)


def main(_: list[str]) -> None:
    out = common.make_folder(FLAGS.out)
    sizes = (16, 256) if FLAGS.quick else paper_setups.page_sizes_by_flag()
    latencies: dict[str, dict[int, float]] = {}
    sources = {}
    with (out / "fig18.jsonl").open("w") as file:
        for dataset in RATES:
            num = NUM_REQUESTS[dataset] // (8 if FLAGS.quick else 1)
            requests, sources[dataset] = paper_setups.poisson_requests(dataset, num, RATES[dataset])
            latencies[dataset] = {}
            for page_size in sizes:
                run = SETUPS["opt-13b"].run(
                    "paged", requests, page_size=page_size, overhead=host_overhead.by_flags()
                )[0]
                latency_s = float(np.mean(run.timeline.normalized_latency_s))
                latencies[dataset][page_size] = latency_s
                row = {
                    "dataset": dataset,
                    "page_size": page_size,
                    "rate": RATES[dataset],
                    "normalized_latency_s": latency_s,
                    "preemptions": int(np.sum(run.num_preemptions)),
                }
                file.write(json.dumps(row) + "\n")
                print(f"{dataset:>8}, pages of {page_size:>3}: {latency_s:.4f} s/token", flush=True)
    draw(latencies, out / "fig18.png")
    common.print_last_line(latencies | {"lengths": sources, **common.provenance()})


def comparison(last: dict[str, Any]) -> list[Comparison]:
    """The best page size, and what the largest costs, of which the paper prints no number."""
    found = []
    for dataset, paper in PAPER.items():
        latencies = {int(size): latency_s for size, latency_s in last[dataset].items()}
        best, largest = min(latencies, key=lambda size: latencies[size]), max(latencies)
        over = latencies[largest] / latencies[best]
        found += [
            Comparison(f"{dataset}: page size of the least latency", paper, best, "tokens"),
            Comparison(f"{dataset}: latency at {largest} over the least", None, over, "x"),
        ]
    return found


def draw(latencies: dict[str, dict[int, float]], path: Path) -> None:
    """Normalized latency by page size."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 4.4), layout="constrained")
        axes = figure.add_subplot()
        for dataset, by_size in latencies.items():
            label = f"{dataset}, {RATES[dataset]:g} requests/s"
            axes.plot(
                list(by_size), list(by_size.values()), "o-", color=COLOURS[dataset], label=label
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(list(next(iter(latencies.values()))), minor=False)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_xlabel("tokens a page")
        axes.set_ylabel("normalized latency, s/token")
        axes.legend(frameon=False)
        figure.savefig(path)


if __name__ == "__main__":
    define_flags()
    common.run(main)
