"""What does the compiler make of our kernels, for cards that are not here?

    python -m pallas_kernels.inspect --kernel=all --shape=all --target=h100

Compiles each kernel at each named shape and prints one JSON line a case. Needs no GPU: the CUDA
plugin and its assembler come with the extra `inspect`. About 3 seconds a case. A case that does
not compile or misses a gate (spilled bytes, local memory, shared memory, a kernel for Hopper
without wgmma or TMA, one for Ampere without mma or cp.async) is a line with the reason in
`failed`, and the exit status is then 1. What a kernel says that it does not do is in `refused`.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from absl import app, flags

FLAGS = flags.FLAGS


class Kernel(NamedTuple):
    """Where a kernel is, the cards that it is for, and what its code must contain."""

    module: str
    targets: tuple[str, ...]
    instructions: tuple[str, ...]  # fields of `compile_only.Report`
    case: Callable[[Any, Any], "Case"]  # of the module and a shape


class Case(NamedTuple):
    """A call in which the kernel is launched once."""

    call: Callable
    arguments: dict[str, Any]  # shapes by name
    stages: int
    thread_blocks: int
    threads: int  # of a thread block
    least_bytes: int  # that any algorithm must move


def attention_case(module, shape) -> Case:
    """One call of `paged_attention`."""
    arguments = shape.arguments()
    tile = module.tile_of(arguments["q"], arguments["k_pages"])
    call = partial(
        module.attend, sm_scale=shape.head_dim**-0.5, soft_cap=None, window=None, tile=tile
    )
    if not shape.is_ragged:
        call = partial(call, cu_q_lens=None)
    arrays = (arguments[name] for name in ("q", "k_pages", "page_indices"))
    geometry = module.check(*arrays, is_ragged=shape.is_ragged, tile=tile)
    return Case(
        call,
        arguments,
        stages=tile.stages,
        thread_blocks=geometry.num_thread_blocks,
        threads=module.threads_of(geometry),
        least_bytes=shape.least_bytes(),
    )


def copy_case(module, shape) -> Case:
    """One page for each row is copied, as when all rows fork."""
    import jax
    import jax.numpy as jnp

    pages = shape.arguments()["k_pages"]
    index = jax.ShapeDtypeStruct((shape.num_rows,), jnp.int32)
    page_bytes = pages.size // pages.shape[0] * pages.dtype.itemsize
    return Case(
        module.copy,
        {"pages": pages, "sources": index, "targets": index},
        stages=1,
        thread_blocks=shape.num_rows * module.pieces_of(pages).count,
        threads=module.THREADS,
        least_bytes=2 * shape.num_rows * page_bytes,
    )


KERNELS = {
    "paged_attention_sm80": Kernel(
        "pallas_kernels.paged_attention.kernel_sm80",
        ("a100",),
        ("mma", "cp_async"),
        attention_case,
    ),
    "paged_attention_sm90": Kernel(
        "pallas_kernels.paged_attention.kernel_sm90",
        ("h100", "h200"),
        ("wgmma", "tma"),
        attention_case,
    ),
    "page_copy_sm90": Kernel(
        "pallas_kernels.page_copy.kernel_sm90", ("h100", "h200"), ("tma",), copy_case
    ),
}


def define_flags() -> None:
    flags.DEFINE_enum("kernel", "all", ["all", *KERNELS], "The kernel to compile, or all.")
    flags.DEFINE_list("shape", ["all"], "Names of shapes, parts of names, or all.")
    flags.DEFINE_enum("target", "h100", ["a100", "h100", "h200"], "The card to compile for.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}: every setting is a --flag=value")
    os.environ["JAX_PLATFORMS"] = "cpu"  # else the CUDA plugin looks for a GPU
    kernels = [name for name in KERNELS if FLAGS.kernel in ("all", name)]
    kernels = [name for name in kernels if FLAGS.target in KERNELS[name].targets]
    if not kernels:
        sys.exit(
            f"error: --kernel={FLAGS.kernel} has nothing to compile for --target={FLAGS.target}"
        )
    try:
        failures = 0
        for row in inspect(kernels, FLAGS.shape, FLAGS.target):
            print(json.dumps(row), flush=True)
            failures += row["failed"] is not None
    except (ValueError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    if failures:
        sys.exit(f"error: {failures} cases failed")


def inspect(kernels: list[str], shape_names: list[str], target: str) -> Iterator[dict]:
    """One row for each of `kernels` at each shape that is named, wholly or by a part.

    Raises:
      ValueError: no shape has such a name.
    """
    from pallas_kernels.common import targets
    from pallas_kernels.paged_attention.shapes import choose_shapes

    chosen = choose_shapes(shape_names)
    targets.description(target)  # the plugin is all that a case can lack: say so once
    for kernel in kernels:
        for shape in chosen:
            yield inspect_case(kernel, shape, target)


def inspect_case(kernel: str, shape, target: str) -> dict:
    """Compiles one case; what goes wrong there is a value of the row."""
    from pallas_kernels.common import compile_only, targets

    row = {"kernel": kernel, "shape": shape.name, "target": target, "refused": None, "failed": None}
    module = importlib.import_module(KERNELS[kernel].module)
    try:
        case = KERNELS[kernel].case(module, shape)
        report = compile_only.compile_kernel(case.call, case.arguments, targets.device(target))
    except NotImplementedError as error:
        return row | {"refused": str(error)}
    except Exception as error:  # a compiler's errors are of many classes
        return row | {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    limits = targets.limits(target)
    at_once = limits.blocks_at_once(report.smem_bytes, report.registers, case.threads)
    waves = round(case.thread_blocks / (at_once * limits.num_processors), 2) if at_once else None
    return row | {
        **report._asdict(),
        "stages": case.stages,
        "least_bytes": case.least_bytes,
        "thread_blocks": case.thread_blocks,
        "blocks_per_processor": at_once,
        "waves": waves,
        "occupancy": at_once * case.threads / limits.threads,
        "failed": _missed_gate(report, at_once, KERNELS[kernel].instructions),
    }


def _missed_gate(report, blocks_at_once: int, instructions: tuple[str, ...]) -> str | None:
    """Which promise the compiled kernel breaks."""
    gates = {
        "it spills registers": report.spill_bytes == 0,
        "it uses local memory": report.stack_bytes == 0 and not report.local_memory,
        "its shared memory does not fit": blocks_at_once > 0,
        **{f"it has no {name}": getattr(report, name) > 0 for name in instructions},
    }
    return next((sentence for sentence, holds in gates.items() if not holds), None)


if __name__ == "__main__":
    define_flags()
    app.run(main)
