"""One step of continuous batching, as two pure functions around an executor.

`plan_step` decides which tokens to compute: it splits the token budget, preempts if pages run out,
admits, and takes the pages. An executor carries the plan out and samples. `commit_step` appends the
samples and ends sequences. Neither touches a byte of KV.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxpage.config import EngineConfig
from jaxpage.paging import status
from jaxpage.paging.allocator import Allocator
from jaxpage.paging.page_table import num_pages_for
from jaxpage.scheduling.policies import PolicyFn
from jaxpage.scheduling.state import (
    DONE,
    ERROR,
    LENGTH,
    NOT_DONE,
    PREEMPTED,
    RUNNING,
    STOP,
    WAITING,
    Requests,
    SchedulerState,
)


class Plan(struct.PyTreeNode):
    """What a step computes: in slot `b`, the next `counts[b]` tokens of request `requests[b]`.

    `lengths` includes them, and `page_indices` holds their pages. Where `samples`, the last of
    them is the sequence's last known token, and its logits choose the next. Before anything is
    written, page `sources[b]` is copied to page `targets[b]`; where both are `P`, nothing is.
    """

    requests: jax.Array  # i32[B]; R for an empty slot
    counts: jax.Array  # i32[B], tokens
    samples: jax.Array  # bool[B]
    lengths: jax.Array  # i32[B], tokens
    page_indices: jax.Array  # i32[B, M]
    sources: jax.Array  # i32[B], pages
    targets: jax.Array  # i32[B], pages
    num_preempted: jax.Array  # i32[], sequences that lost their pages to make this step

    @property
    def num_tokens(self) -> jax.Array:
        """Tokens of the step, `i32[]`."""
        return jnp.sum(self.counts)


class Outcome(NamedTuple):
    """What an executor gives back, by slot; only rows where the plan samples are read."""

    tokens: jax.Array  # i32[B]
    logprobs: jax.Array  # f32[B]
    failed: jax.Array  # bool[B], the row's logits are not finite


def plan_step(
    state: SchedulerState, config: EngineConfig, allocator: Allocator, policy: PolicyFn
) -> tuple[SchedulerState, Plan]:
    """Chooses the tokens of the next step and takes their pages.

    Running sequences come first, in the policy's order. If pages run out, the last in that order
    are preempted: their pages go back and they will be computed again. Only then are
    requests admitted, the preempted before any new one (Kwon et al. 2023, section 4.5), and none
    in a step that preempted.
    """
    num_requests = state.requests.phases.shape[0]
    computed = jnp.zeros((num_requests,), jnp.int32)
    computed = computed.at[state.slots].set(state.table.lengths, mode="drop")
    ranks = policy(state.requests, computed)

    order = _slot_order(state, ranks)
    counts = _split_budget(state, order, config)
    fits = allocator.fitting(state.table, order, counts)
    victims = state.running & ~fits
    state = _preempt(state, victims, allocator)
    counts = jnp.where(victims, 0, counts)
    may_admit = ~jnp.any(victims)
    state, counts = _admit(state, counts, ranks, may_admit, config, allocator)

    # Pages of one step: a row of n tokens starts at most ceil(n / S) pages, so budget / S and one
    # for every row; and it copies one page at most.
    most_pages = config.token_budget // config.page_size + 2 * config.num_slots
    table, appended = allocator.append(state.table, counts, min(most_pages, config.num_pages))
    state = state.replace(table=table)
    known = _of_slots(state.requests.num_tokens, state.slots)
    plan = Plan(
        requests=state.slots,
        counts=counts,
        samples=(counts > 0) & (table.lengths == known),
        lengths=table.lengths,
        page_indices=table.page_indices,
        sources=appended.sources,
        targets=appended.targets,
        num_preempted=jnp.sum(victims, dtype=jnp.int32),
    )
    return state, plan


def commit_step(
    state: SchedulerState,
    plan: Plan,
    outcome: Outcome,
    allocator: Allocator,
    eos_ids: tuple[int, ...],
) -> SchedulerState:
    """Appends the sampled tokens, ends sequences, and gives their pages back.

    A sequence ends by one of `eos_ids` (unless it ignores them), by its length limit, or by an
    error of its own row; no other row is touched by that.
    """
    requests, rows = state.requests, jnp.where(plan.samples, plan.requests, _nobody(state))
    position = _of_slots(requests.num_tokens, rows)
    appended = jnp.where(outcome.failed, _nobody(state), rows)
    num_tokens = position + 1
    is_eos = jnp.zeros_like(plan.samples)
    for eos_id in eos_ids:
        is_eos |= outcome.tokens == eos_id
    is_eos &= ~requests.ignore_eos.at[rows].get(mode="fill", fill_value=True)
    reason = jnp.where(num_tokens >= _of_slots(requests.final_lens, rows), LENGTH, NOT_DONE)
    reason = jnp.where(is_eos, STOP, reason)
    reason = jnp.where(outcome.failed, ERROR, reason)
    ends = plan.samples & (reason != NOT_DONE)
    ended = jnp.where(ends, plan.requests, _nobody(state))
    is_first = position == _of_slots(requests.prompt_lens, rows)
    first = jnp.where(is_first, appended, _nobody(state))

    requests = requests.replace(
        tokens=requests.tokens.at[appended, position].set(outcome.tokens, mode="drop"),
        logprobs=requests.logprobs.at[appended, position].set(outcome.logprobs, mode="drop"),
        num_tokens=requests.num_tokens.at[appended].set(num_tokens, mode="drop"),
        phases=requests.phases.at[ended].set(DONE, mode="drop"),
        finish_reasons=requests.finish_reasons.at[ended].set(reason, mode="drop"),
        first_steps=requests.first_steps.at[first].set(state.step, mode="drop"),
        final_steps=requests.final_steps.at[ended].set(state.step, mode="drop"),
    )
    return state.replace(
        requests=requests,
        table=allocator.release(state.table, ends),
        slots=jnp.where(ends, _nobody(state), state.slots),
        step=state.step + 1,
    )


def _nobody(state: SchedulerState) -> int:
    """The request number that means none, `R`."""
    return state.requests.phases.shape[0]


def _of_slots(values: jax.Array, requests: jax.Array) -> jax.Array:
    """`values[requests]`, and 0 for slots without a request."""
    return values.at[requests].get(mode="fill", fill_value=0)


def _slot_order(state: SchedulerState, ranks: jax.Array) -> jax.Array:
    """Slots by rank, then arrival; empty ones last, `i32[B]`."""
    rank = _of_slots(ranks, state.slots)
    arrival = _of_slots(state.requests.arrivals, state.slots)
    return jnp.lexsort((arrival, rank, ~state.running)).astype(jnp.int32)


def _wanted(known: jax.Array, computed: jax.Array, prompt: jax.Array, config: EngineConfig):
    """Tokens that a sequence would take now if the budget were its own.

    With `batch_invariant` these never depend on anyone else: a prompt goes in chunks
    between fixed positions, and output tokens go one by one, even when computed again.
    """
    if not config.batch_invariant:
        return known - computed
    chunk = max(config.token_budget // 2, 1)
    whole = jnp.minimum(chunk - computed % chunk, prompt - computed)
    return jnp.where(computed < prompt, whole, jnp.minimum(known - computed, 1))


def _split_budget(state: SchedulerState, order: jax.Array, config: EngineConfig) -> jax.Array:
    """Tokens of each running slot, `i32[B]`: in order, each takes what it wants of what is left."""
    requests, slots = state.requests, state.slots
    known, prompt = _of_slots(requests.num_tokens, slots), _of_slots(requests.prompt_lens, slots)
    wanted = _wanted(known, state.table.lengths, prompt, config)[order]
    before = jnp.cumsum(wanted) - wanted
    left = jnp.maximum(config.token_budget - before, 0)
    granted = _whole_or_part(wanted, left, config)
    return jnp.zeros_like(granted).at[order].set(granted)


def _whole_or_part(wanted: jax.Array, left: jax.Array, config: EngineConfig) -> jax.Array:
    """What a sequence gets of the `left` tokens: with `batch_invariant`, all it wants or none."""
    if config.batch_invariant:
        return jnp.where(wanted <= left, wanted, 0)
    return jnp.minimum(wanted, left)


def _preempt(state: SchedulerState, victims: jax.Array, allocator: Allocator) -> SchedulerState:
    """Takes the victims' pages and puts them back in line."""
    requests = state.requests
    rows = jnp.where(victims, state.slots, _nobody(state))
    requests = requests.replace(
        phases=requests.phases.at[rows].set(PREEMPTED, mode="drop"),
        num_preemptions=requests.num_preemptions.at[rows].add(1, mode="drop"),
    )
    return state.replace(
        requests=requests,
        table=allocator.release(state.table, victims),
        slots=jnp.where(victims, _nobody(state), state.slots),
    )


