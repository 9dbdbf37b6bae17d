"""CSV and TSV files whose faults are reported with their line; plain or `.gz`."""

import csv
import gzip
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from jaxpage.config import ConfigError, require

Row = dict[str, str]


def read_rows(
    path: Path, columns: Sequence[str], is_tsv: bool = False
) -> Iterator[tuple[int, Row]]:
    """Rows with the number of their line, the header's being 1; `columns` are among theirs.

    With `is_tsv` fields end with a tab, and quotation marks are as good as other characters.

    Raises:
      ConfigError: there is no such file, a column is missing, or a line has other fields.
    """
    with open_text(path) as file:
        style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if is_tsv else {}
        reader = csv.DictReader(file, **style)
        found = reader.fieldnames or []
        require(
            set(columns) <= set(found),
            f"{path}, line 1: expected a header with {', '.join(columns)}, found {list(found)}",
        )
        for row in reader:
            # With too few fields the rest are None, with too many a list under None.
            require(
                None not in row and None not in row.values(),
                f"{path}, line {reader.line_num}: expected {len(found)} fields",
            )
            yield reader.line_num, row


def integer(path: Path, line: int, row: dict, column: str) -> int:
    """The number in a column of a row.

    Raises:
      ConfigError: it is none from 0 on.
    """
    try:
        value = int(row[column])
    except (TypeError, ValueError):
        value = -1
    if value < 0:
        raise ConfigError(f"{path}, line {line}: {column}={row[column]!r} is no number from 0 on")
    return value


def open_text(path: Path) -> IO[str]:
    """Opens a file to read.

    Raises:
      ConfigError: there is none.
    """
    require(path.is_file(), f"{path}: no such file")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")
