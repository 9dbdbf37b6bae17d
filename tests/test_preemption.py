"""Preemption by recompute, by whole sequences and by pages: who makes way, and no byte is lost.

A pretended executor keeps, in a real pool of one layer, which token of which request a slot holds,
and checks before it samples that every row finds all of its own.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_oracle import Ask
from scripted_serving import EOS_IDS, MOST_REQUESTS

from jaxpage.config import ConfigError, EngineConfig, Prices
from jaxpage.engine.step import move_pages
from jaxpage.paging import kv_pool
from jaxpage.paging.allocator import ALLOCATORS, CACHED, WHOLE_CACHED, Allocator
from jaxpage.paging.cache_state import PrefixCache
from jaxpage.paging.kv_pool import KvPool
from jaxpage.paging.tiers import Movable
from jaxpage.scheduling import state as scheduler_state
from jaxpage.scheduling.accounting import StepRecord, record_step
from jaxpage.scheduling.policies import POLICIES
from jaxpage.scheduling.state import DONE, Sampling, SchedulerState, waiting_request
from jaxpage.scheduling.step import Outcome, commit_step, plan_step


def looking_anew(allocator: Allocator) -> Allocator:
    """Which looks through the pool after each move for what may go next."""
    ops = allocator.tier
    assert ops is not None

    def movable(table, rows):
        now = ops.movable(table, rows).now
        return Movable(theirs=jnp.broadcast_to(rows[:, None], now.shape), now=now)

    def moved(table, entries, page):
        del page
        return movable(table, entries.theirs[:, 0])

    return replace(allocator, tier=ops._replace(movable=movable, moved=moved))


SHARED = {"paged": ALLOCATORS["paged"], "lru": CACHED["lru"], "whole": WHOLE_CACHED["lru"]}
ANEW = {f"{name}, looking anew": looking_anew(SHARED[name]) for name in ("paged", "lru")}
RECOMPUTE = EngineConfig(
    num_slots=4, num_pages=9, page_size=2, pages_per_slot=6, num_requests=8, token_buckets=(8,)
)
FINE = replace(RECOMPUTE, preemption="fine", host_pages=24)
MODES = {
    "recompute": RECOMPUTE,
    "swap": replace(FINE, preemption="swap"),
    "fine": FINE,
    "fine, a page a step": replace(FINE, transfer_budget=1),
    "fine, small host": replace(FINE, host_pages=2),
    "swap, small host": replace(FINE, preemption="swap", host_pages=3),
    # Fewer than 6 tokens are computed again, more are moved.
    "auto": replace(FINE, preemption="auto", prices=Prices(1.0, 0.3, 2.0)),
}
# What only a cache has on the host: pages that nobody holds.
CACHE_MODES = {
    "recompute, cache on the host": replace(RECOMPUTE, host_pages=5),
    "recompute, a page a step": replace(RECOMPUTE, host_pages=9, transfer_budget=1),
}
every_memory = pytest.mark.parametrize("allocator", ["lru", "paged"])
submit = jax.jit(scheduler_state.submit)


def empty_pool(num_pages: int, page_size: int) -> KvPool:
    shape = (1, num_pages, 1, page_size, 1)
    return KvPool(jnp.full(shape, -1.0, jnp.float32), jnp.full(shape, -1.0, jnp.float32))


@functools.cache
def compile_step(config: EngineConfig, allocator_name: str, policy: str = "fcfs"):
    allocator = (SHARED | ANEW)[allocator_name]
    N, S = config.max_seq_len, config.page_size

    @functools.partial(jax.jit, donate_argnames=("pool", "host"))
    def step(state, pool, host, outputs):
        planned, plan = plan_step(state, config, allocator, POLICIES[policy])
        requests, nobody = planned.requests, planned.requests.phases.shape[0]
        pool, host = move_pages(pool, host, plan, config)

        # What a token leaves in the pool depends on it and on its position.
        position = jnp.arange(N, dtype=jnp.int32)[None]
        row = jnp.minimum(plan.requests, nobody - 1)
        content = (requests.tokens[row] * 64 + position).astype(jnp.float32)
        is_new = (position >= (plan.lengths - plan.counts)[:, None]) & (
            position < plan.lengths[:, None]
        )
        pages = jnp.where(is_new, plan.page_indices[:, position[0] // S], config.num_pages)
        offsets = jnp.broadcast_to(position % S, pages.shape)
        flat = content.reshape(-1, 1, 1)
        pool = kv_pool.write(pool, 0, flat, flat, pages.reshape(-1), offsets.reshape(-1))
        found = pool.keys[0, :, 0, :, 0].at[plan.page_indices].get(mode="fill", fill_value=-2)
        wrong = found.reshape(content.shape) != content
        wrong &= (position < plan.lengths[:, None]) & (plan.counts > 0)[:, None]

        arrival = requests.arrivals[row]
        known = requests.num_tokens[row]
        outcome = Outcome(
            tokens=jnp.where(plan.samples, outputs[arrival, known], EOS_IDS[0]),
            logprobs=jnp.zeros(plan.counts.shape, jnp.float32),
            failed=~plan.samples,
        )
        after = commit_step(planned, plan, outcome, allocator, EOS_IDS)
        broken = [jnp.sum(allocator.violations(s.table)) for s in (planned, after)]
        record = record_step(planned, plan)
        return after, pool, host, (jnp.stack(broken), jnp.sum(wrong), plan, record)

    return step


class Serving:
    """A scheduler, its pool and its host pool; requests are named by arrival."""

    def __init__(self, config: EngineConfig, allocator: str):
        self.config, self.allocator = config, allocator
        self.step_fn = compile_step(config, allocator)
        self.state = scheduler_state.create(config, (SHARED | ANEW)[allocator])
        self.pool = empty_pool(config.num_pages, config.page_size)
        host = empty_pool(config.host_pages, config.page_size)
        self.host = jax.device_put(host, jax.memory.Space.Host)
        self.outputs = np.zeros((MOST_REQUESTS, config.max_seq_len + 1), np.int32)
        self.records: list[StepRecord] = []
        self.num_submitted = 0
        self.num_left_findable = 0  # full pages of rows that made way

    def submit(self, *asks: Ask) -> None:
        """Submits requests after those submitted before, which keep their rows."""
        for number, ask in enumerate(asks, start=self.num_submitted):
            start = len(ask.prompt)
            self.outputs[number, start : start + len(ask.outputs)] = ask.outputs
            request = waiting_request(
                ask.prompt,
                final_len=ask.final_len,
                reserved_len=0,
                max_len=self.config.max_seq_len,
                arrival=number,
                ignore_eos=ask.ignore_eos,
                group=number,
                sampling=Sampling(
                    jnp.float32(0), jnp.int32(0), jnp.float32(1), jnp.float32(1), jnp.uint32(0)
                ),
            )
            self.state = submit(self.state, np.int32(number), request)
        self.num_submitted += len(asks)

    def step(self):
        before = self.state
        self.state, self.pool, self.host, seen = self.step_fn(
            self.state, self.pool, self.host, self.outputs
        )
        broken, wrong, plan, record = jax.tree.map(np.asarray, seen)
        assert broken.tolist() == [0, 0]
        assert wrong == 0
        # A cached page that pages of the host follow goes there whatever the budget is.
        assert (
            "lru" in self.allocator
            or self.allocator == "whole"
            or plan.moves_out.count <= self.config.moves_at_most
        )
        assert plan.moves_in.count <= self.config.moves_at_most
        shares = ("token_states", "reservation", "internal", "external", "cached", "idle")
        pool = self.config.num_pages * self.config.page_size
        assert sum(int(getattr(record, name)) for name in shares) == pool
        assert min(int(getattr(record, name)) for name in shares) >= 0
        self.records.append(record)
        self._check_findable(before)
        return plan

    def _check_findable(self, before: SchedulerState) -> None:
        """All full pages of who makes way were in the index before, if there is one."""
        table = before.table
        if not isinstance(table, PrefixCache):
            return
        num_preemptions = np.asarray(self.state.requests.num_preemptions)
        lost = num_preemptions > np.asarray(before.requests.num_preemptions)
        made_way = np.append(lost, False)[before.slots]
        full = np.asarray(table.lengths)[made_way] // table.page_size
        assert np.asarray(table.num_indexed)[made_way].tolist() == full.tolist()
        self.num_left_findable += sum(full.tolist())

    def finish(self) -> None:
        for _ in range(500):
            if not bool(jnp.any(self.state.unfinished)):
                table = self.state.table
                assert int(table.tier.num_free + table.num_host_cached) == self.config.host_pages
                assert int(table.num_free + table.num_cached) == self.config.num_pages
                return
            self.step()
        pytest.fail("the requests never end")

    def total(self, name: str) -> int:
        return sum(int(getattr(record, name)) for record in self.records)


def check(serving: Serving, asks: list[Ask]) -> None:
    requests = jax.tree.map(np.asarray, serving.state.requests)
    for number, ask in enumerate(asks):
        tokens = requests.tokens[number, : requests.num_tokens[number]].tolist()
        assert requests.phases[number] == DONE
        assert tokens == ask.answer(EOS_IDS)[0]


def ask_of(prompt: list[int], outputs: list[int], ignore_eos: bool = True) -> Ask:
    return Ask(tuple(prompt), tuple(outputs), ignore_eos)


asks_of = st.builds(
    ask_of,
    st.lists(st.integers(0, 3), min_size=1, max_size=7),  # prompts that often begin alike
    st.lists(st.integers(0, 9), min_size=1, max_size=5),
    st.booleans(),
)


every_case = [
    *((mode, allocator) for mode in MODES for allocator in SHARED),
    *((mode, cache) for mode in CACHE_MODES for cache in ("lru", "whole")),
]


@pytest.mark.in_ci("fine-paged")
@pytest.mark.parametrize(("mode", "allocator"), every_case)
@given(workload=st.lists(asks_of, min_size=2, max_size=MOST_REQUESTS))
@settings(deadline=None, max_examples=25)
def test_whatever_makes_way_prints_what_it_would_have_printed(mode, allocator, workload):
    serving = Serving((MODES | CACHE_MODES)[mode], allocator)
    serving.submit(*workload)
    serving.finish()
    check(serving, workload)


@pytest.mark.slow
@pytest.mark.parametrize("allocator", ["lru", "paged"])
@pytest.mark.parametrize("mode", ["fine", "swap", "fine, small host"])
@given(workload=st.lists(asks_of, min_size=3, max_size=MOST_REQUESTS))
@settings(deadline=None, max_examples=25)
def test_what_may_go_next_is_what_a_look_through_the_pool_finds(mode, allocator, workload):
    serving, other = (
        Serving(MODES[mode], name) for name in (allocator, f"{allocator}, looking anew")
    )
    for each in (serving, other):
        each.submit(*workload)
    while bool(jnp.any(serving.state.unfinished)):
        jax.tree.map(np.testing.assert_array_equal, serving.step(), other.step())
        assert len(serving.records) < 500, "the requests never end"


# Three that grow past the pool's 9 pages together: 12 tokens each at their end.
GROWING = [ask_of([i] * 4, [i + 4] * 8) for i in range(3)]


def run(config: EngineConfig, allocator: str = "paged") -> Serving:
    serving = Serving(config, allocator)
    serving.submit(*GROWING)
    serving.finish()
    check(serving, GROWING)
    assert serving.total("num_preempted") > 0
    return serving


@pytest.mark.slow
@every_memory
def test_pages_that_come_back_are_not_computed_again(allocator):
    for mode in ("swap", "fine", "fine, a page a step"):
        serving = run(MODES[mode], allocator)
        assert serving.total("num_recomputed") == 0
        assert serving.total("moved_out") >= serving.total("moved_in") > 0
        # What ended leaves for the host as well, if it is cached.
        assert allocator == "lru" or serving.total("moved_out") == serving.total("moved_in")
        computed = serving.total("num_tokens")
        assert computed == sum(ask.final_len - 1 for ask in GROWING)


@pytest.mark.parametrize("mode", ["recompute", "fine"])
def test_who_makes_way_has_all_full_pages_in_the_index(mode):
    assert run(MODES[mode], "lru").num_left_findable > 0


def test_a_shared_prefix_that_has_been_away_is_found_and_shared_again():
    first = ask_of([0] * 4, list(range(9, 17)))
    alike = [ask_of([1] * 4, [2 + i] * 7) for i in range(3)]
    serving = Serving(replace(FINE, num_pages=7), "lru")
    serving.submit(first, *alike)
    was_away = False
    for _ in range(20):
        serving.step()
        seconds = np.asarray(serving.state.table.page_indices)[1:3, 1]
        was_away |= seconds[0] > 7 and len(set(seconds.tolist())) == 1
    serving.finish()
    check(serving, [first, *alike])
    assert was_away


@pytest.mark.slow
def test_a_prompt_whose_pages_went_to_the_host_waits_for_them_and_computes_only_its_end():
    config = replace(RECOMPUTE, host_pages=9)
    serving = Serving(config, "lru")
    first, other = ask_of([1] * 7, [5]), ask_of([2] * 7, [6] * 5)
    serving.submit(first)
    serving.finish()
    serving.submit(other, ask_of([3] * 7, [7] * 5))  # 12 tokens each: they need all 9 pages
    serving.finish()
    assert int(serving.state.table.num_host_cached) > 0
    before = serving.total("num_tokens")
    again = ask_of([1] * 7, [8])
    serving.submit(again)
    plans = [serving.step(), serving.step()]
    assert [int(plan.moves_in.count) for plan in plans] == [3, 0]
    assert [int(plan.num_tokens) for plan in plans] == [0, 1]
    serving.finish()
    assert serving.total("num_tokens") == before + 1
    check(serving, [first, other, ask_of([3] * 7, [7] * 5), again])


@pytest.mark.slow
def test_recompute_moves_nothing_and_computes_again_what_was_lost():
    serving = run(RECOMPUTE)
    assert serving.total("moved_out") == serving.total("moved_in") == 0
    extra = serving.total("num_tokens") - sum(ask.final_len - 1 for ask in GROWING)
    assert serving.total("num_recomputed") == extra > 0


@pytest.mark.slow
def test_no_step_moves_more_than_the_budget():
    slow = run(MODES["fine, a page a step"])
    assert max(int(record.moved_out) for record in slow.records) == 1


def test_pages_move_fewer_than_whole_sequences():
    swap, fine = run(MODES["swap"]), run(MODES["fine"])
    assert fine.total("moved_out") < swap.total("moved_out")
    assert max(int(record.moved_out) for record in swap.records) > 2
    assert max(int(record.moved_out) for record in fine.records) == 2  # two rows grow at once


def test_fine_takes_the_last_pages_of_the_last_sequence():
    serving = Serving(FINE, "paged")
    serving.submit(*GROWING)
    while True:
        before = np.asarray(serving.state.table.page_indices)
        plan = serving.step()
        if plan.moves_out.count:
            break
    assert plan.moves_out.count == 2
    after = np.asarray(serving.state.table.page_indices)
    last = int(np.asarray(serving.state.table.lengths)[2] - 1) // FINE.page_size
    lost = before[2, [last, last - 1]]
    assert plan.moves_out.sources[:2].tolist() == lost.tolist()  # nothing has moved before
    places = np.asarray(serving.state.table.tier.places)
    assert places[lost].tolist() == (FINE.num_pages + plan.moves_out.targets[:2]).tolist()
    assert (after[2, :last] == before[2, :last]).all()
    assert plan.counts.tolist() == [1, 1, 0, 0]


def records_of(serving: Serving) -> list[dict[str, int]]:
    return [{k: int(v) for k, v in record._asdict().items()} for record in serving.records]


@pytest.mark.slow
def test_auto_computes_again_what_is_cheap_to_compute_and_moves_what_is_cheap_to_move():
    computes, moves = (
        run(replace(MODES["auto"], prices=prices))
        for prices in (Prices(0.0, 0.0, 1.0), Prices(1.0, 1.0, 0.0))
    )
    assert records_of(computes) == records_of(run(RECOMPUTE))
    assert records_of(moves) == records_of(run(FINE))


def test_auto_weighs_each_request_by_its_length():
    # Together they grow past the pool, and the last makes way: of 5 tokens, or of 8 and more.
    long = [ask_of([i] * 4, [i + 4] * 8) for i in range(2)]
    for last, computes_again in (
        (ask_of([7] * 2, [8] * 9), True),
        (ask_of([7] * 8, [8] * 4), False),
    ):
        serving = Serving(replace(MODES["auto"], num_pages=11), "paged")
        serving.submit(*long, last)
        serving.finish()
        check(serving, [*long, last])
        assert serving.total("num_preempted") > 0
        assert (serving.total("num_recomputed") > 0) == computes_again
        assert (serving.total("moved_out") > 0) != computes_again


@pytest.mark.slow
def test_a_full_host_falls_back_to_recompute():
    serving = run(MODES["swap, small host"])
    assert serving.total("num_recomputed") > 0
    assert max(int(record.host_pages) for record in serving.records) <= 3


def test_modes_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="preemption='never'"):
        replace(RECOMPUTE, preemption="never")
    with pytest.raises(ConfigError, match="host_pages=0"):
        replace(RECOMPUTE, preemption="swap")
    with pytest.raises(ConfigError, match="host_pages=-4"):
        replace(RECOMPUTE, host_pages=-4)
    with pytest.raises(ConfigError, match="host_pages=4"):
        scheduler_state.create(replace(RECOMPUTE, host_pages=4), ALLOCATORS["paged"])
    with pytest.raises(ConfigError, match="transfer_budget=-1"):
        replace(FINE, transfer_budget=-1)
    with pytest.raises(ConfigError, match="transfer_budget=3"):
        replace(FINE, preemption="swap", transfer_budget=3)
    with pytest.raises(ConfigError, match="transfer_budget=3"):
        replace(RECOMPUTE, transfer_budget=3)
    with pytest.raises(ConfigError, match="allocator=max"):
        scheduler_state.create(FINE, ALLOCATORS["max"])
