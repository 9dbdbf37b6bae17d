"""Every test runs strict: no implicit dtype or rank promotion, eight fake CPU devices.

With JAXPAGE_TEST_ON=gpu JAX runs on the card, and the kernels too, in place of the interpreter.
"""

import os
from collections.abc import Iterator
from pathlib import Path

if os.environ.get("JAXPAGE_TEST_ON") == "gpu":
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # workers share the card
else:
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
