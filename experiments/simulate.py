"""How would a trace be served by a model on a device that is not here?

    python -m experiments.simulate --model=opt-13b --device=a100-80gb --trace=FILE \\
        --trace_format=azure --out=DIR

The engine's own scheduler runs under the cost model (WORKSPACE.md): nothing is computed, and times
are what the calibrated kernels would take. DIR gets `requests.jsonl`, a row a request, `steps.csv`,
a row a step, and `summary.json`. Seconds to minutes on one core, some thousand requests a second
where prompts are short. With --limit_s it is first found how fast requests can come, at random, so
that their mean normalized latency stays within that, and DIR tells of that rate. Expected: what the
same scheduler would do on that device, as far as the cost model is right (README.md says how far);
what a host-bound engine adds to each step is not in it, but for --overhead_s.
"""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments import common, host_overhead
from jaxpage.config import PREEMPTION_MODES, ConfigError, EngineConfig, require
from jaxpage.paging.allocator import ALLOCATORS, CACHED, Allocator
from jaxpage.scheduling.policies import POLICIES
from jaxpage.sim import arrivals, cost_model, runs, synthetic, trace_files
from jaxpage.sim import lengths as length_sets
from jaxpage.sim.capacity import capacity
from jaxpage.sim.cost_model import CostModel
from jaxpage.sim.device import DEVICES, find_device
from jaxpage.sim.efficiencies import read_efficiencies
from jaxpage.sim.metrics import latency_summary, steps_of_note, waste_shares
from jaxpage.sim.runs import Run, kv_tokens_in
from jaxpage.sim.shapes import SHAPES
from jaxpage.sim.synthetic import Level
from jaxpage.sim.trace_files import FORMATS, Recorded

FLAGS = flags.FLAGS

TURNS = "turns"
MOST_TOKENS = 4096  # of a conversation, unless --max_tokens


def define_flags() -> None:
    flags.DEFINE_enum("model", "opt-13b", sorted(SHAPES), "Whose shapes are priced.")
    flags.DEFINE_string(
        "device", "a100-80gb", f"One of {', '.join(DEVICES)}, or a JSON file of measure_device."
    )
    flags.DEFINE_integer("num_devices", 1, "Over how many the model is spread.", lower_bound=1)
    flags.DEFINE_string(
        "efficiencies", None, "A file of calibrate; by default those that A100s measured."
    )
    host_overhead.define_flags()
    flags.adopt_module_key_flags(host_overhead)
    define_trace_flags()
    define_serving_flags()
    flags.DEFINE_float("slo_ttft_s", np.inf, "A first token counts as good up to this.")
    flags.DEFINE_float("slo_tpot_s", np.inf, "And the time between tokens up to this.")
    flags.DEFINE_string("out", None, "The folder to write to.", required=True)


def define_trace_flags() -> None:
    """What arrives, and when."""
    flags.DEFINE_string("trace", None, "The file with the requests.", required=True)
    flags.DEFINE_enum(
        "trace_format",
        None,
        [*sorted(FORMATS), TURNS],
        f"Its format; {TURNS} are those of conversations, whose next comes after the last answer.",
        required=True,
    )
    flags.DEFINE_string("token_column", "gpt2_tokens", f"The column of {TURNS} with the lengths.")
    flags.DEFINE_float(
        "think_s",
        30.0,
        f"With {TURNS}: mean seconds from an answer to the next turn (exponential).",
        lower_bound=0.0,
    )
    flags.DEFINE_list(
        "prefix_tree",
        [],
        "What prompts begin with, as CHILDRENxTOKENS by level: 4x512,8x128 is one of 4 prompts of "
        "512 tokens, and then one of the 8 continuations of 128 that each of them has.",
    )
    flags.DEFINE_float(
        "rate",
        None,
        "Requests a second that arrive at random (Poisson) in place of the trace's own times; "
        "formats without times need it. Of conversations with --trace_format=turns.",
        lower_bound=1e-9,
    )
    flags.DEFINE_integer(
        "requests", None, "How many (or conversations) to take; by default all.", lower_bound=1
    )
    flags.DEFINE_float(
        "limit_s",
        None,
        "Find the highest rate at which mean normalized latency, s/token, is within this (the "
        "paper's measure of capacity) and serve at that; the search begins at --rate or at 1.",
        lower_bound=1e-9,
    )
    flags.DEFINE_integer("seed", 0, "The seed of arrivals.")


