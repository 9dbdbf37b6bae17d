"""Writes a file of requests, with prompts and lengths of ShareGPT, for machines and models without.

    python -m experiments.make_workload --requests=96 --out=FILE.jsonl

Each line is {"prompt_ids", "max_new_tokens"}, as `--workload` of other scripts takes it. The tokens
are of `--model`'s tokenizer; a model of another vocabulary can serve them where only speed counts.
Seconds. The last line of stdout says how long prompts and outputs are.
"""

from pathlib import Path

import numpy as np
from absl import flags

from experiments import common
from jaxpage.sim.workloads import serving_workload

FLAGS = flags.FLAGS


def define_flags() -> None:
    common.define_model_flags()
    flags.adopt_module_key_flags(common)
    flags.DEFINE_integer("requests", 96, "How many to write.", lower_bound=1)
    flags.DEFINE_integer("max_prompt_tokens", 512, "Cuts longer prompts.", lower_bound=1)
    flags.DEFINE_integer("max_output_tokens", 256, "Cuts longer outputs.", lower_bound=1)
    flags.DEFINE_string("out", None, "The JSONL file to write.", required=True)


def main(_: list[str]) -> None:
    with common.open_for_writing(FLAGS.out):  # at once, before the model is read
        model = common.load_flagged_model()
    limits = FLAGS.max_prompt_tokens, FLAGS.max_output_tokens
    items = serving_workload(common.tokenizer_of(model), FLAGS.requests, *limits).items
    lines = ({"prompt_ids": i.prompt_ids, "max_new_tokens": i.max_new_tokens} for i in items)
    common.write_jsonl(Path(FLAGS.out), lines)
    common.print_last_line(
        {
            "requests": len(items),
            "mean_prompt_tokens": float(np.mean([len(item.prompt_ids) for item in items])),
            "mean_output_tokens": float(np.mean([item.max_new_tokens for item in items])),
        }
    )


if __name__ == "__main__":
    define_flags()
    common.run(main)
