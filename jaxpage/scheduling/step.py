"""One step of continuous batching, as two pure functions around an executor.

`plan_step` decides which tokens to compute: it splits the token budget, preempts if pages run out,
admits, and takes the pages. An executor carries the plan out and samples. `commit_step` appends the
samples and ends sequences. Neither touches a byte of KV.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jaxpage.config import EngineConfig
from jaxpage.paging.allocator import Allocator
from jaxpage.paging.copies import Copies
from jaxpage.paging.freed import Freed
from jaxpage.scheduling import beams
from jaxpage.scheduling.admission import admit, share_prompts
from jaxpage.scheduling.batch import (
    Batch,
    followers,
    leaders,
    of_slots,
    own_pace,
    sequences_of,
    take_pages,
    wanted,
    whole_or_part,
)
from jaxpage.scheduling.beams import Candidates
from jaxpage.scheduling.policies import PolicyFn
from jaxpage.scheduling.preemption import bring_back, make_way, may_make_way, paused, with_siblings
from jaxpage.scheduling.state import (
    DONE,
    ERROR,
    LENGTH,
    NOT_DONE,
    STOP,
    Requests,
    SchedulerState,
)


class Plan(struct.PyTreeNode):
    """What a step computes: in slot `b`, the next `counts[b]` tokens of request `requests[b]`.

    `lengths` includes them, and `page_indices` holds their pages. Where `samples`, the sequence's
    next token is chosen from the state of the last of them; or from that of slot `states[b]`, which
    computed the prompt for both. Before anything is written, `moves_out` are made, then `copies`,
    each in their order; then `freed` pages are wiped, `moves_in` are made, and `host_freed` pages
    are wiped. All pages are places in the pool, or on the host.
    """

    requests: jax.Array  # i32[B]; R for an empty slot
    counts: jax.Array  # i32[B], tokens
    samples: jax.Array  # bool[B]
    states: jax.Array  # i32[B], slots
    lengths: jax.Array  # i32[B], tokens
    page_indices: jax.Array  # i32[B, M]; P for none, and on the host
    copies: Copies
    moves_out: Copies  # from pages to pages of the host
    moves_in: Copies  # from pages of the host to pages
    freed: Freed
    host_freed: Freed  # pages of the host
    num_found: jax.Array  # i32[], tokens of admitted sequences that need not be computed
    num_preempted: jax.Array  # i32[], sequences that lost pages to make this step
    num_recomputed: jax.Array  # i32[], tokens of the step that had been computed before

    @property
    def num_tokens(self) -> jax.Array:
        """Tokens of the step, `i32[]`."""
        return jnp.sum(self.counts)


class Outcome(NamedTuple):
    """What an executor gives back, by slot; only rows where the plan samples are read."""

    tokens: jax.Array  # i32[B]
    logprobs: jax.Array  # f32[B]
    failed: jax.Array  # bool[B], the row's logits are not finite
    candidates: Candidates | None = None  # None where no beams are searched


def plan_step(
    state: SchedulerState, config: EngineConfig, allocator: Allocator, policy: PolicyFn
) -> tuple[SchedulerState, Plan]:
    """Chooses the tokens of the next step and takes their pages.

    Running sequences come first, in the policy's order. If pages run out, the last in that order
    make way (`scheduling.preemption`). Only then are requests admitted, the preempted before any
    new one (Kwon et al. 2023, section 4.5), and none while pages are short or on the host.
    """
    num_requests = state.requests.phases.shape[0]
    computed = jnp.zeros((num_requests,), jnp.int32)
    computed = computed.at[state.slots].set(state.table.lengths, mode="drop")
    ranks = policy(state.requests, computed)
    ranks = _of_whole_requests(ranks, state.requests, state.unfinished)

    order = _slot_order(state, ranks)
    counts = _split_budget(state, order, config)
    none_waits = ~jnp.any(paused(state, config))
    state, way = make_way(state, order, counts, config, allocator)
    batch = Batch(
        table=state.table,
        requests=state.requests,
        slots=state.slots,
        counts=jnp.zeros_like(counts),
        copies=Copies.none(config.num_slots, config.num_pages),
        num_found=jnp.asarray(0, jnp.int32),
    )
    batch = take_pages(batch, way.counts, config, allocator)
    may_admit = ~way.is_short & none_waits
    if config.static_batches:
        may_admit &= ~jnp.any(state.running)
    batch = admit(batch, ranks, may_admit, config, allocator)
    batch, states = share_prompts(batch, allocator)
    batch = bring_back(batch, order, ~way.is_short, config, allocator)
    table, slots = batch.table, batch.slots
    moves_out = moves_in = Copies.none(0, config.num_pages)
    if config.host_pages > 0 and allocator.tier is not None:
        table, moves_out, moves_in = allocator.tier.take_moves(table)
    freed = host_freed = Freed.none(0)
    if config.zero_freed and allocator.tier is not None:
        table, freed, host_freed = allocator.tier.take_freed(table, batch.copies.live_targets)
    requests, num_recomputed = _computed(batch)
    state = state.replace(requests=requests, table=table, slots=slots)
    known = of_slots(state.requests.num_tokens, slots)
    plan = Plan(
        requests=slots,
        counts=batch.counts,
        samples=(batch.counts[states] > 0) & (table.lengths == known),
        states=states,
        lengths=table.lengths,
        page_indices=table.in_pool,
        copies=batch.copies,
        moves_out=moves_out,
        moves_in=moves_in,
        freed=freed,
        host_freed=host_freed,
        num_found=batch.num_found,
        num_preempted=way.num_preempted,
        num_recomputed=num_recomputed,
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
    error of its own row; no other row is touched by that. What a beam search does stands in
    `scheduling.beams`.
    """
    requests = state.requests
    samples = plan.samples & (of_slots(requests.beams.widths, plan.requests) == 0)
    rows = jnp.where(samples, plan.requests, _nobody(state))
    position = of_slots(requests.num_tokens, rows)
    appended = jnp.where(outcome.failed, _nobody(state), rows)
    num_tokens = position + 1
    is_eos = jnp.zeros_like(samples)
    for eos_id in eos_ids:
        is_eos |= outcome.tokens == eos_id
    is_eos &= ~requests.ignore_eos.at[rows].get(mode="fill", fill_value=True)
    reason = jnp.where(num_tokens >= of_slots(requests.final_lens, rows), LENGTH, NOT_DONE)
    reason = jnp.where(is_eos, STOP, reason)
    reason = jnp.where(outcome.failed, ERROR, reason)
    ends = samples & (reason != NOT_DONE)
    ended = jnp.where(ends, plan.requests, _nobody(state))
    is_first = position == of_slots(requests.prompt_lens, rows)
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
    # Rows that may give up their pages before the next lookup: of searches any may die.
    state = state.replace(requests=requests)
    leaving = ends | (plan.samples & ~samples) | may_make_way(state)
    table = allocator.settle(state.table, sequences_of(state), leaving)
    state = state.replace(
        table=allocator.release(table, ends),
        slots=jnp.where(ends, _nobody(state), state.slots),
    )
    if outcome.candidates is not None:
        state = beams.advance(
            state, plan.samples, outcome.candidates, outcome.failed, allocator, eos_ids
        )
    return state.replace(step=state.step + 1)


