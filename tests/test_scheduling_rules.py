"""The scheduler's rules by name: the paper's, and those that we added."""

import dataclasses

import numpy as np
import pytest
from scheduler_oracle import Ask
from scripted_serving import ROOMY, SMALL, TIGHT, Serving, logprob_at


def ask(prompt_len: int, num_outputs: int, **how) -> Ask:
    return Ask(tuple(range(10, 10 + prompt_len)), tuple([1] * num_outputs), **how)


def test_the_newest_request_is_preempted_first_whatever_its_slot():
    serving = Serving(TIGHT)
    serving.submit(ask(1, 1), ask(2, 6))
    serving.step()
    serving.submit(ask(3, 4))  # takes the slot that request 0 left, before that of request 1
    assert serving.run(2) == [{1: 1, 2: 3}, {1: 1, 2: 1}]
    assert serving.seen["slots"].tolist()[:2] == [serving.rows[2], serving.rows[1]]
    assert serving.run(1) == [{1: 1}]
    assert (serving.phase(1), serving.phase(2)) == ("running", "preempted")


def test_no_more_are_preempted_than_must_be():
    serving = Serving(TIGHT)
    serving.submit(ask(2, 4), ask(2, 4), ask(2, 4))
    assert serving.run(2) == [{0: 2, 1: 2, 2: 2}, {0: 1, 1: 1}]  # 9 pages wanted, 8 there
    assert serving.seen["plan"].num_preempted == 1


def test_as_many_are_preempted_as_must_be():
    serving = Serving(TIGHT)
    serving.submit(ask(4, 4), ask(1, 6))
    assert serving.run(1) == [{0: 4, 1: 1}]
    serving.submit(ask(1, 2))
    assert serving.run(1) == [{0: 1, 1: 1, 2: 1}]
    assert serving.seen["num_free"] == 0
    assert serving.run(1) == [{0: 1}]  # the one page of request 2 would not do for two
    assert serving.seen["plan"].num_preempted == 2


def preempt_one() -> Serving:
    """Request 1 is preempted with four tokens known; request 2, of one token, waits behind it."""
    serving = Serving(TIGHT)
    serving.submit(ask(4, 4), ask(3, 3))
    assert serving.run(2) == [{0: 4, 1: 2}, {0: 1, 1: 1}]
    serving.submit(ask(1, 2))
    assert serving.run(1) == [{0: 1}]
    assert serving.seen["plan"].num_preempted == 1
    return serving


def test_nothing_new_is_admitted_until_the_preempted_are_back():
    serving = preempt_one()
    assert serving.seen["num_free"] == 2  # one for request 0, one that request 2 could have
    assert serving.run(1) == [{0: 1}]
    assert (serving.phase(1), serving.phase(2)) == ("preempted", "waiting")
    assert serving.run(1) == [{1: 4, 2: 1}]


def test_a_preempted_request_is_computed_again_and_its_tokens_stay():
    serving = preempt_one()
    before = serving.tokens(1)
    assert len(before) == 4
    serving.run(2)
    row = serving.seen["plan"].requests.tolist().index(serving.rows[1])
    assert serving.seen["plan"].lengths[row] == 4  # all four at once, from the first on
    serving.finish()
    assert serving.tokens(1) == [10, 11, 12, 1, 1, 1]
    assert serving.of("logprobs", 1)[3:6].tolist() == [logprob_at(1, i) for i in (3, 4, 5)]
    assert (serving.of("num_preemptions", 1), serving.of("first_steps", 1)) == (1, 1)
    assert serving.of("num_preemptions", 0) == 0


def test_a_step_that_preempts_admits_nobody_not_even_a_preempted_one_that_would_fit():
    # Only a policy that lets a preempted request overtake those that run can tell.
    serving = Serving(TIGHT, policy="preempted_first")
    serving.submit(ask(2, 4), ask(2, 4), ask(2, 4))
    assert serving.run(3) == [{0: 2, 1: 2, 2: 2}, {0: 1, 1: 1}, {0: 1, 1: 1}]
    assert serving.run(1) == [{0: 1}]  # the three tokens of request 2 could have had their pages
    assert (serving.seen["plan"].num_preempted, serving.seen["num_free"]) == (1, 8)
    assert serving.run(1) == [{1: 5, 2: 1}]


