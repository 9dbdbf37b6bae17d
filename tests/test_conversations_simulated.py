"""Turns of a conversation in the simulator: who follows whom, when, and what is found cached."""

import heapq
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpage.config import ConfigError, EngineConfig
from jaxpage.paging import priority_queue
from jaxpage.paging.allocator import ALLOCATORS, CACHED
from jaxpage.scheduling.policies import POLICIES
from jaxpage.sim import cost_model, runs, synthetic
from jaxpage.sim import trace as traces
from jaxpage.sim.device import DEVICES
from jaxpage.sim.lengths import RecordedTurn, rounds_of
from jaxpage.sim.shapes import SHAPES
from jaxpage.sim.synthetic import Level
from jaxpage.sim.trace import Arrival

CONFIG = EngineConfig(
    num_slots=4,
    num_pages=64,
    page_size=4,
    pages_per_slot=16,
    num_requests=8,
    token_buckets=(32,),
    log_steps=16,
)
COST = cost_model.create(SHAPES["opt-13b"], DEVICES["a100-40gb"], page_size=4)


def simulated(requests, allocator=ALLOCATORS["paged"], config=CONFIG, **options) -> runs.Run:
    return runs.run(requests, COST, config, allocator, POLICIES["fcfs"], **options)


def talks(num: int, turns: int, gap_s: float = 0.01) -> list[Arrival]:
    dialogues = [[(3 + i % 3, 4)] * turns for i in range(num)]
    return synthetic.multi_turn(
        dialogues, gap_s * np.arange(num), [0.5 + 0.1 * i for i in range(99)]
    )


@pytest.mark.slow
def test_a_turn_comes_when_the_one_before_is_done_and_its_user_has_thought():
    requests = talks(3, 3)
    timeline = simulated(requests).timeline
    for number, request in enumerate(requests):
        if request.follows is None:
            assert timeline.arrival_s[number] == request.arrival_s
        else:
            due_s = timeline.finish_s[request.follows] + request.arrival_s
            assert timeline.arrival_s[number] == due_s
        # Nobody else is there: who comes is in the next step.
        assert 0 < timeline.first_token_latency_s[number] < 0.1


def test_a_turn_finds_all_full_pages_of_the_one_before():
    run = simulated(talks(2, 4), CACHED["lru"])
    # 3 + 4 tokens a turn for one, 4 + 4 for the other: all but the last token were computed.
    known = np.array([[0, 7, 14, 21], [0, 8, 16, 24]]) - 1
    np.testing.assert_array_equal(run.cached_lens, np.maximum(known // 4 * 4, 0).ravel())
    assert simulated(talks(2, 4)).cached_lens.max() == 0


@pytest.mark.slow
def test_conversations_do_not_find_each_other():
    alike = synthetic.multi_turn([[(9, 4), (2, 2)], [(9, 4), (2, 2)]], [0.0, 5.0], [1.0, 1.0])
    run = simulated(alike, CACHED["lru"])
    np.testing.assert_array_equal(run.cached_lens, [0, 12, 0, 12])


@pytest.mark.slow
def test_content_of_a_first_turn_is_that_of_all_that_follow():
    opens = replace(talks(1, 1)[0], prompt_len=8, content=(5, 6))
    requests = [opens, Arrival(1.0, 14, 3, follows=0), Arrival(9.0, 13, 3, content=(5, 6, 7))]
    run = simulated(requests, CACHED["lru"], tokens_each=4)
    np.testing.assert_array_equal(run.cached_lens, [0, 8, 8])


@pytest.mark.slow
def test_runs_of_decode_steps_do_not_pass_by_a_turn_that_is_due():
    """All is equal to the bit to what steps taken one a call of the loop give."""
    requests = talks(6, 3, gap_s=0.02)
    together = simulated(requests).timeline
    singly = simulated(requests, config=replace(CONFIG, log_steps=1)).timeline
    for name in ("arrival_s", "first_token_s", "finish_s"):
        np.testing.assert_array_equal(getattr(together, name), getattr(singly, name))


@pytest.mark.slow
def test_turns_wait_for_rows_like_everyone_and_samples_come_together():
    requests = talks(4, 2, gap_s=0.0)
    # Three of four rows are asked for at once, while turns come due.
    requests.append(Arrival(0.6, 5, 6, num_samples=3))
    run = simulated(requests, config=replace(CONFIG, num_requests=4))
    assert not np.isnan(run.timeline.finish_s).any()
    assert run.steps["num_sampled"].sum() == 8 * 4 + 3 * 6


def test_the_last_turn_may_be_all_that_is_left():
    run = simulated(synthetic.multi_turn([[(3, 2)] * 5], [0.0], [100.0] * 4))
    assert 400 < run.timeline.finish_s[-1] < 401


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ([Arrival(0, 4, 2, follows=0)], "request 0: follows=0 must be the number of an earlier"),
        ([Arrival(0, 4, 2), Arrival(0, 8, 2, follows=-1)], "request 1: follows=-1 must be"),
        (
            [Arrival(0, 4, 2), Arrival(0, 8, 2, follows=0), Arrival(0, 8, 2, follows=0)],
            "request 2: follows=0 must be .* no other follows",
        ),
        ([Arrival(0, 4, 2), Arrival(0, 6, 2, follows=0)], "prompt_len=6 must be more than the 6"),
        ([Arrival(0, 4, 2, num_samples=2), Arrival(0, 9, 2, follows=0)], "one sequence each"),
        ([Arrival(0, 4, 2), Arrival(0, 9, 2, content=(1,), follows=0)], "only the first has conte"),
        ([Arrival(5, 4, 2), Arrival(1, 9, 2, follows=0), Arrival(4, 4, 2)], "request 2 arrives"),
    ],
)
def test_a_conversation_that_cannot_be_is_refused(wrong, words):
    with pytest.raises(ConfigError, match=words):
        traces.create(wrong, CONFIG, ALLOCATORS["paged"])


