"""Do small pages that move to the host cost less than whole sequences that do, or computing again?

    python -m experiments.claim_eviction --out=FILE.jsonl

The same load, more than the pool can hold, under each mode of preemption: ShareGPT prompts on the
real model, all there from the start, admitted without headroom, EOS ignored. After every step the
host notes when each token came. FILE gets a row a mode, and the last line of stdout compares them.
About six minutes on two cores. Expected of the article's claim: `fine` moves at most half the
bytes of `swap`, no token differs between the modes, and the 99th percentile of the time between
tokens is lower. Refuted if not.
"""

import json
import time
from collections import defaultdict
from dataclasses import replace

import numpy as np
from absl import flags

from experiments import common
from jaxpage.checkpoint.load import LoadedModel
from jaxpage.config import PREEMPTION_MODES, EngineConfig, require
from jaxpage.engine.request import Request, Result
from jaxpage.engine.run import Journal
from jaxpage.model.params import Params
from jaxpage.model.placement import serving_params
from jaxpage.paging.kv_pool import page_bytes
from jaxpage.sim.workloads import serving_workload

FLAGS = flags.FLAGS

MAX_PROMPT_TOKENS = 256
MAX_OUTPUT_TOKENS = 256


def define_flags() -> None:
    common.define_model_flags()
    common.define_engine_flags(num_slots=16, prefix_cache=False)
    flags.adopt_module_key_flags(common)
    common.define_workload_flag("ShareGPT prompts with the lengths of their replies")
    flags.DEFINE_integer("requests", 32, "How many prompts to serve.", lower_bound=1)
    flags.DEFINE_integer("kv_bytes", 64 * 2**20, "How many bytes the pool may take.", lower_bound=1)
    flags.DEFINE_list("modes", list(PREEMPTION_MODES), "The modes to compare.")
    flags.DEFINE_string("out", None, "The JSONL file to write the rows to.", required=True)


def main(_: list[str]) -> None:
    require(not FLAGS["preemption"].present, "--preemption: name what to compare in --modes")
    for mode in FLAGS.modes:
        require(mode in PREEMPTION_MODES, f"--modes: {mode!r} is none of {PREEMPTION_MODES}")
    with common.open_for_writing(FLAGS.out) as out:
        model = common.load_flagged_model()
        requests = common.workload_flagged() or sharegpt_requests(model)
        params = serving_params(model.params, FLAGS.dtype)
        rows, outputs = {}, {}
        for mode in FLAGS.modes:
            config = config_of(model, requests, mode)
            rows[mode], outputs[mode] = measure(model, params, config, requests)
            out.write(json.dumps(rows[mode]) + "\n")
            print(sentence(rows[mode]), flush=True)
    first = outputs[FLAGS.modes[0]]
    common.print_last_line(
        {
            "rows": rows,
            "requests_with_other_tokens": {
                mode: sum(a != b for a, b in zip(first, tokens, strict=True))
                for mode, tokens in outputs.items()
            },
            **ratios(rows),
            **common.provenance(),
        }
    )


def sharegpt_requests(model: LoadedModel) -> list[Request]:
    """`--requests` prompts, each with an output as long as the reply in the data."""
    items = serving_workload(
        common.tokenizer_of(model), FLAGS.requests, MAX_PROMPT_TOKENS, MAX_OUTPUT_TOKENS
    ).items
    return [Request(i.id, i.prompt_ids, i.max_new_tokens, ignore_eos=True) for i in items]


def config_of(model: LoadedModel, requests: list[Request], mode: str) -> EngineConfig:
    """The pool of `--kv_bytes`, which takes in whoever fits at the moment."""
    config = common.config_for(
        model,
        requests,
        kv_bytes=FLAGS.kv_bytes,
        preemption=mode,
        host_bytes=None if mode == "recompute" else FLAGS.host_bytes,
        transfer_budget=FLAGS.transfer_budget if mode == "fine" else 0,
    )
    return replace(config, headroom_pages=0)


def measure(
    model: LoadedModel, params: Params, config: EngineConfig, requests: list[Request]
) -> tuple[dict, list[list[int]]]:
    """Serves the requests once, after compilation: the mode's row, and all outputs."""
    engine = common.engine_for(model, params, config, "paged")
    engine.compile()
    came_s: dict[str, list[float]] = defaultdict(list)

    def listen(request_id: str, sample: int, tokens: list[int]) -> None:
        del sample
        came_s[request_id] += [time.perf_counter()] * len(tokens)

    results, journal = common.serve_all(engine, requests, steps_per_read=1, on_tokens=listen)
    gaps_s = np.concatenate([np.diff(times) for times in came_s.values()])
    bytes_a_page = page_bytes(model.config, config.page_size, FLAGS.dtype)
    row = row_of(results, journal, gaps_s, bytes_a_page)
    return {"mode": config.preemption, "num_pages": config.num_pages, **row}, [
        result.output_ids for result in results
    ]


def row_of(
    results: list[Result], journal: Journal, gaps_s: np.ndarray, bytes_a_page: int
) -> dict[str, float]:
    """What a run cost."""

    def total(name: str) -> int:
        return sum(record[name] for record in journal.records)

    preemptions = total("num_preempted")
    moved_bytes = (total("moved_out") + total("moved_in")) * bytes_a_page
    num_output_tokens = sum(len(result.output_ids) for result in results)
    return {
        "output_tokens_per_s": num_output_tokens / journal.wall_s,
        "steps": journal.num_steps,
        "preemptions": preemptions,
        "moved_bytes": moved_bytes,
        "moved_bytes_per_preemption": moved_bytes / preemptions if preemptions else 0.0,
        "most_pages_moved_in_a_step": max(
            record["moved_out"] + record["moved_in"] for record in journal.records
        ),
        "recomputed_tokens": total("num_recomputed"),
        "steps_without_a_token": sum(record["num_sampled"] == 0 for record in journal.records),
        "mean_running": journal.mean("num_running") - journal.mean("num_paused"),
        "inter_token_p50_s": float(np.percentile(gaps_s, 50)),
        "inter_token_p99_s": float(np.percentile(gaps_s, 99)),
        "inter_token_max_s": float(np.max(gaps_s)),
        "wall_s": journal.wall_s,
    }


def ratios(rows: dict[str, dict]) -> dict[str, float]:
    """`fine` over `swap`, where both were measured."""
    if not {"fine", "swap"} <= set(rows) or not rows["swap"]["moved_bytes"]:
        return {}
    names = ("moved_bytes", "inter_token_p99_s", "output_tokens_per_s")
    return {f"fine_over_swap_{name}": rows["fine"][name] / rows["swap"][name] for name in names}


def sentence(row: dict) -> str:
    """A row for people."""
    return (
        f"{row['mode']:>9}: {row['output_tokens_per_s']:6.1f} tokens/s, "
        f"{row['preemptions']} preemptions, {row['moved_bytes'] / 2**20:.1f} MiB moved, "
        f"{row['recomputed_tokens']} tokens computed again, between tokens "
        f"p50 {row['inter_token_p50_s'] * 1e3:.0f} ms, p99 {row['inter_token_p99_s'] * 1e3:.0f} ms"
    )


if __name__ == "__main__":
    define_flags()
    common.run(main)
