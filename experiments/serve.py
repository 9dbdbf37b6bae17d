"""Serves real prompts from a KV budget in bytes under one allocator.

    python -m experiments.serve --allocator=paged --kv_bytes=64000000 --requests=64 --out=DIR

Prompts are the first human turns of ShareGPT, at most 512 tokens; outputs are as long as the
recorded replies, at most 256 tokens, and EOS is ignored, so that every allocator does the same
work. DIR gets `steps.jsonl` (one row a step), `requests.jsonl` (one a request), `owners.npz` (which
request owns which page, by step) and `summary.json`. About a minute on two cores for 64 requests.
Expected: the same tokens under every allocator, and the most batched requests under `paged`.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments import common, hosts, saving
from jaxpage.checkpoint.load import LoadedModel
from jaxpage.config import ConfigError
from jaxpage.engine.host import Engine
from jaxpage.engine.request import Request, Result
from jaxpage.engine.run import Journal
from jaxpage.engine.snapshots import SnapshotConfig
from jaxpage.sim.metrics import summarise
from jaxpage.sim.workloads import WorkItem, Workload, serving_workload

FLAGS = flags.FLAGS

MAX_PROMPT_TOKENS = 512
MAX_OUTPUT_TOKENS = 256


def define_flags() -> None:
    common.define_model_flags()
    common.define_engine_flags(num_slots=64)
    hosts.define_mesh_flags()
    flags.adopt_module_key_flags(common)
    flags.adopt_module_key_flags(hosts)
    define_serving_flags()
    common.define_allocator_flag()
    saving.define_save_flags()
    flags.adopt_module_key_flags(saving)


def define_serving_flags() -> None:
    """Flags that the demo shares."""
    flags.DEFINE_integer(
        "kv_bytes",
        256 * 2**20,
        "How many bytes keys and values may take, all layers together.",
        lower_bound=1,
    )
    flags.DEFINE_integer("requests", 64, "How many prompts to serve.", lower_bound=1)
    flags.DEFINE_string("out", None, "The folder to write results to.", required=True)


def main(_: list[str]) -> None:
    folder = common.make_folder(FLAGS.out)
    model = common.load_flagged_model()
    workload = read_workload(model)
    engine = common.build_engine(model, budgeted_config(model, FLAGS.requests), FLAGS.allocator)
    print(f"serving {workload.source} under {FLAGS.allocator}")
    snapshots = saving.snapshots_flagged()
    common.print_last_line(serve_workload(engine, workload.items, folder, snapshots))


def read_workload(model: LoadedModel) -> Workload:
    """The prompts to serve."""
    tokenizer = common.tokenizer_of(model)
    return serving_workload(tokenizer, FLAGS.requests, MAX_PROMPT_TOKENS, MAX_OUTPUT_TOKENS)


def budgeted_config(model: LoadedModel, num_requests: int):
    """Capacities within `--kv_bytes`, for any request of the workload."""
    return common.config_by_flags(
        model,
        max_seq_len=MAX_PROMPT_TOKENS + MAX_OUTPUT_TOKENS,
        num_slots=min(FLAGS.num_slots, num_requests),
        num_requests=num_requests,
        kv_bytes=FLAGS.kv_bytes,
        record_page_map=True,
    )


def serve_workload(
    engine: Engine,
    items: Sequence[WorkItem],
    folder: Path,
    snapshots: SnapshotConfig | None = None,
) -> dict:
    """Compiles, serves `items`, writes the result files of one run and returns its summary."""
    allocator = engine.setup.allocator.name
    compile_s = engine.compile()
    requests = [Request(i.id, i.prompt_ids, i.max_new_tokens, ignore_eos=True) for i in items]
    with tqdm(total=len(requests), desc=f"{allocator:>6}", unit="request") as bar:
        results, journal = engine.serve(
            requests, steps_per_read=8, on_progress=_advance(bar), snapshots=snapshots
        )
    served = [result for result in results if result.error is None]
    if not served:
        raise ConfigError(f"--kv_bytes={FLAGS.kv_bytes}: no request fits: {results[0].error}")
    config = engine.setup.engine
    summary = {
        "allocator": allocator,
        "status": "ok" if len(served) == len(results) else "some requests were refused",
        "refused": len(results) - len(served),
        **summarise(
            journal.records,
            engine.setup.engine,
            wall_s=journal.wall_s,
            num_prompt_tokens=sum(len(r.request.prompt_ids) for r in served),
            num_output_tokens=sum(len(r.output_ids) for r in served),
            normalized_latencies_s=[r.normalized_latency_s for r in served],
        ),
        "compile_s": compile_s,
        "cached_prompt_tokens": sum(r.num_cached_tokens for r in served),
        **common.disk_summary(journal),
        "kv_bytes": FLAGS.kv_bytes,
        "num_pages": config.num_pages,
        "page_size": config.page_size,
        **common.provenance(),
    }
    _write_run(folder, results, journal, summary, config.num_requests)
    return summary


def _advance(bar: tqdm) -> Callable[[Journal, int], None]:
    def on_progress(journal: Journal, num_done: int) -> None:
        bar.set_postfix(running=journal.records[-1]["num_running"], refresh=False)
        bar.update(num_done - bar.n)

    return on_progress


def _write_run(
    folder: Path, results: list[Result], journal: Journal, summary: dict, num_requests: int
) -> None:
    steps = (
        record | {"time_s": time_s}
        for record, time_s in zip(journal.records, journal.step_times_s, strict=True)
    )
    common.write_jsonl(folder / "steps.jsonl", steps)
    common.write_jsonl(folder / "requests.jsonl", (_request_row(result) for result in results))
    rows = sorted(journal.request_ids)
    np.savez_compressed(
        folder / "owners.npz",
        owners=np.stack(journal.owners).astype(np.int16),
        request_ids=np.array([journal.request_ids[row] for row in rows]),
        nobody=num_requests,
    )
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def _request_row(result: Result) -> dict:
    return {
        "id": result.request.id,
        "prompt_tokens": len(result.request.prompt_ids),
        "output_tokens": len(result.output_ids),
        "finish_reason": result.finish_reason,
        "error": result.error,
        "preemptions": result.num_preemptions,
        "cached_tokens": result.num_cached_tokens,
        "first_token_s": result.first_token_s,
        "finish_s": result.finish_s,
        "normalized_latency_s_per_token": result.normalized_latency_s,
        "output_ids": result.output_ids,
    }


if __name__ == "__main__":
    define_flags()
    common.run(main)
