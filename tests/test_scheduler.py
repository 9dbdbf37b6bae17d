"""`plan_step` and `commit_step` against an oracle in plain Python, and the paper's rules by name.

No model is needed: the executor draws from a script, by request and position.
"""

import dataclasses
import functools
from collections.abc import Callable

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax import lax
from scheduler_oracle import Ask, PagedMemory, Planned, ReservedMemory, SchedulerOracle

from jaxpage.config import EngineConfig
from jaxpage.paging.allocator import ALLOCATORS
from jaxpage.scheduling import state as scheduler_state
from jaxpage.scheduling.accounting import record_step
from jaxpage.scheduling.policies import POLICIES
from jaxpage.scheduling.state import FINISH_REASONS, Sampling, waiting_request
from jaxpage.scheduling.step import Outcome, commit_step, plan_step

EOS_IDS = (7, 8)
PHASES = ("free", "waiting", "preempted", "running", "done")
MOST_REQUESTS = 8  # of one workload
MOST_STEPS = 400

SMALL = EngineConfig(
    num_slots=4, num_pages=9, page_size=2, pages_per_slot=6, num_requests=5, token_buckets=(4, 7)
)
POOLS = {"paged": 9, "oracle": 16, "pow2": 16, "max": 16}  # of SMALL; 8 pages are one "max" run
ROOMY = dataclasses.replace(SMALL, num_pages=24)  # only tokens and slots are scarce
TIGHT = EngineConfig(
    num_slots=3, num_pages=8, page_size=1, pages_per_slot=8, num_requests=6, token_buckets=(6,)
)


def preempted_first(requests, computed):
    """Not one of ours: requests that lost their pages go before all others."""
    del computed
    return -requests.num_preemptions


CHOICES = POLICIES | {"preempted_first": preempted_first}

every_allocator = pytest.mark.parametrize("allocator", ALLOCATORS)
every_policy = pytest.mark.parametrize("policy", POLICIES)
invariant_or_not = pytest.mark.parametrize("batch_invariant", (False, True))

submit = jax.jit(scheduler_state.submit)
forget = jax.jit(scheduler_state.forget)


def invariant(config: EngineConfig) -> EngineConfig:
    return dataclasses.replace(
        config, batch_invariant=True, token_buckets=config.token_buckets[-1:]
    )


@functools.cache
def compile_step(config: EngineConfig, allocator_name: str) -> Callable:
    """One step around an executor that reads a script; the policy is chosen when it runs.

    What the executor gives for slots that sample nothing is made to hurt whoever reads it.
    """
    allocator = ALLOCATORS[allocator_name]

    def step(state, policy_index, outputs, fails):
        def policy(requests, computed):
            return lax.switch(policy_index, list(CHOICES.values()), requests, computed)

        planned, plan = plan_step(state, config, allocator, policy)
        requests = planned.requests
        arrival = requests.arrivals.at[plan.requests].get(mode="fill", fill_value=0)
        position = requests.num_tokens.at[plan.requests].get(mode="fill", fill_value=0)
        outcome = Outcome(
            tokens=jnp.where(plan.samples, outputs[arrival, position], EOS_IDS[0]),
            logprobs=jnp.where(plan.samples, logprob_at(arrival, position), jnp.nan),
            failed=fails[arrival, position] | ~plan.samples,
        )
        after = commit_step(planned, plan, outcome, allocator, EOS_IDS)
        violations = [jnp.sum(allocator.violations(s.table)) for s in (planned, after)]
        seen = {
            "plan": plan,
            "requests": after.requests,
            "slots": after.slots,
            "lengths": after.table.lengths,
            "page_indices": after.table.page_indices,
            "num_free": after.table.num_free,
            "step": after.step,
            "violations": jnp.stack(violations),
            "record": record_step(planned, plan),
        }
        return after, seen

    return jax.jit(step)


def logprob_at(number, position):
    """A log-probability that no other draw has."""
    return -(number * 100 + position) / 8


