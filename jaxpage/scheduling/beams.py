"""Beam search: a request's likeliest sequences, as rows that fork and die in lockstep.

A request of width `k` runs in `k` slots that compute their last token in the same step. Of all
continuations the `k` likeliest that do not end go on: a row's first child stays in it, and further
children take the rows of those that have none, whose pages they give back for the parent's (Kwon et
al. 2023, section 4.4 and fig 9). The best `k` that have ended are *kept* in `k` rows of the queue
that no slot runs. What is kept, and when a search is over, follows `generate` of transformers 5.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpage.paging.allocator import Allocator
from jaxpage.scheduling.batch import of_slots
from jaxpage.scheduling.state import (
    DONE,
    ERROR,
    EXHAUSTIVE,
    HELD,
    IMPATIENT,
    LENGTH,
    STOP,
    Requests,
    SchedulerState,
)


class Candidates(NamedTuple):
    """The likeliest next tokens of each slot, best first, with their log probabilities."""

    tokens: jax.Array  # i32[B, C]
    logprobs: jax.Array  # f32[B, C]


class _Search(NamedTuple):
    """One request: its rows, and what they may become. `W` is the greatest width there is."""

    slots: jax.Array  # i32[W], of its beams; B after the last
    live: jax.Array  # i32[W], rows of its beams; R after the last
    kept: jax.Array  # i32[W], rows of those that have ended; R after the last
    width: jax.Array  # i32[]
    position: jax.Array  # i32[], of the next token
    num_new: jax.Array  # i32[], output tokens with the next


class _Children(NamedTuple):
    """Continuations of a search, the likeliest first."""

    parents: jax.Array  # i32[C], beams
    tokens: jax.Array  # i32[C]
    logprobs: jax.Array  # f32[C], of the token alone
    totals: jax.Array  # f32[C], of all output
    ends: jax.Array  # bool[C], that end, and are likely enough to be kept
    goes_on: jax.Array  # bool[C], that could be beams of the next step
    is_stop: jax.Array  # bool[C], they end by a token


def num_candidates(max_beams: int, eos_ids: tuple[int, ...]) -> int:
    """How many continuations of each row are looked at, so that enough are left if some end."""
    return max(2, 1 + len(eos_ids)) * max_beams if max_beams > 1 else 0


def advance(
    state: SchedulerState,
    samples: jax.Array,
    candidates: Candidates,
    failed: jax.Array,
    allocator: Allocator,
    eos_ids: tuple[int, ...],
) -> SchedulerState:
    """Takes all searches a token further whose rows are among `samples: bool[B]`.

    Those that are over give their pages back; their result is in the kept rows, best first. A
    search with a row that `failed: bool[B]` is over too.
    """
    waits = samples & (of_slots(state.requests.beams.widths, state.slots) > 0)

    def next_search(carry):
        state, waits = carry
        group = _groups(state)
        ours = waits & (group == group[jnp.argmax(waits)])
        state = _advance_one(state, ours, candidates, failed, allocator, eos_ids)
        return state, waits & ~ours

    return lax.while_loop(lambda carry: jnp.any(carry[1]), next_search, (state, waits))[0]


def _advance_one(
    state: SchedulerState,
    ours: jax.Array,
    candidates: Candidates,
    failed: jax.Array,
    allocator: Allocator,
    eos_ids: tuple[int, ...],
) -> SchedulerState:
    per_beam = max(2, 1 + len(eos_ids))
    search = _search_of(state, ours, candidates.tokens.shape[1] // per_beam)
    lead = search.live[0]
    children = _children_of(state.requests, search, candidates, eos_ids, per_beam)
    at_length = search.position + 1 >= state.requests.final_lens[lead]
    requests, best = _keep(state.requests, search, children)
    requests, born, dead, likeliest = _go_on(requests, search, children, state.step)

    fails = jnp.any(ours & failed)
    is_over = _is_decided(requests, search, best, likeliest) | at_length | fails
    state = state.replace(requests=_end(requests, search, is_over, fails, state.step))

    num_slots = state.slots.shape[0]
    released = jnp.zeros_like(ours).at[_at(search.slots, dead, num_slots)].set(True, mode="drop")
    released = jnp.where(is_over, ours, released)
    table = allocator.release(state.table, released)
    assert allocator.share is not None  # the host refuses searches where nothing can be shared
    share = allocator.share

    def share_next(carry):
        table, moves = carry
        child = jnp.argmax(moves)
        parent, row = born[0][child], born[1][child]
        length = table.lengths[search.slots[parent]]
        table = share(table, search.slots[parent], search.slots[row], length)
        return table, moves.at[child].set(False)

    moves = (born[0] != born[1]) & ~is_over
    table, _ = lax.while_loop(lambda carry: jnp.any(carry[1]), share_next, (table, moves))
    nobody = state.requests.phases.shape[0]
    return state.replace(table=table, slots=jnp.where(ours & is_over, nobody, state.slots))


def _groups(state: SchedulerState) -> jax.Array:
    """The group of each slot's sequence, `i32[B]`; `R` for none."""
    groups = state.requests.groups
    return groups.at[state.slots].get(mode="fill", fill_value=groups.shape[0])


