"""How long prompts and answers are: of recorded turns, of a file, or drawn by statistics."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxpage.config import require
from jaxpage.sim.csv_files import integer, read_rows
from jaxpage.sim.trace import Arrival

PAIRING_RULES = ("first", "all")


class Lengths(NamedTuple):
    """Tokens of `n` requests, `i64[n]` each."""

    prompts: np.ndarray
    outputs: np.ndarray

    @property
    def means(self) -> tuple[float, float]:
        return float(np.mean(self.prompts)), float(np.mean(self.outputs))

    def take(self, rows: np.ndarray | slice) -> "Lengths":
        return Lengths(self.prompts[rows], self.outputs[rows])


class RecordedTurn(NamedTuple):
    """A turn of a conversation, which `conversation` numbers."""

    conversation: int
    number: int  # of the turn, from 0
    is_human: bool
    num_tokens: int


def read_turns(path: Path, token_column: str) -> list[RecordedTurn]:
    """Turns by file: CSV with `conv_index`, `turn_index`, `role` and a column of tokens.

    Raises:
      ConfigError: the file is not there, lacks a column, or a line holds no such numbers.
    """
    columns = ("conv_index", "turn_index", "role", token_column)
    return [
        RecordedTurn(
            integer(path, line, row, "conv_index"),
            integer(path, line, row, "turn_index"),
            row["role"] == "human",
            integer(path, line, row, token_column),
        )
        for line, row in read_rows(path, columns)
    ]


def pairs_of(turns: Iterable[RecordedTurn], rule: str, bos: int = 1) -> Lengths:
    """What a human said and the answer to it: only what opens a conversation, or `all`.

    Earlier turns are no part of a prompt; `bos` tokens are. Empty turns make no pair.

    Raises:
      ConfigError: there is no such rule, or no pair.
    """
    require(rule in PAIRING_RULES, f"pairing rule {rule!r} is none of {', '.join(PAIRING_RULES)}")
    found = rounds_of(turns, bos)
    if rule == "first":
        found = found.take(found.numbers == 0)
    require(len(found.said) > 0, "no conversation that a human turn with an answer opens")
    return Lengths(found.said, found.answers)


class Rounds(NamedTuple):
    """What humans said and the answers to it, in the order of the turns; `i64[n]` each."""

    conversations: np.ndarray
    numbers: np.ndarray  # of the human's turn in the conversation
    said: np.ndarray  # tokens, and BOS
    histories: np.ndarray  # tokens of the conversation before
    answers: np.ndarray  # tokens

    def take(self, rows: np.ndarray | slice) -> "Rounds":
        return Rounds(*(column[rows] for column in self))


def rounds_of(turns: Iterable[RecordedTurn], bos: int = 1) -> Rounds:
    """Every turn of a human that the next one answers; empty turns make no round.

    Raises:
      ConfigError: there is none.
    """
    columns = np.array([tuple(turn) for turn in turns], np.int64).reshape(-1, 4).T
    conversations, numbers, is_human, tokens = columns
    before = np.cumsum(tokens) - tokens
    opens = np.diff(conversations, prepend=-1) != 0
    histories = before - np.maximum.accumulate(np.where(opens, before, 0))
    said, answer = slice(-1), slice(1, None)
    is_round = (
        ~opens[answer]
        & (numbers[said] + 1 == numbers[answer])
        & (is_human[said] > is_human[answer])
        & (np.minimum(tokens[said], tokens[answer]) > 0)
    )
    rows = np.flatnonzero(is_round)
    require(len(rows) > 0, "no human turn with an answer to it")
    return Rounds(
        conversations[rows], numbers[rows], tokens[rows] + bos, histories[rows], tokens[rows + 1]
    )


def read_lengths(path: Path, prompt_column: str, output_column: str, bos: int = 0) -> Lengths:
    """By file, CSV; requests without a token in the answer are left out.

    Raises:
      ConfigError: as `read_turns`; or nothing has an answer.
    """
    rows = [
        (integer(path, line, row, prompt_column) + bos, integer(path, line, row, output_column))
        for line, row in read_rows(path, (prompt_column, output_column))
    ]
    answered = [row for row in rows if row[1] > 0]
    require(len(answered) > 0, f"{path}: no request with an answer in it")
    prompts, outputs = np.array(answered, np.int64).T
    return Lengths(prompts, outputs)


def within(lengths: Lengths, max_tokens: int) -> Lengths:
    """Those of at most `max_tokens` in all, prompt and output."""
    return lengths.take(lengths.prompts + lengths.outputs <= max_tokens)


def rescaled(lengths: Lengths, mean_prompt: float, mean_output: float) -> Lengths:
    """In proportion, to these means; at least one token each way."""
    prompt, output = lengths.means
    scaled = lengths.prompts * (mean_prompt / prompt), lengths.outputs * (mean_output / output)
    return Lengths(*(np.maximum(np.rint(values), 1).astype(np.int64) for values in scaled))


def drawn(
    rng: np.random.Generator, num: int, mean_prompt: float, mean_output: float, cv: float = 1.0
) -> Lengths:
    """Log-normal about these means with deviations `cv` times as large, at least one token."""
    sigma = np.sqrt(np.log1p(cv**2))

    def lengths(mean: float) -> np.ndarray:
        values = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, num)
        return np.maximum(np.rint(values), 1).astype(np.int64)

    return Lengths(lengths(mean_prompt), lengths(mean_output))


def requests_of(
    lengths: Lengths,
    arrival_s: np.ndarray,
    *,
    content: Sequence[int] = (),
    num_samples: int = 1,
    num_beams: int = 1,
) -> list[Arrival]:
    """A request for each, in order; all prompts begin with `content`, a number a token."""
    columns = (arrival_s.tolist(), lengths.prompts.tolist(), lengths.outputs.tolist())
    return [
        Arrival(*each, content=content, num_samples=num_samples, num_beams=num_beams)
        for each in zip(*columns, strict=True)
    ]
