"""Many steps at once: runs of decode steps in which nothing can change but lengths.

After a step in which every running sequence decoded, none ended and none made way, the next is the
same with one token more each, until one ends, another arrives, or pages run out: whoever waits
could not be admitted, and needs what only an end can give. Such steps are priced and recorded one
by one, and planned not at all; the table then takes their tokens in one go. Only the numbers of
pages differ from what steps taken singly give, which nothing here reads.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxpage.config import EngineConfig
from jaxpage.paging.allocator import Allocator, Table
from jaxpage.paging.page_table import PageTable, num_pages_for
from jaxpage.scheduling.accounting import StepRecord, measure_memory
from jaxpage.scheduling.batch import of_slots
from jaxpage.scheduling.state import SchedulerState
from jaxpage.scheduling.step import Plan
from jaxpage.sim import clock
from jaxpage.sim.clock import Time
from jaxpage.sim.cost_model import Load, load_of
from jaxpage.sim.step_log import Step, StepLog, write

PriceFn = Callable[[Load], jax.Array]


def can_run(config: EngineConfig, allocator: Allocator) -> bool:
    """Whether any steps may be taken together.

    Full pages enter a prefix cache step by step, and beams are pruned in each.
    """
    return not allocator.caches and config.max_beams == 1


def is_steady(before: SchedulerState, plan: Plan, after: SchedulerState) -> jax.Array:
    """Whether the step from `before` was such that the next may begin a run, `bool[]`.

    `before` is planned, and `after` committed.
    """
    decodes = jnp.where(before.running, (plan.counts == 1) & plan.samples, True)
    none_ended = jnp.all(before.slots == after.slots) & jnp.any(after.running)
    return jnp.all(decodes) & none_ended & (plan.num_preempted == 0) & ~_any_paused(after.table)


def _any_paused(table: Table) -> jax.Array:
    return jnp.any(table.num_hosted > 0)


def run_ahead(
    scheduler: SchedulerState,
    log: StepLog,
    now: Time,
    steady: jax.Array,
    arrives: Callable[[Time], jax.Array],
    price: PriceFn,
    config: EngineConfig,
    allocator: Allocator,
) -> tuple[SchedulerState, StepLog, Time]:
    """The state, log and time after as many steps as are sure to be alike; none unless `steady`.

    `arrives(now)` says whether somebody would get a row. At least one row of the log is left.
    """
    running, lengths = scheduler.running, scheduler.table.lengths
    one_each = running.astype(jnp.int32)
    left = of_slots(scheduler.requests.final_lens - scheduler.requests.num_tokens, scheduler.slots)
    furthest = jnp.min(jnp.where(running, left, jnp.iinfo(jnp.int32).max)) - 1
    furthest = jnp.where(steady, furthest, 0)
    rows = log.steps.seconds.shape[0]
    last = jax.tree.map(lambda column: column[jnp.maximum(log.count - 1, 0)], log.steps.record)
    none = jnp.asarray(0, jnp.int32)

    def goes_on(carry):
        done, log, now = carry
        pages = _new_pages(scheduler.table, (done + 1) * one_each)
        has_pages = pages <= jnp.minimum(scheduler.table.num_free, config.most_new_pages)
        return (done < furthest) & (log.count < rows - 1) & has_pages & ~arrives(now)

    def step(carry):
        done, log, now = carry
        counts = (done + 1) * one_each
        seconds = price(load_of(one_each, lengths + counts, running, none, none))
        now = clock.after(now, seconds)
        record = _record(scheduler, counts, scheduler.step + done, last)
        return done + 1, write(log, Step(record, seconds, now)), now

    done, log, now = lax.while_loop(goes_on, step, (none, log, now))

    def take(carry):
        left, scheduler = carry
        counts = left * one_each
        table, _ = allocator.append(scheduler.table, counts, config.most_new_pages)
        requests, slots = scheduler.requests, scheduler.slots
        requests = requests.replace(
            num_tokens=requests.num_tokens.at[slots].add(counts, mode="drop"),
            computed_lens=requests.computed_lens.at[slots].max(lengths + counts, mode="drop"),
        )
        scheduler = scheduler.replace(table=table, requests=requests, step=scheduler.step + left)
        return none, scheduler

    # A loop of no turn or one: a branch would copy the table.
    scheduler = lax.while_loop(lambda carry: carry[0] > 0, take, (done, scheduler))[1]
    return scheduler, log, now


def _new_pages(table: Table, counts: jax.Array) -> jax.Array:
    """Pages that rows take for `counts: i32[B]` more tokens, `i32[]`."""
    if not isinstance(table, PageTable):  # all was reserved
        return jnp.asarray(0, jnp.int32)
    later = num_pages_for(table.lengths + counts, table.page_size)
    return jnp.sum(later - table.held_pages)


def _record(
    scheduler: SchedulerState, counts: jax.Array, step: jax.Array, last: StepRecord
) -> StepRecord:
    """Of a step at whose end rows have `counts: i32[B]` more tokens, after one recorded `last`."""
    table, requests = scheduler.table, scheduler.requests
    pages = _new_pages(table, counts)
    changes = {"num_free": table.num_free - pages} if isinstance(table, PageTable) else {}
    table = table.replace(lengths=table.lengths + counts, **changes)
    none = jnp.asarray(0, jnp.int32)
    memory = measure_memory(table, requests.final_lens, scheduler.slots, last.num_waiting)
    return last._replace(
        step=step,
        num_preempted=none,
        num_copied=none,
        num_found=none,
        num_recomputed=none,
        held_pages=table.num_pages - table.num_free - table.num_cached,
        named_pages=jnp.sum(table.held_pages - table.num_hosted),
        moved_out=none,
        moved_in=none,
        **memory,
    )
