"""`kill -9` at any moment: what was saved goes on, and the answers are those of an undisturbed run.

pytest -s -m slow tests/test_killed.py    # at least 50 kills, and says how many
"""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMAND = (
    "-m experiments.generate --model=random:tiny --num_slots=4 --page_size=4 --num_pages=160 "
    "--preemption=fine --max_new_tokens=300 --ignore_eos --logprobs --temperature=0.8"
)


def start(tmp_path: Path, out: str, *more: str) -> subprocess.Popen:
    command = [sys.executable, *COMMAND.split(), f"--prompts={tmp_path}/prompts.jsonl"]
    command += [f"--out={tmp_path / out}", *more]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def end(process: subprocess.Popen) -> dict:
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return json.loads(stdout.splitlines()[-1])


def write_prompts(path: Path) -> None:
    rows = [
        {"id": i, "prompt_ids": list(range(1, 4 + 2 * i)), "n": 1 + i % 2, "tenant": str(i % 3)}
        for i in range(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def live(tmp_path: Path, folder: Path, dice: random.Random, spared: bool) -> dict | None:
    """One life of a run; its summary, if it was spared or over before it was killed."""
    process = start(
        tmp_path, "killed.jsonl", f"--save_dir={folder}", "--save_every_steps=1", "--resume"
    )
    if spared:
        return end(process)
    before = saved(folder)
    while process.poll() is None and saved(folder) == before:
        time.sleep(0.005)
    until_s = time.monotonic() + dice.uniform(0.0, 0.8)
    while process.poll() is None and time.monotonic() < until_s:
        time.sleep(0.002)
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    if process.wait() == -signal.SIGKILL:
        process.communicate()
        return None
    return end(process)


def newest(folder: Path) -> int:
    """The number of the last whole snapshot, -1 without one."""
    return max((int(name) for name in saved(folder) if name.isdecimal()), default=-1)


def saved(folder: Path) -> set[str]:
    """What is in the folder, whole or not."""
    return {path.name for path in folder.glob("*")} - {"lock"}


@pytest.mark.in_ci("1")
@pytest.mark.parametrize("num_kills", [1, 50])
def test_a_killed_run_loses_nothing_that_was_saved(tmp_path, num_kills):
    write_prompts(tmp_path / "prompts.jsonl")
    expected = end(start(tmp_path, "whole.jsonl"))
    assert expected["errors"] == 0 and expected["preemptions"] > 0
    dice = random.Random(num_kills)
    killed, runs = 0, 0
    while killed < num_kills:
        folder, summary = tmp_path / f"saves {runs}", None
        while summary is None:
            last_saved = newest(folder)
            summary = live(tmp_path, folder, dice, spared=killed == num_kills)
            killed += summary is None
            assert newest(folder) >= last_saved
        runs += 1
        assert (tmp_path / "killed.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
        assert summary["steps"] == expected["steps"]  # the journal knows each once
    print(f"\n{killed} kills in {runs} runs of {expected['steps']} steps")
