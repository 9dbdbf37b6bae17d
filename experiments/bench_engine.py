"""How fast does the engine serve a fixed set of requests, all there from the start?

    python -m experiments.bench_engine --workload=FILE.jsonl --dtype=float32 --num_slots=32

Lines of the workload are `{"prompt_ids", "max_new_tokens"}`; without a file it takes the first 32
ShareGPT prompts that open with a human, cut at 512 tokens, 128 new tokens each. EOS is ignored.
One run after compilation; about a minute on two cores. The last line of stdout is a JSON object.
"""

from absl import flags

from experiments import common
from jaxpage.checkpoint.load import LoadedModel
from jaxpage.config import require
from jaxpage.engine.request import Request

FLAGS = flags.FLAGS


def define_flags() -> None:
    common.define_model_flags()
    common.define_engine_flags(prefix_cache=False)
    flags.adopt_module_key_flags(common)
    flags.DEFINE_string(
        "workload", None, "A JSONL file of requests; by default 32 prompts from ShareGPT."
    )
    flags.DEFINE_integer(
        "num_pages", None, "How many pages the pool has; by default enough for all slots."
    )
    flags.DEFINE_integer(
        "pool_factor", 1, "Make the pool this many times larger, to see that it costs nothing."
    )
    flags.DEFINE_integer("repeats", 1, "How often to serve the workload; the last run counts.")


def main(_: list[str]) -> None:
    model = common.load_flagged_model()
    requests = _read_workload(FLAGS.workload, model)
    config = common.config_for(
        model, requests, num_pages=FLAGS.num_pages, pool_factor=FLAGS.pool_factor
    )
    engine = common.build_engine(model, config)
    compile_s = engine.compile()
    counter = common.CompilationCounter()
    for _repeat in range(FLAGS.repeats):
        results, journal = common.serve_all(engine, requests)

    num_output = sum(len(result.output_ids) for result in results)
    num_prompt = sum(len(request.prompt_ids) for request in requests)
    common.print_last_line(
        {
            "output_tokens_per_s": num_output / journal.wall_s,
            "total_tokens_per_s": (num_output + num_prompt) / journal.wall_s,
            "compile_s": compile_s,
            "steps": journal.num_steps,
            "peak_rss_bytes": common.peak_rss_bytes(),
            "host_transfers_per_step": journal.num_host_reads / journal.num_steps,
            "recompiles": counter.count,
            "wall_s": journal.wall_s,
            "output_tokens": num_output,
            "prompt_tokens": num_prompt,
            "num_pages": config.num_pages,
            "attention": common.attention_in_use(engine),
            **common.provenance(),
        }
    )


def _read_workload(path: str | None, model: LoadedModel) -> list[Request]:
    if path is None:
        return common.bench_requests(model, 32, max_new_tokens=128)
    requests = []
    for number, line in common.read_jsonl(path):
        for name, kind in (("prompt_ids", list), ("max_new_tokens", int)):
            require(
                isinstance(line.get(name), kind),
                f'{path}:{number}: "{name}" must be a {kind.__name__}, got {line.get(name)!r:.80}',
            )
        prompt_ids = tuple(line["prompt_ids"])
        requests.append(Request(str(number), prompt_ids, line["max_new_tokens"], ignore_eos=True))
    require(bool(requests), f"{path}: no requests in it")
    return requests


if __name__ == "__main__":
    define_flags()
    common.run(main)
