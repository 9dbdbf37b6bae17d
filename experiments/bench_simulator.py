"""How many requests a second does the simulator serve?

    python -m experiments.bench_simulator

OPT-13B on an A100-80GB with 66,144 KV tokens, requests of ShareGPT's lengths.
In one thread: at light load, where most steps are decode steps that need no plan, and at
saturation, all requests at once. A sweep: `--sweep` configurations of rate and seed, a thread a
core; and `--vmapped` of them, a quarter as long, as one program. One JSON row each: simulated
requests and steps by second of wall time, after compilation. A minute. Expected: at least 1,250 a
second at saturation and 10,000 in the sweep. Refuted if not.
For comparison: Vidur, whose scheduler is Python's, with its latency predictor replaced by a formula
simulates 290 to 780 requests a second at light load and 1,250 at saturation (2,000 and 10,000
requests, on a machine of this kind).
"""

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import common, paper_setups
from jaxpage.config import EngineConfig, require
from jaxpage.paging.allocator import ALLOCATORS
from jaxpage.scheduling.policies import POLICIES
from jaxpage.sim import arrivals, cost_model, runs, simulate
from jaxpage.sim import lengths as length_sets
from jaxpage.sim import trace as traces
from jaxpage.sim.cost_model import CostModel
from jaxpage.sim.device import DEVICES
from jaxpage.sim.lengths import Lengths
from jaxpage.sim.runs import Run
from jaxpage.sim.shapes import SHAPES
from jaxpage.sim.simulate import Simulation
from jaxpage.sim.trace import Arrival

FLAGS = flags.FLAGS

PAGED = ALLOCATORS["paged"]
LIGHT_RATE = 1.0  # requests a second


def define_flags() -> None:
    paper_setups.define_length_flags()
    flags.adopt_module_key_flags(paper_setups)
    flags.DEFINE_integer("requests", 10_000, "At saturation; a fifth at light load.", lower_bound=5)
    flags.DEFINE_integer("num_slots", 64, "How many sequences can run at once.", lower_bound=1)
    flags.DEFINE_integer("kv_tokens", 66_144, "Tokens whose KV finds room.", lower_bound=2048)
    flags.DEFINE_integer("sweep", 64, "How many configurations a sweep has.", lower_bound=1)
    flags.DEFINE_integer("vmapped", 8, "How many under vmap, at most --sweep.", lower_bound=1)


def main(_: list[str]) -> None:
    require(
        FLAGS.vmapped <= FLAGS.sweep,
        f"--vmapped={FLAGS.vmapped} are taken of a sweep of {FLAGS.sweep}: raise --sweep",
    )
    lengths, source = paper_setups.lengths_by_flags("sharegpt")
    light = make_requests(lengths, FLAGS.requests // 5, LIGHT_RATE, seed=0)
    full = make_requests(lengths, FLAGS.requests, np.inf, seed=0)
    rows = [measure("light", [light], 1), measure("saturated", [full], 1)]
    rates = np.linspace(1.0, 8.0, FLAGS.sweep)
    sweep = [
        make_requests(lengths, FLAGS.requests // 5, float(rate), seed)
        for seed, rate in enumerate(rates)
    ]
    rows.append(measure("sweep", sweep, os.cpu_count() or 1))
    chosen = [sweep[i * FLAGS.sweep // FLAGS.vmapped] for i in range(FLAGS.vmapped)]
    few = [requests[: len(requests) // 4] for requests in chosen]
    rows += [measure("each", few, 1), measure_vmapped(few)]
    by_name = {row["load"]: row["requests_per_s"] for row in rows}
    common.print_last_line({**by_name, "rows": rows, "lengths": source, **common.provenance()})


def make_requests(lengths: Lengths, num: int, rate: float, seed: int) -> list[Arrival]:
    """Poisson arrivals; all at once for an infinite rate."""
    rng = np.random.default_rng(FLAGS.seed + seed)
    chosen = lengths.take(rng.choice(len(lengths.prompts), num))
    at_once = np.zeros(num)
    return length_sets.requests_of(
        chosen, at_once if rate == np.inf else arrivals.poisson(rng, num, rate)
    )


def measure(load: str, loads: Sequence[list[Arrival]], num_threads: int) -> dict:
    """One row: all loads, on so many threads, once what they need is compiled."""
    simulate_one(loads[0])
    start_s = time.perf_counter()
    with ThreadPoolExecutor(num_threads) as pool:
        done = list(pool.map(simulate_one, loads))
    wall_s = time.perf_counter() - start_s
    num_steps = sum(len(run.steps["seconds"]) for run in done)
    num_requests = sum(map(len, loads))
    row = {
        "load": load,
        "runs": len(loads),
        "threads": num_threads,
        "requests_per_s": num_requests / wall_s,
        "steps_per_s": num_steps / wall_s,
        "mean_batch": float(np.mean([np.mean(run.steps["num_running"]) for run in done])),
        "wall_s": wall_s,
    }
    print(json.dumps(row), flush=True)
    return row


def measure_vmapped(loads: Sequence[list[Arrival]]) -> dict:
    """One row: all loads in one program, once it is compiled."""
    cost, config = cost_and_config()
    each = [traces.create(requests, config, PAGED) for requests in loads]
    trace, costs = stacked(each), stacked([cost] * len(each))
    policy = jnp.zeros((len(each),), jnp.int32)

    def run() -> tuple[Simulation, int]:
        found, num_steps = stacked([simulate.create(trace, config, PAGED) for trace in each]), 0
        while bool(jnp.any(found.num_done < trace.count)):
            found = simulate.simulate_each(
                found, trace, costs, policy,
                config=config, allocator=PAGED, policies=(POLICIES["fcfs"],),
            )  # fmt: skip
            num_steps += int(jnp.sum(found.log.count))
        return found, num_steps

    run()
    start_s = time.perf_counter()
    _, num_steps = run()
    wall_s = time.perf_counter() - start_s
    row = {
        "load": "vmapped",
        "runs": len(loads),
        "threads": 1,
        "requests_per_s": sum(map(len, loads)) / wall_s,
        "steps_per_s": num_steps / wall_s,
        "wall_s": wall_s,
    }
    print(json.dumps(row), flush=True)
    return row


def stacked[T](trees: Sequence[T]) -> T:
    """Trees of one form as one, with a first axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def simulate_one(requests: list[Arrival]) -> Run:
    cost, config = cost_and_config()
    return runs.run(requests, cost, config, PAGED, POLICIES["fcfs"])


def cost_and_config() -> tuple[CostModel, EngineConfig]:
    page_size = 16
    config = EngineConfig(
        num_slots=FLAGS.num_slots,
        num_pages=FLAGS.kv_tokens // page_size,
        page_size=page_size,
        pages_per_slot=paper_setups.MAX_TOKENS // page_size,
        num_requests=2 * FLAGS.num_slots,
        token_buckets=(2048,),
        headroom_pages=1,
        log_steps=4096,
    )
    return cost_model.create(SHAPES["opt-13b"], DEVICES["a100-80gb"], page_size=page_size), config


if __name__ == "__main__":
    define_flags()
    common.run(main)
