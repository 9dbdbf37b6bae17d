"""Who joins a step: sequences from the head of the line, while a slot, budget and pages are left.

A request of several sequences is admitted whole or not at all. The first computes the prompt; the
others have a slot and wait, and then share its pages, so that a prompt is computed and kept once
(Kwon et al. 2023, section 4.4).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpage.config import EngineConfig
from jaxpage.paging import status
from jaxpage.paging.allocator import Allocator, Prompt
from jaxpage.paging.prefix_cache import Found
from jaxpage.scheduling.batch import (
    Batch,
    followers,
    leaders,
    make_findable,
    of_slots,
    owed_pages,
    own_pace,
    pages_soon,
    take_pages,
    wanted,
    whole_or_part,
)
from jaxpage.scheduling.state import PREEMPTED, RUNNING, WAITING

FURTHEST = jnp.iinfo(jnp.int32).max


class _Candidate(NamedTuple):
    """The head of the line: its request, and a slot for it."""

    request: jax.Array  # i32[]
    row: jax.Array  # i32[]
    siblings: jax.Array  # bool[R], that are in line with it
    follows: jax.Array  # bool[], one of its siblings runs already
    possible: jax.Array  # bool[], there is a request, slots for all of them, and budget


def admit(
    batch: Batch, ranks: jax.Array, may_admit: jax.Array, config: EngineConfig, allocator: Allocator
) -> Batch:
    """Admits from the head of the line, which never moves past a head that does not fit.

    Pages that running sequences still need for tokens already known, and for the headroom, are
    owed to them, so that a prompt once begun is not starved by the next. A request alone always
    fits, headroom or not: it ends in the pool. It can share what others compute in this step.
    """

    def admit_one(carry):
        candidate, batch = carry
        batch = make_findable(batch, allocator)
        prompt, owed = _prompt_of(batch, candidate, config)
        table, found = allocator.admit(batch.table, candidate.row, prompt, owed)
        admitted = found.status == status.OK
        batch = _seat(batch.replace(table=table), candidate, found, admitted, config.num_pages)
        count = _first_count(batch, candidate.request, found.num_tokens, config)
        waits = candidate.follows | (table.num_hosted[candidate.row] > 0)
        count = jnp.where(admitted & ~waits, count, 0)
        counts = jnp.zeros_like(batch.counts).at[candidate.row].set(count)
        batch = take_pages(batch, counts, config, allocator)
        following = _head_of_line(batch, ranks, config)
        return following._replace(possible=following.possible & admitted), batch

    first = _head_of_line(batch, ranks, config)
    first = first._replace(possible=first.possible & may_admit)
    return lax.while_loop(lambda carry: carry[0].possible, admit_one, (first, batch))[1]


def share_prompts(batch: Batch, allocator: Allocator) -> tuple[Batch, jax.Array]:
    """Gives the prompt's pages to all who waited for it, if this step computes its end.

    Returns the slot of which each row takes the last state, `i32[B]`: its own, but for those who
    sample their first token from the prompt that another one computed.
    """
    num_slots = batch.slots.shape[0]
    own = jnp.arange(num_slots, dtype=jnp.int32)
    share = allocator.share
    if share is None:  # every sequence computes its own
        return batch, own
    requests, lengths = batch.requests, batch.table.lengths
    leader = jnp.minimum(leaders(batch.slots, requests.groups), num_slots - 1)
    known = of_slots(requests.num_tokens, batch.slots)
    prompt = of_slots(requests.prompt_lens, batch.slots)
    waits = followers(batch.slots, requests.groups, lengths) & (lengths[leader] >= prompt)
    # Its last state is there to sample from only if the prompt's last token is computed last.
    is_end = (batch.counts[leader] > 0) & (lengths[leader] == prompt) & (known[leader] == prompt)
    num_tokens = jnp.where(is_end, prompt, jnp.minimum(prompt, known - 1))

    def share_next(carry):
        table, waits = carry
        row = jnp.argmax(waits).astype(jnp.int32)
        return share(table, leader[row], row, num_tokens[row]), waits.at[row].set(False)

    table, _ = lax.while_loop(lambda carry: jnp.any(carry[1]), share_next, (batch.table, waits))
    return batch.replace(table=table), jnp.where(waits & is_end, leader, own)


def _head_of_line(batch: Batch, ranks: jax.Array, config: EngineConfig) -> _Candidate:
    """The next sequence to admit: a preempted one before any new one, then by rank and arrival."""
    requests, phases = batch.requests, batch.requests.phases
    preempted = phases == PREEMPTED
    eligible = jnp.where(jnp.any(preempted), preempted, phases == WAITING)
    best = jnp.min(jnp.where(eligible, ranks, FURTHEST))
    arrivals = jnp.where(eligible & (ranks == best), requests.arrivals, FURTHEST)
    request = jnp.argmin(arrivals).astype(jnp.int32)

    empty = batch.slots == phases.shape[0]
    in_group = requests.groups == requests.groups[request]
    siblings = eligible & in_group
    follows = jnp.any(in_group & (phases == RUNNING))
    enough = jnp.sum(empty, dtype=jnp.int32) >= jnp.sum(siblings, dtype=jnp.int32)
    # What is found cached only makes it less.
    count = _first_count(batch, request, jnp.asarray(0, jnp.int32), config)
    return _Candidate(
        request=request,
        row=jnp.argmax(empty).astype(jnp.int32),
        siblings=siblings,
        follows=follows,
        possible=jnp.any(eligible) & enough & ((count > 0) | follows),
    )


def _first_count(
    batch: Batch, request: jax.Array, computed: jax.Array, config: EngineConfig
) -> jax.Array:
    """Tokens that a request brings to the step that admits it, of which `computed` are found."""
    requests = batch.requests
    known = own_pace(requests)[request]
    tokens = wanted(known, computed, requests.prompt_lens[request], config)
    return whole_or_part(tokens, config.token_budget - jnp.sum(batch.counts), config)


def _prompt_of(
    batch: Batch, candidate: _Candidate, config: EngineConfig
) -> tuple[Prompt, jax.Array]:
    """What the candidate asks of the allocator, and the pages that are owed to others.

    Its siblings are owed what they will hold beside the prompt's full pages. Who follows a sibling
    asks for nothing: it was among those.
    """
    requests, request = batch.requests, candidate.request
    owed = owed_pages(batch, batch.slots < requests.phases.shape[0], config)
    every = pages_soon(requests.num_tokens, requests.final_lens, config)
    others = every - requests.prompt_lens // config.page_size
    is_other = candidate.siblings.at[request].set(False)
    owed += jnp.sum(jnp.where(is_other, others, 0))

    def unless_it_follows(value: jax.Array, else_: int) -> jax.Array:
        return jnp.where(candidate.follows, else_, value)

    prompt = Prompt(
        tokens=requests.tokens[request],
        num_tokens=unless_it_follows(requests.num_tokens[request], 1),
        salt=requests.salts[request],
        soon=unless_it_follows(every[request] * config.page_size, 0),
        reserved=requests.reserved_lens[request],
    )
    return prompt, unless_it_follows(owed, 0)


def _seat(
    batch: Batch, candidate: _Candidate, found: Found, admitted: jax.Array, num_pages: int
) -> Batch:
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
