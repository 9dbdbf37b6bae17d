"""Does PagedAttention do what is claimed of it? Real prompts, one memory budget, four allocators.

    python -m experiments.demo --out=results/demo

Serves 64 ShareGPT prompts with SmolLM2-135M under `paged`, `oracle`, `pow2` and `max`, answers a
few questions, and prints a table and the article's claims beside what was measured. DIR gets
`results.jsonl`, `answers.jsonl`, `claims.jsonl`, three pictures, and a folder for each run as
`experiments.serve` writes it. About eight minutes on two cores. Expected: the same tokens under
every allocator; `max` runs 16 requests at once and `paged` about 36 (the paper's Fig 13: 7 and 30).
It would be refuted if `paged` batched no more than `oracle`.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from absl import flags

from experiments import claims, common, demo_load, plots, serve
from jaxpage.checkpoint.load import LoadedModel
from jaxpage.checkpoint.tokenizer import StreamDecoder, Tokenizer
from jaxpage.config import ConfigError, EngineConfig
from jaxpage.engine.host import Engine
from jaxpage.engine.request import Request
from jaxpage.model.params import Params
from jaxpage.model.placement import serving_params
from jaxpage.sim.workloads import WorkItem

FLAGS = flags.FLAGS

ALLOCATORS = ("paged", "oracle", "pow2", "max")

QUESTIONS = (
    "What is a page table, in one sentence?",
    "Write a two-line poem about memory.",
    "Name three rivers in Europe.",
)
MAX_ANSWER_TOKENS = 80

COLUMNS: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("allocator", lambda row: row["allocator"]),
    ("tokens/s", lambda row: f"{row['output_tokens_per_s']:.1f}"),
    ("batched", lambda row: f"{row['mean_batched_requests']:.2f}"),
    ("tokens %", lambda row: f"{100 * row['token_states_share']:.1f}"),
    ("reserved %", lambda row: f"{100 * row['reservation_share']:.1f}"),
    ("internal %", lambda row: f"{100 * row['internal_share']:.1f}"),
    ("external %", lambda row: f"{100 * row['external_share']:.1f}"),
    ("s/token", lambda row: f"{row['normalized_latency_s_per_token']:.3f}"),
    ("preempted", lambda row: str(row["preemptions"])),
    ("wall s", lambda row: f"{row['wall_s']:.1f}"),
    ("status", lambda row: row["status"]),
)
LEGEND = """\
batched: requests running at once; tokens, reserved, internal, external: shares of the KV memory
(holds tokens; reserved and used later; reserved and never used; in no reservation); these are
means over the steps in which requests wait for memory. s/token: mean of latency / output length."""


def define_flags() -> None:
    common.define_model_flags()
    common.define_engine_flags(num_slots=demo_load.NUM_SLOTS, prefix_cache=False)
    serve.define_serving_flags()
    for module in (common, serve):
        flags.adopt_module_key_flags(module)  # so that --help shows them
    FLAGS.set_default("page_size", demo_load.PAGE_SIZE)
    FLAGS.set_default("kv_bytes", demo_load.KV_BYTES)


def main(_: list[str]) -> None:
    folder = common.make_folder(FLAGS.out)
    phases: dict[str, float] = {}
    with phase("load the model (converted on first use)", phases):
        model = common.load_flagged_model()
        params = serving_params(model.params, FLAGS.dtype)
        workload = serve.read_workload(model)
        config = serve.budgeted_config(model, FLAGS.requests)
    print(f"{workload.source}; {budget_text(config, FLAGS.kv_bytes)}")
    rows = {}
    for allocator in ALLOCATORS:
        with phase(f"serve under {allocator}", phases):
            make = engine_maker(model, params, config, allocator)
            rows[allocator] = run_allocator(make, allocator, workload.items, folder / allocator)
    common.write_jsonl(folder / "results.jsonl", rows.values())
    with phase("answer a few questions, EOS honoured", phases):
        answers = answer_questions(engine_maker(model, params, config, "paged"), model.tokenizer)
        common.write_jsonl(folder / "answers.jsonl", answers)
    with phase("draw", phases):
        pictures = draw(folder)
    differing = differing_requests(rows, folder)
    report(rows, differing, pictures, folder)
    print("\nseconds by phase")
    print(format_table([(f"{seconds:.1f}", name) for name, seconds in phases.items()]))
    common.print_last_line(result_line(rows, differing, phases))


@contextmanager
def phase(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Says that a phase begins, and keeps how long it took in `seconds`."""
    print(f"\n== {name}", flush=True)
    start_s = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start_s


def budget_text(config: EngineConfig, kv_bytes: int) -> str:
    """What the KV budget holds, and how many requests Max can run in it."""
    run_pages = 1 << (config.pages_per_slot - 1).bit_length()  # what the buddy allocator gives
    text = (
        f"KV budget {kv_bytes / 1e6:.1f} MB = {config.num_pages} pages of "
        f"{config.page_size} tokens; {config.num_pages // run_pages} requests of "
        f"{config.max_seq_len} tokens fit under max"
    )
    if run_pages != config.pages_per_slot:
        text += f" (its runs are rounded up from {config.pages_per_slot} to {run_pages} pages)"
    return text


def engine_maker(
    model: LoadedModel, params: Params, config: EngineConfig, allocator: str
) -> Callable[[], Engine]:
    """Makes an engine when called: its pool lives no longer than the run that needs it.

    In contiguous memory nothing is ever preempted, so there the mode of the pages is left out.
    """
    if not common.allocator_named(allocator).grows:
        config = replace(
            config, preemption="recompute", host_pages=0, transfer_budget=0, prices=None
        )
    return lambda: common.engine_for(model, params, config, allocator)


