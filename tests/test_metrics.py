"""Rates and shares of a run, from step records written by hand."""

import numpy as np
import pytest

from jaxpage.config import EngineConfig
from jaxpage.sim.metrics import (
    Timeline,
    columns_of,
    latency_summary,
    steps_short_of_memory,
    summarise,
    waste_shares,
)

CONFIG = EngineConfig(
    num_slots=4, num_pages=10, page_size=1, pages_per_slot=8, num_requests=9, token_buckets=(4, 16)
)


def record(num_tokens: int, num_running: int, num_waiting: int, *memory: int) -> dict[str, int]:
    names = ("token_states", "reservation", "internal", "external", "idle", "cached")
    return {
        "num_tokens": num_tokens,
        "num_running": num_running,
        "num_waiting": num_waiting,
        "num_preempted": 0,
        **dict(zip(names, (*memory, 0), strict=True)),
    }


FILLING = record(16, 2, 5, 4, 0, 0, 6, 0)  # the budget is what they wait for
SHORT = record(3, 3, 4, 7, 1, 2, 0, 0)
SHORT_TOO = record(2, 2, 4, 5, 1, 0, 4, 0)
ALL_SLOTS = record(4, 4, 3, 8, 0, 1, 1, 0)
IDLE = record(1, 1, 0, 1, 0, 0, 0, 9)


def summary_of(*records: dict[str, int]) -> dict[str, float]:
    return summarise(
        records,
        CONFIG,
        wall_s=2.0,
        num_prompt_tokens=10,
        num_output_tokens=30,
        normalized_latencies_s=[0.5, 1.5],
    )


def test_only_steps_that_lack_memory_and_neither_slot_nor_budget_count_as_short_of_it():
    records = [FILLING, SHORT, ALL_SLOTS, IDLE]
    short = steps_short_of_memory(columns_of(records), CONFIG)
    np.testing.assert_array_equal(short, [False, True, False, False])


def test_shares_are_means_over_the_steps_short_of_memory():
    summary = summary_of(FILLING, SHORT, SHORT_TOO, ALL_SLOTS, IDLE)
    assert (summary["steps"], summary["steps_short_of_memory"]) == (5, 2)
    assert summary["mean_batched_requests"] == 2.5
    shares = [
        summary[f"{n}_share"] for n in ("token_states", "reservation", "internal", "external")
    ]
    assert shares == pytest.approx([0.6, 0.1, 0.1, 0.2])


def test_with_memory_for_all_the_shares_are_over_all_steps_and_idle_memory_is_no_waste():
    summary = summary_of(FILLING, IDLE)
    assert (summary["steps_short_of_memory"], summary["mean_batched_requests"]) == (0, 1.5)
    assert summary["token_states_share"] == pytest.approx(0.25)
    assert summary["external_share"] == pytest.approx(0.3)


def test_rates_count_what_was_printed_and_what_was_read():
    summary = summary_of(SHORT)
    assert (summary["output_tokens_per_s"], summary["total_tokens_per_s"]) == (15.0, 20.0)
    assert summary["normalized_latency_s_per_token"] == 1.0


def test_no_steps_have_no_shares():
    assert set(waste_shares(columns_of([])).values()) == {0.0}
    summary = summary_of()
    assert summary["steps"] == summary["mean_batched_requests"] == summary["preemptions"] == 0


def test_latency_is_of_the_first_token_of_each_later_one_and_of_all():
    timeline = Timeline(
        arrival_s=np.array([1.0, 2.0, 2.0]),
        first_token_s=np.array([2.0, 2.5, 6.0]),
        finish_s=np.array([6.0, 2.5, 11.0]),
        output_lens=np.array([5, 1, 3]),
    )
    found = latency_summary(timeline, slo_first_token_s=1.0, slo_token_s=2.0)
    assert [found[f"ttft_{name}_s"] for name in ("p50", "mean")] == [1.0, pytest.approx(5.5 / 3)]
    assert found["tpot_p50_s"] == 1.0 and found["tpot_p99_s"] == pytest.approx(2.47)
    assert found["normalized_latency_mean_s"] == pytest.approx((1.0 + 0.5 + 3.0) / 3)
    assert (found["latency_p50_s"], found["span_s"], found["requests"]) == (5.0, 10.0, 3)
    assert (found["requests_per_s"], found["output_tokens_per_s"]) == (0.3, 0.9)
    # The first two are within both.
    assert found["goodput_per_s"] == 0.2
    assert latency_summary(timeline)["goodput_per_s"] == 0.3
