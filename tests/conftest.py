"""Every test runs strict: no implicit dtype or rank promotion, eight fake CPU devices."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

MAPS = Path("/proc/self/maps")  # only Linux has it
MOST_MAPS = 20_000


@pytest.fixture(autouse=True, scope="module")
def few_programs_in_memory() -> Iterator[None]:
    """Forgets compiled programs when there are thousands.

    Each holds some fifteen memory maps, of which Linux gives a process 65,530; past that, XLA
    crashes while it compiles.
    """
    yield
    if MAPS.exists() and len(MAPS.read_text().splitlines()) > MOST_MAPS:
        jax.clear_caches()
