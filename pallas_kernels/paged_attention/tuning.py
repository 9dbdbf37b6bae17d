"""The tiles that were measured to be fastest on a card, and where they are kept.

`tuned/` holds one JSON file for each card, written by `tune` on that card and by nobody else. A
row's bits depend on its tile, so that a tile is chosen by what a serving run never changes: dtypes,
head dim, page size and query heads to a KV head, and not by the rows or queries of a step.
"""

import functools
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from pallas_kernels.paged_attention import gpu
from pallas_kernels.paged_attention.config import Tile

FOLDER = Path(__file__).parent / "tuned"


class Kind(NamedTuple):
    """Calls that take the same tile on a card."""

    kernel: str  # the module's last name
    q_dtype: str
    pages_dtype: str
    group: int  # query heads to a KV head, G
    page_size: int
    head_dim: int


def kind_of(kernel: str, q, k_pages) -> Kind:
    """The kind of a call of `kernel`, a module's name, with arrays of these shapes."""
    _, num_kv_heads, page_size, head_dim = k_pages.shape
    name = kernel.rpartition(".")[2]
    group = q.shape[1] // num_kv_heads
    return Kind(name, q.dtype.name, k_pages.dtype.name, group, page_size, head_dim)


def tuned_tile(kernel: str, q, k_pages) -> Tile | None:
    """The tile measured on this machine's card for such a call; None if nobody has."""
    card = gpu.card()
    if card is None:
        return None
    return read_tiles(file_of(card.device_kind)).get(kind_of(kernel, q, k_pages))


def file_of(card: str) -> Path:
    """The file of a card, by the name that JAX gives it."""
    return FOLDER / f"{re.sub(r'[^a-z0-9]+', '_', card.lower()).strip('_')}.json"


@functools.cache
def read_tiles(file: Path) -> dict[Kind, Tile]:
    """The tiles of a file by kind; none if there is no such file.

    Raises:
      ValueError: the file is not what `row_of` makes.
    """
    if not file.exists():
        return {}
    try:
        rows = json.loads(file.read_text())
        kinds = [Kind(**{name: row[name] for name in Kind._fields}) for row in rows]
        tiles = [Tile(**{name: row[name] for name in Tile._fields}) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error!r}: write it with `tune`, or delete it.") from error
    return dict(zip(kinds, tiles, strict=True))


def row_of(kind: Kind, tile: Tile, measured: dict[str, Any]) -> dict[str, Any]:
    """What the file holds of a kind: its tile, and what was measured, where and when."""
    return {**kind._asdict(), **tile._asdict(), **measured}


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """Writes `rows` over those of the same kinds that the file has; other kinds stay."""
    old = json.loads(file.read_text()) if file.exists() else []
    by_kind = {tuple(row[name] for name in Kind._fields): row for row in [*old, *rows]}
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(by_kind[kind]) for kind in sorted(by_kind))
    file.write_text(f"[\n{lines}\n]\n")
    read_tiles.cache_clear()