def test_dialogues_are_rounds_one_after_the_other_as_far_as_they_fit():
    said = [(0, True, 9), (0, False, 4), (0, True, 2), (0, True, 3), (0, False, 3), (0, True, 5)]
    said += [(1, False, 7), (1, True, 5), (1, False, 6), (2, True, 8)]
    turns = [
        RecordedTurn(conversation, number, is_human, tokens)
        for number, (conversation, is_human, tokens) in enumerate(said)
    ]
    rounds = rounds_of(turns, bos=1)
    # What opens the second one is said before its first answer, and so is what nobody answered.
    assert synthetic.dialogues_of(rounds, 100) == [[(10, 4), (5, 3)], [(13, 6)]]
    assert synthetic.dialogues_of(rounds, 21) == [[(10, 4)], [(13, 6)]]
    assert synthetic.dialogues_of(rounds, 14) == [[(10, 4)]]
    assert synthetic.dialogues_of(rounds, 13) == []


@pytest.mark.slow
def test_prompts_begin_alike_as_far_as_their_paths_agree():
    plain = [Arrival(float(i), 3, 2) for i in range(40)]
    rng = np.random.default_rng(0)
    found = synthetic.with_prefixes(rng, plain, [Level(2, 8), Level(3, 4)], tokens_each=4)
    assert {request.prompt_len for request in found} == {15}
    contents = {request.content for request in found}
    assert len(contents) == 6 and len({content[:2] for content in contents}) == 2
    # A number stands for one place of one node.
    assert len({number for content in contents for number in content}) == 2 * 2 + 6
    run = simulated(found, CACHED["lru"], tokens_each=4)
    firsts = {content: i for i, content in reversed(list(enumerate(r.content for r in found)))}
    later = [i for i, request in enumerate(found) if firsts[request.content] < i]
    np.testing.assert_array_equal(run.cached_lens[later], 12)
    for wrong in (Level(2, 6), Level(0, 4), Level(2, 0)):
        with pytest.raises(ConfigError, match="a multiple of 4"):
            synthetic.with_prefixes(rng, plain, [wrong], tokens_each=4)
    with pytest.raises(ConfigError, match="nothing in common yet"):
        synthetic.with_prefixes(rng, found, [Level(2, 8)], tokens_each=4)


PUT = jax.jit(priority_queue.put)
FIRST = jax.jit(lambda queue: (priority_queue.first(queue), priority_queue.first_key(queue)))


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 1200), st.none() | st.tuples(st.integers(0, 3), st.integers(0, 3))
        ),
        min_size=1,
        max_size=60,
    )
)
def test_the_lowest_of_a_priority_queue_is_that_of_a_heap(changes):
    queue, known = priority_queue.create(1201), {}  # four levels
    for item, key in changes:
        known[item] = key
        pair = (priority_queue.NEVER,) * 2 if key is None else key
        queue = PUT(queue, 0, jnp.int32(item), jnp.array(pair, jnp.int32))
        heap = [key for key in known.values() if key is not None]
        heapq.heapify(heap)
        first, first_key = FIRST(queue)
        if heap:
            assert tuple(first_key.tolist()) == heap[0]
            assert int(first) == min(item for item, key in known.items() if key == heap[0])
        else:
            assert int(first_key[0]) == priority_queue.NEVER
