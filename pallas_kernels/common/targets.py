"""GPUs to compile for without one: descriptions that XLA's CUDA plugin carries within itself."""

import functools
import importlib.util
import mmap
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

PLUGIN = "jax_plugins.xla_cuda12"
INSTALL = "pip install 'jaxpage[inspect]', in an environment of its own"
# The names that the plugin's descriptions give.
DEVICES = {
    "a100": "NVIDIA A100-SXM4-80GB",
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200 141GB HBM3e",
}


CAPABILITIES = {"a100": "8.0", "h100": "9.0", "h200": "9.0"}


class Limits(NamedTuple):
    """What one processor of a card (an SM) holds, and how many there are."""

    num_processors: int
    smem_bytes: int  # all thread blocks of a processor together
    registers: int
    threads: int
    # Of compute capabilities 8.0 and 9.0 alike (CUDA C++ Programming Guide, technical
    # specifications); not all of XLA's descriptions have them.
    reserved_smem_bytes: int = 1024  # what each thread block costs beyond its own
    blocks: int = 32

    def blocks_at_once(self, smem_bytes: int, registers: int, threads: int) -> int:
        """Thread blocks that one processor can hold, by its scarcest resource."""
        # Registers are given to warps of 32 threads in pieces of 256.
        warp_registers = -(-registers * 32 // 256) * 256
        return min(
            self.smem_bytes // (smem_bytes + self.reserved_smem_bytes),
            self.registers // (warp_registers * -(-threads // 32)),
            self.threads // threads,
            self.blocks,
        )


def limits(target: str) -> Limits:
    """The limits of `target`, one of `DEVICES`."""
    return Limits(
        num_processors=_number(target, "core_count"),
        smem_bytes=_number(target, "shared_memory_per_core"),
        registers=_number(target, "registers_per_core_limit"),
        threads=_number(target, "threads_per_core_limit"),
    )


def memory_bytes(target: str) -> int:
    """Bytes of a card's memory, before anything is in it."""
    return _number(target, "device_memory_size")


def _number(target: str, field: str) -> int:
    found = re.search(rf"^\s*{field}: (\d+)$", description(target), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"XLA's description of {target} has no {field}")
    return int(found[1])


def device(target: str) -> Any:
    """A device of kind `target` that can be compiled for and not run on."""
    return devices(target, 1)[0]


def devices(target: str, count: int) -> Sequence[Any]:
    """Devices of one machine, all of kind `target`, to compile for."""
    from jax.experimental import topologies

    topology = f"1x1x{count}"  # machines, processes of each, devices of each
    return topologies.get_topology_desc(
        "", platform="cuda", target_config=description(target), topology=topology
    ).devices


@functools.cache
def description(target: str) -> str:
    """XLA's target configuration of `target`, a text proto.

    Raises:
      ValueError: `target` is not in `DEVICES`.
      ModuleNotFoundError: the CUDA plugin is not installed.
      RuntimeError: the plugin installed does not know the card.
    """
    if target not in DEVICES:
        raise ValueError(f"{target=} must be one of {sorted(DEVICES)}")
    spec = importlib.util.find_spec("jax_plugins") and importlib.util.find_spec(PLUGIN)
    if not spec or spec.origin is None:
        raise ModuleNotFoundError(f"{PLUGIN} is not installed: {INSTALL}")
    (library,) = Path(spec.origin).parent.glob("*.so")
    wanted = f'device_description_str: "{DEVICES[target]}"'
    # Descriptions are texts among the machine code: long runs of printable characters.
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for found in re.finditer(rb"[\t\n\r\x20-\x7e]{500,}", data):
            text = found[0].decode()
            if "gpu_device_info" in text and wanted in text:
                return text[text.index("gpu_device_info") :]
    raise RuntimeError(f"{library.name} has no description of {DEVICES[target]}")