def define_serving_flags() -> None:
    """What it is served with."""
    flags.DEFINE_integer(
        "kv_tokens",
        None,
        "Tokens whose KV finds room; by default what the weights leave of nine tenths of memory.",
        lower_bound=1,
    )
    flags.DEFINE_integer("num_slots", 256, "How many sequences can run at once.", lower_bound=1)
    flags.DEFINE_integer("page_size", 16, "How many tokens a page holds.", lower_bound=1)
    flags.DEFINE_integer(
        "token_budget", 2048, "How many tokens a step computes at most.", lower_bound=1
    )
    flags.DEFINE_integer(
        "max_tokens",
        None,
        "Tokens that a sequence can have, which --allocator=max reserves; by default what the "
        "longest of the trace has.",
        lower_bound=1,
    )
    flags.DEFINE_enum("allocator", "paged", sorted(ALLOCATORS), "How memory is given out.")
    flags.DEFINE_enum("policy", "fcfs", sorted(POLICIES), "Who goes first.")
    flags.DEFINE_bool("prefix_cache", True, "Keep pages for prompts that begin alike; paged only.")
    flags.DEFINE_enum("eviction", "lru", list(CACHED), "Which cached page leaves first.")
    flags.DEFINE_enum("preemption", "recompute", PREEMPTION_MODES, "Who makes way, and how.")
    flags.DEFINE_integer(
        "host_tokens",
        None,
        "Tokens whose KV finds room on the host; by default as many as on the devices, and none "
        "under --preemption=recompute.",
        lower_bound=1,
    )


def main(_: list[str]) -> None:
    out = common.make_folder(FLAGS.out)
    cost, rate = cost_by_flags(), FLAGS.rate
    found = {}
    if FLAGS.limit_s is not None:
        rate = capacity(lambda rate: latency_s(rate, cost), FLAGS.limit_s, rate or 1.0)
        found = {"limit_s": FLAGS.limit_s, "capacity_per_s": rate}
    recorded = trace_of(rate)
    start_s = time.perf_counter()
    run, config = serve(recorded, cost)
    wall_s = time.perf_counter() - start_s
    row = summary(run, config) | found | {"wall_s": wall_s}
    row["simulated_requests_per_wall_s"] = len(recorded.requests) / wall_s
    write(out, run, row | common.provenance())
    common.print_last_line(row | common.provenance())


def serve(recorded: Recorded, cost: CostModel) -> tuple[Run, EngineConfig]:
    config = config_by_flags(cost, recorded)
    with tqdm(total=len(recorded.requests), unit="request", disable=None) as bar:
        run = runs.run(
            recorded.requests,
            cost,
            config,
            allocator_by_flags(),
            POLICIES[FLAGS.policy],
            tokens_each=recorded.tokens_each,
            on_progress=lambda done: bar.update(done - bar.n),
        )
    return run, config


def latency_s(rate: float, cost: CostModel) -> float:
    """The mean normalized latency at `rate`, which it also says."""
    run, _ = serve(trace_of(rate), cost)
    mean_s = float(np.mean(run.timeline.normalized_latency_s))
    print(f"{rate:.4g} requests/s: {mean_s:.4g} s/token", flush=True)
    return mean_s


def trace_of(rate: float | None) -> Recorded:
    """The requests of `--trace`, at their own times or at `rate`."""
    if FLAGS.trace_format == TURNS:
        require(not FLAGS.prefix_tree, "--prefix_tree goes with traces whose turns are apart")
        return conversations_of(rate)
    recorded = retimed(trace_files.read(Path(FLAGS.trace), FLAGS.trace_format), rate)
    if not FLAGS.prefix_tree:
        return recorded
    rng = np.random.default_rng(FLAGS.seed)
    requests = synthetic.with_prefixes(rng, recorded.requests, levels_by_flag(), tokens_each=1)
    return recorded._replace(requests=requests, tokens_each=1)


def conversations_of(rate: float | None) -> Recorded:
    if rate is None:
        raise ConfigError("conversations have no times: say how fast they open by --rate")
    turns = length_sets.read_turns(Path(FLAGS.trace), FLAGS.token_column)
    rounds = length_sets.rounds_of(turns, bos=0)
    dialogues = synthetic.dialogues_of(rounds, FLAGS.max_tokens or MOST_TOKENS)
    num = FLAGS.requests or len(dialogues)
    require(0 < num <= len(dialogues), f"--requests={num}: {FLAGS.trace} has {len(dialogues)}")
    rng = np.random.default_rng(FLAGS.seed)
    opens_s = arrivals.poisson(rng, num, rate).tolist()
    pauses_s = iter(lambda: float(rng.exponential(FLAGS.think_s)), None)
    requests = synthetic.multi_turn(dialogues[:num], opens_s, pauses_s)
    return Recorded(requests, tokens_each=1, has_times=True)


def levels_by_flag() -> list[Level]:
    levels = []
    for text in FLAGS.prefix_tree:
        numbers = text.split("x")
        require(
            len(numbers) == 2 and all(number.isdecimal() for number in numbers),
            f"--prefix_tree={','.join(FLAGS.prefix_tree)}: expected CHILDRENxTOKENS, got {text!r}",
        )
        levels.append(Level(*map(int, numbers)))
    return levels