def test_a_sequence_that_the_budget_does_not_reach_keeps_its_pages_and_waits():
    serving = Serving(ROOMY, policy="shortest_first")
    serving.submit(ask(3, 9), ask(11, 1))
    assert serving.run(3) == [{0: 3, 1: 4}, {0: 0, 1: 7}, {0: 1}]
    assert serving.of("num_preemptions", 0) == 0


def test_the_head_of_the_line_is_not_overtaken_by_a_request_that_would_fit():
    serving = Serving(TIGHT)
    serving.submit(ask(5, 3), ask(6, 2), ask(1, 1))
    assert serving.run(5) == [{0: 5}, {0: 1}, {0: 1}, {1: 6}, {1: 1, 2: 1}]


def test_pages_that_a_prompt_begun_still_needs_are_not_given_to_a_newcomer():
    serving = Serving(TIGHT)
    serving.submit(ask(7, 1), ask(2, 1))
    assert serving.run(1) == [{0: 6}]
    assert serving.seen["num_free"] == 2
    assert serving.run(2) == [{0: 1}, {1: 2}]


WITH_HEADROOM = dataclasses.replace(TIGHT, headroom_pages=1)


def test_headroom_keeps_out_a_request_that_would_soon_be_preempted():
    serving, hasty = Serving(WITH_HEADROOM), Serving(TIGHT)
    for one in (serving, hasty):
        one.submit(ask(2, 4), ask(2, 4), ask(2, 4))
    # Three pages each, of 8: the third would be let in without headroom, and out again.
    assert serving.run(2) == [{0: 2, 1: 2}, {0: 1, 1: 1}]
    assert hasty.run(2) == [{0: 2, 1: 2, 2: 2}, {0: 1, 1: 1}]
    assert (serving.of("num_preemptions", 2), hasty.of("num_preemptions", 2)) == (0, 1)


def test_headroom_is_not_kept_for_a_request_that_cannot_need_it():
    serving = Serving(dataclasses.replace(WITH_HEADROOM, num_pages=6))
    serving.submit(ask(3, 1), ask(3, 1))  # each ends with its first token, which is never computed
    assert serving.run(1) == [{0: 3, 1: 3}]


def test_headroom_never_keeps_out_a_request_that_is_alone():
    serving = Serving(dataclasses.replace(TIGHT, headroom_pages=8))
    serving.submit(ask(4, 4), ask(2, 1))
    assert serving.run(1) == [{0: 4}]
    serving.finish()
    assert (serving.reason(0), serving.reason(1)) == ("length", "length")


def test_a_long_prompt_is_computed_in_parts_and_samples_at_its_last():
    serving = Serving(ROOMY)
    serving.submit(ask(10, 2), ask(5, 2))
    assert serving.run(1) == [{0: 7}]
    assert not serving.seen["plan"].samples.any()
    assert serving.run(1) == [{0: 3, 1: 4}]
    assert serving.seen["plan"].samples.tolist() == [True, False, False, False]


def test_an_error_of_one_row_ends_that_row_alone():
    serving, twin = Serving(ROOMY), Serving(ROOMY)
    fine = (ask(3, 5), ask(2, 4))
    serving.submit(fine[0], ask(1, 4, fails_at=2), fine[1])
    twin.submit(fine[0], ask(1, 4), fine[1])
    for _ in range(6):
        serving.step()
        twin.step()
        others = {n: count for n, count in serving.planned().items() if n != 1}
        assert others == {n: count for n, count in twin.planned().items() if n != 1}
        for number in (0, 2):
            for name in ("tokens", "logprobs", "num_tokens", "phases", "finish_reasons"):
                same = serving.of(name, number) == twin.of(name, number)
                assert np.all(same), name
    assert (serving.tokens(1), serving.reason(1)) == ([10, 1, 1], "error")
    assert (twin.tokens(1), twin.reason(1)) == ([10, 1, 1, 1, 1], "length")


def test_an_error_at_the_first_token_gives_no_first_step():
    serving = Serving(ROOMY)
    serving.submit(ask(2, 3, fails_at=0))
    serving.finish()
    assert (serving.tokens(0), serving.reason(0)) == ([10, 11], "error")
    assert (serving.of("first_steps", 0), serving.of("final_steps", 0)) == (-1, 0)


