"""What happens when pages run out: who makes way, and how what they computed comes back.

The last sequences in the policy's order make way, as few of them as let the others go on, and with
each all of its request. What becomes of them is a mode:

- `recompute`: they give up all pages and their slot, and are computed again.
- `swap`: all of their pages go to the host, and come back together (Kwon et al. 2023, section 4.5).
- `fine`: only as many pages go as the others need, and no more a step than the transfer budget.

Whoever has pages on the host is *paused*: it keeps its slot and what pages it has left, and goes on
when all are back. If the host is full, `recompute` takes the place of the others.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpage.config import EngineConfig
from jaxpage.paging import tiers
from jaxpage.paging.allocator import Allocator, Table
from jaxpage.paging.tiers import HostTier, TierOps
from jaxpage.scheduling.batch import Batch, Copies, owed_pages
from jaxpage.scheduling.state import PREEMPTED, SchedulerState


class Way(NamedTuple):
    """What `make_way` decided."""

    counts: jax.Array  # i32[B], tokens of the rows that go on
    moves: Copies  # from pages of the pool to pages of the host
    is_short: jax.Array  # bool[], some had to make way
    num_preempted: jax.Array  # i32[], sequences that lost pages


def with_siblings(rows: jax.Array, state: SchedulerState) -> jax.Array:
    """`rows: bool[B]`, and all that run for the same requests."""
    groups = state.requests.groups
    group = groups.at[state.slots].get(mode="fill", fill_value=groups.shape[0])
    chosen = jnp.zeros(groups.shape, jnp.bool_)
    chosen = chosen.at[jnp.where(rows, group, groups.shape[0])].set(True, mode="drop")
    return chosen.at[group].get(mode="fill", fill_value=False)


def paused(state: SchedulerState, config: EngineConfig) -> jax.Array:
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
    moves, before = Copies.none(config.moves_at_most, config.host_pages), state.table.num_hosted
    lost = victims
    if config.host_pages > 0:
        # If all are paused, the first needs its pages back, if need be from the others.
        waits = paused(state, config)
        first = with_siblings(_first(waits, order), state)
        all_wait = jnp.any(waits) & ~jnp.any(state.running & ~waits)
        wanted_back = lax.cond(
            all_wait,
            lambda: _num_hosted(state, first, config),
            lambda: jnp.asarray(0, jnp.int32),
        )
        victims |= state.running & ~first & (wanted_back > _available(state.table))
        counts = jnp.where(victims, 0, counts)
        table, tier, moves, counts, fails = lax.cond(
            jnp.any(victims),
            lambda: _take(state, order, victims, counts, wanted_back, moves, config, allocator),
            lambda: (state.table, state.tier, moves, counts, jnp.asarray(False)),
        )
        state = state.replace(table=table, tier=tier)
        lost = victims & fails
    made_way = lost | ((state.table.num_hosted > 0) & (before == 0))
    sequences = jnp.where(made_way, state.slots, state.requests.phases.shape[0])
    num_preemptions = state.requests.num_preemptions.at[sequences].add(1, mode="drop")
    state = state.replace(requests=state.requests.replace(num_preemptions=num_preemptions))
    way = Way(
        counts=jnp.where(victims, 0, counts),
        moves=moves,
        is_short=jnp.any(victims),
        num_preempted=jnp.sum(made_way, dtype=jnp.int32),
    )
    return _compute_again(state, lost, config, allocator), way


def bring_back(
    state: SchedulerState,
    batch: Batch,
    order: jax.Array,
    may_move: jax.Array,
    config: EngineConfig,
    allocator: Allocator,
) -> tuple[Table, HostTier, Copies]:
    """Moves pages of the first paused request back, if all of them find room beside the others.

    Nobody computes with them before the next step, so they may arrive while this one runs.
    """
    back = Copies.none(config.moves_at_most, config.num_pages)
    if config.host_pages == 0:
        return batch.table, state.tier, back
    ops = _tier_of(allocator)
    waits = paused(state, config)
    first = with_siblings(_first(waits, order), state)

    def move_back():
        others = state.running & ~waits
        hosted = _num_hosted(state, first, config)
        soon = hosted + owed_pages(batch, others | first, config)
        rooms = soon <= _available(batch.table)
        rooms |= ~jnp.any(others) & (hosted <= _available(batch.table))

        def is_left(carry):
            table, _, back = carry
            return jnp.any(first & (table.num_hosted > 0)) & (back.count < limit)

        def move_one(carry):
            table, tier, back = carry
            row = jnp.argmax(first & (table.num_hosted > 0)).astype(jnp.int32)
            column = jnp.argmax(table.page_indices[row] > config.num_pages).astype(jnp.int32)
            table, tier, moved = ops.move_in(table, tier, row, column)
            return table, tier, back.then(moved.host_page, moved.page, config.num_pages)

        limit = jnp.where(rooms, config.moves_at_most, 0)
        return lax.while_loop(is_left, move_one, (batch.table, state.tier, back))

    return lax.cond(may_move & jnp.any(waits), move_back, lambda: (batch.table, state.tier, back))


def _take(
    state: SchedulerState,
    order: jax.Array,
    victims: jax.Array,
    counts: jax.Array,
    wanted_back: jax.Array,
    moves: Copies,
    config: EngineConfig,
    allocator: Allocator,
) -> tuple[Table, HostTier, Copies, jax.Array, jax.Array]:
    """Moves pages of the victims to the host: the last victim's first, from its end.

    Returns the counts of the rows that can go on, which the transfer budget may hold up, and
    whether the host had no room.
    """
    ops = _tier_of(allocator)
    # Cached pages would leave anyway, and could be what follows a victim's page in the index.
    table = ops.make_room(state.table, jnp.asarray(config.num_pages, jnp.int32))
    demand = ops.demand(table, counts)
    need = jnp.sum(demand) + wanted_back - _available(table)
    limit = jnp.minimum(need, config.moves_at_most) if config.preemption == "fine" else None
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=jnp.int32))

    def next_entry(table: Table, tier: HostTier):
        entries = ops.movable(table, victims)
        has_any = jnp.any(entries, axis=1)
        row = jnp.argmax(jnp.where(has_any, rank, -1)).astype(jnp.int32)
        column = jnp.max(jnp.where(entries[row], jnp.arange(entries.shape[1]), 0))
        return row, column.astype(jnp.int32), jnp.any(has_any) & (tier.num_free > 0)

    def is_left(carry):
        _, _, moves, (_, _, is_there) = carry
        return is_there if limit is None else is_there & (moves.count < limit)

    def take_one(carry):
        table, tier, moves, (row, column, _) = carry
        table, tier, moved = ops.move_out(table, tier, row, column)
        moves = moves.then(moved.page, moved.host_page, config.host_pages)
        return table, tier, moves, next_entry(table, tier)

    start = (table, state.tier, moves, next_entry(table, state.tier))
    table, tier, moves, _ = lax.while_loop(is_left, take_one, start)

    fails = (moves.count < need) & (moves.count < config.moves_at_most)
    stalls = jnp.zeros_like(demand, jnp.bool_)
    stalls = stalls.at[order].set(jnp.cumsum(demand[order]) > _available(table))
    counts = jnp.where(with_siblings(stalls & ~fails, state), 0, counts)
    return table, tier, moves, counts, fails


def _compute_again(
    state: SchedulerState, rows: jax.Array, config: EngineConfig, allocator: Allocator
) -> SchedulerState:
    """Takes all pages of `rows: bool[B]` and puts them back in line."""
    requests, nobody = state.requests, state.requests.phases.shape[0]
    sequences = jnp.where(rows, state.slots, nobody)
    requests = requests.replace(phases=requests.phases.at[sequences].set(PREEMPTED, mode="drop"))
    table, tier = allocator.release(state.table, rows), state.tier
    if config.host_pages > 0:
        tier = lax.cond(
            jnp.any(rows),
            lambda: tiers.recount(tier, table.page_indices, config.num_pages),
            lambda: tier,
        )
    return state.replace(
        requests=requests, table=table, tier=tier, slots=jnp.where(rows, nobody, state.slots)
    )


def _available(table: Table) -> jax.Array:
    """Pages that can be had at once, `i32[]`."""
    return table.num_free + table.num_cached


def _num_hosted(state: SchedulerState, rows: jax.Array, config: EngineConfig) -> jax.Array:
    """Pages of `rows: bool[B]` that are on the host, `i32[]`; what several hold counts once."""
    host_pages = state.table.page_indices - config.num_pages - 1
    host_pages = jnp.where(rows[:, None] & (host_pages >= 0), host_pages, config.host_pages)
    is_named = jnp.zeros((config.host_pages,), jnp.bool_).at[host_pages].set(True, mode="drop")
    return jnp.sum(is_named, dtype=jnp.int32)


def _first(rows: jax.Array, order: jax.Array) -> jax.Array:
    """The first of `rows: bool[B]` in the order, alone; `bool[B]`."""
    first = order[jnp.argmax(rows[order])]
    return jnp.zeros_like(rows).at[first].set(rows[first])


def _tier_of(allocator: Allocator) -> TierOps:
    assert allocator.tier is not None  # `scheduling.state.create` refuses a host tier without
    return allocator.tier
