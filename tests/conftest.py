"""Every test runs strict: no implicit dtype or rank promotion, eight fake CPU devices.

With JAXPAGE_TEST_ON=gpu JAX runs on the card, and the kernels too, in place of the interpreter.
What one worker has compiled the others load, and so do tests that build the same engine again.
"""

import fnmatch
import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

if os.environ.get("JAXPAGE_TEST_ON") == "gpu":
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # workers share the card
else:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import pytest

gc.set_threshold(200_000, 50, 100)  # as in `experiments.common.run`
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

MAPS = Path("/proc/self/maps")  # only Linux has it
MOST_MAPS = 20_000
PROGRAMS = pytest.StashKey[tempfile.TemporaryDirectory[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Programs of a run are kept in one folder, which goes when the run ends."""
    given = getattr(config, "workerinput", None)
    if given is None:
        config.stash[PROGRAMS] = tempfile.TemporaryDirectory(prefix="jaxpage-tests-")
    folder = config.stash[PROGRAMS].name if given is None else given["programs"]
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test's cases those that `in_ci` does not name, by patterns, are slow ones."""
    unused: dict[str, set[str]] = {}
    for item in items:
        marker = item.get_closest_marker("in_ci")
        if marker is None or not isinstance(item, pytest.Function):
            continue
        named = {each for each in marker.args if fnmatch.fnmatchcase(item.callspec.id, each)}
        unused.setdefault(item.nodeid.split("[")[0], set(marker.args)).difference_update(named)
        if not named:
            item.add_marker(pytest.mark.slow)
    wrong = {name: patterns for name, patterns in unused.items() if patterns}
    are_all_here = not any("[" in argument for argument in items[0].config.args) if items else True
    if wrong and are_all_here:
        raise pytest.UsageError(f"in_ci names cases that are not there: {wrong}")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    """Of pytest-xdist: what a worker is told before it starts."""
    node.workerinput["programs"] = node.config.stash[PROGRAMS].name


def pytest_unconfigure(config: pytest.Config) -> None:
    if PROGRAMS in config.stash:
        config.stash[PROGRAMS].cleanup()


@pytest.fixture(autouse=True, scope="module")
def few_programs_in_memory() -> Iterator[None]:
    """Forgets compiled programs when there are thousands.

    Each holds some fifteen memory maps, of which Linux gives a process 65,530; past that, XLA
    crashes while it compiles.
    """
    yield
    if MAPS.exists() and len(MAPS.read_text().splitlines()) > MOST_MAPS:
        jax.clear_caches()