def run_allocator(
    make: Callable[[], Engine], allocator: str, items: Sequence[WorkItem], folder: Path
) -> dict[str, Any]:
    """Serves `items` and returns the summary; a run that fails is a row that says why."""
    common.make_folder(str(folder))
    (folder / "summary.json").unlink(missing_ok=True)  # so that an old run is never drawn as this
    try:
        row = serve.serve_workload(make(), items, folder)
    except Exception as error:  # whatever it was, the other allocators still run
        sentence = " ".join(str(error).split())[:200]
        row = {"allocator": allocator, "status": f"failed: {type(error).__name__}: {sentence}"}
        print(row["status"])
    return row


def answer_questions(
    make: Callable[[], Engine], tokenizer: Tokenizer | None
) -> list[dict[str, Any]]:
    """Answers `QUESTIONS` one by one, printing each as its tokens come."""
    if tokenizer is None or tokenizer.chat_template is None:
        print("this model has no chat template: nothing asked")
        return []
    try:
        engine = make()
        return [answer(engine, tokenizer, question) for question in QUESTIONS]
    except Exception as error:  # the table and the claims are still worth printing
        print(f"failed: {type(error).__name__}: {error}")
        return []


def answer(engine: Engine, tokenizer: Tokenizer, question: str) -> dict[str, Any]:
    """Answers one question greedily, streaming it to stdout."""
    prompt = tokenizer.chat([{"role": "user", "content": question}])
    decoder = StreamDecoder(tokenizer)
    request = Request(question, tuple(tokenizer.encode(prompt)), MAX_ANSWER_TOKENS)

    def on_tokens(_: str, sample: int, ids: list[int]) -> None:
        del sample
        print(decoder.feed(ids), end="", flush=True)

    print(f"\n> {question}")
    (result,), _ = engine.serve([request], steps_per_read=2, on_tokens=on_tokens)
    rest = decoder.flush()
    print(rest if result.error is None else f"{rest}[{result.error}]")
    return {
        "question": question,
        "answer": tokenizer.decode(result.output_ids),
        "output_ids": result.output_ids,
        "finish_reason": result.finish_reason,
    }


def differing_requests(rows: Mapping[str, Mapping[str, Any]], folder: Path) -> dict[str, int]:
    """By allocator, how many requests got other tokens than under the first that ran."""
    outputs = {
        name: {
            request["id"]: request["output_ids"]
            for _, request in common.read_jsonl(str(folder / name / "requests.jsonl"))
        }
        for name, row in rows.items()
        if row["status"] == "ok"
    }
    if not outputs:
        return {}
    first = next(iter(outputs.values()))
    return {
        name: sum(ids != first.get(request_id) for request_id, ids in output.items())
        for name, output in outputs.items()
    }


def draw(folder: Path) -> list[Path]:
    """The pictures, or none with a word of why."""
    try:
        return plots.draw_all(folder)
    except ConfigError as error:
        print(error)
        return []


def report(
    rows: Mapping[str, Mapping[str, Any]],
    differing: Mapping[str, int],
    pictures: Sequence[Path],
    folder: Path,
) -> None:
    """Prints the table, whether the tokens agree, where the files are, and the claims."""
    print(f"\n{results_table(list(rows.values()))}\n\n{LEGEND}\n\n{agreement_text(differing)}")
    print("pictures: " + (", ".join(map(str, pictures)) or "none"))
    found = claims.all_claims(rows)
    common.write_jsonl(folder / "claims.jsonl", (asdict(claim) for claim in found))
    print(f"\nThe article's claims\n\n{claims.format_claims(found)}")


def results_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line an allocator; what a failed run does not have is a dash."""

    def cell(row: Mapping[str, Any], of: Callable[[Mapping[str, Any]], str]) -> str:
        try:
            return of(row)
        except KeyError:
            return "-"

    header = tuple(name for name, _ in COLUMNS)
    return format_table([header, *(tuple(cell(row, of) for _, of in COLUMNS) for row in rows)])


def format_table(lines: Sequence[Sequence[str]]) -> str:
    """Aligns columns: the first and last to the left, the others, which are numbers, to the right.

    With two columns the first is the number.
    """
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    left = {0, len(widths) - 1} if len(widths) > 2 else {1}

    def align(index: int, cell: str) -> str:
        return cell.ljust(widths[index]) if index in left else cell.rjust(widths[index])

    return "\n".join(
        "  ".join(align(index, cell) for index, cell in enumerate(line)).rstrip() for line in lines
    )


def agreement_text(differing: Mapping[str, int]) -> str:
    """Whether all runs gave the same tokens."""
    if len(differing) < 2:
        return "tokens: fewer than two runs succeeded, so there is nothing to compare"
    if not any(differing.values()):
        return f"tokens: the same for every request under all {len(differing)} allocators"
    counts = ", ".join(f"{num} under {name}" for name, num in differing.items() if num)
    return (
        f"tokens: NOT the same for all: {counts} differ from {next(iter(differing))}. Products of "
        "differently large steps may round differently; --batch_invariant=true makes them equal"
    )


def result_line(
    rows: Mapping[str, Mapping[str, Any]],
    differing: Mapping[str, int],
    phases: Mapping[str, float],
) -> dict[str, Any]:
    """The demo's result as one JSON object."""
    return {
        "output_tokens_per_s": {name: row.get("output_tokens_per_s") for name, row in rows.items()},
        "paged_over": {name: claims.speedup(rows, name) for name in ALLOCATORS[1:]},
        "status": {name: row["status"] for name, row in rows.items()},
        "differing_requests": dict(differing),
        "phases_s": dict(phases),
        **common.provenance(),
    }


if __name__ == "__main__":
    define_flags()
    common.run(main)
