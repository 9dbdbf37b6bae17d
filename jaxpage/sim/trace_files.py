"""Recorded traces by file: when requests came, how long they were, and what they had in common.

Formats, plain or `.gz`:

- `azure`: CSV of the Azure public traces, `TIMESTAMP,ContextTokens,GeneratedTokens`.
- `burstgpt`: CSV of BurstGPT, of which `Timestamp` (seconds), `Request tokens` and
  `Response tokens` are read.
- `mooncake`: JSON lines with `timestamp` (ms), `input_length`, `output_length`, and `hash_ids`, a
  number for every 512 tokens of the prompt, equal where two prompts begin with equal tokens.
- `lengths`: CSV with `prompt_len` and `output_len`, and no times.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxpage.config import ConfigError, require
from jaxpage.sim.csv_files import integer, open_text, read_rows
from jaxpage.sim.trace import Arrival

MOONCAKE_TOKENS = 512  # that a number of `hash_ids` stands for


class Recorded(NamedTuple):
    """Requests in the order of their arrival, the first at 0 s."""

    requests: list[Arrival]
    tokens_each: int  # that a number of their content stands for
    has_times: bool


def read(path: Path, trace_format: str) -> Recorded:
    """The trace in a file.

    Raises:
      ConfigError: there is no such file or format, it has no requests, a column is missing, or a
        line holds no such numbers, a time before the one ahead of it, or a length of 0.
    """
    require(
        trace_format in FORMATS,
        f"trace format {trace_format!r} is none of {', '.join(sorted(FORMATS))}",
    )
    return FORMATS[trace_format](path)


def _azure(path: Path) -> Recorded:
    columns = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    return _timed(path, read_rows(path, columns), _instant, columns)


def _burstgpt(path: Path) -> Recorded:
    columns = ("Timestamp", "Request tokens", "Response tokens")
    return _timed(path, read_rows(path, columns), _seconds, columns)


def _lengths(path: Path) -> Recorded:
    columns = ("prompt_len", "output_len")
    found = [
        Arrival(0.0, *_both_lengths(path, line, row, columns))
        for line, row in read_rows(path, columns)
    ]
    return Recorded(_some(path, found), tokens_each=1, has_times=False)


def _mooncake(path: Path) -> Recorded:
    columns = ("timestamp", "input_length", "output_length")
    rows = list(_json_rows(path, (*columns, "hash_ids")))
    recorded = _timed(path, iter(rows), _milliseconds, columns)
    requests, numbers = [], {}
    for request, (line, row) in zip(recorded.requests, rows, strict=True):
        ids = row["hash_ids"]
        num_blocks = -(-request.prompt_len // MOONCAKE_TOKENS)
        is_chain = isinstance(ids, list) and all(type(number) is int for number in ids)
        require(
            is_chain and len(ids) == num_blocks and min(ids, default=0) >= 0,
            f"{path}, line {line}: hash_ids must be {num_blocks} numbers from 0 on, one for every "
            f"{MOONCAKE_TOKENS} of {request.prompt_len} tokens",
        )
        # Numbered anew, in the order of the file: a hash may be larger than an array's numbers.
        content = tuple(numbers.setdefault(number, len(numbers)) for number in ids)
        requests.append(replace(request, content=content))
    return Recorded(requests, MOONCAKE_TOKENS, has_times=True)


FORMATS: dict[str, Callable[[Path], Recorded]] = {
    "azure": _azure,
    "burstgpt": _burstgpt,
    "lengths": _lengths,
    "mooncake": _mooncake,
}


def _timed(
    path: Path,
    rows: Iterator[tuple[int, dict]],
    nanos_of: Callable[[object], int],
    columns: Sequence[str],
) -> Recorded:
    """Of rows with a time in the first of `columns` and lengths in the others."""
    requests: list[Arrival] = []
    first = before = None
    for line, row in rows:
        said = f"{path}, line {line}: {columns[0]}={row[columns[0]]!r}"
        try:
            nanos = nanos_of(row[columns[0]])
        except (OverflowError, ValueError) as error:
            raise ConfigError(f"{said} is no time") from error
        require(nanos >= 0, f"{said} is negative")
        require(
            before is None or nanos >= before,
            f"{said} is before the line ahead of it: sort the file by time",
        )
        before, first = nanos, nanos if first is None else first
        prompt_len, output_len = _both_lengths(path, line, row, columns[1:])
        requests.append(Arrival((nanos - first) / 1e9, prompt_len, output_len))
    return Recorded(_some(path, requests), tokens_each=1, has_times=True)


def _some(path: Path, requests: list[Arrival]) -> list[Arrival]:
    require(len(requests) > 0, f"{path}: no requests in it")
    return requests


def _both_lengths(path: Path, line: int, row: dict, columns: Sequence[str]) -> tuple[int, int]:
    def length(column: str) -> int:
        found = integer(path, line, row, column)
        require(
            found > 0,
            f"{path}, line {line}: {column}={found}: a request has at least one token each way; "
            "leave out requests that failed",
        )
        return found

    prompt, output = columns
    return length(prompt), length(output)


def _json_rows(path: Path, fields: Sequence[str]) -> Iterator[tuple[int, dict]]:
    with open_text(path) as file:
        for line, text in enumerate(file, 1):
            try:
                row = json.loads(text)
            except ValueError as error:
                raise ConfigError(f"{path}, line {line}: not JSON ({error})") from error
            require(
                isinstance(row, dict) and set(fields) <= set(row),
                f"{path}, line {line}: expected an object with {', '.join(fields)}",
            )
            yield line, row


def _instant(value: object) -> int:
    """Nanoseconds of a date and time; all of a file are of one zone."""
    text = str(value).removesuffix("Z").removesuffix("+00:00")
    if not text:
        raise ValueError("no date")
    return int(np.datetime64(text, "ns").astype(np.int64))


def _seconds(value: object) -> int:
    return round(float(str(value)) * 1e9)


def _milliseconds(value: object) -> int:
    return round(float(str(value)) * 1e6)
