"""Answers the prompts of a JSONL file with a paged engine.

    python -m experiments.generate --prompts=IN.jsonl --out=OUT.jsonl --max_new_tokens=64

Input lines are `{"id", "prompt"}` or `{"id", "prompt_ids"}`, with `"max_new_tokens"`, `"seed"`,
`"n"`, `"num_beams"`, `"priority"` (for `--policy=priority`, higher goes first) and `"tenant"` if
wanted; output lines are `{"id", "prompt_ids", "output_ids", "text", "finish_reason",
"cached_tokens"}` in input order. Of `n` samples, or of the `n` best of `num_beams` beams, the
others stand in `"more"`. Requests of one tenant share the pages of what
their prompts have in common (`--prefix_cache`). A request that cannot be served gets an `"error"`
sentence and holds up no other. With `--save_dir` a run that was killed goes on by `--resume`.
"""

import json
from dataclasses import replace

from absl import flags

from experiments import common, hosts, saving
from jaxpage.checkpoint.load import LoadedModel
from jaxpage.config import ConfigError, EngineConfig, require
from jaxpage.engine.request import Request, Result
from jaxpage.engine.run import Journal

FLAGS = flags.FLAGS


class EarlyStopping(flags.BooleanParser):
    """Yes, no or `never`: `--early_stopping`, `--noearly_stopping`, `--early_stopping=never`."""

    def parse(self, argument: str | bool) -> bool | str:
        if argument == "never":
            return "never"
        try:
            return super().parse(argument)
        except ValueError as error:
            raise ValueError("it must be true, false or never") from error


def define_flags() -> None:
    common.define_model_flags()
    common.define_engine_flags()
    hosts.define_mesh_flags()
    flags.adopt_module_key_flags(common)
    flags.adopt_module_key_flags(hosts)
    flags.DEFINE_string("prompts", None, "The JSONL file with the prompts.", required=True)
    flags.DEFINE_string("out", None, "The JSONL file to write the answers to.", required=True)
    flags.DEFINE_integer(
        "max_new_tokens", 128, "How many tokens to generate where a prompt does not say."
    )
    flags.DEFINE_bool("ignore_eos", False, "Go on after an end-of-sequence token.")
    flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token; more draws more freely.")
    flags.DEFINE_integer("top_k", 0, "Draw from the k likeliest tokens only; 0 from all.")
    flags.DEFINE_float("top_p", 1.0, "Draw from the likeliest tokens of this total probability.")
    flags.DEFINE_float("repetition_penalty", 1.0, "Divide the logits of tokens seen; 1 does not.")
    flags.DEFINE_integer("n", 1, "How many samples, or beams, of each prompt to write.")
    flags.DEFINE_integer("num_beams", 1, "From 2 on search for the likeliest text; draw nothing.")
    flags.DEFINE_float("length_penalty", 1.0, "More than 0 favours long beams, less short ones.")
    flags.DEFINE(
        EarlyStopping(),
        "early_stopping",
        False,
        "End a search once as many beams have ended, or, with =never, only when no other can come "
        "to be better. Left alone, it ends when no other would be better if it ended now.",
        boolean=True,
    )
    flags.DEFINE_integer("seed", 0, "The seed of requests that have none, mixed with their id.")
    flags.DEFINE_integer(
        "num_pages", None, "How many pages the pool has; by default enough for all slots."
    )
    flags.DEFINE_bool("logprobs", False, "Write the log probability of each output token as well.")
    common.define_allocator_flag()
    saving.define_save_flags()
    flags.adopt_module_key_flags(saving)


def main(_: list[str]) -> None:
    lines = _read_lines(FLAGS.prompts)
    with common.open_for_writing(FLAGS.out) as out:
        model = common.load_flagged_model()
        requests, errors = _read_requests(lines, model)
        searches = any(request.num_beams > 1 for request in requests)
        for name in ("length_penalty", "early_stopping"):
            require(
                searches or not FLAGS[name].present,
                f"--{name} is for beam search: give --num_beams from 2 on",
            )
        config = _size(model, requests)
        engine = common.build_engine(model, config, FLAGS.allocator)
        compile_s = engine.compile()
        results, journal = engine.serve(requests, snapshots=saving.snapshots_flagged())
        results += [Result(request, error=error) for request, error in errors]
        by_id = {result.request.id: result for result in results}
        for line in lines:
            row = _output_line(by_id[_id_of(line)], line, model)
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    common.print_last_line(_summary(results, journal, compile_s))


def _id_of(line: dict) -> str:
    return json.dumps(line["id"])


def _read_lines(path: str) -> list[dict]:
    """The lines of the prompt file; one without an id, or with another's, refuses the file."""
    lines, seen = [], {}
    for number, line in common.read_jsonl(path):
        require("id" in line, f'{path}:{number}: no "id": every line needs one of its own')
        first = seen.setdefault(_id_of(line), number)
        require(
            first == number,
            f"{path}:{number}: id {line['id']!r} was used in line {first}: ids must be distinct",
        )
        lines.append(line)
    require(bool(lines), f"{path}: no prompts in it: write one JSON object a line")
    return lines


