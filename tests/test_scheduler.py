"""`plan_step` and `commit_step` against an oracle in plain Python, over random workloads."""

import dataclasses

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from scheduler_oracle import Ask, PagedMemory, Planned, ReservedMemory, SchedulerOracle
from scripted_serving import (
    EOS_IDS,
    MOST_REQUESTS,
    MOST_STEPS,
    PHASES,
    POOLS,
    SMALL,
    TIGHT,
    Serving,
    every_allocator,
    every_policy,
    invariant,
    invariant_or_not,
    logprob_at,
)

from jaxpage.config import EngineConfig
from jaxpage.scheduling.state import FINISH_REASONS


def asks(config: EngineConfig, long: bool, policy: str):
    """Requests that fit a slot and, alone, the pool; some stop, some fail, some ignore EOS.

    The `long` ones never stop, and most end where a slot does.
    """
    longest = min(config.max_seq_len, config.num_pages * config.page_size)

    def make(prompt_len, outputs, ignore_eos, fails_at, gap_steps, priority):
        prompt = (EOS_IDS[0], *(100 + i for i in range(prompt_len - 1)))
        outputs = outputs[: longest - prompt_len]
        return Ask(prompt, tuple(outputs), ignore_eos, fails_at, gap_steps, priority)

    token = st.sampled_from((1, 2, 3, 4, 5, 6, *(() if long else EOS_IDS)))
    return st.builds(
        make,
        st.integers(1, longest - 1),
        st.lists(token, min_size=longest if long else 1, max_size=longest),
        st.booleans(),
        st.sampled_from((None, None, None, 0, 1, 3)),
        st.integers(0, 2),
        st.sampled_from((0, 0, 1, -2)) if policy == "priority" else st.just(0),
    )


def oracle_for(config: EngineConfig, allocator: str, policy: str) -> SchedulerOracle:
    shape = (config.num_slots, config.pages_per_slot, config.num_pages, config.page_size)
    return SchedulerOracle(
        num_slots=config.num_slots,
        budget=config.token_budget,
        policy=policy,
        batch_invariant=config.batch_invariant,
        eos_ids=EOS_IDS,
        headroom=config.headroom_pages * config.page_size,
        memory=PagedMemory(shape) if allocator == "paged" else ReservedMemory(shape, allocator),
    )


def assert_same(serving: Serving, oracle: SchedulerOracle, planned: Planned) -> None:
    """The plan, every request that is held, and every slot."""
    seen, plan, nobody = serving.seen, serving.seen["plan"], serving.config.num_requests
    rows = [nobody if a is None else serving.rows[a] for a in planned.arrivals]
    assert plan.requests.tolist() == rows
    assert plan.counts.tolist() == planned.counts
    assert plan.samples.tolist() == planned.samples
    assert plan.lengths.tolist() == planned.lengths
    assert plan.page_indices.tolist() == planned.page_indices
    assert int(plan.num_preempted) == planned.num_preempted

    held = [oracle.in_slot(slot) for slot in range(oracle.num_slots)]
    assert seen["slots"].tolist() == [serving.rows[s.arrival] if s else nobody for s in held]
    assert seen["lengths"].tolist() == [s.computed if s else 0 for s in held]
    assert seen["page_indices"].tolist() == oracle.memory.table.page_indices()
    assert int(seen["step"]) == oracle.step
    for number, row in serving.rows.items():
        sequence = oracle.sequences[number]
        is_ = jax.tree.map(lambda leaf, row=row: leaf[row], seen["requests"])
        length = int(is_.num_tokens)
        assert PHASES[is_.phases] == sequence.phase
        assert is_.tokens[:length].tolist() == sequence.tokens
        assert FINISH_REASONS[is_.finish_reasons] == sequence.reason
        assert is_.num_preemptions == sequence.num_preemptions
        assert (is_.first_steps, is_.final_steps) == (sequence.first_step, sequence.final_step)
        positions = np.arange(sequence.prompt_len, length)
        drawn = is_.logprobs[sequence.prompt_len : length]
        assert drawn.tolist() == logprob_at(number, positions).tolist()


def assert_sound(
    serving: Serving, oracle: SchedulerOracle, policy: str, ran_before: set[int]
) -> set[str]:
    """What holds in any step, whatever the oracle says; returns what was met."""
    config, plan, counts = serving.config, serving.seen["plan"], serving.planned()
    assert 0 < int(plan.num_tokens) <= config.token_budget  # somebody always gets on
    named = plan.page_indices[plan.page_indices < config.num_pages]
    assert len(set(named.tolist())) == len(named)
    open_ = [s for s in oracle.sequences if s.final_step in (-1, oracle.step - 1)]  # at its start
    if policy == "fcfs":
        assert counts.get(open_[0].arrival, 0) > 0  # the oldest always gets on: nobody starves
    if plan.num_preempted:
        assert set(counts) < ran_before  # nobody is admitted
    if config.batch_invariant:
        assert 0 not in counts.values()  # who once was admitted is never short of budget

    record = serving.seen["record"]
    done = (record.num_tokens, record.num_sampled, record.num_preempted)
    assert done == (plan.num_tokens, np.sum(plan.samples), plan.num_preempted)
    assert (record.num_running, record.num_waiting) == (len(counts), len(open_) - len(counts))
    shares = (record.token_states, record.reservation, record.internal, record.external)
    assert min(shares) >= 0
    assert sum(shares) + record.idle + record.cached == config.num_pages * config.page_size

    met = {oracle.sequences[number].reason for number in counts}
    met |= {"preempted"} if plan.num_preempted else set()
    met |= {"starved of budget"} if 0 in counts.values() else set()
    met |= {"part of a prompt"} if np.any((plan.counts > 0) & ~plan.samples) else set()
    has_room = len(counts) < config.num_slots and plan.num_tokens < config.token_budget
    if has_room and record.num_waiting > 0 and not plan.num_preempted:
        met.add("short of memory")
    return met


