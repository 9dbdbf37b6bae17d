"""How fast does the engine serve a fixed set of requests, all there from the start?

    python -m experiments.bench_engine --workload=FILE.jsonl --dtype=float32 --num_slots=32

Lines of the workload are `{"prompt_ids", "max_new_tokens"}`; without a file it takes the first 32
ShareGPT prompts that open with a human, cut at 512 tokens, 128 new tokens each. EOS is ignored.
One run after compilation; about a minute on two cores. The last line of stdout is a JSON object.
"""

from absl import flags

from experiments import common, hosts

FLAGS = flags.FLAGS


def define_flags() -> None:
    common.define_model_flags()
    common.define_engine_flags(prefix_cache=False)
    hosts.define_mesh_flags()
    flags.adopt_module_key_flags(common)
    flags.adopt_module_key_flags(hosts)
    common.define_workload_flag("32 prompts from ShareGPT")
    flags.DEFINE_integer(
        "num_pages", None, "How many pages the pool has; by default enough for all slots."
    )
    flags.DEFINE_integer(
        "pool_factor", 1, "Make the pool this many times larger, to see that it costs nothing."
    )
    flags.DEFINE_integer(
        "repeats", 1, "How often to serve the workload; the last run counts.", lower_bound=1
    )


def main(_: list[str]) -> None:
    model = common.load_flagged_model()
    requests = common.workload_flagged() or common.bench_requests(model, 32, max_new_tokens=128)
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


if __name__ == "__main__":
    define_flags()
    common.run(main)