def _nobody(state: SchedulerState) -> int:
    """The request number that means none, `R`."""
    return state.requests.phases.shape[0]


def _slot_order(state: SchedulerState, ranks: jax.Array) -> jax.Array:
    """Slots by rank, then arrival; empty ones last, `i32[B]`."""
    rank = of_slots(ranks, state.slots)
    arrival = of_slots(state.requests.arrivals, state.slots)
    # One key after the other: XLA's CPU sorts by a single one many times faster than by several.
    order = jnp.argsort(arrival, stable=True)
    order = order[jnp.argsort(rank[order], stable=True)]
    order = order[jnp.argsort((~state.running[order]).astype(jnp.int32), stable=True)]
    return order.astype(jnp.int32)


def _split_budget(state: SchedulerState, order: jax.Array, config: EngineConfig) -> jax.Array:
    """Tokens of each running slot, `i32[B]`: in order, each takes what it wants of what is left."""
    requests, slots, lengths = state.requests, state.slots, state.table.lengths
    known, prompt = of_slots(own_pace(requests), slots), of_slots(requests.prompt_lens, slots)
    tokens = wanted(known, lengths, prompt, config)
    # Who could share nothing of a prompt that is there computes it too: see `prefix_cache.share`.
    first = jnp.minimum(leaders(slots, requests.groups), config.num_slots - 1)
    waits = followers(slots, requests.groups, lengths) & (lengths[first] < prompt)
    tokens = jnp.where(waits, 0, tokens)
    is_beam = of_slots(requests.beams.widths, slots) > 0
    searches = config.max_beams > 1
    if searches:
        in_step = is_beam & ~with_siblings(is_beam & (lengths != known), state)
        in_step &= of_slots(requests.num_tokens, slots) > known
        tokens = jnp.where(in_step, 1, tokens)
    tokens = jnp.where(paused(state, config), 0, tokens)[order]
    before = jnp.cumsum(tokens) - tokens
    left = jnp.maximum(config.token_budget - before, 0)
    granted = whole_or_part(tokens, left, config)
    granted = jnp.zeros_like(granted).at[order].set(granted)
    if searches:
        granted = jnp.where(with_siblings(in_step & (granted == 0), state), 0, granted)
    return granted


def _computed(batch: Batch) -> tuple[Requests, jax.Array]:
    """Notes what is computed with this step; and how many of its tokens were already, `i32[]`."""
    requests, lengths = batch.requests, batch.table.lengths
    before = of_slots(requests.computed_lens, batch.slots)
    again = jnp.minimum(before, lengths) - (lengths - batch.counts)
    computed = requests.computed_lens.at[batch.slots].max(lengths, mode="drop")
    return requests.replace(computed_lens=computed), jnp.sum(jnp.maximum(again, 0))


def _of_whole_requests(ranks: jax.Array, requests: Requests, unfinished: jax.Array) -> jax.Array:
    """The ranks, `i32[R]`, where sequences of one request all have the lowest of theirs."""
    furthest = jnp.full_like(ranks, jnp.iinfo(jnp.int32).max)
    best = furthest.at[requests.groups].min(jnp.where(unfinished, ranks, furthest))
    return best[requests.groups]
