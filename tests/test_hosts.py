"""Several processes serve as one, with two devices each: the same answers, and who dies is missed.

pytest -m slow tests/test_hosts.py    # also four processes, and each of two that dies
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_checkpoints import CONFIG, hf_tensors, write_hf

ROOT = Path(__file__).parent.parent
GENERATE = (
    "-m experiments.generate --num_slots=4 --page_size=4 --num_pages=96 --ignore_eos --logprobs "
    "--temperature=0.8 --noprefix_cache --model={folder}/model --prompts={folder}/prompts.jsonl "
    "--out={folder}/{out}"
)
BENCH = (
    "-m experiments.bench_engine --num_slots=4 --page_size=4 --model={folder}/model "
    "--workload={folder}/prompts.jsonl"
)
MODEL = replace(CONFIG, num_heads=8)  # and two KV heads, which up to eight devices share
DEAD_AFTER_S = 10


def start(
    tmp_path: Path,
    out: str,
    *more: str,
    num_devices: int,
    number: int = 0,
    command: str = GENERATE,
) -> subprocess.Popen:
    words = [sys.executable, *command.format(folder=tmp_path, out=out).split(), *more]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {
        "JAX_NUM_CPU_DEVICES": str(num_devices),
        "JAX_PLATFORMS": "cpu",
        "JAXPAGE_CACHE": str(tmp_path / "cache"),
    }
    paths = (tmp_path / f"{out}.{number}.{kind}" for kind in ("out", "err"))
    with next(paths).open("w") as stdout, next(paths).open("w") as stderr:
        return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=stdout, stderr=stderr)


def start_all(
    tmp_path: Path,
    out: str,
    *more: str,
    num_processes: int,
    last: tuple[str, ...] = (),
    command: str = GENERATE,
) -> list[subprocess.Popen]:
    """All of them, with flags that the `last` one has alone."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    them = (f"--coordinator_address={address}", f"--num_processes={num_processes}")
    return [
        start(
            tmp_path, out, *them, f"--process_id={i}", f"--dead_after_s={DEAD_AFTER_S}", *more,
            *(last if i == num_processes - 1 else ()), num_devices=2, number=i, command=command,
        )
        for i in range(num_processes)
    ]  # fmt: skip


def end(tmp_path: Path, out: str, *processes: subprocess.Popen) -> dict:
    """What the first of them printed; the others print nothing."""
    for number, process in enumerate(processes):
        status = process.wait(timeout=600)
        assert status == 0, (tmp_path / f"{out}.{number}.err").read_text()
        assert number == 0 or not (tmp_path / f"{out}.{number}.out").read_text()
    (line,) = (tmp_path / f"{out}.0.out").read_text().splitlines()
    return json.loads(line)


def write_inputs(tmp_path: Path, max_new_tokens: int) -> None:
    write_hf(tmp_path / "model", MODEL, hf_tensors(MODEL))
    rows = [
        {"id": i, "prompt_ids": list(range(1, 4 + 2 * i)), "max_new_tokens": max_new_tokens}
        for i in range(7)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.in_ci("2-data:2,model:2")
@pytest.mark.parametrize(
    ("num_processes", "mesh"),
    [(2, "data:2,model:2"), (2, "model:4"), (4, "data:4,model:2"), (4, "data:2,model:4")],
)
def test_several_processes_print_what_one_prints(tmp_path, num_processes, mesh):
    write_inputs(tmp_path, max_new_tokens=12)
    alone = start(tmp_path, "one.jsonl", f"--mesh={mesh}", num_devices=2 * num_processes)
    expected = end(tmp_path, "one.jsonl", alone)
    them = start_all(tmp_path, "all.jsonl", f"--mesh={mesh}", num_processes=num_processes)
    found = end(tmp_path, "all.jsonl", *them)
    assert (found["errors"], found["steps"]) == (0, expected["steps"])
    # To the bit, log probabilities too.
    assert (tmp_path / "all.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()


@pytest.mark.slow
def test_nothing_compiles_while_several_processes_serve(tmp_path):
    write_inputs(tmp_path, max_new_tokens=12)
    end(tmp_path, "one.jsonl", start(tmp_path, "one.jsonl", num_devices=1))  # converts the model
    flags = ("--mesh=data:2,model:2",)
    them = start_all(tmp_path, "bench", *flags, num_processes=2, command=BENCH)
    assert end(tmp_path, "bench", *them)["recompiles"] == 0


def fails(tmp_path: Path, process: subprocess.Popen, number: int, within_s: float) -> str:
    """What a process said that ends with an error."""
    assert process.wait(timeout=within_s) not in (0, -signal.SIGKILL)
    return (tmp_path / f"all.jsonl.{number}.err").read_text()


@pytest.mark.slow
def test_processes_that_were_given_different_requests_refuse_them(tmp_path):
    write_inputs(tmp_path, max_new_tokens=4)
    end(tmp_path, "one.jsonl", start(tmp_path, "one.jsonl", num_devices=1))  # converts the model
    flags = ("--mesh=data:2,model:2",)
    them = start_all(tmp_path, "all.jsonl", *flags, num_processes=2, last=("--seed=7",))
    for number, process in enumerate(them):
        assert "given different requests" in fails(tmp_path, process, number, within_s=120)


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_who_dies_is_missed_and_the_run_goes_on_from_what_was_saved(tmp_path, dies):
    write_inputs(tmp_path, max_new_tokens=100)
    mesh, saves = "--mesh=data:2,model:2", tmp_path / "saves"
    expected = end(tmp_path, "one.jsonl", start(tmp_path, "one.jsonl", mesh, num_devices=4))
    flags = (mesh, f"--save_dir={saves}", "--save_every_steps=1", "--resume")
    them = start_all(tmp_path, "all.jsonl", *flags, num_processes=2)
    while not any(path.name.isdecimal() for path in saves.glob("*")):
        assert all(process.poll() is None for process in them)
        time.sleep(0.005)
    them[dies].send_signal(signal.SIGKILL)
    assert them[dies].wait() == -signal.SIGKILL
    said = fails(tmp_path, them[1 - dies], 1 - dies, within_s=DEAD_AFTER_S + 10)
    if dies == 0:  # with it goes what connects them, whose loss XLA does not leave to us
        assert "another task died" in said
    else:
        assert "another process is gone" in said and "--resume" in said
    assert not (tmp_path / "all.jsonl").read_text()

    again = end(tmp_path, "all.jsonl", *start_all(tmp_path, "all.jsonl", *flags, num_processes=2))
    assert again["steps"] == expected["steps"]
    assert (tmp_path / "all.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()


@pytest.mark.slow
def test_who_falls_silent_is_missed_in_time(tmp_path):
    write_inputs(tmp_path, max_new_tokens=100)
    end(tmp_path, "one.jsonl", start(tmp_path, "one.jsonl", num_devices=1))  # converts the model
    flags = ("--mesh=data:2,model:2", f"--save_dir={tmp_path / 'saves'}", "--save_every_steps=1")
    them = start_all(tmp_path, "all.jsonl", *flags, num_processes=2)
    while not any(path.name.isdecimal() for path in (tmp_path / "saves").glob("*")):
        assert all(process.poll() is None for process in them)
        time.sleep(0.005)
    them[1].send_signal(signal.SIGSTOP)
    try:
        since_s = time.monotonic()
        fails(tmp_path, them[0], 0, within_s=3 * DEAD_AFTER_S)
        print(f"\nsilence of {DEAD_AFTER_S} s was missed after {time.monotonic() - since_s:.1f} s")
    finally:
        them[1].kill()
        them[1].wait()