class _Candidate(NamedTuple):
    """The head of the line: its request, a slot for it, and its tokens in this step."""

    request: jax.Array  # i32[]
    row: jax.Array  # i32[]
    count: jax.Array  # i32[]
    possible: jax.Array  # bool[], there is a request, a slot and budget


def _head_of_line(
    requests: Requests,
    phases: jax.Array,
    slots: jax.Array,
    counts: jax.Array,
    ranks: jax.Array,
    config: EngineConfig,
) -> _Candidate:
    """The next request to admit: a preempted one before any new one, then by rank and arrival."""
    preempted = phases == PREEMPTED
    eligible = jnp.where(jnp.any(preempted), preempted, phases == WAITING)
    furthest = jnp.iinfo(jnp.int32).max
    best = jnp.min(jnp.where(eligible, ranks, furthest))
    arrivals = jnp.where(eligible & (ranks == best), requests.arrivals, furthest)
    request = jnp.argmin(arrivals).astype(jnp.int32)

    empty = slots == phases.shape[0]
    wanted = _wanted(
        requests.num_tokens[request],
        jnp.asarray(0, jnp.int32),
        requests.prompt_lens[request],
        config,
    )
    count = _whole_or_part(wanted, config.token_budget - jnp.sum(counts), config)
    return _Candidate(
        request=request,
        row=jnp.argmax(empty).astype(jnp.int32),
        count=count,
        possible=jnp.any(eligible) & jnp.any(empty) & (count > 0),
    )