def _read_requests(
    lines: list[dict], model: LoadedModel
) -> tuple[list[Request], list[tuple[Request, str]]]:
    """Requests, and those that are no requests with the reason."""
    requests, errors = [], []
    for line in lines:
        request = Request(
            id=_id_of(line),
            prompt_ids=(),
            max_new_tokens=FLAGS.max_new_tokens,
            temperature=FLAGS.temperature,
            top_k=FLAGS.top_k,
            top_p=FLAGS.top_p,
            repetition_penalty=FLAGS.repetition_penalty,
            seed=common.seed_of(FLAGS.seed, _id_of(line)),
            n=FLAGS.n,
            num_beams=FLAGS.num_beams,
            length_penalty=FLAGS.length_penalty,
            early_stopping=FLAGS.early_stopping,
            ignore_eos=FLAGS.ignore_eos,
        )
        try:
            requests.append(_fill(request, line, model))
        except ConfigError as error:
            errors.append((request, str(error)))
    return requests, errors


def _fill(request: Request, line: dict, model: LoadedModel) -> Request:
    """`request` with what its line says.

    Raises:
      ConfigError: a value is of the wrong kind.
    """
    if "prompt_ids" in line:
        prompt_ids = line["prompt_ids"]
        is_list = isinstance(prompt_ids, list) and all(type(token) is int for token in prompt_ids)
        require(is_list, f'"prompt_ids" must be a list of integers, got {prompt_ids!r:.80}')
    else:
        text = line.get("prompt")
        if not isinstance(text, str):
            raise ConfigError(f'"prompt" must be a string, got {text!r:.80}')
        tokenizer = model.tokenizer
        if tokenizer is None:
            raise ConfigError(
                f'--model={FLAGS.model} has no tokenizer: give "prompt_ids" in place of "prompt"'
            )
        prompt_ids = tokenizer.encode(text)
    request = replace(request, prompt_ids=tuple(prompt_ids))
    for name in ("max_new_tokens", "seed", "n", "num_beams", "priority"):
        value = line.get(name, getattr(request, name))
        require(type(value) is int, f'"{name}" must be an integer, got {value!r:.80}')
        request = replace(request, **{name: value})
    tenant = line.get("tenant", "")
    require(type(tenant) is str, f'"tenant" must be a string, got {tenant!r:.80}')
    request = replace(request, tenant=tenant)
    return request


def _size(model: LoadedModel, requests: list[Request]) -> EngineConfig:
    """Slots as long as the longest request that the model can take."""
    lengths = [len(r.prompt_ids) + max(r.max_new_tokens, 1) for r in requests]
    longest = max([n for n in lengths if n <= model.config.max_position], default=1)
    return common.config_by_flags(
        model,
        max_seq_len=longest,
        num_requests=min(max(sum(r.num_rows for r in requests), 2 * FLAGS.num_slots), 1024),
        num_pages=FLAGS.num_pages,
        max_beams=min(max([r.num_beams for r in requests], default=1), FLAGS.num_slots),
    )


def _output_line(result: Result, line: dict, model: LoadedModel) -> dict:
    row = {"id": line["id"], "prompt_ids": list(result.request.prompt_ids)}
    row |= _sample_of(result, model)
    if result.error is not None:
        return row | {"output_ids": [], "text": "", "error": result.error}
    row["cached_tokens"] = result.num_cached_tokens
    if result.more:
        row["more"] = [_sample_of(sample, model) for sample in result.more]
    return row


def _sample_of(result: Result, model: LoadedModel) -> dict:
    tokenizer = model.tokenizer
    row = {
        "output_ids": result.output_ids,
        "text": tokenizer.decode(result.output_ids) if tokenizer is not None else None,
        "finish_reason": result.finish_reason,
    }
    if result.score is not None:
        row["score"] = result.score
    if FLAGS.logprobs:
        row["logprobs"] = result.logprobs
    return row


def _summary(results: list[Result], journal: Journal, compile_s: float) -> dict:
    samples = [sample for result in results for sample in (result, *result.more)]
    num_output_tokens = sum(len(sample.output_ids) for sample in samples)
    return {
        "requests": len(results),
        "errors": sum(sample.error is not None for sample in samples),
        "output_tokens": num_output_tokens,
        "output_tokens_per_s": num_output_tokens / journal.wall_s if journal.wall_s else 0.0,
        "wall_s": journal.wall_s,
        "compile_s": compile_s,
        "steps": journal.num_steps,
        "preemptions": sum(sample.num_preemptions for sample in samples),
        # The others of a request share the prompt of the first.
        "cached_prompt_tokens": sum(result.num_cached_tokens for result in results),
        **common.disk_summary(journal),
        **common.provenance(),
    }


if __name__ == "__main__":
    define_flags()
    common.run(main)
