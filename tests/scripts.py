"""Runs the experiment scripts, as a user would, but for what all of them import: that is there.

A process that has imported it, and begun nothing, forks one for each run.
"""

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess
from typing import IO

ROOT = Path(__file__).parent.parent
PARENT = """
import json, os, runpy, sys
import jax, matplotlib.figure, numpy, optax, experiments.common
answers = os.dup(1)
for line in sys.stdin:
    name, out, err, *flags = json.loads(line)
    child = os.fork()
    if child == 0:
        sys.argv = [name, *flags]
        for number, path in ((0, os.devnull), (1, out), (2, err)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
        sys.stdin = open(os.devnull)
        runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
        sys.exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.write(answers, f"{status}\\n".encode())
"""


@functools.cache
def parent() -> subprocess.Popen[str]:
    """Of this worker; it ends with its standard input."""
    command = [sys.executable, "-c", PARENT]
    return subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def run_script(name: str, *flags: str) -> CompletedProcess[str]:
    """`python -m experiments.NAME FLAGS`."""
    with tempfile.TemporaryDirectory(prefix="jaxpage-script-") as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        asks, answers = _pipes(parent())
        asks.write(json.dumps([name, str(out), str(err), *flags]) + "\n")
        asks.flush()
        status = int(answers.readline())
        return CompletedProcess([name, *flags], status, out.read_text(), err.read_text())


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None and process.stdout is not None
    return process.stdin, process.stdout
