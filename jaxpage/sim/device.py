"""Devices by their data sheets, or by a user's file: what the cost model holds kernels against."""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

from jaxpage.config import ConfigError, require


@dataclass(frozen=True)
class DeviceSpec:
    """Peak rates of one device; no kernel reaches them, which is what efficiencies are for.

    Rates are one way: of the link to the other devices and of the bus to the host, half of what a
    data sheet that counts both ways gives.
    """

    name: str
    flops_per_s: float  # dense products of 16-bit floats
    bytes_per_s: float  # of its memory
    link_bytes_per_s: float  # to the other devices, all links together
    host_bytes_per_s: float  # to the host's memory
    memory_bytes: float
    tile_rows: int  # of a product, computed at once; a product of fewer takes as long

    def __post_init__(self):
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            is_rate = isinstance(value, int | float) and math.isfinite(value) and value > 0
            require(is_rate, f"{self.name}: {field.name}={value!r} must be a positive number")


# NVIDIA's data sheets of the SXM modules: PCIe 4.0 and NVLink 3 for Ampere, 5.0 and 4 for Hopper.
# Tiles of 64 rows are those of Hopper's tensor cores, and describe what A100s measured, too.
DEVICES: dict[str, DeviceSpec] = {
    spec.name: spec
    for spec in (
        DeviceSpec("a100-40gb", 312e12, 1555e9, 300e9, 32e9, 40e9, 64),
        DeviceSpec("a100-80gb", 312e12, 2039e9, 300e9, 32e9, 80e9, 64),
        DeviceSpec("h100", 989.4e12, 3350e9, 450e9, 64e9, 80e9, 64),
        DeviceSpec("h200", 989.4e12, 4800e9, 450e9, 64e9, 141e9, 64),
    )
}


def find_device(name_or_file: str) -> DeviceSpec:
    """The device of that name, or of that JSON file: one object with the fields of `DeviceSpec`.

    Raises:
      ConfigError: there is neither, or the file does not hold exactly these fields.
    """
    if name_or_file in DEVICES:
        return DEVICES[name_or_file]
    path = Path(name_or_file)
    require(
        path.is_file(),
        f"device {name_or_file!r}: neither a file nor one of {', '.join(sorted(DEVICES))}",
    )
    try:
        known = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error})") from error
    names = {field.name for field in fields(DeviceSpec)}
    require(
        isinstance(known, dict) and set(known) == names,
        f"{path}: expected one object with the fields {', '.join(sorted(names))}",
    )
    return DeviceSpec(**known)
