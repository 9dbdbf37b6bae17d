"""The runner of all figures: who gets which flags, what is kept, and what is run again."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import figures, outcomes
from experiments.figure_list import Experiment
from jaxpage.config import ConfigError

ALONE = Experiment("one", "Fig 0", "A title", "What it shows.", "", 1, takes=("turns", "quick"))
OTHER = replace(ALONE, name="two", takes=(), out="file")


class Scripts:
    """Stands in for processes: each script prints its line, or fails."""

    def __init__(self, **ends: tuple[int, str, str]):
        self.ends, self.commands = ends, []

    def __call__(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        code, out, error = self.ends.get(command[2].split(".")[1], (0, 'said\n{"a": 1}\n', ""))
        return subprocess.CompletedProcess(command, code, out, error)


def run_all(results: Path, scripts: Scripts, force: bool = False, **given) -> list[str]:
    return figures.run_all([ALONE, OTHER], results, given, force, scripts)


def test_scripts_get_the_flags_that_they_have_and_their_files_are_kept(tmp_path, capsys):
    scripts = Scripts()
    assert run_all(tmp_path, scripts, turns="F", quick=True) == []
    one, two = scripts.commands
    assert one[2:] == ["experiments.one", "--turns=F", "--quick", f"--out={tmp_path / 'one'}"]
    assert two[2:] == ["experiments.two", f"--out={tmp_path / 'two' / 'rows.jsonl'}"]
    assert json.loads((tmp_path / "one" / "one.json").read_text()) == {"a": 1}
    assert (tmp_path / "one" / "log.txt").read_text().startswith("said")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("[1/2] one: about 1 min ... ok after")
    assert len(lines) == 2


def test_what_ended_well_with_the_same_flags_and_code_is_not_run_again(tmp_path, monkeypatch):
    run_all(tmp_path, Scripts())
    again = Scripts()
    run_all(tmp_path, again)
    assert again.commands == []
    run_all(tmp_path, again, turns="G")
    assert [command[2] for command in again.commands] == ["experiments.one"]
    run_all(tmp_path, again, turns="G", force=True)
    assert len(again.commands) == 3
    monkeypatch.setattr(figures, "code_version", lambda: "another")
    run_all(tmp_path, again, turns="G")
    assert len(again.commands) == 5


def test_a_script_that_fails_is_told_of_and_is_run_again(tmp_path):
    failing = Scripts(one=(1, "", "Traceback\nerror: no room\n"), two=(0, "no object\n", ""))
    run_all(tmp_path, Scripts())
    assert run_all(tmp_path, failing, force=True) == ["one", "two"]
    first, second = (outcomes.read_outcome(each, tmp_path / each.name) for each in (ALONE, OTHER))
    assert (first.error, first.last) == ("error: no room", None)
    assert second.error == "its last line of stdout is no JSON object"
    assert not (tmp_path / "one" / "one.json").exists()  # of the run before
    mended = Scripts()
    assert run_all(tmp_path, mended) == []
    assert len(mended.commands) == 2


def test_names_of_scripts_are_checked():
    assert [each.name for each in figures.chosen([ALONE, OTHER], ["two"])] == ["two"]
    measured = replace(OTHER, is_simulated=False)
    assert figures.chosen([ALONE, measured], []) == [ALONE]
    with pytest.raises(ConfigError, match="--only=three: take of one, two"):
        figures.chosen([ALONE, OTHER], ["three"])
