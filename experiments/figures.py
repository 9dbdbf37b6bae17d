"""Runs every simulated figure and claim, and builds the report from what they leave.

    python -m experiments.figures --results=results/figures --report=report/index.html

Each script of `experiments.figure_list` runs in a process of its own. Its files go to a folder of
its name under --results, with its last line of stdout as NAME.json, what it printed as log.txt, and
how it ended as run.json. One that has ended well with the same flags and the same code is not run
again, so that what was interrupted can go on; --force runs it all the same. One that fails is told
of in the report, and by the exit status. Over an hour on two cores (`figure_list` says what each
takes); less with --quick. Expected: no failure, and in the report the numbers of the README.
"""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import common, report
from experiments.figure_list import EXPERIMENTS, Experiment
from jaxpage.config import require

FLAGS = flags.FLAGS

CallFn = Callable[[list[str]], subprocess.CompletedProcess[str]]

ROOT = Path(__file__).parent.parent
INPUTS = {
    "turns": "ShareGPT's turns, as the scripts' --turns; left empty, what they do without.",
    "alpaca": "Alpaca's lengths, as the scripts' --alpaca; left empty, drawn.",
}


def define_flags() -> None:
    for name, text in INPUTS.items():
        flags.DEFINE_string(name, "", text)
    flags.DEFINE_bool("quick", False, "Pass --quick to the scripts that know it.")
    flags.DEFINE_list("only", [], "Run these scripts alone, those that are not simulated too.")
    flags.DEFINE_bool("force", False, "Run what has been run, too.")
    flags.DEFINE_string("results", "results/figures", "The folder for results.")
    flags.DEFINE_string("report", "report/index.html", "The page to write.")


def main(_: list[str]) -> None:
    results = common.make_folder(FLAGS.results)
    given = {name: FLAGS[name].value for name in INPUTS if FLAGS[name].value}
    if FLAGS.quick:
        given["quick"] = True
    failures = run_all(chosen(EXPERIMENTS, FLAGS.only), results, given, FLAGS.force)
    path = report.write(EXPERIMENTS, results, Path(FLAGS.report))
    print(f"{path}: open it in a browser")
    common.print_last_line({"report": str(path), "failed": failures})
    if failures:
        sys.exit(f"error: {', '.join(failures)} failed: see log.txt in the folders of {results}")


def chosen(experiments: Sequence[Experiment], only: Sequence[str]) -> list[Experiment]:
    """Those that are named, or all that are simulated.

    Raises:
      ConfigError: a name is not in the list.
    """
    names = [experiment.name for experiment in experiments]
    for name in only:
        require(name in names, f"--only={name}: take of {', '.join(names)}")
    return [each for each in experiments if (each.name in only if only else each.is_simulated)]


def call(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command in this very Python."""
    words = [sys.executable, *command[1:]]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def run_all(
    experiments: Sequence[Experiment],
    results: Path,
    given: dict[str, Any],
    force: bool = False,
    call: CallFn = call,
) -> list[str]:
    """Runs what has no such results yet, with a line for each; returns who failed."""
    code = code_version()
    failures = []
    for number, experiment in enumerate(experiments, start=1):
        where = f"[{number}/{len(experiments)}] {experiment.name}"
        folder = common.make_folder(str(results / experiment.name))
        command = command_of(experiment, folder, given)
        if not force and is_done(folder, experiment.name, command, code):
            print(f"{where}: has been run", flush=True)
            continue
        print(f"{where}: about {experiment.minutes:g} min ... ", end="", flush=True)
        run = run_one(experiment, folder, command, code, call)
        print(run["status"] if run["error"] is None else f"failed: {run['error']}", end="")
        print(f" after {run['wall_s']:.0f} s", flush=True)
        if run["error"] is not None:
            failures.append(experiment.name)
    return failures


def command_of(experiment: Experiment, folder: Path, given: dict[str, Any]) -> list[str]:
    """The script and its flags, as a reader would call it."""
    command = ["python", "-m", f"experiments.{experiment.name}"]
    for name in experiment.takes:
        if name in given:
            command.append(f"--{name}" if given[name] is True else f"--{name}={given[name]}")
    if experiment.out != "none":
        out = folder if experiment.out == "folder" else folder / "rows.jsonl"
        command.append(f"--out={out}")
    return command


def code_version() -> str | None:
    """The commit, and a digest of what is changed since; None outside of a repository."""

    def git(*words: str) -> bytes:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, check=False).stdout

    changes = git("diff", "HEAD") + git("status", "--porcelain")
    digest = f"+{hashlib.sha256(changes).hexdigest()[:12]}" if changes else ""
    return (git("rev-parse", "--short", "HEAD").decode().strip() + digest) or None


def is_done(folder: Path, name: str, command: list[str], code: str | None) -> bool:
    """Whether the folder holds the results of this very command and code."""
    try:
        run = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        return False
    is_same = (run["status"], run["command"], run["code"]) == ("ok", command, code)
    return is_same and (folder / f"{name}.json").is_file()


def run_one(
    experiment: Experiment, folder: Path, command: list[str], code: str | None, call: CallFn
) -> dict[str, Any]:
    """Runs a script and keeps its last line and how it ended, which is returned."""
    for name in ("run.json", f"{experiment.name}.json"):
        (folder / name).unlink(missing_ok=True)  # so that no old run is ever shown as this one
    start_s = time.perf_counter()
    done = call(command)
    (folder / "log.txt").write_text(done.stdout + done.stderr)
    line, error = last_line_of(done)
    if error is None:
        (folder / f"{experiment.name}.json").write_text(line + "\n")
    run = {
        "status": "ok" if error is None else "failed",
        "error": error,
        "command": command,
        "code": code,
        "wall_s": time.perf_counter() - start_s,
    }
    (folder / "run.json").write_text(json.dumps(run, indent=1) + "\n")
    return run


def last_line_of(done: subprocess.CompletedProcess[str]) -> tuple[str, str | None]:
    """The line with the JSON object that a script ended with, and why it is none, if it is."""
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return "", said[-1][:500]
    line = (done.stdout.splitlines() or [""])[-1]
    try:
        is_object = isinstance(json.loads(line), dict)
    except ValueError:
        is_object = False
    return line, None if is_object else "its last line of stdout is no JSON object"


if __name__ == "__main__":
    define_flags()
    common.run(main)
