"""The rules that keep the layout: who may import whom, where is compiled, how long a file may be.

Imports inside functions count as well. The parsing is tested on sources that break the rules.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("jaxpage", "pallas_kernels", "experiments")
MOST_LINES = 420
MOST_FUNCTION_LINES = 70
# Serving compiles in one place; what runs no model compiles by itself.
COMPILES = ("jaxpage/engine/loop.py", "jaxpage/sim/calibrate.py", "jaxpage/sim/simulate.py")

# Packages of jaxpage, and those that each may import besides itself.
BELOW = {
    "config": set(),
    "paging": {"config"},
    "scheduling": {"config", "paging"},
    "model": {"config", "paging", "scheduling"},
    "sim": {"config", "paging", "scheduling"},
    "engine": {"config", "paging", "scheduling", "model", "sim", "checkpoint"},
    "checkpoint": {"config", "model"},
}
CHECKPOINT_MAY_IMPORT = ("jaxpage.config", "jaxpage.model.params", "jaxpage.model.presets")
ENGINE_MAY_IMPORT = "jaxpage.checkpoint.snapshot_files"
USE_KERNELS = ("paging", "model", "engine")


def sources(*packages: str) -> list[str]:
    """Paths of all modules of our packages, relative to the root."""
    paths = [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
    return [path.relative_to(ROOT).as_posix() for path in paths]


def read(path: str) -> str:
    return (ROOT / path).read_text()


def is_module(name: str) -> bool:
    at = ROOT / name.replace(".", "/")
    return at.is_dir() or at.with_suffix(".py").exists()


def imports(source: str) -> set[str]:
    """What a source imports: `from a import b` is `a.b`, but `a` if that is a module of ours."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "relative imports hide the flow"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            is_ours = within(node.module, *OURS)
            found |= {node.module if is_ours and not is_module(name) else name for name in full}
    return found


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def broken_rules(path: str, source: str) -> list[str]:
    """The imports of a module that its place in the flow does not allow."""
    found = imports(source)
    top, *rest = Path(path).with_suffix("").parts
    if top == "experiments":
        return []
    if top == "pallas_kernels":
        return sorted(name for name in found if within(name, "jaxpage", "experiments"))
    package = rest[0]
    if package == "__init__":
        return sorted(name for name in found if within(name, *OURS))
    wrong = {name for name in found if within(name, "experiments", "absl.flags", "absl.app")}
    for name in found:
        if within(name, "jaxpage"):
            target = name.split(".")[1] if "." in name else ""
            if target != package and target not in BELOW[package]:
                wrong.add(name)
        if within(name, "pallas_kernels") and package not in USE_KERNELS:
            wrong.add(name)
        if package == "engine" and within(name, "jaxpage.checkpoint"):
            wrong |= {name} - {ENGINE_MAY_IMPORT}
        is_checkpoint_model = package == "checkpoint" and within(name, "jaxpage.model")
        if is_checkpoint_model and name not in CHECKPOINT_MAY_IMPORT:
            wrong.add(name)
    return sorted(wrong)