def retimed(recorded: Recorded, rate: float | None) -> Recorded:
    """As many requests as asked for, at their own times or at `rate`."""
    require(
        recorded.has_times or rate is not None,
        f"--trace_format={FLAGS.trace_format} has no times: say how fast they come with --rate",
    )
    requests = recorded.requests[: FLAGS.requests]
    if FLAGS.requests is not None:
        require(
            len(requests) == FLAGS.requests,
            f"--requests={FLAGS.requests}: {FLAGS.trace} has {len(requests)}",
        )
    if rate is not None:
        times_s = arrivals.poisson(np.random.default_rng(FLAGS.seed), len(requests), rate)
        requests = [
            replace(request, arrival_s=float(time_s))
            for request, time_s in zip(requests, times_s, strict=True)
        ]
    return recorded._replace(requests=requests, has_times=True)


def cost_by_flags() -> CostModel:
    efficiencies = (
        None if FLAGS.efficiencies is None else read_efficiencies(Path(FLAGS.efficiencies))
    )
    return cost_model.create(
        SHAPES[FLAGS.model],
        find_device(FLAGS.device),
        num_devices=FLAGS.num_devices,
        page_size=FLAGS.page_size,
        overhead=host_overhead.by_flags(),
        efficiencies=efficiencies,
    )


def config_by_flags(cost: CostModel, recorded: Recorded) -> EngineConfig:
    """Pages for `--kv_tokens`, slots for the longest request, and twice as many rows as slots."""
    size = FLAGS.page_size
    longest = max(request.prompt_len + request.output_len for request in recorded.requests)
    kv_tokens = FLAGS.kv_tokens or kv_tokens_in(cost.shape, cost.device, cost.num_devices)
    host_tokens = FLAGS.host_tokens or (0 if FLAGS.preemption == "recompute" else kv_tokens)
    require(kv_tokens >= size, f"--kv_tokens={kv_tokens} is less than a page of {size}: give more")
    return EngineConfig(
        num_slots=FLAGS.num_slots,
        num_pages=kv_tokens // size,
        page_size=size,
        pages_per_slot=-(-(FLAGS.max_tokens or longest) // size),
        num_requests=2 * FLAGS.num_slots,
        token_buckets=(max(FLAGS.token_budget, FLAGS.num_slots),),
        headroom_pages=1,
        preemption=FLAGS.preemption,
        host_pages=host_tokens // size,
        prices=cost_model.prices(cost) if FLAGS.preemption == "auto" else None,
        log_steps=4096,
    )


def allocator_by_flags() -> Allocator:
    if FLAGS.allocator == "paged" and FLAGS.prefix_cache:
        return CACHED[FLAGS.eviction]
    return ALLOCATORS[FLAGS.allocator]


def summary(run: Run, config: EngineConfig) -> dict[str, float]:
    """Latencies, and what the steps did; shares of memory as means over steps short of it."""
    steps, full = run.steps, steps_of_note(run.steps, config)
    latencies = latency_summary(run.timeline, FLAGS.slo_ttft_s, FLAGS.slo_tpot_s)
    return latencies | {
        "steps": len(steps["seconds"]),
        "busy_s": float(np.sum(steps["seconds"], dtype=np.float64)),
        "kv_tokens": config.num_pages * config.page_size,
        "mean_batched_requests": float(np.mean(full["num_running"])),
        **{f"{name}_share": share for name, share in waste_shares(full).items()},
        "preemptions": int(np.sum(run.num_preemptions)),
        "recomputed_tokens": int(np.sum(steps["num_recomputed"])),
        "hit_tokens": int(np.sum(run.cached_lens)),
        "moved_pages": int(np.sum(steps["moved_in"]) + np.sum(steps["moved_out"])),
    }


def write(out: Path, run: Run, row: dict) -> None:
    timeline = run.timeline
    columns = {
        "arrival_s": timeline.arrival_s,
        "first_token_s": timeline.first_token_s,
        "finish_s": timeline.finish_s,
        "output_len": timeline.output_lens,
        "num_preemptions": run.num_preemptions,
        "cached_tokens": run.cached_lens,
    }
    with (out / "requests.jsonl").open("w") as file:
        for values in zip(*(column.tolist() for column in columns.values()), strict=True):
            file.write(json.dumps(dict(zip(columns, values, strict=True))) + "\n")
    table = np.column_stack(list(run.steps.values()))
    with (out / "steps.csv").open("w") as file:
        np.savetxt(file, table, "%.9g", ",", header=",".join(run.steps), comments="")
    (out / "summary.json").write_text(json.dumps(row, indent=2) + "\n")


if __name__ == "__main__":
    define_flags()
    common.run(main)
