"""What the experiments on sharing and eviction make of a run's records."""

import types
from pathlib import Path

import numpy as np
import pytest
from recorded_text import Letters

from experiments import claim_eviction, claim_sharing, fig15_sharing_savings
from jaxpage.config import ConfigError
from jaxpage.engine.request import Request, Result
from jaxpage.engine.run import Journal
from jaxpage.scheduling.accounting import StepRecord

REQUEST = Request("r", (1, 2), 3)
NOTHING = dict.fromkeys(StepRecord._fields, 0)


def test_a_mode_is_charged_for_what_it_moved_and_computed_again():
    records = [
        NOTHING | {"num_preempted": 2, "moved_out": 3, "num_sampled": 1, "num_running": 4},
        NOTHING | {"moved_in": 3, "num_paused": 1, "num_running": 2},
        NOTHING | {"num_recomputed": 7, "num_sampled": 2},
    ]
    row = claim_eviction.row_of(
        [Result(REQUEST, [5, 6, 7])], Journal(records, wall_s=2.0), np.array([0.1, 0.3]), 100
    )
    assert row["moved_bytes"] == 600 and row["moved_bytes_per_preemption"] == 300
    assert row["most_pages_moved_in_a_step"] == 3
    assert row["recomputed_tokens"] == 7
    assert row["steps_without_a_token"] == 1
    assert row["mean_running"] == pytest.approx(5 / 3)
    assert row["output_tokens_per_s"] == 1.5
    assert row["inter_token_p50_s"] == pytest.approx(0.2)


def test_fine_is_compared_with_swap_only_where_both_ran():
    one = {"moved_bytes": 4, "inter_token_p99_s": 2.0, "output_tokens_per_s": 8.0}
    two = {"moved_bytes": 1, "inter_token_p99_s": 1.0, "output_tokens_per_s": 8.0}
    assert claim_eviction.ratios({"swap": one}) == {}
    assert claim_eviction.ratios({"swap": one | {"moved_bytes": 0}, "fine": two}) == {}
    assert claim_eviction.ratios({"swap": one, "fine": two}) == {
        "fine_over_swap_moved_bytes": 0.25,
        "fine_over_swap_inter_token_p99_s": 0.5,
        "fine_over_swap_output_tokens_per_s": 1.0,
    }


def test_a_folder_that_may_hold_the_prompts_is_refused(monkeypatch, tmp_path):
    flags = types.SimpleNamespace(disk_dir=str(tmp_path / "new"))
    monkeypatch.setattr(claim_sharing, "FLAGS", flags)
    with claim_sharing.disk_folder() as folder:
        assert folder == flags.disk_dir
    (tmp_path / "new" / "page").touch()
    with (
        pytest.raises(ConfigError, match=r"disk_dir=.*new is not empty.*name an empty folder"),
        claim_sharing.disk_folder(),
    ):
        pass
    flags.disk_dir = None
    with claim_sharing.disk_folder() as folder:
        assert Path(folder).is_dir()
    assert not Path(folder).exists()


def test_alpacas_lengths_are_those_of_its_deciles(monkeypatch):
    class Flags:
        requests, max_tokens = 8, 200

    monkeypatch.setattr(fig15_sharing_savings, "FLAGS", Flags)
    workloads = fig15_sharing_savings.workloads(Letters())
    alpaca, sharegpt = workloads["alpaca"], workloads["sharegpt"]
    assert [item.id for item in alpaca] == [item.id for item in sharegpt]
    assert max(item.max_new_tokens for item in alpaca) <= 200
    lengths = sorted(item.max_new_tokens for item in alpaca)
    # The middle of the first eighth lies between the first two deciles, and so on.
    assert lengths[0] == int(np.interp(1 / 16, [0, 0.1], [1, 7]))
    assert lengths[3] == int(np.interp(7 / 16, [0.4, 0.5], [27, 44]))
    assert all(
        a.prompt_ids == s.prompt_ids[: len(a.prompt_ids)]
        for a, s in zip(alpaca, sharegpt, strict=True)
    )
