"""What happens when pages run out: who makes way, and how what they computed comes back.

The last sequences in the policy's order make way, as few of them as let the others go on, and with
each all of its request. What becomes of them is a mode:

- `recompute`: they give up all pages and their slot, and are computed again.
- `swap`: all of their pages go to the host, and come back together (Kwon et al. 2023, section 4.5).
- `fine`: only as many pages go as the others need, and no more a step than the transfer budget.
- `auto`: `recompute` for those whose tokens are computed again in less time than their pages take
  to the host and back, at the configuration's prices, and `fine` for the others.

Whoever has pages on the host is *paused*: it keeps its slot and what pages it has left, and goes on
when all are back. If the host is full, `recompute` takes the place of the others.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpage.config import EngineConfig
from jaxpage.paging.allocator import Allocator, Table
from jaxpage.paging.page_table import num_pages_for
from jaxpage.paging.tiers import Movable, TierOps
from jaxpage.scheduling.batch import Batch, of_slots, owed_pages, pages_on_host
from jaxpage.scheduling.state import PREEMPTED, SchedulerState


class Way(NamedTuple):
    """What `make_way` decided."""

    counts: jax.Array  # i32[B], tokens of the rows that go on
    is_short: jax.Array  # bool[], some had to make way
    num_preempted: jax.Array  # i32[], sequences that lost pages


def with_siblings(rows: jax.Array, state: SchedulerState | Batch) -> jax.Array:
    """`rows: bool[B]`, and all that run for the same requests."""
    groups = state.requests.groups
    group = groups.at[state.slots].get(mode="fill", fill_value=groups.shape[0])
    chosen = jnp.zeros(groups.shape, jnp.bool_)
    chosen = chosen.at[jnp.where(rows, group, groups.shape[0])].set(True, mode="drop")
    return chosen.at[group].get(mode="fill", fill_value=False)


def paused(state: SchedulerState | Batch, config: EngineConfig) -> jax.Array:
    """Rows that wait for pages of theirs, or of their request, to come back: `bool[B]`."""
    if config.host_pages == 0:
        return jnp.zeros(state.slots.shape, jnp.bool_)
    return with_siblings(state.table.num_hosted > 0, state)


def make_way(
    state: SchedulerState,
    order: jax.Array,
    counts: jax.Array,
    config: EngineConfig,
    allocator: Allocator,
) -> tuple[SchedulerState, Way]:
    """Lets the first rows in `order` append `counts: i32[B]`, maybe at the cost of the last."""
    victims = with_siblings(state.running & ~allocator.fitting(state.table, order, counts), state)
    before, lost = state.table.num_hosted, victims
    if config.host_pages > 0:
        back, others = _back_at_once(state, order, config)
        victims |= others
        counts = jnp.where(victims, 0, counts)
        if config.preemption != "recompute":
            again = _cheaper_again(state, victims, config)
            if config.prices is not None:
                state = state.replace(table=allocator.release(state.table, again))
            moving = victims & ~again
            table, counts, fails = lax.cond(
                jnp.any(moving),
                lambda: _move_out(state, order, moving, counts, back, config, allocator),
                lambda: (state.table, counts, jnp.asarray(False)),
            )
            state = state.replace(table=table)
            lost = again | (moving & fails)
    made_way = lost | ((state.table.num_hosted > 0) & (before == 0))
    sequences = jnp.where(made_way, state.slots, state.requests.phases.shape[0])
    num_preemptions = state.requests.num_preemptions.at[sequences].add(1, mode="drop")
    state = state.replace(requests=state.requests.replace(num_preemptions=num_preemptions))
    way = Way(
        counts=jnp.where(victims, 0, counts),
        is_short=jnp.any(victims),
        num_preempted=jnp.sum(made_way, dtype=jnp.int32),
    )
    return _compute_again(state, lost, allocator), way


def may_make_way(state: SchedulerState) -> jax.Array:
    """Rows that the next step may preempt, `bool[B]`: none, or all if pages could run out.

    Each may need pages for all that it knows, and one more: in place of a page that it shares, or
    for a token that its search is about to append.
    """
    table = state.table
    known = of_slots(state.requests.num_tokens, state.slots)
    most = num_pages_for(known, table.page_size) - table.held_pages + 1
    is_short = jnp.sum(jnp.where(state.running, most, 0)) > _available(table)
    return state.running & (is_short | jnp.any(table.num_hosted > 0))


def _back_at_once(
    state: SchedulerState, order: jax.Array, config: EngineConfig
) -> tuple[jax.Array, jax.Array]:
    """If all are paused, how many pages the first needs back; and who makes way for them.

    That is `i32[]`, and `bool[B]`: all others, if so many cannot be had.
    """

    def some_wait():
        waits = paused(state, config)
        first = with_siblings(_first(waits, order), state)
        all_wait = ~jnp.any(state.running & ~waits)
        back = jnp.where(all_wait, pages_on_host(state.table, first, config), 0)
        return back, state.running & ~first & (back > _available(state.table))

    def nobody_waits():
        return jnp.asarray(0, jnp.int32), jnp.zeros_like(state.running)

    return lax.cond(jnp.any(state.table.num_hosted > 0), some_wait, nobody_waits)


def _cheaper_again(state: SchedulerState, victims: jax.Array, config: EngineConfig) -> jax.Array:
    """Those of `victims: bool[B]` that are computed again in less time than their pages move.

    All that run for a request make way alike. What others share with it, or the prefix cache would
    give back, counts as if it had to be computed, and be moved.
    """
    prices = config.prices
    if prices is None:
        return jnp.zeros_like(victims)
    table = state.table
    tokens = table.lengths.astype(jnp.float32)
    again_s = prices.token_s * tokens + prices.pair_s * tokens * (tokens + 1) / 2
    # Those on the host have only the way back before them.
    ways = 2 * num_pages_for(table.lengths, config.page_size) - table.num_hosted
    groups = state.requests.groups
    slots = jnp.where(victims, state.slots, groups.shape[0])
    group = groups.at[slots].get(mode="fill", fill_value=groups.shape[0])
    saved_s = prices.page_s * ways.astype(jnp.float32) - again_s
    saved_s = jnp.zeros(groups.shape, jnp.float32).at[group].add(saved_s, mode="drop")
    return victims & (saved_s.at[group].get(mode="fill", fill_value=0) > 0)


def bring_back(
    batch: Batch, order: jax.Array, may_move: jax.Array, config: EngineConfig, allocator: Allocator
) -> Batch:
    """Moves pages of paused requests back, in order, of each if all find room beside the others.

    Nobody computes with them before the next step, so they may arrive while this one runs.
    """
    if config.host_pages == 0:
        return batch
    ops = _tier_of(allocator)

    def next_first(batch: Batch, left: jax.Array):
        """The next request to bring back, and how many of its pages."""
        waits = paused(batch, config)
        running = batch.slots < batch.requests.phases.shape[0]
        first, others = with_siblings(_first(waits, order), batch), running & ~waits
        hosted = pages_on_host(batch.table, first, config)
        rooms = owed_pages(batch, others | first, config) <= _available(batch.table)
        rooms |= ~jnp.any(others) & (hosted <= _available(batch.table))
        return first, jnp.where(rooms & jnp.any(waits), jnp.minimum(hosted, left), 0)

    def bring_next(carry):
        batch, left, (first, count) = carry
        count = jnp.minimum(count, batch.table.num_free)

        def move_one(_, table):
            row = jnp.argmax(first & (table.num_hosted > 0)).astype(jnp.int32)
            column = jnp.argmax(table.tier.is_hosted(table.page_indices[row])).astype(jnp.int32)
            return ops.move_in(table, row, column)

        batch = batch.replace(table=lax.fori_loop(0, count, move_one, batch.table))
        # Who does not get all that it may have ends the line: nobody overtakes.
        left = jnp.where(count < carry[2][1], 0, left - count)
        return batch, left, next_first(batch, left)

    def bring_all():
        left = jnp.asarray(config.moves_at_most, jnp.int32)
        first, count = next_first(batch, left)
        # Cached pages leave for all of them before any page is back: see `HostTier`.
        hosted = pages_on_host(batch.table, batch.table.num_hosted > 0, config)
        room = jnp.where(count > 0, jnp.minimum(hosted, left), 0)
        ready = batch.replace(table=ops.make_room(batch.table, room))
        start = (ready, left, (first, count))
        return lax.while_loop(lambda carry: carry[2][1] > 0, bring_next, start)[0]

    waits = jnp.any(batch.table.num_hosted > 0)
    return lax.cond(may_move & waits, bring_all, lambda: batch)


def _move_out(
    state: SchedulerState,
    order: jax.Array,
    victims: jax.Array,
    counts: jax.Array,
    back: jax.Array,
    config: EngineConfig,
    allocator: Allocator,
) -> tuple[Table, jax.Array, jax.Array]:
    """Moves pages of the victims to the host: the last victim's first, from its end.

    `back` pages are needed beside those for `counts`. Returns the counts of the rows that can go
    on, which the transfer budget may hold up, and whether the host had no room.
    """
    ops = _tier_of(allocator)
    # Cached pages would leave anyway, and could be what follows a victim's page in the index.
    table = ops.make_room(state.table, jnp.asarray(config.num_pages, jnp.int32))
    demand = ops.demand(table, counts)
    need = jnp.sum(demand) + back - _available(table)
    limit = jnp.asarray(config.moves_at_most, jnp.int32)
    if config.moves_pages:
        limit = jnp.minimum(need, jnp.maximum(limit - table.tier.outs.count, 0))
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=jnp.int32))

    def next_entry(table: Table, entries: Movable):
        has_any = jnp.any(entries.now, axis=1)
        row = jnp.argmax(jnp.where(has_any, rank, -1)).astype(jnp.int32)
        column = jnp.max(jnp.where(entries.now[row], jnp.arange(entries.now.shape[1]), 0))
        has_room = table.tier.num_free + table.num_host_cached > 0
        return row, column.astype(jnp.int32), jnp.any(has_any) & has_room

    def is_left(carry):
        _, _, num_moved, (_, _, is_there) = carry
        return is_there & (num_moved < limit)

    def move_one(carry):
        table, entries, num_moved, (row, column, _) = carry
        page = table.page_indices[row, column]
        table = ops.move_out(table, row, column)
        entries = ops.moved(table, entries, page)
        return table, entries, num_moved + 1, next_entry(table, entries)

    entries = ops.movable(table, victims)
    start = (table, entries, jnp.asarray(0, jnp.int32), next_entry(table, entries))
    table, _, num_moved, _ = lax.while_loop(is_left, move_one, start)

    fails = num_moved < jnp.minimum(need, limit)
    stalls = jnp.zeros_like(demand, jnp.bool_)
    stalls = stalls.at[order].set(jnp.cumsum(demand[order]) > _available(table))
    counts = jnp.where(with_siblings(stalls & ~fails, state), 0, counts)
    return table, counts, fails


def _compute_again(state: SchedulerState, rows: jax.Array, allocator: Allocator) -> SchedulerState:
    """Takes all pages of `rows: bool[B]` and puts them back in line."""
    requests, nobody = state.requests, state.requests.phases.shape[0]
    sequences = jnp.where(rows, state.slots, nobody)
    requests = requests.replace(phases=requests.phases.at[sequences].set(PREEMPTED, mode="drop"))
    return state.replace(
        requests=requests,
        table=allocator.release(state.table, rows),
        slots=jnp.where(rows, nobody, state.slots),
    )


def _available(table: Table) -> jax.Array:
    """Pages that can be had at once, `i32[]`."""
    return table.num_free + table.num_cached


def _first(rows: jax.Array, order: jax.Array) -> jax.Array:
    """The first of `rows: bool[B]` in the order, alone; `bool[B]`."""
    first = order[jnp.argmax(rows[order])]
    return jnp.zeros_like(rows).at[first].set(rows[first])


def _tier_of(allocator: Allocator) -> TierOps:
    assert allocator.tier is not None  # `scheduling.state.create` refuses a host tier without
    return allocator.tier
