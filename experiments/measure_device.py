"""What does this machine make of the kernels of a model? Rows for `experiments.calibrate`.

    python -m experiments.measure_device --model=random:smollm2-135m --out=DIR

Measures, on the device that JAX finds, at the model's own sizes: products and elementwise
operations by number of tokens, attention over pages of decoding batches and of prompts, and pages
on their way to the host and back. Each is timed in many calls of one dispatch that wait for each
other. DIR gets `rows.csv`, and `device.json` with the highest rates seen, against which
`calibrate --device=DIR/device.json --rows=measured:NAME:DIR/rows.csv` fits efficiencies, and which
`--device=DIR/device.json` names elsewhere. About a minute on two cores. With one device nothing is
said of links between several: `link_bytes_per_s` is then the memory's.
"""

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import asdict

import jax
import jax.numpy as jnp
from absl import flags

from experiments import common
from experiments.device_kernels import (
    Measured,
    attention,
    elementwise,
    moves,
    products,
    tile_rows,
)
from jaxpage.checkpoint.load import RANDOM
from jaxpage.config import ModelConfig
from jaxpage.model.presets import PRESETS
from jaxpage.sim import kernels
from jaxpage.sim.device import DeviceSpec
from jaxpage.sim.profiles import COLUMNS

FLAGS = flags.FLAGS

MOVED_PAGES = (1, 8, 64)


def define_flags() -> None:
    common.define_model_flags()
    flags.adopt_module_key_flags(common)
    flags.DEFINE_integer("page_size", 16, "How many tokens a page holds.", lower_bound=1)
    flags.DEFINE_list("tokens", ["1", "8", "64", "256", "1024"], "How many tokens a step has.")
    flags.DEFINE_list("batches", ["1", "8", "64"], "How many sequences decode together.")
    flags.DEFINE_list("contexts", ["128", "1024"], "How many tokens a sequence has.")
    flags.DEFINE_integer("repeats", 5, "How often each is timed.", lower_bound=1)
    flags.DEFINE_string("out", None, "The folder for rows.csv and device.json.", required=True)


def main(_: list[str]) -> None:
    folder = common.make_folder(FLAGS.out)
    name = FLAGS.model.removeprefix(RANDOM)
    model = PRESETS[name] if name in PRESETS else common.load_flagged_model().config
    rows = []
    for row in measure_all(model):
        rows.append(row)
        print(f"{row.group}: {row.seconds * 1e6:.1f} us", flush=True)
    device = device_of(rows)
    (folder / "device.json").write_text(json.dumps(asdict(device), indent=2))
    with common.open_for_writing(str(folder / "rows.csv")) as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in rows:
            kind, work = kernels.KINDS[row.kind], [float(x) for x in row.work]
            writer.writerow([device.name, row.group, kind, row.tokens, *work, row.seconds])
    common.print_last_line({"rows": len(rows), "spec": asdict(device), **common.provenance()})


def measure_all(model: ModelConfig) -> Iterator[Measured]:
    """Rows of all kinds that one device can show."""
    dtype = jnp.dtype(FLAGS.dtype)
    for tokens in map(int, FLAGS.tokens):
        yield from products(model, tokens, dtype, FLAGS.repeats)
        yield from elementwise(model, tokens, dtype, FLAGS.repeats)
    for context in map(int, FLAGS.contexts):
        for batch in map(int, FLAGS.batches):
            yield attention(model, batch, 1, context, FLAGS.page_size, dtype, FLAGS.repeats)
        for tokens in map(int, FLAGS.tokens):
            if 1 < tokens <= context:
                yield attention(model, 1, tokens, context, FLAGS.page_size, dtype, FLAGS.repeats)
    for pages in MOVED_PAGES:
        yield moves(model, pages, FLAGS.page_size, dtype, FLAGS.repeats)


def device_of(rows: list[Measured]) -> DeviceSpec:
    """This machine, with the highest rates seen as its peaks."""

    def fastest(column: str, *kinds: int) -> float:
        return max(
            float(getattr(row.work, column)) / row.seconds for row in rows if row.kind in kinds
        )

    moved = fastest("bytes", kernels.NORM, kernels.ACTIVATION, kernels.ADD, kernels.DECODE)
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    stats = jax.devices()[0].memory_stats() or {}
    return DeviceSpec(
        name=jax.devices()[0].device_kind,
        flops_per_s=fastest("flops", kernels.LINEAR),
        bytes_per_s=moved,
        link_bytes_per_s=moved,
        host_bytes_per_s=fastest("bytes", kernels.HOST_COPY),
        tile_rows=tile_rows(),
        memory_bytes=float(stats.get("bytes_limit", pages * page_bytes)),
    )


if __name__ == "__main__":
    define_flags()
    common.run(main)
