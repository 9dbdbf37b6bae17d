"""The side channel's experiment: what the attacker sees, and how it is judged."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from experiments import claim_side_channel as experiment

SECRETS = [(number, number) for number in range(6)]


@pytest.fixture
def pretended_engine(monkeypatch):
    """Answers at once what the tenant has asked before, and takes a second for the rest."""
    asked: set = set()

    def ask(engine, prompts, tenant):
        del engine
        results = []
        for prompt in prompts:
            found = (tenant, prompt) in asked
            asked.add((tenant, prompt))
            seen = {"first_token_s": 0.0 if found else 1.0, "num_cached_tokens": 2 * found}
            results.append(SimpleNamespace(**seen))
        return results

    monkeypatch.setattr(experiment, "ask", ask)


@pytest.mark.usefixtures("pretended_engine")
def test_one_salt_tells_all_and_a_salt_each_tells_nothing():
    rng = np.random.default_rng(0)
    engine: Any = None
    guesses = [g for number in range(3) for g in experiment.play(engine, SECRETS, number, rng)]
    arms = {
        arm: experiment.summarise([g for g in guesses if g.arm == arm], 0.5, rng)
        for arm in experiment.ARMS
    }
    assert all(row["guesses"] == 3 * len(SECRETS) for row in arms.values())
    told, hidden = arms["one_salt"], arms["salt_each"]
    assert (told["auc"], told["accuracy"], told["sent_found_cached"]) == (1, 1, 9)
    assert told["guesses_found_cached"] == 9 and told["p_value"] < 0.01
    assert (hidden["auc"], hidden["accuracy"], hidden["guesses_found_cached"]) == (0.5, 0.5, 0)
    assert hidden["p_value"] == 1


def test_the_area_counts_pairs_in_order_and_ties_by_half():
    sent = np.array([True, True, False, False])
    assert experiment.auc(np.array([1.0, 4.0, 2.0, 4.0]), sent) == (1 + 1 + 0 + 0.5) / 4


def test_the_interval_holds_the_area_and_shrinks_with_more_guesses():
    rng = np.random.default_rng(0)

    def interval(n: int):
        times_s, sent = rng.random(n), np.arange(n) % 2 == 0
        low, high = experiment.auc_interval(times_s, sent, rng)
        assert low < experiment.auc(times_s, sent) < high
        return high - low

    assert interval(2000) < interval(60) / 3
