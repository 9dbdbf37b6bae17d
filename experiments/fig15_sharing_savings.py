"""How many pages do samples and beams of one prompt save by sharing them? The paper's Fig 15.

    python -m experiments.fig15_sharing_savings --out=FILE.jsonl

Real sampling and real beam search, on the real model: each workload is served with 2, 4 and 6
sequences a request, and every step counts the pages that its sequences name, and how many pages
those are. The saving is one less their quotient, over all steps. Outputs have recorded lengths
(EOS ignored), as in the paper's traces. `sharegpt` is real prompts and reply lengths, cut to
what a laptop can do; `alpaca` is the same text cut to Alpaca's lengths. FILE gets a row a case.
About nine minutes on two cores. Expected: beams save several times more than samples, and more
sequences save more (OPT-13B: samples 6 to 10 %, beams 38 to 55 % on Alpaca). Refuted if not.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from absl import flags

from experiments import common
from experiments.comparisons import Comparison
from jaxpage.config import require
from jaxpage.engine.host import Engine
from jaxpage.engine.request import Request
from jaxpage.sim.workloads import TextCodec, WorkItem, serving_workload

FLAGS = flags.FLAGS

WIDTHS = (2, 4, 6)
NAMES = {"parallel": "samples", "beam": "beams"}
# The paper's Fig 15 (OPT-13B on Alpaca) and its text (the range on ShareGPT), percent saved.
PAPER = {
    ("alpaca", "parallel"): {2: 6.09, 4: 8.53, 6: 9.79},
    ("alpaca", "beam"): {2: 37.56, 4: 53.13, 6: 55.16},
    ("sharegpt", "parallel"): (16.2, 30.5),
    ("sharegpt", "beam"): (44.3, 66.3),
}
# Deciles of Alpaca's lengths in GPT-2 tokens (the first 5,000 records): instruction with input,
# and output.
ALPACA_PROMPTS = (4, 8, 10, 11, 13, 14, 16, 19, 23, 30, 242)
ALPACA_OUTPUTS = (1, 7, 11, 16, 27, 44, 61, 77, 97, 127, 622)


def define_flags() -> None:
    common.define_model_flags()
    common.define_engine_flags(num_slots=24, prefix_cache=False)
    flags.adopt_module_key_flags(common)
    flags.DEFINE_integer("requests", 12, "How many prompts of each workload.", lower_bound=1)
    flags.DEFINE_integer(
        "max_tokens", 256, "The most tokens of a prompt, and the most of an output.", lower_bound=1
    )
    flags.DEFINE_string("out", None, "The JSONL file to write the rows to.", required=True)


def main(_: list[str]) -> None:
    require(FLAGS.num_slots >= WIDTHS[-1], f"--num_slots must be at least {WIDTHS[-1]}")
    with common.open_for_writing(FLAGS.out) as out:
        model = common.load_flagged_model()
        tokenizer = common.tokenizer_of(model)
        config = common.config_by_flags(
            model,
            max_seq_len=2 * FLAGS.max_tokens,
            num_requests=4 * FLAGS.num_slots,
            max_beams=WIDTHS[-1],
        )
        engine = common.build_engine(model, config)
        engine.compile()
        rows = []
        for name, items in workloads(tokenizer).items():
            for method in ("parallel", "beam"):
                for width in WIDTHS:
                    rows.append(measure(engine, name, items, method, width))
                    out.write(json.dumps(rows[-1]) + "\n")
                    print(sentence(rows[-1]), flush=True)
    common.print_last_line({"rows": rows, **common.provenance()})


def workloads(tokenizer: TextCodec) -> dict[str, list[WorkItem]]:
    """Prompts by the name of their lengths."""
    texts = serving_workload(tokenizer, FLAGS.requests, FLAGS.max_tokens, FLAGS.max_tokens).items
    rng = np.random.default_rng(0)
    places = (np.arange(len(texts)) + 0.5) / len(texts)
    deciles = np.linspace(0, 1, 11)
    prompt_lens = rng.permutation(np.interp(places, deciles, ALPACA_PROMPTS)).astype(int)
    output_lens = rng.permutation(np.interp(places, deciles, ALPACA_OUTPUTS)).astype(int)
    alpaca = [
        WorkItem(
            item.id,
            item.prompt_ids[:prompt_len],
            min(int(output_len), FLAGS.max_tokens),
            item.prompt_text,
        )
        for item, prompt_len, output_len in zip(texts, prompt_lens, output_lens, strict=True)
    ]
    return {"alpaca": alpaca, "sharegpt": list(texts)}


def measure(
    engine: Engine, workload: str, items: Sequence[WorkItem], method: str, width: int
) -> dict:
    """Serves a workload with `width` sequences a request, and counts pages."""
    requests = [
        Request(item.id, item.prompt_ids, item.max_new_tokens, ignore_eos=True, n=width, seed=seed)
        for seed, item in enumerate(items)
    ]
    changes = {"num_beams": width} if method == "beam" else {"temperature": 1.0}
    requests = [replace(request, **changes) for request in requests]
    _, journal = common.serve_all(engine, requests)
    named = sum(record["named_pages"] for record in journal.records)
    held = sum(record["held_pages"] for record in journal.records)
    return {
        "workload": workload,
        "method": method,
        "sequences": width,
        "saved_percent": 100 * (1 - held / named),
        "paper_percent": paper_of(workload, method, width),
        "mean_pages_without_sharing": named / journal.num_steps,
        "mean_pages": held / journal.num_steps,
        "copied_pages": sum(record["num_copied"] for record in journal.records),
        "prompt_tokens": sum(len(item.prompt_ids) for item in items) / len(items),
        "output_tokens": sum(item.max_new_tokens for item in items) / len(items),
        "steps": journal.num_steps,
        "wall_s": journal.wall_s,
    }


def paper_of(workload: str, method: str, width: int) -> float | tuple[float, float]:
    """What the paper prints, or the range that its text gives for all widths."""
    paper = PAPER[workload, method]
    return paper[width] if isinstance(paper, dict) else paper


def comparison(last: dict[str, Any]) -> list[Comparison]:
    """The pages that are saved, by workload, method and width."""
    return [
        Comparison(
            f"{row['workload']}, {row['sequences']} {NAMES[row['method']]}: pages saved",
            paper_of(row["workload"], row["method"], row["sequences"]),
            row["saved_percent"],
            "%",
        )
        for row in last["rows"]
    ]


def sentence(row: dict) -> str:
    """A row for people."""
    paper = row["paper_percent"]
    told = f"{paper[0]} to {paper[1]}" if isinstance(paper, tuple) else paper
    return (
        f"{row['workload']:>8}, {row['method']:>8}, {row['sequences']} sequences: "
        f"{row['saved_percent']:.1f} % of pages saved (paper: {told} %)"
    )


if __name__ == "__main__":
    define_flags()
    common.run(main)
