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
from jaxpage.paging.allocator import Allocator, Prompt, Table
from jaxpage.paging.page_table import num_pages_for
from jaxpage.paging.prefix_cache import Found
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
    written, the `copies` are made.
    """

    requests: jax.Array  # i32[B]; R for an empty slot
    counts: jax.Array  # i32[B], tokens
    samples: jax.Array  # bool[B]
    lengths: jax.Array  # i32[B], tokens
    page_indices: jax.Array  # i32[B, M]
    copies: "Copies"
    num_found: jax.Array  # i32[], tokens of admitted sequences that need not be computed
    num_preempted: jax.Array  # i32[], sequences that lost their pages to make this step

    @property
    def num_tokens(self) -> jax.Array:
        """Tokens of the step, `i32[]`."""
        return jnp.sum(self.counts)


class Copies(NamedTuple):
    """Pages to copy, `sources[i]` to `targets[i]` for `i < count`, one after the other.

    The order matters: a page may be copied, leave the cache, and be the target of a later copy.
    """

    sources: jax.Array  # i32[B], pages
    targets: jax.Array  # i32[B], pages
    count: jax.Array  # i32[]

    @staticmethod
    def none(num_slots: int, num_pages: int) -> "Copies":
        nothing = jnp.full((num_slots,), num_pages, jnp.int32)
        return Copies(nothing, nothing, jnp.asarray(0, jnp.int32))

    def then(self, sources: jax.Array, targets: jax.Array, num_pages: int) -> "Copies":
        """With the pairs of `i32[n]` that are pages, in their order, at the end."""
        is_copy = targets < num_pages
        place = self.count + jnp.cumsum(is_copy.astype(jnp.int32)) - 1
        place = jnp.where(is_copy, place, self.targets.shape[0])
        return Copies(
            self.sources.at[place].set(sources, mode="drop"),
            self.targets.at[place].set(targets, mode="drop"),
            self.count + jnp.sum(is_copy, dtype=jnp.int32),
        )


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
    batch = _Batch(
        table=state.table,
        requests=state.requests,
        slots=state.slots,
        counts=jnp.zeros_like(counts),
        copies=Copies.none(config.num_slots, config.num_pages),
        num_found=jnp.asarray(0, jnp.int32),
    )
    batch = _take_pages(batch, counts, config, allocator)
    batch = _admit(batch, ranks, ~jnp.any(victims), config, allocator)
    table, slots = batch.table, batch.slots
    state = state.replace(requests=batch.requests, table=table, slots=slots)
    known = _of_slots(state.requests.num_tokens, slots)
    plan = Plan(
        requests=slots,
        counts=batch.counts,
        samples=(batch.counts > 0) & (table.lengths == known),
        lengths=table.lengths,
        page_indices=table.page_indices,
        copies=batch.copies,
        num_found=batch.num_found,
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
        table=allocator.release(allocator.settle(state.table), ends),
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


class _Batch(struct.PyTreeNode):
    """A step in the making: who runs, with what pages, and how many tokens each brings."""

    table: Table
    requests: Requests
    slots: jax.Array  # i32[B]
    counts: jax.Array  # i32[B]
    copies: Copies
    num_found: jax.Array  # i32[]


def _take_pages(
    batch: _Batch, counts: jax.Array, config: EngineConfig, allocator: Allocator
) -> _Batch:
    """Gives the rows pages for `counts` more tokens, and makes those findable that become full."""
    # A row of n tokens starts at most ceil(n / S) pages, so all rows start budget / S and one each;
    # and a row copies one page at most.
    most_pages = config.token_budget // config.page_size + 2 * config.num_slots
    table, taken = allocator.append(batch.table, counts, min(most_pages, config.num_pages))
    requests = batch.requests
    table = allocator.enter(table, requests.tokens, batch.slots, requests.salts)
    return batch.replace(
        table=table,
        counts=batch.counts + counts,
        copies=batch.copies.then(taken.sources, taken.targets, config.num_pages),
    )


class _Candidate(NamedTuple):
    """The head of the line: its request, and a slot for it."""

    request: jax.Array  # i32[]
    row: jax.Array  # i32[]
    possible: jax.Array  # bool[], there is a request, a slot and budget


def _head_of_line(batch: _Batch, ranks: jax.Array, config: EngineConfig) -> _Candidate:
    """The next request to admit: a preempted one before any new one, then by rank and arrival."""
    requests, phases = batch.requests, batch.requests.phases
    preempted = phases == PREEMPTED
    eligible = jnp.where(jnp.any(preempted), preempted, phases == WAITING)
    furthest = jnp.iinfo(jnp.int32).max
    best = jnp.min(jnp.where(eligible, ranks, furthest))
    arrivals = jnp.where(eligible & (ranks == best), requests.arrivals, furthest)
    request = jnp.argmin(arrivals).astype(jnp.int32)

    empty = batch.slots == phases.shape[0]
    # What is found cached only makes it less.
    count = _first_count(batch, request, jnp.asarray(0, jnp.int32), config)
    return _Candidate(
        request=request,
        row=jnp.argmax(empty).astype(jnp.int32),
        possible=jnp.any(eligible) & jnp.any(empty) & (count > 0),
    )


def _first_count(
    batch: _Batch, request: jax.Array, computed: jax.Array, config: EngineConfig
) -> jax.Array:
    """Tokens that a request brings to the step that admits it, of which `computed` are found."""
    requests = batch.requests
    wanted = _wanted(requests.num_tokens[request], computed, requests.prompt_lens[request], config)
    return _whole_or_part(wanted, config.token_budget - jnp.sum(batch.counts), config)


def _admit(
    batch: _Batch,
    ranks: jax.Array,
    may_admit: jax.Array,
    config: EngineConfig,
    allocator: Allocator,
) -> _Batch:
    """Admits from the head of the line while a slot, budget and pages are left.

    Pages that running sequences still need for tokens already known, and for the headroom, are
    owed to them, so that a prompt once begun is not starved by the next. The line never moves past
    a head that does not fit. A sequence alone always does, headroom or not: it ends in the pool.
    """
    headroom = config.headroom_pages * config.page_size

    def soon(known: jax.Array, final: jax.Array) -> jax.Array:
        # The token that ends a sequence is never computed.
        return jnp.maximum(known, jnp.minimum(known + headroom, final - 1))

    def admit_one(carry):
        candidate, batch = carry
        request, requests = candidate.request, batch.requests
        ends = soon(
            _of_slots(requests.num_tokens, batch.slots),
            _of_slots(requests.final_lens, batch.slots),
        )
        owed = jnp.sum(num_pages_for(ends, config.page_size) - batch.table.held_pages)
        known = requests.num_tokens[request]
        prompt = Prompt(
            tokens=requests.tokens[request],
            num_tokens=known,
            salt=requests.salts[request],
            soon=soon(known, requests.final_lens[request]),
            reserved=requests.reserved_lens[request],
        )
        table, found = allocator.admit(batch.table, candidate.row, prompt, owed)
        admitted = found.status == status.OK
        batch = _seat(batch.replace(table=table), candidate, found, admitted, config.num_pages)
        count = jnp.where(admitted, _first_count(batch, request, found.num_tokens, config), 0)
        counts = jnp.zeros_like(batch.counts).at[candidate.row].set(count)
        batch = _take_pages(batch, counts, config, allocator)
        following = _head_of_line(batch, ranks, config)
        return following._replace(possible=following.possible & admitted), batch

    first = _head_of_line(batch, ranks, config)
    first = first._replace(possible=first.possible & may_admit)
    return lax.while_loop(lambda carry: carry[0].possible, admit_one, (first, batch))[1]


def _seat(
    batch: _Batch, candidate: _Candidate, found: Found, admitted: jax.Array, num_pages: int
) -> _Batch:
    """Puts the candidate in its slot, if it is admitted."""
    requests = batch.requests
    request = jnp.where(admitted, candidate.request, requests.phases.shape[0])
    row = jnp.where(admitted, candidate.row, batch.slots.shape[0])
    is_new = requests.phases[candidate.request] == WAITING
    cached = jnp.where(is_new, found.num_tokens, requests.cached_lens[candidate.request])
    requests = requests.replace(
        phases=requests.phases.at[request].set(RUNNING, mode="drop"),
        cached_lens=requests.cached_lens.at[request].set(cached, mode="drop"),
    )
    return batch.replace(
        requests=requests,
        slots=batch.slots.at[row].set(request, mode="drop"),
        copies=batch.copies.then(found.source[None], found.target[None], num_pages),
        num_found=batch.num_found + found.num_tokens,
    )
