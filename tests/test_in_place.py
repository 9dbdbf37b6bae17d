"""The scheduler's loops change their arrays in place: XLA copies none of the pool's size."""

import re
from collections import Counter
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jaxpage.config import EngineConfig
from jaxpage.paging import priority_queue
from jaxpage.paging.allocator import ALLOCATORS, CACHED, WHOLE_CACHED
from jaxpage.scheduling import state as scheduler_state
from jaxpage.scheduling.policies import fcfs
from jaxpage.scheduling.state import SchedulerState
from jaxpage.scheduling.step import Outcome, commit_step, plan_step

NUM_SLOTS, NUM_PAGES, PAGES_PER_SLOT = 32, 7919, 61  # numbers that nothing else has
CONFIG = EngineConfig(
    num_slots=NUM_SLOTS,
    num_pages=NUM_PAGES,
    page_size=4,
    pages_per_slot=PAGES_PER_SLOT,
    num_requests=64,
    token_buckets=(64,),
)


def copies_by_shape(allocator, config=CONFIG) -> Counter:
    """How often the compiled loop over steps copies an array, by its shape."""
    drawn = Outcome(
        tokens=jnp.zeros((NUM_SLOTS,), jnp.int32),
        logprobs=jnp.zeros((NUM_SLOTS,), jnp.float32),
        failed=jnp.zeros((NUM_SLOTS,), jnp.bool_),
    )

    def step(state):
        state, plan = plan_step(state, config, allocator, fcfs)
        return commit_step(state, plan, drawn, allocator, eos_ids=(2,))

    @partial(jax.jit, donate_argnums=0)
    def steps(state: SchedulerState, limit):
        return jax.lax.while_loop(lambda state: state.step < limit, step, state)

    state = scheduler_state.create(config, allocator)
    compiled = steps.lower(state, jnp.int32(3)).compile().as_text() or ""
    return Counter(re.findall(r"= \w+\[([\d,]*)\]\S* copy\(", compiled))


def shapes_of(queue: priority_queue.PriorityQueue) -> list[str]:
    return [",".join(map(str, level.shape)) for level in queue.levels]


@pytest.mark.in_ci("lru")
@pytest.mark.parametrize(
    "allocator",
    [ALLOCATORS["paged"], CACHED["lru"], WHOLE_CACHED["lru"]],
    ids=["paged", "lru", "whole"],
)
def test_pages_that_move_copy_no_array_of_a_tiers_size(allocator):
    config = replace(CONFIG, preemption="fine", host_pages=6007)
    copies = copies_by_shape(allocator, config)
    queue = priority_queue.create(NUM_PAGES + 6007, num_queues=2)
    for shape in ("6007", str(NUM_PAGES + 6007), *shapes_of(queue)):
        assert copies[shape] == 0
    assert copies[str(NUM_PAGES)] <= 2


@pytest.mark.in_ci("paged")
@pytest.mark.parametrize("name", ["paged", "lru", "lfu"])
def test_no_step_copies_an_array_of_the_pools_or_the_tables_size(name):
    copies = copies_by_shape((ALLOCATORS | CACHED)[name])
    assert copies  # the pattern finds copies
    queue = priority_queue.create(NUM_PAGES)
    for shape in (f"{NUM_SLOTS},{PAGES_PER_SLOT}", *shapes_of(queue)):
        assert copies[shape] == 0
    # Two in the branch for shared pages that are too few, which looks through the pool anyway.
    assert copies[str(NUM_PAGES)] <= 2