@pytest.mark.parametrize(
    ("request_", "tokens", "reason"),
    [
        pytest.param(Ask((5,), (1, 7, 3)), [5, 1, 7], "stop", id="the first of two EOS"),
        pytest.param(Ask((5,), (1, 8, 3)), [5, 1, 8], "stop", id="the second of two EOS"),
        pytest.param(Ask((5, 7), (1, 2)), [5, 7, 1, 2], "length", id="EOS in the prompt"),
        pytest.param(Ask((5,), (1, 7)), [5, 1, 7], "stop", id="EOS at the limit"),
        pytest.param(Ask((5,), (1,)), [5, 1], "length", id="one token"),
    ],
)
def test_a_request_ends_at_an_eos_token_or_at_its_limit(request_, tokens, reason):
    serving = Serving(ROOMY)
    serving.submit(request_)
    serving.finish()
    assert (serving.tokens(0), serving.reason(0)) == (tokens, reason)
    assert serving.of("final_steps", 0) == len(tokens) - len(request_.prompt) - 1


def test_a_request_with_ignore_eos_runs_to_its_limit_and_its_neighbour_stops():
    serving = Serving(ROOMY)
    serving.submit(Ask((5,), (7, 8, 7, 1), ignore_eos=True), Ask((5,), (7, 8, 7, 1)))
    serving.finish()
    assert (serving.tokens(0), serving.reason(0)) == ([5, 7, 8, 7, 1], "length")
    assert (serving.tokens(1), serving.reason(1)) == ([5, 7], "stop")


@pytest.mark.parametrize(
    ("policy", "plans"),
    [
        ("fcfs", [{0: 7}, {0: 4, 1: 1}]),
        ("shortest_first", [{1: 1, 0: 6}, {1: 1, 0: 5}]),
        ("decode_first", [{1: 1, 0: 6}, {1: 1, 0: 5}]),
        ("priority", [{1: 1, 0: 6}, {1: 1, 0: 5}]),
    ],
)
def test_the_policy_decides_whether_a_long_prompt_delays_its_neighbour(policy, plans):
    serving = Serving(ROOMY, policy=policy)
    serving.submit(ask(11, 1), dataclasses.replace(ask(1, 5), priority=1))
    assert serving.run(2) == plans


@pytest.mark.parametrize(("later_by", "goes_first"), [(1, True), (63, True), (64, False)])
def test_a_level_of_priority_goes_before_those_that_came_just_before(later_by, goes_first):
    serving = Serving(ROOMY, policy="priority")
    shape = (later_by + 1, ROOMY.max_seq_len)  # outputs are by arrival
    serving.outputs, serving.fails = np.zeros(shape, np.int32), np.zeros(shape, bool)
    serving.submit(ask(11, 1))
    serving.num_submitted = later_by
    serving.submit(dataclasses.replace(ask(11, 1), priority=1))
    first = later_by if goes_first else 0
    assert serving.run(1)[0][first] == ROOMY.token_budget


@pytest.mark.parametrize(("policy", "victim"), [("fcfs", 1), ("shortest_first", 0)])
def test_the_last_in_the_policys_order_is_preempted(policy, victim):
    serving = Serving(TIGHT, policy=policy)
    serving.submit(ask(3, 5), ask(3, 3))
    serving.run(3)
    assert serving.phase(victim) == "preempted"
    assert serving.phase(1 - victim) == "running" or serving.reason(1 - victim) == "length"


@pytest.mark.parametrize(
    ("allocator", "num_at_once"), [("paged", 4), ("oracle", 4), ("pow2", 4), ("max", 2)]
)
def test_reserving_the_most_lets_fewer_run_at_once(allocator, num_at_once):
    serving = Serving(dataclasses.replace(SMALL, num_pages=16), allocator)
    serving.submit(*[ask(1, 4) for _ in range(4)])
    assert len(serving.run(1)[0]) == num_at_once
    serving.finish()
    assert [serving.of("num_preemptions", number) for number in range(4)] == [0] * 4


def test_a_row_used_again_holds_nothing_of_the_request_before():
    serving = Serving(TIGHT)
    serving.submit(ask(4, 4))
    serving.finish()
    serving.forget(0)
    assert not np.asarray(serving.state.unfinished).any()
    serving.submit(ask(1, 2, fails_at=0))
    assert serving.rows[1] == 0
    assert (serving.tokens(1), serving.reason(1), serving.phase(1)) == ([10], "", "waiting")
    assert (serving.of("first_steps", 1), serving.of("final_steps", 1)) == (-1, -1)
    serving.finish()
    assert serving.of("tokens", 1).tolist() == [10] + [0] * 7
    assert serving.of("logprobs", 1).tolist() == [0.0] * 8