def _search_of(state: SchedulerState, ours: jax.Array, max_beams: int) -> _Search:
    requests, num_slots = state.requests, ours.shape[0]
    nobody = requests.phases.shape[0]
    slots = _where(ours, max_beams, num_slots)
    live = _at(state.slots, slots, nobody)
    lead = live[0]
    is_kept = (requests.groups == requests.groups[lead]) & (requests.phases == HELD)
    return _Search(
        slots=slots,
        live=live,
        kept=_where(is_kept, max_beams, nobody),
        width=requests.beams.widths[lead],
        position=requests.num_tokens[lead],
        num_new=requests.num_tokens[lead] + 1 - requests.prompt_lens[lead],
    )


def _children_of(
    requests: Requests,
    search: _Search,
    candidates: Candidates,
    eos_ids: tuple[int, ...],
    per_beam: int,
) -> _Children:
    lead, index = search.live[0], jnp.arange(search.live.shape[0])
    so_far = _at(requests.beams.scores, search.live, -jnp.inf)
    # Before the first output all beams are one sequence.
    so_far = jnp.where((search.num_new == 1) & (index > 0), -jnp.inf, so_far)
    logprobs = _at(candidates.logprobs, search.slots, -jnp.inf)
    totals, flat = lax.top_k((so_far[:, None] + logprobs).reshape(-1), logprobs.shape[1])
    parents = (flat // logprobs.shape[1]).astype(jnp.int32)
    tokens = _at(candidates.tokens, search.slots, 0).reshape(-1)[flat]
    rank = jnp.arange(totals.shape[0], dtype=jnp.int32)
    is_offered = (rank < per_beam * search.width) & (totals > -jnp.inf)
    is_stop = jnp.zeros_like(is_offered)
    for eos_id in eos_ids:
        is_stop |= tokens == eos_id
    is_stop &= ~requests.ignore_eos[lead]
    at_length = search.position + 1 >= requests.final_lens[lead]
    return _Children(
        parents=parents,
        tokens=tokens,
        logprobs=logprobs.reshape(-1)[flat],
        totals=totals,
        ends=is_offered & (rank < search.width) & (is_stop | at_length),
        goes_on=is_offered & ~is_stop,
        is_stop=is_stop,
    )


def _keep(requests: Requests, search: _Search, children: _Children) -> tuple[Requests, jax.Array]:
    """Keeps the best of those kept and those that end now; returns their scores, `f32[W]`."""
    beams, kept, max_beams = requests.beams, search.kept, search.kept.shape[0]
    nobody = requests.phases.shape[0]
    penalty = beams.length_penalties[search.live[0]]
    scores = _score(children.totals, search.num_new, penalty)
    scores = jnp.concatenate(
        [_at(beams.scores, kept, -jnp.inf), jnp.where(children.ends, scores, -jnp.inf)]
    )
    best, chosen = lax.top_k(scores, max_beams)
    is_new = chosen >= max_beams
    child = jnp.maximum(chosen - max_beams, 0)
    sources = jnp.where(
        is_new, search.live[children.parents[child]], kept[jnp.minimum(chosen, max_beams - 1)]
    )
    targets = jnp.where(best > -jnp.inf, kept, nobody)
    lengths = jnp.where(is_new, search.position + 1, _at(requests.num_tokens, sources, 0))
    reasons = jnp.where(children.is_stop[child], STOP, LENGTH)
    reasons = jnp.where(is_new, reasons, _at(requests.finish_reasons, sources, 0))
    requests = _copy_rows(requests, sources, targets, search, children, child, is_new)
    return requests.replace(
        num_tokens=requests.num_tokens.at[targets].set(lengths, mode="drop"),
        finish_reasons=requests.finish_reasons.at[targets].set(reasons, mode="drop"),
        beams=beams.replace(scores=beams.scores.at[targets].set(best, mode="drop")),
    ), best


def _go_on(
    requests: Requests, search: _Search, children: _Children, step: jax.Array
) -> tuple[Requests, tuple[jax.Array, jax.Array], jax.Array, jax.Array]:
    """Makes the likeliest children that do not end the beams of the next step.

    Returns for each its parent and the beam whose row it has, two `i32[W]`, equal where there is
    nothing to share; the beams that die, `i32[W]`, `W` after the last; and the best total, `f32[]`.
    """
    max_beams, num_children = search.live.shape[0], children.tokens.shape[0]
    beam = jnp.arange(max_beams, dtype=jnp.int32)
    place = jnp.cumsum(children.goes_on.astype(jnp.int32)) - 1
    child = _where(children.goes_on & (place < search.width), max_beams, num_children)
    is_child = child < num_children
    parents = _at(children.parents, child, max_beams)
    is_same = (parents[:, None] == parents[None]) & (beam[:, None] > beam[None])
    moves = is_child & jnp.any(is_same, axis=1)

    has_child = jnp.zeros((max_beams,), jnp.bool_).at[parents].set(True, mode="drop")
    dead = _where(~has_child & (beam < search.width), max_beams, max_beams)
    row = jnp.where(moves, _at(dead, jnp.cumsum(moves.astype(jnp.int32)) - 1, max_beams), parents)

    nobody = requests.phases.shape[0]
    targets = _at(search.live, row, nobody)
    sources = _at(search.live, parents, nobody)
    totals = _at(children.totals, child, -jnp.inf)
    requests = _copy_rows(requests, sources, targets, search, children, child, is_child)
    started = jnp.where(search.num_new == 1, search.live, nobody)
    return (
        requests.replace(
            num_tokens=requests.num_tokens.at[targets].set(search.position + 1, mode="drop"),
            first_steps=requests.first_steps.at[started].set(step, mode="drop"),
            beams=requests.beams.replace(
                scores=requests.beams.scores.at[targets].set(totals, mode="drop")
            ),
        ),
        (parents, row),
        dead,
        totals[0],
    )


def _is_decided(
    requests: Requests, search: _Search, best: jax.Array, likeliest: jax.Array
) -> jax.Array:
    """Whether all are kept that are wanted, and no beam is worth waiting for: `bool[]`.

    `best: f32[W]` are the scores of those kept. A beam's total only falls from the `likeliest`, so
    that no score is better than this total at the length that flatters it most: the greatest if
    length is rewarded, else the present one. A patient search looks at the present one alone.
    """
    lead, worst = search.live[0], best[search.width - 1]
    patience, penalty = requests.beams.patience[lead], requests.beams.length_penalties[lead]
    most_new = requests.final_lens[lead] - requests.prompt_lens[lead]
    looks_ahead = (patience == EXHAUSTIVE) & (penalty > 0)
    attainable = _score(likeliest, jnp.where(looks_ahead, most_new, search.num_new), penalty)
    return (worst > -jnp.inf) & ((patience == IMPATIENT) | (attainable <= worst))


def _copy_rows(
    requests: Requests,
    sources: jax.Array,
    targets: jax.Array,
    search: _Search,
    children: _Children,
    child: jax.Array,
    grows: jax.Array,
) -> Requests:
    """Gives rows `targets: i32[W]` the output of rows `sources`, and where it `grows` a token."""

    def copied(values: jax.Array, new: jax.Array) -> jax.Array:
        rows = values.at[sources].get(mode="fill", fill_value=0)
        last = jnp.where(grows, _at(new, child, 0), rows[:, search.position])
        return values.at[targets].set(rows.at[:, search.position].set(last), mode="drop")

    return requests.replace(
        tokens=copied(requests.tokens, children.tokens),
        logprobs=copied(requests.logprobs, children.logprobs),
    )


def _end(
    requests: Requests, search: _Search, is_over: jax.Array, fails: jax.Array, step: jax.Array
) -> Requests:
    """Ends a search that is over: its kept rows are the result."""
    nobody, lead = requests.phases.shape[0], search.live[0]
    live = jnp.where(is_over, search.live, nobody)
    kept = jnp.where(is_over, search.kept, nobody)
    failed = jnp.where(fails, search.kept, nobody)
    of_kept = {
        name: getattr(requests, name).at[kept].set(getattr(requests, name)[lead], mode="drop")
        for name in ("first_steps", "num_preemptions", "cached_lens")
    }
    return requests.replace(
        **of_kept,
        phases=requests.phases.at[live].set(DONE, mode="drop").at[kept].set(DONE, mode="drop"),
        finish_reasons=requests.finish_reasons.at[failed].set(ERROR, mode="drop"),
        final_steps=requests.final_steps.at[kept].set(step, mode="drop"),
    )


def _score(total: jax.Array, num_new: jax.Array, penalty: jax.Array) -> jax.Array:
    """What sequences of different lengths are compared by: the total over a power of the length."""
    return total / num_new.astype(jnp.float32) ** penalty


def _where(mask: jax.Array, size: int, fill: int) -> jax.Array:
    """The first `size` indices at which `mask` holds, ascending, then `fill`: `i32[size]`."""
    return jnp.nonzero(mask, size=size, fill_value=fill)[0].astype(jnp.int32)


def _at(values: jax.Array, index: jax.Array, fill) -> jax.Array:
    """`values[index]`, and `fill` outside."""
    return values.at[index].get(mode="fill", fill_value=fill)
