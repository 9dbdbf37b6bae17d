"""Where the KV memory is, at every step, in the paper's four categories (its section 3.1, Fig 2).

All are in tokens of the pool and add up to it: *token states*; *reservation*, memory that its
sequence will use later; *internal* fragmentation, memory reserved past what its sequence will
ever use; *external* fragmentation and other, memory that no reservation covers while requests
wait, with what the buddy system rounds up. Memory that is free when nobody waits is `idle`: no
waste, and not in the paper, whose traces keep the system full. Nor has it `cached` memory, pages
of sequences that ended, kept for those that begin alike and given up when they are needed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpage.paging.allocator import Table
from jaxpage.scheduling.state import PREEMPTED, WAITING, SchedulerState
from jaxpage.scheduling.step import Plan


class StepRecord(NamedTuple):
    """What one step did and where the memory was when it ran; all `i32[]`."""

    step: jax.Array
    num_tokens: jax.Array
    num_sampled: jax.Array
    num_running: jax.Array
    num_waiting: jax.Array
    num_preempted: jax.Array
    num_copied: jax.Array  # pages
    num_found: jax.Array  # tokens that admitted sequences found in the prefix cache
    num_recomputed: jax.Array  # tokens that had been computed before
    num_paused: jax.Array  # sequences with pages on the host
    held_pages: jax.Array  # of the pool, in use
    named_pages: jax.Array  # the same if what several sequences hold counts for each
    host_pages: jax.Array  # of the host, that sequences hold
    host_cached: jax.Array  # pages of the host that none holds, kept for those that begin alike
    moved_out: jax.Array  # pages
    moved_in: jax.Array  # pages
    token_states: jax.Array
    reservation: jax.Array
    internal: jax.Array
    external: jax.Array
    cached: jax.Array
    idle: jax.Array


def record_step(state: SchedulerState, plan: Plan) -> StepRecord:
    """The record of a step that is planned and not yet committed.

    With a request that may stop by EOS its limit stands in for the length it will have.
    """
    requests, table = state.requests, state.table
    phases = requests.phases
    num_waiting = jnp.sum((phases == WAITING) | (phases == PREEMPTED), dtype=jnp.int32)
    waste = measure_memory(table, requests.final_lens, state.slots, num_waiting)
    return StepRecord(
        step=state.step,
        num_tokens=plan.num_tokens,
        num_sampled=jnp.sum(plan.samples, dtype=jnp.int32),
        num_running=jnp.sum(state.running, dtype=jnp.int32),
        num_waiting=num_waiting,
        num_preempted=plan.num_preempted,
        num_copied=plan.copies.count,
        num_found=plan.num_found,
        num_recomputed=plan.num_recomputed,
        num_paused=jnp.sum(table.num_hosted > 0, dtype=jnp.int32),
        held_pages=table.num_pages - table.num_free - table.num_cached,
        named_pages=jnp.sum(table.held_pages - table.num_hosted),
        host_pages=table.num_host_held,
        host_cached=table.num_host_cached,
        moved_out=plan.moves_out.count,
        moved_in=plan.moves_in.count,
        **waste,
    )


def measure_memory(
    table: Table, final_lens: jax.Array, slots: jax.Array, num_waiting: jax.Array
) -> dict[str, jax.Array]:
    """The six shares of the pool, in tokens, `i32[]` each; they add up to `P * S`.

    What several sequences hold counts once.
    """
    final = final_lens.at[slots].get(mode="fill", fill_value=0)
    # A prompt in the middle of its chunks may hold less than it will need: min, not final.
    usable = jnp.minimum(jnp.maximum(final, table.lengths), table.reserved_tokens)

    def tokens(of_row: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(table.is_first_holder, of_row, 0))

    reservation = tokens(usable - table.lengths)
    internal = tokens(table.reserved_tokens - usable)
    rounding = tokens(table.held_pages * table.page_size - table.reserved_tokens)
    free, cached = table.num_free * table.page_size, table.num_cached * table.page_size
    in_use = table.num_pages * table.page_size - free - cached
    waits = num_waiting > 0
    return {
        "token_states": in_use - reservation - internal - rounding,
        "reservation": reservation,
        "internal": internal,
        "external": rounding + jnp.where(waits, free, 0),
        "cached": cached,
        "idle": jnp.where(waits, 0, free),
    }