def compiling_lines(source: str) -> list[int]:
    """Lines that name `jit`, `pjit` or `pmap`, or give a donation argument."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        names = {getattr(node, "id", None), getattr(node, "attr", None)}
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
        is_donation = isinstance(node, ast.keyword) and (node.arg or "").startswith("donate_")
        if names & {"jit", "pjit", "pmap"} or is_donation:
            lines.append(getattr(node, "lineno", 0))
    return sorted(set(lines))


def long_functions(source: str) -> list[str]:
    functions = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return [
        f"{node.name}: {length} lines"
        for node in functions
        if (length := (node.end_lineno or 0) - node.lineno + 1) > MOST_FUNCTION_LINES
    ]


every_module = pytest.mark.parametrize("path", sources(*OURS))
every_library_module = pytest.mark.parametrize("path", sources("jaxpage"))


def test_all_packages_have_a_place_in_the_flow():
    parts = {Path(path).with_suffix("").parts[1] for path in sources("jaxpage")}
    assert parts - {"__init__"} == set(BELOW)
    assert len(sources(*OURS)) > 40


@every_module
def test_imports_only_flow_downwards(path):
    assert broken_rules(path, read(path)) == []


@every_library_module
def test_only_the_loop_compiles_and_donates(path):
    lines = compiling_lines(read(path))
    assert bool(lines) == (path in COMPILES), lines


@every_module
def test_files_and_functions_are_short(path):
    assert len(read(path).splitlines()) <= MOST_LINES
    assert long_functions(read(path)) == []


# --- the parsing itself --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("jaxpage/config.py", "import jaxpage.paging.ragged"),
        ("jaxpage/paging/x.py", "from jaxpage.scheduling.state import Requests"),
        ("jaxpage/paging/x.py", "from jaxpage import scheduling"),
        ("jaxpage/scheduling/x.py", "from jaxpage.model import sampling"),
        ("jaxpage/scheduling/x.py", "from jaxpage.engine.step import Setup"),
        ("jaxpage/model/x.py", "from jaxpage.sim import metrics"),
        ("jaxpage/sim/x.py", "import jaxpage.model.llama as llama"),
        ("jaxpage/sim/x.py", "def f():\n    from jaxpage.engine import loop"),
        ("jaxpage/engine/x.py", "from jaxpage.checkpoint.load import load_model"),
        ("jaxpage/engine/x.py", "from experiments import common"),
        ("jaxpage/engine/x.py", "from absl import flags"),
        ("jaxpage/engine/x.py", "import absl.flags"),
        ("jaxpage/checkpoint/x.py", "from jaxpage.model.llama import forward"),
        ("jaxpage/checkpoint/x.py", "from jaxpage.model import placement"),
        ("jaxpage/checkpoint/x.py", "from jaxpage.paging import kv_pool"),
        ("jaxpage/sim/x.py", "from pallas_kernels.paged_attention import paged_attention"),
        ("jaxpage/__init__.py", "from jaxpage.config import ModelConfig"),
        ("pallas_kernels/x.py", "from jaxpage.config import require"),
        ("pallas_kernels/x.py", "import experiments.common"),
    ],
)
def test_an_import_against_the_flow_is_found(path, line):
    assert len(broken_rules(path, line)) == 1


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("jaxpage/model/x.py", "from jaxpage.scheduling.state import Sampling"),
        ("jaxpage/engine/x.py", "from jaxpage.model import llama, sampling"),
        ("jaxpage/checkpoint/x.py", "from jaxpage.model.params import Params"),
        ("jaxpage/checkpoint/x.py", "from jaxpage.model import params"),
        ("jaxpage/checkpoint/x.py", "from absl import logging as absl_logging"),
        ("jaxpage/paging/x.py", "import jax\nfrom jaxpage.paging import ragged"),
        ("experiments/x.py", "from absl import flags\nfrom jaxpage.engine import host"),
    ],
)
def test_an_import_with_the_flow_is_not_complained_of(path, line):
    assert broken_rules(path, line) == []


@pytest.mark.parametrize(
    "source",
    [
        "@jax.jit\ndef f(x): return x",
        "@partial(jax.jit, donate_argnums=0)\ndef f(x): return x",
        "from jax import jit",
        "g = api.lower(f, donate_argnames=('x',))",
        "h = jax.pmap(f)",
    ],
)
def test_a_place_that_compiles_is_found(source):
    assert compiling_lines(source)
    assert not compiling_lines("x = jax.vmap(f)(y)\n" + '"""jit in a docstring"""')


def test_a_long_function_is_found():
    body = "    x = 1\n"
    assert long_functions("def f():\n" + body * MOST_FUNCTION_LINES) == ["f: 71 lines"]
    assert long_functions("def f():\n" + body * (MOST_FUNCTION_LINES - 1)) == []
