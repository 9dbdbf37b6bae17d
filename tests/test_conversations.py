"""Conversations of several turns, and what serving them reports."""

import json

import pytest
from recorded_text import Letters, put_in_place_of_sharegpt

from experiments import bench_prefix
from jaxpage.config import ConfigError
from jaxpage.engine.request import Request, Result
from jaxpage.engine.run import Journal
from jaxpage.scheduling.accounting import StepRecord
from jaxpage.sim.conversations import Conversation, Turn, sharegpt_conversations


def said(*texts: str) -> list[dict]:
    return [
        {"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)
    ]


RECORDS = [
    {"id": "one turn", "conversations": said("ab", "cd")},
    {"id": "unanswered", "conversations": said("ab", "cd", "ef")},
    {"id": "two", "conversations": said("ab", "c", "d", "efg", "h")},
    {"id": "long", "conversations": said("a", "b", "cd", "e", "f" * 50, "g")},
    {"id": "silent", "conversations": said("a", "b", "c", "", "d", "e")},
    {"id": "odd", "conversations": [*said("a", "b"), *said("c", "d")[::-1]]},
    {"id": "three", "conversations": said("a", "b", "c", "d", "e", "f" * 9)},
]


@pytest.fixture
def recorded(monkeypatch):
    put_in_place_of_sharegpt(monkeypatch, json.dumps(RECORDS))


def test_conversations_keep_the_answered_turns_that_fit(recorded):
    found = sharegpt_conversations(Letters(), 3, max_tokens=20, max_output_tokens=4)
    lengths = [[(len(t.said_ids), t.max_new_tokens) for t in c.turns] for c in found]
    assert [c.id for c in found] == ["two", "long", "three"]
    assert lengths == [[(2, 1), (1, 3)], [(1, 1), (2, 1)], [(1, 1), (1, 1), (1, 4)]]
    assert [c.num_tokens for c in found] == [7, 5, 9]
    with pytest.raises(ConfigError, match="num=4 conversations asked for, 3 recorded"):
        sharegpt_conversations(Letters(), 4, max_tokens=20, max_output_tokens=4)


@pytest.mark.parametrize("name", ["num", "max_tokens", "max_output_tokens"])
def test_limits_must_be_positive(recorded, name):
    limits = {"num": 1, "max_tokens": 9, "max_output_tokens": 9} | {name: 0}
    with pytest.raises(ConfigError, match=f"{name}=0"):
        sharegpt_conversations(Letters(), **limits)


def test_a_prompt_is_all_that_was_said():
    talk = Conversation("a", (Turn((1, 2), 2), Turn((3,), 1), Turn((4, 5), 9)))
    assert talk.prompt(0, []) == (1, 2)
    assert talk.prompt(2, [[6, 7], [8]]) == (1, 2, 6, 7, 3, 8, 4, 5)
    with pytest.raises(ConfigError, match="turn 1 of a follows 0 answers"):
        talk.prompt(1, [])


class Echo:
    """An engine that answers with the prompt's last token, and finishes in the order asked."""

    def __init__(self):
        self.asked: list[Request] = []

    def serve(self, requests, then, steps_per_read):
        del steps_per_read
        waiting, results = list(requests), []
        for request in waiting:
            self.asked.append(request)
            output = [request.prompt_ids[-1]] * request.max_new_tokens
            now_s = float(len(results) + 1)
            results.append(Result(request, output, first_token_s=now_s, finish_s=now_s))
            if (more := then(results[-1])) is not None:
                waiting.append(more)
        records = [dict.fromkeys(StepRecord._fields, 0) | {"num_tokens": 3}] * 2
        return results, Journal(records, wall_s=4.0)


def test_each_turn_follows_its_answer_and_later_ones_alone_are_timed():
    talks = [
        Conversation("a", (Turn((1, 2), 2), Turn((3,), 1))),
        Conversation("b", (Turn((4,), 1), Turn((5,), 1), Turn((6,), 1))),
    ]
    echo = Echo()
    row = bench_prefix.talk(echo, talks)  # pyright: ignore[reportArgumentType]
    asked = {request.id: request.prompt_ids for request in echo.asked}
    assert asked == {
        "a 0": (1, 2),
        "a 1": (1, 2, 2, 2, 3),
        "b 0": (4,),
        "b 1": (4, 4, 5),
        "b 2": (4, 4, 5, 5, 6),
    }
    assert (row["requests"], row["prompt_tokens"], row["output_tokens"]) == (5, 16, 6)
    assert row["computed_tokens"] == 6
    # The later three wait 3 - 1, 4 - 2 and 5 - 4 seconds after the answers before them.
    assert row["later_first_token_p50_s"] == 2.0


def test_with_the_cache_is_compared_by_medians():
    def row(has_cache, wall_s, hits):
        same = {"requests": 2, "prompt_tokens": 40, "later_first_token_p50_s": wall_s / 2}
        computed = 60 - hits
        return {
            **same,
            "has_cache": has_cache,
            "wall_s": wall_s,
            "hit_tokens": hits,
            "computed_tokens": computed,
        }

    rows = [row(True, wall_s, 30) for wall_s in (1.0, 2.0, 9.0)]
    rows += [row(False, wall_s, 0) for wall_s in (8.0, 5.0, 6.0)]
    found = bench_prefix.compare(rows)
    assert found["speed_up"] == found["later_first_token_ratio"] == 3.0
    assert found["hit_share"] == 0.75 and found["computed_ratio"] == 2.0


def test_a_pool_must_hold_what_runs_while_it_is_measured():
    assert bench_prefix.pool_of("1000") == 1000
    for wrong in ("767", "many"):
        with pytest.raises(ConfigError, match=f"'{wrong}' must be a number of pages from 768"):
            bench_prefix.pool_of(wrong)
