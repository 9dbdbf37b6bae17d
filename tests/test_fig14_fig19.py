"""The scripts of Figs 14 and 19 in short."""

import json

import pytest
from scripts import run_script
from test_experiments import assert_fails_with

from experiments import fig14_parallel_and_beam, fig19_swap_recompute


@pytest.mark.slow
def test_fig14_in_short(tmp_path):
    done = run_script("fig14_parallel_and_beam", "--quick", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert list(last["rates"]) == ["parallel 1", "parallel 4", "beam 4"]
    assert list(last["rates"]["beam 4"]) == ["paged", "oracle", "oracle, no copies"]
    saved = last["pages_saved_percent"]
    assert saved["parallel 1"] == 0 < saved["parallel 4"] < 20 < 40 < saved["beam 4"] < 75
    assert 0 < last["copied"]["beam 4"] < 1
    # Copies take time, and what others copy pages share.
    over = last["paged_over"]["beam 4"]
    assert over["oracle"] >= over["oracle, no copies"]
    compared = {row.what: row for row in fig14_parallel_and_beam.comparison(last)}
    basic = compared["parallel 1: requests/s of paged over oracle"]
    assert (basic.paper, basic.ours) == (1.3, last["paged_over"]["parallel 1"]["oracle"])
    printed = compared["beam 4: pages saved (Fig 15)"]
    assert (printed.paper, printed.ours) == (53.13, saved["beam 4"])
    rows = [json.loads(line) for line in (tmp_path / "fig14.jsonl").read_text().splitlines()]
    assert {row["system"] for row in rows} == {"paged", "oracle"}
    assert (tmp_path / "fig14.png").stat().st_size > 10_000


def test_fig14_says_what_it_cannot_compare(tmp_path):
    out = f"--out={tmp_path}"
    wrong = run_script("fig14_parallel_and_beam", "--widths=2,one", out)
    assert_fails_with(wrong, "--widths=2,one", "from 2 on")


@pytest.mark.slow
def test_fig19_in_short(tmp_path):
    done = run_script("fig19_swap_recompute", "--quick", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    times = last["times_ms"]
    assert (last["source"], last["tokens"]) == ("cost model", 256)
    assert len(set(times["recompute"].values())) == 1  # pages do not matter to it
    by_layer, whole = times["swap_by_layer_in_and_out"], times["swap_in_and_out"]
    # 256 pages out and in, 10 us for each copy: of a page, or of a layer's keys or values of it.
    assert whole["1"] - whole["256"] == pytest.approx(2 * 255 * 0.01, rel=1e-3)
    assert by_layer["1"] - by_layer["256"] == pytest.approx(2 * 255 * 0.01 * 80, rel=1e-3)
    served = last["normalized_latency_s"]["sharegpt"]
    assert served["swap"]["16"] < served["swap_by_layer"]["16"]
    assert all(count["16"] > 20 for count in last["preemptions"]["sharegpt"].values())
    compared = fig19_swap_recompute.comparison(last)
    assert compared[0].paper == (0.0, 1.2)
    assert compared[0].ours == pytest.approx(times["recompute"]["256"] / whole["256"])
    rows = [json.loads(line) for line in (tmp_path / "fig19.jsonl").read_text().splitlines()]
    moved = {row["mode"]: row["moved_pages"] for row in rows if row["figure"] == "19b"}
    assert moved["recompute"] == 0 < moved["swap"]
    assert (tmp_path / "fig19.png").stat().st_size > 10_000


def test_fig19_says_whose_times_it_gives(tmp_path):
    out = f"--out={tmp_path}"
    wrong = run_script("fig19_swap_recompute", "--quick", "--device=b200", out)
    assert_fails_with(wrong, "'b200'", "a100-80gb")