class Serving:
    """A scheduler with its queue and its pretended executor; requests are named by arrival."""

    def __init__(self, config: EngineConfig, allocator: str = "paged", policy: str = "fcfs"):
        self.config = config
        self.step_fn = compile_step(config, allocator)
        self.policy_index = np.int32(list(CHOICES).index(policy))
        self.state = scheduler_state.create(config, ALLOCATORS[allocator])
        self.outputs = np.zeros((MOST_REQUESTS, config.max_seq_len), np.int32)
        self.fails = np.zeros((MOST_REQUESTS, config.max_seq_len), bool)
        self.rows: dict[int, int] = {}  # of the queue, by arrival
        self.num_submitted = 0

    def submit(self, *asks: Ask) -> None:
        for ask in asks:
            number, self.num_submitted = self.num_submitted, self.num_submitted + 1
            for i, token in enumerate(ask.outputs):
                self.outputs[number, len(ask.prompt) + i] = token
                self.fails[number, len(ask.prompt) + i] = i == ask.fails_at
            row = min(set(range(self.config.num_requests)) - set(self.rows.values()))
            self.rows[number] = row
            request = waiting_request(
                ask.prompt,
                final_len=ask.final_len,
                max_len=self.config.max_seq_len,
                arrival=number,
                ignore_eos=ask.ignore_eos,
                sampling=Sampling(
                    temperature=jnp.float32(0),
                    top_k=jnp.int32(0),
                    top_p=jnp.float32(1),
                    repetition_penalty=jnp.float32(1),
                    seed=jnp.uint32(0),
                ),
            )
            self.state = submit(self.state, np.int32(row), request)

    @property
    def has_room(self) -> bool:
        return len(self.rows) < self.config.num_requests

    def forget(self, number: int) -> None:
        self.state = forget(self.state, np.int32(self.rows.pop(number)))

    def step(self) -> dict:
        self.state, seen = self.step_fn(self.state, self.policy_index, self.outputs, self.fails)
        self.seen = jax.tree.map(np.asarray, seen)
        assert self.seen["violations"].tolist() == [0, 0]
        return self.seen

    def planned(self) -> dict[int, int]:
        """Tokens of the last step by request, those that run and brought none included."""
        plan = self.seen["plan"]
        counts = zip(plan.requests.tolist(), plan.counts.tolist(), strict=True)
        number_of = {row: number for number, row in self.rows.items()}
        return {number_of[row]: count for row, count in counts if row in number_of}

    def run(self, num_steps: int) -> list[dict[int, int]]:
        """Makes steps and returns what each planned."""
        plans = []
        for _ in range(num_steps):
            self.step()
            plans.append(self.planned())
        return plans

    def finish(self) -> None:
        for _ in range(MOST_STEPS):
            if all(self.phase(number) == "done" for number in self.rows):
                return
            self.step()
        pytest.fail("the requests never end")

    def of(self, name: str, number: int):
        return np.asarray(getattr(self.state.requests, name))[self.rows[number]]

    def phase(self, number: int) -> str:
        return PHASES[self.of("phases", number)]

    def reason(self, number: int) -> str:
        return FINISH_REASONS[self.of("finish_reasons", number)]

    def tokens(self, number: int) -> list[int]:
        return self.of("tokens", number)[: self.of("num_tokens", number)].tolist()


# --- random workloads ----------------------------------------------------------------------------


def asks(config: EngineConfig):
    """Requests that fit a slot and, alone, the pool; some stop, some fail, some ignore EOS."""
    longest = min(config.max_seq_len, config.num_pages * config.page_size)

    def make(prompt_len, outputs, ignore_eos, fails_at, gap_steps):
        prompt = (EOS_IDS[0], *(100 + i for i in range(prompt_len - 1)))
        outputs = outputs[: longest - prompt_len]
        return Ask(prompt, tuple(outputs), ignore_eos, fails_at, gap_steps)

    token = st.sampled_from((1, 2, 3, 4, 5, 6, *EOS_IDS))
    return st.builds(
        make,
        st.integers(1, longest - 1),
        st.lists(token, min_size=1, max_size=longest),
        st.booleans(),
        st.sampled_from((None, None, None, 0, 1, 3)),
        st.integers(0, 2),
    )


def oracle_for(config: EngineConfig, allocator: str, policy: str) -> SchedulerOracle:
    shape = (config.num_slots, config.pages_per_slot, config.num_pages, config.page_size)
    return SchedulerOracle(
        num_slots=config.num_slots,
        budget=config.token_budget,
        policy=policy,
        batch_invariant=config.batch_invariant,
        eos_ids=EOS_IDS,
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
    assert sum(shares) + record.idle == config.num_pages * config.page_size

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


def check_random_workloads(config: EngineConfig, allocator: str, policy: str, **how) -> set[str]:
    met: set[str] = set()
    workloads = st.lists(asks(config), min_size=1, max_size=MOST_REQUESTS)

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


@pytest.mark.slow
@invariant_or_not
@every_policy
@every_allocator
@pytest.mark.parametrize("page_size", (1, 3))
def test_many_random_workloads_run_as_in_the_oracle(allocator, policy, batch_invariant, page_size):
    config = EngineConfig(
        num_slots=5,
        num_pages=11 if allocator == "paged" else 32,
        page_size=page_size,
        pages_per_slot=9,
        num_requests=7,
        token_buckets=(5,),
        batch_invariant=batch_invariant,
    )
    met = check_random_workloads(config, allocator, policy, max_examples=150)
    assert ("preempted" in met) == (allocator == "paged")


# --- the rules, by name --------------------------------------------------------------------------


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
    ],
)
def test_the_policy_decides_whether_a_long_prompt_delays_its_neighbour(policy, plans):
    serving = Serving(ROOMY, policy=policy)
    serving.submit(ask(11, 1), ask(1, 5))
    assert serving.run(2) == plans


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
