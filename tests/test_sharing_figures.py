"""A prefix that all prompts share, and dialogues as prompts: the paper's Figs 16 and 17."""

import json

import numpy as np
import pytest
from scripts import run_script

from experiments import fig16_shared_prefix, fig17_chatbot, kept_rounds, rate_search
from jaxpage.config import ConfigError, EngineConfig
from jaxpage.paging.allocator import CACHED
from jaxpage.scheduling.policies import POLICIES
from jaxpage.sim import cost_model, runs
from jaxpage.sim import lengths as length_sets
from jaxpage.sim.cost_model import NO_OVERHEAD
from jaxpage.sim.device import DEVICES
from jaxpage.sim.lengths import Lengths, RecordedTurn
from jaxpage.sim.shapes import SHAPES

# Says, is answered; an answer that opens, twice the human, an empty turn.
TURNS = [
    RecordedTurn(3, 0, True, 10),
    RecordedTurn(3, 1, False, 20),
    RecordedTurn(3, 2, True, 5),
    RecordedTurn(3, 3, False, 6),
    RecordedTurn(4, 0, False, 7),
    RecordedTurn(4, 1, True, 8),
    RecordedTurn(4, 2, True, 9),
    RecordedTurn(4, 3, False, 4000),
    RecordedTurn(4, 4, True, 2000),
    RecordedTurn(4, 5, False, 3),
    RecordedTurn(4, 6, True, 0),
    RecordedTurn(4, 7, False, 3),
]


def test_a_round_knows_what_was_said_before_it():
    rounds = length_sets.rounds_of(TURNS, bos=1)
    columns = [tuple(column.tolist()) for column in rounds]
    assert list(zip(*columns, strict=True)) == [
        (3, 0, 11, 0, 20),
        (3, 2, 6, 30, 6),
        (4, 2, 10, 15, 4000),
        (4, 4, 2001, 4024, 3),
    ]
    with pytest.raises(ConfigError, match="no human turn with an answer"):
        length_sets.rounds_of([])
    with pytest.raises(ConfigError, match="no conversation that a human turn"):
        length_sets.pairs_of(TURNS[4:], "first")


def requests(rounds: str, **changes) -> list[tuple[int, int]]:
    conditions = fig17_chatbot.Conditions(0.2, NO_OVERHEAD, rounds, **changes)
    found = fig17_chatbot.requests_of(length_sets.rounds_of(TURNS), conditions)
    return list(zip(found.prompts.tolist(), found.outputs.tolist(), strict=True))


def test_a_prompt_is_the_last_1024_tokens_of_a_dialogue():
    assert requests("all") == [(11, 20), (36, 6), (25, 1024), (1024, 3)]
    assert requests("last") == [(36, 6), (1024, 3)]
    assert requests("last", all_long=True) == [(1024, 6), (1024, 3)]


def test_behind_1024_tokens_the_next_power_of_two_is_2048_by_every_rule():
    long = Lengths(np.full(3, 1024), np.array([1, 16, 1024]))
    assert fig17_chatbot.reserve_most(long) == {"max": 1.0, "pow2": 1.0, "oracle": 1.0}
    short = Lengths(np.array([1000, 100, 900]), np.array([24, 900, 130]))
    assert fig17_chatbot.reserve_most(short) == pytest.approx(
        {"max": 1.0, "pow2": 1.0, "oracle": 1 / 3}
    )


def test_drawn_dialogues_have_the_rounds_and_turns_that_are_stated():
    turns = fig17_chatbot.drawn_turns(np.random.default_rng(1), 4000)
    rounds = length_sets.rounds_of(turns, bos=0)
    assert len(np.unique(rounds.conversations)) == 4000
    assert len(rounds.said) / 4000 == pytest.approx(fig17_chatbot.MEAN_ROUNDS, rel=0.05)
    assert np.mean(rounds.said) == pytest.approx(fig17_chatbot.SAID[0], rel=0.1)
    assert np.mean(rounds.answers) == pytest.approx(fig17_chatbot.ANSWERS[0], rel=0.05)
    opens = [not turn.is_human for turn in turns if turn.number == 0]
    assert np.mean(opens) == pytest.approx(fig17_chatbot.BEGIN_WITH_ANSWER, abs=0.03)


