"""Ending a request because nobody waits for it any more, between two steps."""

import jax
import jax.numpy as jnp

from jaxpage.paging.allocator import Allocator
from jaxpage.scheduling.batch import of_slots, sequences_of
from jaxpage.scheduling.state import CANCELLED, DONE, FREE, SchedulerState


def cancel(state: SchedulerState, row: jax.Array, allocator: Allocator) -> SchedulerState:
    """Ends all sequences of the request that has row `row` of the queue; nobody's for `R`.

    What they have of tokens stays to be read. Their pages are given back, wherever they are; full
    ones stay in the prefix index, if there is one.
    """
    requests = state.requests
    nobody = requests.phases.shape[0]
    group = requests.groups.at[row].get(mode="fill", fill_value=nobody)
    ours = (requests.groups == group) & (requests.phases != FREE) & (requests.phases != DONE)
    ends = of_slots(ours, state.slots)
    requests = requests.replace(
        phases=jnp.where(ours, DONE, requests.phases),
        finish_reasons=jnp.where(ours, CANCELLED, requests.finish_reasons),
    )
    table = allocator.enter_computed(state.table, sequences_of(state), ends)
    return state.replace(
        requests=requests,
        table=allocator.release(table, ends),
        slots=jnp.where(ends, nobody, state.slots),
    )
