"""The highest rate that is sustained, and batches that are not continuous."""

from dataclasses import replace

import numpy as np
import pytest
from test_paper_figures import CONFIG, COST
from test_simulate import run

from jaxpage.config import ConfigError
from jaxpage.paging.allocator import ALLOCATORS
from jaxpage.sim.capacity import capacity
from jaxpage.sim.trace import Arrival


@pytest.mark.parametrize("start", [0.01, 1.0, 3.7, 900.0])
@pytest.mark.parametrize("true_rate", [0.3, 3.7, 55.0])
def test_the_highest_rate_within_the_limit_is_found_from_anywhere(start, true_rate):
    asked = []

    def latency_s(rate: float) -> float:
        asked.append(rate)
        return 0.1 if rate <= true_rate else 9.0

    found = capacity(latency_s, 0.5, start, precision=0.01)
    assert found <= true_rate < found * 1.01 * (1 + 1e-12)
    assert found in asked  # what is reported was seen to hold
    assert len(asked) == len(set(asked)) < 40


def test_a_limit_that_all_rates_keep_or_none_has_no_answer():
    with pytest.raises(ConfigError, match="no rate takes longer than"):
        capacity(lambda rate: 0.1, 0.5, 1.0)
    with pytest.raises(ConfigError, match="latency is more than"):
        capacity(lambda rate: 1.0, 0.5, 1.0)
    with pytest.raises(ConfigError, match="limit_s=0 must be a positive"):
        capacity(lambda rate: 1.0, 0, 1.0)


@pytest.mark.slow
def test_a_static_batch_ends_before_the_next_begins():
    config = replace(CONFIG, static_batches=True, num_slots=3)
    requests = [Arrival(0.0, 4, length) for length in (2, 9, 3, 5, 1)]
    _, _, logs = run(requests, config, ALLOCATORS["oracle"], COST)
    running = np.concatenate([log["num_running"] for log in logs])
    np.testing.assert_array_equal(running, [3, 3, 2, *[1] * 6, 2, *[1] * 4])
    _, _, logs = run(requests, replace(config, static_batches=False), ALLOCATORS["oracle"], COST)
    assert len(np.concatenate([log["step"] for log in logs])) < len(running)
