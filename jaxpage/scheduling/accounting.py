"""Where the KV memory is, at every step, in the paper's four categories (its section 3.1, Fig 2).

All are in tokens of the pool and add up to it: *token states*; *reservation*, memory that its
sequence will use later; *internal* fragmentation, memory reserved past what its sequence will
ever use; *external* fragmentation and other, memory that no reservation covers while requests
wait, with what the buddy system rounds up. Memory that is free when nobody waits is `idle`: no
waste, and not in the paper, whose traces keep the system full.
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
    token_states: jax.Array
    reservation: jax.Array
    internal: jax.Array
    external: jax.Array
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
        num_copied=jnp.sum(plan.targets < table.num_pages, dtype=jnp.int32),
        **waste,
    )


def measure_memory(
    table: Table, final_lens: jax.Array, slots: jax.Array, num_waiting: jax.Array
) -> dict[str, jax.Array]:
    """The five shares of the pool, in tokens, `i32[]` each; they add up to `P * S`."""
    final = final_lens.at[slots].get(mode="fill", fill_value=0)
    # A prompt in the middle of its chunks may hold less than it will need: min, not final.
    usable = jnp.minimum(jnp.maximum(final, table.lengths), table.reserved_tokens)
    token_states = jnp.sum(table.lengths)
    reservation = jnp.sum(usable - table.lengths)
    internal = jnp.sum(table.reserved_tokens - usable)
    rounding = jnp.sum(table.held_pages * table.page_size - table.reserved_tokens)
    free = table.num_free * table.page_size
    waits = num_waiting > 0
    return {
        "token_states": token_states,
        "reservation": reservation,
        "internal": internal,
        "external": rounding + jnp.where(waits, free, 0),
        "idle": jnp.where(waits, 0, free),
    }
