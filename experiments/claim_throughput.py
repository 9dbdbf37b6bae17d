"""Do pages serve two to four times as many tokens? The article's claim, on the hardware it names.

    python -m experiments.claim_throughput --out=FILE.jsonl

Llama 3.1 70B on four A100-80GB, simulated with the engine's own scheduler: requests of ShareGPT's
lengths, all there from the start; output tokens a second while some wait, by
pages, by the contiguous rules, of which Max reserves 4,096 tokens for everyone, and by static
batches of such reservations. KV gets what the weights leave of nine tenths of memory, or
--kv_tokens. FILE gets a row a rule. Half a minute on one core; --quick is seconds. Expected: paged
2 to 4 times as many as Max. Refuted outside: where Max's batches are large already, products take
as long as they have tokens, and more of them at once gain less. `make demo` measures the same ratio
on a small model on this machine.
"""

import json
from typing import Any

import numpy as np
from absl import flags

from experiments import common, paper_setups
from experiments.comparisons import Comparison
from experiments.plots import LABELS
from jaxpage.config import EngineConfig
from jaxpage.paging.allocator import ALLOCATORS
from jaxpage.scheduling.policies import POLICIES
from jaxpage.sim import cost_model, runs
from jaxpage.sim import lengths as length_sets
from jaxpage.sim.cost_model import CostModel
from jaxpage.sim.device import DEVICES
from jaxpage.sim.shapes import SHAPES
from jaxpage.sim.trace import Arrival

FLAGS = flags.FLAGS

MAX_TOKENS = 4096  # the article's sequence
PAGE_SIZE = 16
ARTICLE = (2.0, 4.0)  # what paged serves over contiguous allocation


def define_flags() -> None:
    paper_setups.define_length_flags()
    flags.adopt_module_key_flags(paper_setups)
    flags.DEFINE_enum("model", "llama-3.1-70b", sorted(SHAPES), "What is served.")
    flags.DEFINE_enum("device", "a100-80gb", sorted(DEVICES), "On what.")
    flags.DEFINE_integer("num_devices", 4, "On how many.", lower_bound=1)
    flags.DEFINE_integer("kv_tokens", None, "Tokens whose KV finds room.", lower_bound=MAX_TOKENS)
    flags.DEFINE_integer("num_slots", 1024, "The most sequences at once.", lower_bound=1)
    flags.DEFINE_integer("requests", 4096, "How many wait at the start.", lower_bound=8)
    flags.DEFINE_bool("quick", False, "Take an eighth of the requests.")
    flags.DEFINE_string("out", None, "The JSONL file to write the rows to.", required=True)


def main(_: list[str]) -> None:
    with common.open_for_writing(FLAGS.out) as out:
        lengths, source = paper_setups.lengths_by_flags("sharegpt")
        num = FLAGS.requests // 8 if FLAGS.quick else FLAGS.requests
        rows = np.random.default_rng(FLAGS.seed).choice(len(lengths.prompts), num)
        requests = length_sets.requests_of(lengths.take(rows), np.zeros(num))
        cost = cost_model.create(
            SHAPES[FLAGS.model],
            DEVICES[FLAGS.device],
            num_devices=FLAGS.num_devices,
            page_size=PAGE_SIZE,
        )
        found = {}
        for system in ("static", *LABELS):
            row = found[system] = measure(system, requests, cost)
            out.write(json.dumps(row) + "\n")
            print(
                f"{system:>6}: {row['output_tokens_per_s']:,.0f} output tokens/s, "
                f"{row['batched_requests']:.1f} requests batched, "
                f"{1e3 * row['mean_step_s']:.0f} ms a step",
                flush=True,
            )
    paged = found["paged"]["output_tokens_per_s"]
    over = {name: paged / row["output_tokens_per_s"] for name, row in found.items()}
    common.print_last_line(
        {"paged_over": over, "rows": found, "lengths": source, **common.provenance()}
    )


def measure(system: str, requests: list[Arrival], cost: CostModel) -> dict:
    """Of the steps in which requests wait."""
    allocator = ALLOCATORS["max" if system == "static" else system]
    kv_tokens = FLAGS.kv_tokens or runs.kv_tokens_in(cost.shape, cost.device, cost.num_devices)
    config = EngineConfig(
        num_slots=FLAGS.num_slots,
        num_pages=kv_tokens // PAGE_SIZE,
        page_size=PAGE_SIZE,
        pages_per_slot=MAX_TOKENS // PAGE_SIZE,
        num_requests=2 * FLAGS.num_slots,
        token_buckets=(max(2048, FLAGS.num_slots),),
        headroom_pages=int(allocator.grows),
        static_batches=system == "static",
        log_steps=2048,
    )
    run = runs.run(requests, cost, config, allocator, POLICIES["fcfs"])
    waits = run.steps["num_waiting"] > 0
    steps = {name: column[waits] for name, column in run.steps.items()}
    return {
        "system": system,
        "kv_tokens": config.num_pages * PAGE_SIZE,
        "output_tokens_per_s": float(np.sum(steps["num_sampled"]) / np.sum(steps["seconds"])),
        "batched_requests": float(np.mean(steps["num_running"])),
        "mean_step_s": float(np.mean(steps["seconds"])),
        "preemptions": int(np.sum(run.num_preemptions)),
    }


def comparison(last: dict[str, Any]) -> list[Comparison]:
    """The article compares with contiguous allocation, which is Max; of the others it is silent."""
    names = LABELS | {"static": "static batches"}
    return [
        Comparison(f"paged over {names[system]}", ARTICLE if system == "max" else None, ratio, "x")
        for system, ratio in last["paged_over"].items()
        if system != "paged"
    ]


if __name__ == "__main__":
    define_flags()
    common.run(main)
