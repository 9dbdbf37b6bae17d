"""At which rate does latency turn up? A knee to hold against a real engine's.

    python -m experiments.knee --out=DIR

OPT-13B on one A100-80GB with 66,144 tokens of KV, ShareGPT's lengths, Poisson arrivals, simulated
with the engine's own scheduler: the median time to the first token and the mean latency of an
output token, by requests a second. What an engine's host adds to each step the cost model does not
know; `--overhead_s` and `--overhead_per_row_s` add it. DIR gets `knee.jsonl`, a row a rate, and
`knee.png`. Half a minute on one core; --quick is seconds. Expected: both are flat while memory and
time suffice, and turn up within one request a second. Refuted if not.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from experiments import common, host_overhead, paper_setups
from experiments.comparisons import Comparison
from experiments.paper_setups import SETUPS
from experiments.plots import RUN_COLOURS, STYLE
from jaxpage.config import require
from jaxpage.sim.device import DEVICES

FLAGS = flags.FLAGS

KV_TOKENS = 66_144
RATES = (1.0, 2.0, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0)
OPT_13B = SETUPS["opt-13b"]
SETUP = replace(
    OPT_13B,
    device=DEVICES["a100-80gb"],
    kv_bytes=KV_TOKENS * OPT_13B.shape.kv_bytes_per_token,
)


def define_flags() -> None:
    paper_setups.define_length_flags()
    flags.adopt_module_key_flags(paper_setups)
    flags.DEFINE_list("rates", [f"{rate:g}" for rate in RATES], "Requests a second.")
    flags.DEFINE_integer("requests", 4096, "How many at each rate.", lower_bound=1)
    flags.DEFINE_integer("num_slots", 256, "The most sequences at once.", lower_bound=1)
    host_overhead.define_flags()
    flags.adopt_module_key_flags(host_overhead)
    flags.DEFINE_bool("quick", False, "An eighth of the requests.")
    flags.DEFINE_string("out", None, "The folder to write to.", required=True)


def main(_: list[str]) -> None:
    out = common.make_folder(FLAGS.out)
    num = FLAGS.requests // (8 if FLAGS.quick else 1)
    rows, source = [], ""
    with (out / "knee.jsonl").open("w") as file:
        for rate in rates_by_flag():
            requests, source = paper_setups.poisson_requests("sharegpt", num, rate)
            run = SETUP.run(
                "paged", requests, num_slots=FLAGS.num_slots, overhead=host_overhead.by_flags()
            )[0]
            rows.append(
                {
                    "rate": rate,
                    "ttft_p50_s": float(np.median(run.timeline.first_token_latency_s)),
                    "normalized_latency_mean_s": float(np.mean(run.timeline.normalized_latency_s)),
                    "tpot_mean_s": float(np.mean(run.timeline.token_latency_s)),
                    "batched": float(np.mean(run.steps["num_running"])),
                    "preemptions": int(np.sum(run.num_preemptions)),
                }
            )
            file.write(json.dumps(rows[-1]) + "\n")
            print(json.dumps(rows[-1]), flush=True)
    draw(rows, out / "knee.png")
    common.print_last_line(
        {"rows": rows, "kv_tokens": KV_TOKENS, "lengths": source, **common.provenance()}
    )


def rates_by_flag() -> tuple[float, ...]:
    """Those of `--rates`, ascending.

    Raises:
      ConfigError: one is not a positive number.
    """
    try:
        rates = tuple(sorted(map(float, FLAGS.rates)))
    except ValueError:
        rates = ()
    is_right = len(rates) > 0 and all(0 < rate < np.inf for rate in rates)
    require(is_right, f"--rates={','.join(FLAGS.rates)}: positive numbers, requests a second")
    return rates


def comparison(last: dict[str, Any]) -> list[Comparison]:
    """Both latencies at each rate; nobody has printed them."""
    found = []
    for row in last["rows"]:
        at = f"at {row['rate']:g} requests/s"
        found += [
            Comparison(f"{at}: median time to the first token", None, row["ttft_p50_s"], "s"),
            Comparison(
                f"{at}: latency by output token", None, row["normalized_latency_mean_s"], "s"
            ),
        ]
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Both latencies by rate, a panel each."""
    rates = [row["rate"] for row in rows]
    panels = {
        "ttft_p50_s": "median time to first token, s",
        "normalized_latency_mean_s": "mean latency by output token, s",
    }
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        for axes, (name, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
            axes.plot(rates, [row[name] for row in rows], "o-", color=RUN_COLOURS["paged"])
            axes.set_yscale("log")
            axes.set_xlabel("requests/s")
            axes.set_ylabel(label)
        figure.savefig(path)


if __name__ == "__main__":
    define_flags()
    common.run(main)
