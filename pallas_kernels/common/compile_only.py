"""Compiles a function that holds one Mosaic GPU kernel, and reads what the compiler made of it.

No GPU is needed. Mosaic GPU writes what it does into a folder: PTX, the assembler's report, the
shared memory of the launch, and machine code (SASS) where `nvdisasm` stands beside `ptxas`.
"""

import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import SingleDeviceSharding


class Report(NamedTuple):
    """One compiled kernel. Counts are of instructions in its code, not of those executed."""

    registers: int  # of a thread, as the assembler allots them
    spill_bytes: int  # stores and loads together
    stack_bytes: int  # of a thread; local memory is nothing else
    smem_bytes: int  # of a thread block
    wgmma: int  # asynchronous matrix products of a warpgroup
    mma: int  # matrix products of a warp
    tma: int  # copies by the tensor memory accelerator
    cp_async: int  # copies from device to shared memory by threads
    wide_loads: int  # loads of 16 bytes from device memory by threads
    local_memory: int | None  # loads and stores; None without SASS
    compile_s: float


def compile_kernel(
    function: Callable, arguments: Mapping[str, jax.ShapeDtypeStruct], device: Any
) -> Report:
    """Compiles `function(**arguments)`, in which one kernel is launched, for `device`.

    Raises:
      RuntimeError: the compiler left no report, as when `function` launches no kernel.
    """
    placed = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device))
        for name, x in arguments.items()
    }
    with _dump_folder() as folder, jax.default_device(device):
        start_s = time.perf_counter()
        jax.jit(function).lower(**placed).compile()
        compile_s = time.perf_counter() - start_s
        # Mosaic GPU compiles a module once a process: of one that it knows, only the text is new.
        text = _only(folder, "*.after_layout_inference.txt").read_text()
        module = re.sub(r'dump_basename = "\w*"', "", text)
        if module not in _REPORTS:
            _REPORTS[module] = read_report(folder)
        return _REPORTS[module]._replace(compile_s=compile_s)


_REPORTS: dict[str, Report] = {}  # by the module's text


def read_report(folder: Path) -> Report:
    """The report of the one kernel whose files are in `folder`."""
    assembler = _only(folder, "*.ptxas").read_text(errors="replace")
    ptx = _only(folder, "*.ptx").read_text(errors="replace")
    resources = _only(folder, "*.resources.txt").read_text()
    sass = next(iter(folder.glob("*.sass*")), None)
    operations = None if sass is None else sass_operations(sass.read_text(errors="replace"))
    return Report(
        registers=_number(r"Used (\d+) registers", assembler),
        spill_bytes=sum(map(int, re.findall(r"(\d+) bytes spill", assembler))),
        stack_bytes=_number(r"(\d+) bytes stack frame", assembler),
        smem_bytes=_number(r"smem_scratch_bytes=(\d+)", resources),
        wgmma=ptx.count("wgmma.mma_async"),
        mma=len(re.findall(r"\bmma\.sync", ptx)),
        tma=ptx.count("cp.async.bulk.tensor"),
        cp_async=len(re.findall(r"cp\.async\.c[ag]\.shared", ptx)),
        wide_loads=len(re.findall(r"ld\.global\S*\.v4\.[bfsu]32|ld\.global\S*\.v2\.[bfsu]64", ptx)),
        local_memory=None if operations is None else operations["LDL"] + operations["STL"],
        compile_s=0.0,
    )


def sass_operations(sass: str) -> Counter[str]:
    """How often each operation stands in a disassembly, its modifiers left out: LDL, HGMMA, .."""
    line = r"/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)"
    return Counter(re.findall(line, sass))


@contextmanager
def _dump_folder() -> Iterator[Path]:
    name = "MOSAIC_GPU_DUMP_TO"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[name] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = [path.name for path in folder.iterdir()]
        raise RuntimeError(f"expected one {pattern} of one kernel, the compiler left {names}")
    return found[0]


def _number(pattern: str, text: str) -> int:
    found: Any = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"{pattern!r} not found in the compiler's report:\n{text[:500]}")
    return int(found[1])
