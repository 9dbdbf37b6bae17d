"""Pages of a state by their tokens, with their bytes: read for the disk, and put back. All pure.

Between two calls of the loop, so no moves are pending. `tokens: i32[N]` are of one sequence.
"""

import jax
import jax.numpy as jnp

from jaxpage.engine.step import EngineState, Setup, wipe_freed
from jaxpage.paging import kv_pool
from jaxpage.paging.allocator import Allocator
from jaxpage.paging.chains import ChainOps
from jaxpage.paging.in_place import first_read
from jaxpage.paging.kv_pool import KvPool


def find(
    state: EngineState, tokens: jax.Array, num_tokens: jax.Array, salt: jax.Array, setup: Setup
) -> tuple[jax.Array, jax.Array]:
    """How many pages of the chain the index has, and the room for more; see `paging.chains`."""
    table = state.scheduler.table
    found = _ops(setup.allocator).find(table, tokens, num_tokens, salt)
    return found.num_pages, found.room


def read(
    state: EngineState,
    tokens: jax.Array,
    num_tokens: jax.Array,
    salt: jax.Array,
    first: jax.Array,
    most: int,
    setup: Setup,
) -> tuple[jax.Array, KvPool]:
    """How many pages of the chain the index has, and copies of `most` of them from `first` on."""
    table = state.scheduler.table
    found = _ops(setup.allocator).find(table, tokens, num_tokens, salt)
    column = first + jnp.arange(most, dtype=jnp.int32)
    page = found.pages.at[column].get(mode="fill", fill_value=table.null)
    place = table.tier.places.at[page].get(mode="fill", fill_value=table.null)
    return found.num_pages, kv_pool.gather(state.pool, state.host_pool, place)


def put_back(
    state: EngineState,
    tokens: jax.Array,
    first: jax.Array,
    count: jax.Array,
    salt: jax.Array,
    pages: KvPool,
    setup: Setup,
) -> tuple[EngineState, jax.Array]:
    """Caches the first `count` of `pages` as the chain's from `first` on; how many it could."""
    allocator = setup.allocator
    table, targets = _ops(allocator).put_back(
        state.scheduler.table, tokens, first, count, salt, most=pages.num_pages
    )
    pool, host_pool = state.pool, state.host_pool
    if setup.engine.host_pages > 0 and allocator.tier is not None:
        table, outs, _ = allocator.tier.take_moves(table)
        host_pool = kv_pool.move_out(pool, host_pool, *outs)
        host_pool, pool = first_read(host_pool, pool)
    num_put = jnp.sum(targets < table.null, dtype=jnp.int32)
    scheduler = state.scheduler.replace(table=table)
    state = state.replace(scheduler=scheduler, pool=pool, host_pool=host_pool)
    state = wipe_freed(state, setup)
    pool = kv_pool.fill(state.pool, pages, table.tier.in_pool(targets), num_put)
    return state.replace(pool=pool), num_put


def _ops(allocator: Allocator) -> ChainOps:
    assert allocator.chains is not None  # `DiskTier` refuses the others
    return allocator.chains
