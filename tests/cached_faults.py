"""What must hold of a `CachedWorld`, after every event and of each."""

import jax
import jax.numpy as jnp
import page_bytes
from cached_world import PREFIXES, ROW_LEN, SALTS, SEQUENCES, TOKENS, CachedWorld
from event_search import Faults
from page_bytes import count, span

from jaxpage.paging.prefix_cache import PrefixCache


def held_tokens(cache: PrefixCache) -> jax.Array:
    return span(jnp.zeros_like(cache.lengths), cache.lengths, ROW_LEN)


def pending_slots(world: CachedWorld) -> jax.Array:
    """Slots that this step writes, `bool[P, S]`."""
    return page_bytes.marked(world.pool, world.cache.page_indices, world.planned)


def faults_of(world: CachedWorld) -> Faults:
    """Faults of the world itself, now and as it is when the step has run."""
    cache = world.cache
    read = page_bytes.read(world.executed, cache.page_indices)
    named = page_bytes.references(cache.page_indices, cache.num_pages) > 0
    in_use = count(named) + cache.num_free + cache.num_cached
    queue, usage = cache.queue, cache.index.usage(jnp.arange(cache.num_pages, dtype=jnp.int32))
    scores, last_used = queue.keys.reshape(2, -1)[:, : cache.num_pages]
    is_leaf = cache.is_cached & (cache.index.num_children == 0)
    stale = (scores != world.score(usage)) | (last_used != usage.last_used)
    now = page_bytes.read(world.pool, cache.page_indices)
    waits = page_bytes.read(pending_slots(world).astype(jnp.int32), cache.page_indices) == 1
    return {
        "invariants": jnp.sum(world.verbs.violations(cache)),
        "bytes": count(held_tokens(cache) & (read != world.expected)),
        "bytes before the step": count(held_tokens(cache) & ~waits & (now != world.expected)),
        "free, held and cached": jnp.abs(in_use - cache.num_pages),
        "index": _misnamed(world),
        "queue": count(is_leaf & stale),
    }


def _misnamed(world: CachedWorld) -> jax.Array:
    """Pages of the index that do not hold what it says, or hold the same as another."""
    cache, size = world.cache, world.cache.page_size
    index, pool = cache.index, world.executed
    depth = index.usage(jnp.arange(cache.num_pages, dtype=jnp.int32)).depth
    in_page = (len(SEQUENCES), -1, size)
    prefixes = jnp.asarray(PREFIXES).reshape(in_page)[:, depth]  # [Q, P, S]
    tokens = jnp.asarray(TOKENS).reshape(in_page)[:, depth]
    before = jnp.asarray(PREFIXES)[:, jnp.maximum(depth * size - 1, 0)]  # [Q, P]
    parent_end = pool.at[index.parents, size - 1].get(mode="fill", fill_value=0)
    roots = index.root(jnp.asarray(SALTS))
    follows = jnp.where(
        depth[None] == 0, index.parents[None] == roots[:, None], parent_end[None] == before
    )
    right = jnp.all((prefixes == pool[None]) & (tokens == index.tokens[None]), axis=2) & follows
    is_in = index.holds(jnp.arange(cache.num_pages, dtype=jnp.int32))
    ends = jnp.where(is_in, pool[:, -1], 0)
    same = jnp.triu(ends[:, None] == ends[None], 1) & is_in[:, None] & is_in[None]
    return count(is_in & ~jnp.any(right, axis=0)) + jnp.where(world.collides, 0, count(same))


def full_hits(
    world: CachedWorld, sequence: jax.Array, known: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Full pages that a sequence must find, and how many of them nobody holds."""
    cache, size = world.cache, world.cache.page_size
    is_in = cache.index.holds(jnp.arange(cache.num_pages, dtype=jnp.int32))
    ends = jnp.where(is_in, world.executed[:, -1], 0)
    wanted = jnp.asarray(PREFIXES)[sequence, size - 1 :: size]
    is_there = ends[None] == wanted[:, None]  # [M, P]
    position = jnp.arange(1, wanted.shape[0] + 1, dtype=jnp.int32) * size
    chain = jnp.cumprod((jnp.any(is_there, 1) & (position < known)).astype(jnp.int32))
    woken = jnp.any(is_there & cache.is_cached[None], 1) & (chain > 0)
    return jnp.sum(chain), count(woken)


def left_out(before: PrefixCache, after: PrefixCache, rows: jax.Array | bool = True) -> jax.Array:
    """Full pages of `rows: bool[B]` that did not become findable, though any bucket had room.

    A row with a twin, or that shares a page with one that entered it, waits for the step's end.
    """
    full = after.lengths // after.page_size
    waits = (after.num_indexed < full) & (after.twins == after.num_pages)
    return count(waits & rows & has_room(before))


def has_room(cache: PrefixCache) -> jax.Array:
    """Whether all full pages that are not in the index would fit into any one bucket."""
    used = jnp.sum(cache.index.buckets < cache.num_pages, axis=1, dtype=jnp.int32)
    pending = jnp.sum(cache.lengths // cache.page_size - cache.num_indexed)
    return jnp.max(used) + pending <= cache.index.buckets.shape[1]


def bad_evictions(
    world: CachedWorld,
    after: PrefixCache,
    num_pages: jax.Array,
    spared: jax.Array | tuple = (),
    entered: jax.Array | tuple = (),
) -> jax.Array:
    """Pages that left in vain, for want of `num_pages`, or before one whose turn it was.

    Pages `spared: i32[n]` had no turn; pages `entered: i32[k]` hold something else than before.
    """
    before = world.cache
    pages = jnp.arange(before.num_pages, dtype=jnp.int32)
    none = jnp.zeros((before.num_pages,), jnp.bool_)
    spared, entered = (
        none.at[jnp.asarray(some, jnp.int32)].set(True, mode="drop") for some in (spared, entered)
    )
    gone = before.is_cached & (~after.index.holds(pages) | entered)
    stays = before.is_cached & (before.index.num_children == 0) & after.is_cached
    stays &= ~spared & ~entered
    usage = before.index.usage(pages)
    turns = world.score(usage), usage.last_used, pages
    is_later = jnp.zeros((before.num_pages,) * 2, jnp.bool_)
    for turn in reversed(turns):
        one, other = turn[:, None], turn[None]
        is_later = (one > other) | ((one == other) & is_later)
    needed = jnp.clip(num_pages - before.num_free, 0, before.num_cached)
    in_vain = jnp.abs(count(gone) - needed)
    return count(gone[:, None] & stays[None] & is_later) + in_vain
