"""The plan for devices that are not here: what it prints, what it refuses, and a real 70B."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from scripts import ROOT, run_script
from test_experiments import assert_fails_with

from jaxpage.model.params import num_parameters
from jaxpage.model.presets import PRESETS

SMALL = ("--model=tiny", "--target=cpu", "--mesh=data:2,model:2", "--num_slots=4")
KV_BYTES = 2**20


def test_a_plan_for_a_small_model_adds_up():
    done = run_script("plan_memory", *SMALL, "--max_seq_len=64", f"--kv_bytes={KV_BYTES}")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    page_bytes = PRESETS["tiny"].kv_bytes_per_token("bfloat16") * 16
    assert row["num_pages"] == KV_BYTES // (page_bytes // 2)
    assert row["kv_bytes"] == row["num_pages"] * page_bytes // 2
    assert row["max_users_4096"] == 2 * (row["num_pages"] // 256)
    assert row["fits"] and row["collectives_per_layer"] == 2
    whole = 2 * num_parameters(PRESETS["tiny"])
    assert whole / 2 < row["weights_bytes"] < whole  # norms are on every device
    parts = row["weights_bytes"] + row["kv_bytes"] + row["scheduler_bytes"]
    assert row["arguments_bytes"] == pytest.approx(parts, rel=0.01)
    assert row["total_bytes"] == row["arguments_bytes"] + row["temp_bytes"]


@pytest.mark.in_ci("*--mesh=model:5*", "*--kv_bytes=900*", "*--target=h100*")
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--model=llama-9",), ("--model=llama-9", "llama-3.1-70b")),
        (("--mesh=model:5",), ("model:5 does not divide", "take another number")),
        (("--mesh=tensor:8",), ("'tensor:8' must be",)),
        (("--kv_bytes=much",), ("--kv_bytes=much must be auto",)),
        (
            ("--kv_bytes=900000000000000",),
            ("weights and KV of", "bytes of each device", "more than the", "take more devices"),
        ),
        (("--target=h100",), ("--target=h100", "pip install")),
    ],
    ids=str,
)
def test_what_cannot_be_planned_is_one_line_with_the_remedy(flags, words):
    done = run_script("plan_memory", *SMALL, *flags)  # of a flag given twice the last counts
    assert_fails_with(done, *words)


@pytest.mark.slow
@pytest.mark.skipif("INSPECT_PYTHON" not in os.environ, reason="`make test-slow` names compilers")
@pytest.mark.parametrize(
    ("target", "mesh"), [("a100-80gb", "data:1,model:4"), ("h100", "data:1,model:8")]
)
def test_llama_70b_fits_and_the_arithmetic_agrees_with_the_compilers(target, mesh):
    command = [os.environ["INSPECT_PYTHON"], "-m", "experiments.plan_memory"]
    command += [f"--target={target}", f"--mesh={mesh}"]
    done = subprocess.run(command, cwd=Path(ROOT), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    parts = row["weights_bytes"] + row["kv_bytes"] + row["scheduler_bytes"]
    assert row["arguments_bytes"] == pytest.approx(parts, rel=0.01)
    assert row["collectives_per_layer"] == 2
    assert row["temp_bytes"] < 0.05 * row["kv_bytes"]
    assert row["peak_rss_bytes"] < 8e9
