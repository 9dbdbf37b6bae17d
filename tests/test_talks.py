"""People who talk with the engine, and the day that claim_lunch makes of them."""

import math

import pytest

from experiments import claim_lunch
from experiments.talks import Talk, Talks, talk_of
from jaxpage.engine.request import Request, Result
from jaxpage.engine.run import Journal
from jaxpage.scheduling.accounting import StepRecord
from jaxpage.sim.conversations import Conversation, Turn

TWO_TURNS = (Turn((1, 2), 2), Turn((3,), 1))


def answered(request: Request, first_token_s: float, finish_s: float) -> Result:
    return Result(
        request,
        [9] * request.max_new_tokens,
        first_token_s=first_token_s,
        finish_s=finish_s,
    )


def test_a_turn_follows_the_answer_after_its_thought():
    talks = Talks([Talk(Conversation("a b", TWO_TURNS), opens_s=5.0, thinks_s=(30.0,))])
    (first,) = talks.first()
    assert (first.id, first.prompt_ids, first.arrival_s) == ("a b 0", (1, 2), 5.0)
    second = talks.then(answered(first, 6.0, 7.0))
    assert second is not None
    assert (second.id, second.prompt_ids, second.arrival_s) == ("a b 1", (1, 2, 9, 9, 3), 37.0)
    assert talk_of(second) == "a b"
    assert talks.asked_s == {"a b 0": 5.0, "a b 1": 37.0}
    assert talks.then(answered(second, 38.0, 39.0)) is None


def test_what_a_talk_has_computed_before_is_known():
    talks = Talks([Talk(Conversation("a", TWO_TURNS))])
    (first,) = talks.first()
    assert talks.num_known(first) == 0
    second = talks.then(answered(first, 1.0, 2.0))
    assert second is not None
    # Two said and the first of two answered: the last answered token was sampled, never computed.
    assert talks.num_known(second) == 3


def test_who_finds_no_room_waits_at_the_door_in_order():
    one_turn = (Turn((1,), 1),)
    talks = Talks(
        [
            Talk(Conversation(name, one_turn), opens_s)
            for name, opens_s in (("c", 4.0), ("a", 0.0), ("b", 1.0))
        ],
        at_once=1,
    )
    (first,) = talks.first()
    assert first.id == "a 0"
    second = talks.then(answered(first, 2.0, 3.0))
    assert second is not None
    # It asked at 1 s, came in when the talk before it was over, and its wait counts from the first.
    assert (second.id, second.arrival_s, talks.asked_s["b 0"]) == ("b 0", 3.0, 1.0)
    third = talks.then(answered(second, 3.2, 3.5))
    assert third is not None
    assert (third.id, third.arrival_s) == ("c 0", 4.0)
    assert talks.then(answered(third, 5.0, 6.0)) is None


@pytest.fixture
def hours_of_10_s():
    if "hour_s" not in claim_lunch.FLAGS:
        claim_lunch.define_flags()
    claim_lunch.FLAGS(["test", "--hour_s=10", "--page_size=2", "--out=unused"])
    yield
    claim_lunch.FLAGS.unparse_flags()


def test_latency_counts_in_the_hour_of_the_question(hours_of_10_s):
    talks = Talks([Talk(Conversation("a", TWO_TURNS), opens_s=9.0, thinks_s=(30.0,))])
    (first,) = talks.first()
    slow = answered(first, 12.0, 13.0)
    second = talks.then(slow)
    assert second is not None
    quick = answered(second, 43.5, 48.0)
    step = dict.fromkeys(StepRecord._fields, 0)
    records = [step | {"cached": 4, "moved_out": 2, "moved_in": 1}, step | {"host_cached": 4}]
    journal = Journal(records, wall_s=48.0, step_times_s=[12.0, 43.5])
    rows = claim_lunch.rows_of(talks, [slow, quick], journal)
    assert [row["hour"] for row in rows] == list(range(8, 19))
    assert [row["turns"] for row in rows] == [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert rows[0]["first_token_p50_s"] == 3.0 and rows[0]["opened"] == 1
    assert rows[0]["normalized_latency_s"] == 2.0
    assert rows[1]["cached_pages"] == 2.0 and rows[1]["moved_pages"] == 3
    assert math.isnan(rows[2]["first_token_p50_s"])
    assert rows[4]["first_token_p50_s"] == 0.5 and rows[4]["host_pages"] == 4.0
    # Three of its tokens were known, so one full page of two, of which nothing was found.
    assert rows[4]["lost_tokens"] == 2
    summed = claim_lunch.summary(rows)
    # 4 s for two tokens at 8 h, 5 s for one at 12 h.
    assert (summed["worst_hour"], summed["worst_over_morning"]) == (12, 2.5)
    assert (summed["lost_tokens"], summed["moved_pages"]) == (2, 3)
    assert claim_lunch.without_nan(rows[2])["first_token_p50_s"] is None
    assert "8 h:   1 turns, latency 2.000 s a token, first one 3.00 s" in claim_lunch.sentence(
        "none", rows[0]
    )
