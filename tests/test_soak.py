"""What the soak asks for, and what it makes of what came."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_engine import CONFIG, setup_of

from experiments import soak
from jaxpage.engine.request import Request, Result, refusal

ROOT = Path(__file__).parent.parent
FINE = Request("r", (1, 2), 3)


@pytest.mark.parametrize("change", soak.MALFORMED, ids=str)
def test_what_is_malformed_is_refused(change):
    setup = setup_of(replace(CONFIG, max_beams=2))
    assert refusal(setup, FINE) is None
    reason = refusal(setup, replace(FINE, **change))
    assert reason is not None


def test_who_was_overtaken_by_how_many():
    dice = random.Random(3)
    for _ in range(20):
        times_s = [dice.choice((float("nan"), *map(float, range(8)))) for _ in range(12)]
        results = [Result(replace(FINE, id=str(i)), first_token_s=t) for i, t in enumerate(times_s)]
        expected = max(sum(later < time for later in times_s[i:]) for i, time in enumerate(times_s))
        assert soak.most_overtaken(results) == expected


@pytest.mark.slow
def test_a_short_soak_loses_nothing(tmp_path):
    command = [sys.executable, "-m", "experiments.soak", "--requests=300"]
    done = subprocess.run(
        [*command, f"--out={tmp_path}/rounds.jsonl"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["requests"] == 300 and last["refused"] > 0 and last["cancelled"] > 0
    assert (last["violations"], last["lost_pages"], last["lost_host_pages"]) == (0, 0, 0)
    assert last["most_overtaken"] <= last["most_overtaken_allowed"]
