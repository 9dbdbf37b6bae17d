"""A step in the making: who runs, with what pages, and how many tokens each brings."""

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxpage.config import EngineConfig
from jaxpage.paging.allocator import Allocator, Table
from jaxpage.paging.copies import Copies
from jaxpage.paging.entering import Sequences
from jaxpage.paging.page_table import num_pages_for
from jaxpage.scheduling.state import Requests, SchedulerState


class Batch(struct.PyTreeNode):
    """What is planned so far."""

    table: Table
    requests: Requests
    slots: jax.Array  # i32[B]
    counts: jax.Array  # i32[B]
    copies: Copies
    num_found: jax.Array  # i32[]


def of_slots(values: jax.Array, requests: jax.Array) -> jax.Array:
    """`values[requests]`, and 0 for slots without a request."""
    return values.at[requests].get(mode="fill", fill_value=0)


def leaders(slots: jax.Array, groups: jax.Array) -> jax.Array:
    """For each slot the first slot with a sequence of the same request, itself if it is that.

    `slots: i32[B]` names the sequences, `groups: i32[R]` says which belong together; `i32[B]`.
    """
    num_slots = slots.shape[0]
    index = jnp.arange(num_slots, dtype=jnp.int32)
    group = groups.at[slots].get(mode="fill", fill_value=groups.shape[0])
    first = jnp.full(groups.shape, num_slots, jnp.int32).at[group].min(index, mode="drop")
    return first.at[group].get(mode="fill", fill_value=num_slots)


def followers(slots: jax.Array, groups: jax.Array, lengths: jax.Array) -> jax.Array:
    """Slots whose sequence waits for its leader to compute the prompt of both, `bool[B]`."""
    index = jnp.arange(slots.shape[0], dtype=jnp.int32)
    return (lengths == 0) & (leaders(slots, groups) < index)


def pages_soon(known: jax.Array, final: jax.Array, config: EngineConfig) -> jax.Array:
    """Pages of sequences with `known` tokens, and of the headroom as far as they can need it."""
    headroom = config.headroom_pages * config.page_size
    # The token that ends a sequence is never computed.
    soon = jnp.maximum(known, jnp.minimum(known + headroom, final - 1))
    return num_pages_for(soon, config.page_size)


def owed_pages(batch: Batch, rows: jax.Array, config: EngineConfig) -> jax.Array:
    """Pages that `rows: bool[B]` still need for what they know, and for the headroom: `i32[]`.

    Those of theirs that are on the host count, once each.
    """
    requests, table = batch.requests, batch.table

    def of_rows(values: jax.Array) -> jax.Array:
        return of_slots(values, batch.slots)

    waits = followers(batch.slots, requests.groups, table.lengths)
    will_share = jnp.where(waits, of_rows(requests.prompt_lens) // config.page_size, 0)
    to_copy = ~table.is_first_holder & (table.lengths % config.page_size != 0)
    soon = pages_soon(of_rows(requests.num_tokens), of_rows(requests.final_lens), config)
    owed = soon - table.held_pages - will_share + to_copy.astype(jnp.int32)
    return jnp.sum(jnp.where(rows, owed, 0)) + pages_on_host(table, rows, config)


def pages_on_host(table: Table, rows: jax.Array, config: EngineConfig) -> jax.Array:
    """Pages of `rows: bool[B]` that are on the host, `i32[]`; what several hold counts once."""
    nothing = jnp.asarray(0, jnp.int32)
    if config.host_pages == 0:
        return nothing

    def count():
        entries = jnp.where(rows[:, None], table.page_indices, table.null)
        entries = jnp.where(table.tier.is_hosted(entries), entries, table.null)
        is_named = jnp.zeros((table.null,), jnp.bool_).at[entries].set(True, mode="drop")
        return jnp.sum(is_named, dtype=jnp.int32)

    return lax.cond(jnp.any(rows & (table.num_hosted > 0)), count, lambda: nothing)


def own_pace(requests: Requests) -> jax.Array:
    """Tokens that each sequence may compute without regard to others of its request, `i32[R]`.

    The last token of a beam that has output is left: the search computes all of them in one step.
    """
    has_output = requests.num_tokens > requests.prompt_lens
    is_last = (requests.beams.widths > 0) & has_output
    return requests.num_tokens - is_last.astype(jnp.int32)


def wanted(known: jax.Array, computed: jax.Array, prompt: jax.Array, config: EngineConfig):
    """Tokens that a sequence would take now if the budget were its own.

    With `batch_invariant` these never depend on anyone else: a prompt goes in chunks
    between fixed positions, and output tokens go one by one, even when computed again.
    """
    if not config.batch_invariant:
        return known - computed
    chunk = max(config.token_budget // 2, 1)
    whole = jnp.minimum(chunk - computed % chunk, prompt - computed)
    return jnp.where(computed < prompt, whole, jnp.minimum(known - computed, 1))


def whole_or_part(tokens: jax.Array, left: jax.Array, config: EngineConfig) -> jax.Array:
    """What a sequence gets of the `left` tokens: with `batch_invariant`, all it wants or none."""
    if config.batch_invariant:
        return jnp.where(tokens <= left, tokens, 0)
    return jnp.minimum(tokens, left)


def take_pages(
    batch: Batch, counts: jax.Array, config: EngineConfig, allocator: Allocator
) -> Batch:
    """Gives the rows pages for `counts` more tokens."""
    table, taken = allocator.append(batch.table, counts, config.most_new_pages)
    return batch.replace(
        table=table,
        counts=batch.counts + counts,
        copies=batch.copies.then(taken.sources, taken.targets, config.num_pages),
    )


def sequences_of(state: SchedulerState | Batch) -> Sequences:
    """What the rows of the table hold."""
    requests = state.requests
    return Sequences(tokens=requests.tokens, salts=requests.salts, rows=state.slots)


def make_findable(batch: Batch, allocator: Allocator) -> Batch:
    """Lets others find all pages that are full, with those that become so in this step."""
    return batch.replace(table=allocator.enter(batch.table, sequences_of(batch), batch.counts))