@pytest.mark.slow
def test_requests_share_the_prefix_and_nothing_else():
    config = EngineConfig(
        num_slots=4,
        num_pages=64,
        page_size=4,
        pages_per_slot=12,
        num_requests=8,
        token_buckets=(32,),
        headroom_pages=1,
        log_steps=64,
    )
    cost = cost_model.create(SHAPES["llama-13b"], DEVICES["a100-40gb"], page_size=4)
    lengths = Lengths(np.full(4, 9), np.full(4, 6))  # alike, so that content alone tells them apart
    make = fig16_shared_prefix.requests_of
    shared = make(lengths, 14, np.array([0.0, 10.0, 20.0, 20.0]), is_shared=True)
    own = make(lengths, 14, np.array([30.0, 40.0, 50.0, 50.0]), is_shared=False)
    assert {request.prompt_len for request in shared + own} == {14 + 3 + 9}
    run = runs.run(shared + own, cost, config, CACHED["lru"], POLICIES["fcfs"])
    found = run.cached_lens.tolist()
    # The first computes it. Of the page in which it ends, only the newest is looked at.
    assert found[:2] == [0, 14]
    assert set(found[2:4]) <= {12, 14}
    assert found[4:] == [0, 0, 0, 0]


def test_sentences_are_read_with_their_quotation_marks(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text('de\tx\ten\n"Ja, sagte er\tx\tYes, "he" said\n\tx\tno translation\n')
    read = fig16_shared_prefix.read_sentences
    assert read(path, "en", "de") == (['Yes, "he" said'], ['"Ja, sagte er'])
    with pytest.raises(ConfigError, match=r"line 1: expected a header with en, fr"):
        read(path, "en", "fr")
    path.write_text("de\ten\nJa\n")
    with pytest.raises(ConfigError, match="line 2: expected 2 fields"):
        read(path, "en", "de")
    with pytest.raises(ConfigError, match="no such file"):
        read(tmp_path / "none.tsv", "en", "de")
    path.write_text("de\ten\n\tYes\n")
    with pytest.raises(ConfigError, match="no line has both en and de"):
        read(path, "en", "de")


def test_the_highest_rate_is_one_that_was_measured_within_the_limit():
    def measure(rate: float) -> rate_search.Point:
        return {"rate": rate, "normalized_latency_s": 0.01 * rate}

    found = rate_search.highest_rate(measure, limit_s=0.2, start=3.0)
    assert found["rate"] == pytest.approx(20, rel=0.03) and found["rate"] <= 20
    rates = [point["rate"] for point in found["points"]]
    assert rates == sorted(rates) and found["rate"] in rates and 3.0 in rates


@pytest.mark.slow
def test_fig16_in_short(tmp_path):
    done = run_script("fig16_shared_prefix", "--quick", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    rates = last["rates"]["five examples"]
    assert list(rates) == ["cached", "oracle"] and rates["cached"] > 2 * rates["oracle"] > 0
    assert last["kv_tokens"] == 15_728 and last["ablations"] == {}
    # All but the first few, who come while the first is at it.
    assert 0.9 < last["prefix_tokens_found"]["five examples"] < 1
    rows = fig16_shared_prefix.comparison(last)
    assert [row.paper for row in rows] == [3.58]
    assert rows[0].ours == pytest.approx(rates["cached"] / rates["oracle"])
    points = [json.loads(line) for line in (tmp_path / "fig16.jsonl").read_text().splitlines()]
    within = [p["rate"] for p in points if p["normalized_latency_s"] <= last["limit_s"]]
    assert max(within) == rates["cached"]
    assert (tmp_path / "fig16.png").stat().st_size > 10_000
    last["cached_over"]["one example"] = {"paged": 2.0, "oracle": 2.5}
    assert [row.paper for row in fig16_shared_prefix.comparison(last)] == [3.58, None, 1.67]


@pytest.mark.slow
def test_fig17_in_short(tmp_path):
    done = run_script("fig17_chatbot", "--quick", "--turns=drawn", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    rates = last["rates"]
    assert rates["paged"] > rates["oracle"] >= rates["pow2"] >= rates["max"] > 0
    shares = last["reserve_2048"]
    assert 0.4 < shares["oracle"] < shares["pow2"] < shares["max"] == 1
    assert last["dialogues"].startswith("drawn: rounds geometric")
    rows = fig17_chatbot.comparison(last)
    assert [row.paper for row in rows] == [2.0, 2.0, 2.0]
    assert rows[0].ours == pytest.approx(rates["paged"] / rates["max"])
    assert (tmp_path / "fig17.png").stat().st_size > 10_000


def test_whole_dialogues_are_taken_by_lot_and_their_rounds_follow_each_other():
    rounds = length_sets.rounds_of(TURNS + [turn._replace(conversation=5) for turn in TURNS[:4]])
    requests = kept_rounds.requests_of(rounds, 3, rate=2.0, pause_s=3.0, seed=0)
    # What does not fit into 2,048 tokens is no part of it, and so the second dialogue is not.
    assert [(r.prompt_len, r.output_len) for r in requests] == [(11, 20), (36, 6)] * 2
    assert [request.follows for request in requests] == [None, 0, None, 2]
    assert requests[1].arrival_s == requests[3].arrival_s == 3.0
    assert 0 < requests[0].arrival_s < requests[2].arrival_s
    assert len(kept_rounds.requests_of(rounds, 2, 2.0, 3.0, seed=0)) == 2