def run_on_both(config: EngineConfig, allocator: str, policy: str, workload: list[Ask]) -> set[str]:
    """Serves a workload to its end; returns what was met on the way."""
    serving, oracle = Serving(config, allocator, policy), oracle_for(config, allocator, policy)
    pending, due, met = list(workload), 0, set()
    for now in range(MOST_STEPS):
        while pending and serving.has_room and due + pending[0].gap_steps <= now:
            due += pending[0].gap_steps
            ask = pending.pop(0)
            serving.submit(ask)
            oracle.submit(ask)
        if serving.rows:
            ran_before = {s.arrival for s in oracle.in_phase("running")}
            serving.step()
            planned = oracle.plan()
            oracle.commit()
            assert_same(serving, oracle, planned)
            met |= assert_sound(serving, oracle, policy, ran_before)
            check_chunks(serving, workload)
        elif not pending:
            break
        for number in list(serving.rows):
            ask = workload[number]
            tokens = serving.seen["requests"].tokens[serving.rows[number]]
            known = serving.seen["requests"].num_tokens[serving.rows[number]]
            answer, reason = ask.answer(EOS_IDS)
            assert tokens[:known].tolist() == answer[:known]  # preempted or not
            if oracle.sequences[number].phase == "done":
                assert (tokens[:known].tolist(), serving.reason(number)) == (answer, reason)
                serving.forget(number)
    assert not serving.rows and not pending, "requests never end"
    assert int(serving.seen["num_free"]) == config.num_pages
    return met


def check_chunks(serving: Serving, workload: list[Ask]) -> None:
    """With `batch_invariant` the tokens of a step start and end where they would alone."""
    config, plan = serving.config, serving.seen["plan"]
    if not config.batch_invariant:
        return
    chunk = config.token_budget // 2
    row_of = {row: number for number, row in serving.rows.items()}
    for row, count, end in zip(plan.requests, plan.counts, plan.lengths, strict=True):
        if count == 0:
            continue
        prompt_len, start = len(workload[row_of[int(row)]].prompt), int(end - count)
        if start >= prompt_len:
            assert count == 1
        else:
            assert start % chunk == 0 and end == min(start + chunk, prompt_len)


def check_random_workloads(
    config: EngineConfig, allocator: str, policy: str, long: bool = False, **how
) -> set[str]:
    met: set[str] = set()
    workloads = st.lists(asks(config, long, policy), min_size=1, max_size=MOST_REQUESTS)

    @settings(deadline=None, **how)
    @given(workload=workloads)
    def check(workload):
        met.update(run_on_both(config, allocator, policy, workload))

    check()
    return met


@invariant_or_not
@every_policy
@every_allocator
def test_random_workloads_run_as_in_the_oracle_and_all_end(allocator, policy, batch_invariant):
    config = dataclasses.replace(SMALL, num_pages=POOLS[allocator])
    config = invariant(config) if batch_invariant else config
    met = check_random_workloads(config, allocator, policy, max_examples=15, derandomize=True)
    assert met >= {"stop", "length", "error", "part of a prompt", "short of memory"}
    assert ("preempted" in met) == (allocator == "paged")


@every_policy
@pytest.mark.parametrize("headroom_pages", (1, 3))
def test_random_workloads_with_headroom_run_as_in_the_oracle(headroom_pages, policy):
    config = dataclasses.replace(TIGHT, headroom_pages=headroom_pages)
    met = check_random_workloads(
        config, "paged", policy, long=True, max_examples=15, derandomize=True
    )
    assert met >= {"length", "preempted", "short of memory"}


@pytest.mark.slow
@invariant_or_not
@every_policy
@every_allocator
@pytest.mark.parametrize(("page_size", "headroom_pages"), [(1, 2), (3, 0), (3, 1)])
def test_many_random_workloads_run_as_in_the_oracle(
    allocator, policy, batch_invariant, page_size, headroom_pages
):
    config = EngineConfig(
        num_slots=5,
        num_pages=9 if allocator == "paged" else 32,
        page_size=page_size,
        pages_per_slot=9,
        num_requests=7,
        token_buckets=(5,),
        headroom_pages=headroom_pages,
        batch_invariant=batch_invariant,
    )
    is_paged = allocator == "paged"
    met = check_random_workloads(config, allocator, policy, long=is_paged, max_examples=150)
    if not is_paged:
        assert "preempted" not in met
    elif headroom_pages == 0:  # headroom is there to make it rare
        assert "preempted" in met
