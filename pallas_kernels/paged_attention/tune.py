"""Which tile is fastest on this card?

    python -m pallas_kernels.paged_attention.tune --shape=all

Question: for each kind of call among the named shapes (dtypes, head dim, page size, heads to a KV
head), which tile has the least time, as a mean over the kind's shapes of the ratio to the time of
the heuristic's tile? Needs an NVIDIA GPU. Minutes: not known yet, as no card has run it.

Every tile is checked against the reference on all input sets before it is timed, as in `bench`; a
kind keeps the heuristic's tile unless another is faster by more than `MARGIN`. One JSON line a
tile; the winners go to `--out`, by default this card's file in `tuned/`, with card, commit and
ratio.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from pallas_kernels.common import timing
from pallas_kernels.paged_attention import bench, gpu, tuning
from pallas_kernels.paged_attention.config import Tile
from pallas_kernels.paged_attention.shapes import Shape, choose_shapes

FLAGS = flags.FLAGS
MARGIN = 0.02  # of a time; less is noise
CANDIDATES = tuple(
    Tile(block_tokens, stages, split_tokens)
    for block_tokens in (64, 128)
    for stages in range(2, 6)
    for split_tokens in (512, 1024, 2048)
)

# Seconds of each tile at a shape, or a sentence why not.
Measure = Callable[[Shape, Sequence[Tile]], Sequence[float | str]]


def kinds_of(kernel: Any, shapes: Sequence[Shape]) -> dict[tuning.Kind, list[Shape]]:
    """The shapes that `kernel`, a module, takes, by kind."""
    found: dict[tuning.Kind, list[Shape]] = {}
    for shape in shapes:
        arguments = shape.arguments()
        q, k_pages, table = (arguments[name] for name in ("q", "k_pages", "page_indices"))
        try:
            kernel.check(q, k_pages, table, is_ragged=shape.is_ragged)
        except NotImplementedError:
            continue
        found.setdefault(tuning.kind_of(kernel.__name__, q, k_pages), []).append(shape)
    return found


def tiles_of(kernel: Any, shape: Shape) -> list[Tile]:
    """The heuristic's tile, then the other candidates that can be launched."""
    arguments = shape.arguments()
    q, k_pages, table = (arguments[name] for name in ("q", "k_pages", "page_indices"))
    tiles = [kernel.heuristic_tile(q, k_pages)]
    for tile in CANDIDATES:
        try:
            kernel.check(q, k_pages, table, is_ragged=shape.is_ragged, tile=tile)
        except (NotImplementedError, ValueError):
            continue
        tiles += [tile] if tile not in tiles else []
    return tiles


def tune(kernel: Any, shapes: Sequence[Shape], measure: Measure) -> Iterator[dict[str, Any]]:
    """One row for each tile of a kind; `is_best` marks one of them, the last.

    A tile that fails or is wrong at any shape of its kind has a `status` other than "ok".
    """
    tiles = tiles_of(kernel, shapes[0])
    by_shape = [measure(shape, tiles) for shape in shapes]
    base, best, best_ratio = None, tiles[0], 1.0
    for tile, *found in zip(tiles, *by_shape, strict=True):
        faults = [fault for fault in found if isinstance(fault, str)]
        logs = [math.log(seconds) for seconds in found if not isinstance(seconds, str)]
        row = {"tile": tile._asdict(), "status": faults[0] if faults else "ok", "ratio": None}
        if not faults and tile == tiles[0]:
            base = sum(logs)
        if not faults and base is not None:
            row["ratio"] = math.exp((sum(logs) - base) / len(logs))
            if row["ratio"] < min(best_ratio, 1 - MARGIN):
                best, best_ratio = tile, row["ratio"]
        yield row | {"is_best": False}
    status = "the heuristic's tile fails" if base is None else "ok"
    yield {"tile": best._asdict(), "status": status, "ratio": best_ratio, "is_best": True}


def measure_here(
    kernel: Any, settings: bench.Settings, shape: Shape, tiles: Sequence[Tile]
) -> list[float | str]:
    """Median seconds of a call on this card with each tile, all on the same input sets."""
    options = {"sm_scale": shape.head_dim**-0.5, "soft_cap": None, "window": None}

    def attend(tile, q, cu_q_lens=None, **arrays):
        out, *_ = kernel.attend(q, cu_q_lens=cu_q_lens, **arrays, **options, tile=tile)
        return out.astype(q.dtype)

    cases = {str(tile): bench.Case(partial(attend, tile)) for tile in tiles}
    rows = bench.bench(shape, cases, settings, copy_bytes_per_s=math.inf)
    return [row["median_s"] if row["status"] == "ok" else row["status"] for row in rows]


def define_flags() -> None:
    defaults = bench.Settings()
    flags.DEFINE_list("shape", ["all"], "Names of shapes, parts of names, or all.")
    flags.DEFINE_integer("repeats", defaults.repeats, "Dispatches to time.", lower_bound=1)
    flags.DEFINE_string("out", None, "The file of the winners; by default this card's in tuned/.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}: every setting is a --flag=value")
    logging.set_verbosity(logging.WARNING)
    try:
        shapes = choose_shapes(FLAGS.shape)
        if missing := timing.missing_gpu():
            raise ValueError(missing)
        kernel = gpu.kernel_of_card()
    except (NotImplementedError, ValueError) as error:
        sys.exit(f"error: {error}")
    origin = timing.provenance()
    file = Path(FLAGS.out) if FLAGS.out else tuning.file_of(origin["device"])
    measure = partial(measure_here, kernel, bench.Settings(repeats=FLAGS.repeats))
    for kind, members in kinds_of(kernel, shapes).items():
        row: dict[str, Any] = {}
        for row in tune(kernel, members, measure):
            print(json.dumps(kind._asdict() | row | origin), flush=True)
        if row["status"] == "ok":
            names = [shape.name for shape in members]
            measured = {"ratio": row["ratio"], "shapes": names} | origin
            tuning.write_rows(file, [tuning.row_of(kind, Tile(**row["tile"]), measured)])


if __name__ == "__main__":
    define_flags()
    app.run(main)