def _admit(
    state: SchedulerState,
    counts: jax.Array,
    ranks: jax.Array,
    may_admit: jax.Array,
    config: EngineConfig,
    allocator: Allocator,
) -> tuple[SchedulerState, jax.Array]:
    """Admits from the head of the line while a slot, budget and pages are left; `counts` too.

    Pages that running sequences still need for tokens already known, and for the headroom, are
    owed to them, so that a prompt once begun is not starved by the next. The line never moves past
    a head that does not fit. A sequence alone always does, headroom or not: it ends in the pool.
    """
    requests = state.requests
    headroom = config.headroom_pages * config.page_size

    def soon(known: jax.Array, final: jax.Array) -> jax.Array:
        # The token that ends a sequence is never computed.
        return jnp.maximum(known, jnp.minimum(known + headroom, final - 1))

    def pages(num_tokens: jax.Array) -> jax.Array:
        return num_pages_for(num_tokens, config.page_size)

    def head(phases, slots, counts):
        return _head_of_line(requests, phases, slots, counts, ranks, config)

    def admit_one(carry):
        candidate, table, phases, slots, counts, owed = carry
        request = candidate.request
        wanted = soon(requests.num_tokens[request], requests.final_lens[request])
        table, outcome = allocator.admit(
            table,
            candidate.row,
            wanted,
            requests.reserved_lens[request],
            owed,
        )
        admitted = outcome == status.OK
        row = jnp.where(admitted, candidate.row, slots.shape[0])
        phases = phases.at[jnp.where(admitted, request, phases.shape[0])].set(RUNNING, mode="drop")
        slots = slots.at[row].set(request, mode="drop")
        counts = counts.at[row].set(candidate.count, mode="drop")
        owed = owed + pages(wanted)
        following = head(phases, slots, counts)
        following = following._replace(possible=following.possible & admitted)
        return following, table, phases, slots, counts, owed

    first = head(requests.phases, state.slots, counts)
    first = first._replace(possible=first.possible & may_admit)
    known = _of_slots(requests.num_tokens, state.slots)
    final = _of_slots(requests.final_lens, state.slots)
    owed = jnp.sum(pages(soon(known, final)) - pages(state.table.lengths))
    carry = (first, state.table, requests.phases, state.slots, counts, owed)
    _, table, phases, slots, counts, _ = lax.while_loop(
        lambda carry: carry[0].possible, admit_one, carry
    )
    requests = requests.replace(phases=phases)
    return state.replace(requests=requests, table=table, slots=slots), counts
