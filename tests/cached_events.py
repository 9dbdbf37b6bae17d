"""All that can happen to a `CachedWorld`, as a universe to search; and when two worlds are one."""

import jax
import jax.numpy as jnp
import numpy as np
import page_bytes
from cached_faults import (
    bad_evictions,
    faults_of,
    full_hits,
    has_room,
    held_tokens,
    left_out,
    pending_slots,
)
from cached_world import COMMON, NOBODY, PREFIXES, ROW_LEN, SALTS, SIBLINGS, TOKENS, CachedWorld
from event_search import Faults, Universe, Verb
from page_bytes import count, differences

from jaxpage.paging import entering, prefix_cache, status
from jaxpage.paging.allocator import Prompt
from jaxpage.paging.eviction import EVICTION_POLICIES
from jaxpage.paging.page_table import num_pages_for


def cached_universe(
    name: str, shape: tuple[int, int, int, int], kinds: list[tuple[str, bool]]
) -> Universe:
    """Rows of `shape` (slots, pages a slot, pages, page size); `kinds` are (policy, collides)."""
    num_rows, pages_per_slot, num_pages, page_size = shape
    assert pages_per_slot * page_size == ROW_LEN
    one, all_rows = np.eye(num_rows, dtype=np.int32), np.ones((1, num_rows), np.int32)

    def start(policy: str, collides: bool) -> CachedWorld:
        return CachedWorld(
            cache=prefix_cache.create(num_rows, pages_per_slot, num_pages, page_size),
            pool=jnp.zeros((num_pages, page_size), jnp.int32),
            sequences=jnp.full((num_rows,), NOBODY, jnp.int32),
            computed=jnp.zeros((num_rows,), jnp.int32),
            is_full=jnp.asarray(False),
            policy=jnp.asarray(list(EVICTION_POLICIES).index(policy), jnp.int32),
            collides=jnp.asarray(collides),
        )

    admitted = [(q, ROW_LEN) for q in range(NOBODY)] + [(0, 3), (1, 5)]
    shared = [(row, *how) for row in range(num_rows) for how in ((0, 0), (1, 0), (0, 1))]
    return Universe(
        name=name,
        kinds=[f"{policy}, hashes collide" if collides else policy for policy, collides in kinds],
        starts=jax.tree.map(lambda *x: np.stack(x), *(start(*kind) for kind in kinds)),
        verbs={
            "admit": Verb(_admit, np.asarray(admitted, np.int32)),
            "append": Verb(_append, np.concatenate([one, page_size * one, all_rows, 4 * all_rows])),
            "share": Verb(_share, np.asarray(shared, np.int32)),
            "settle": Verb(_settle, np.zeros((1, 1), np.int32)),
            "release": Verb(_release, np.concatenate([one, all_rows])),
            "put back": Verb(_put_back, np.asarray([(0, 1), (1, 2), (2, 2)], np.int32)),
        },
        check=faults_of,
        key=_key,
    )


def _admit(world: CachedWorld, arguments: jax.Array) -> tuple[CachedWorld, Faults]:
    """The first empty row gets a sequence, of which some tokens are known; all full pages enter."""
    sequence, known = arguments
    start, before = world, world.found_by_all
    world = world.replace(cache=before)
    is_empty = world.sequences == NOBODY
    row = jnp.argmax(is_empty).astype(jnp.int32)
    allowed = jnp.any(is_empty) & ~world.is_full
    prompt = Prompt(
        tokens=jnp.asarray(TOKENS)[sequence],
        num_tokens=known,
        salt=jnp.asarray(SALTS)[sequence],
        soon=known,
        reserved=known,
    )
    cache, found = world.verbs.admit(before, row, prompt, jnp.asarray(0, jnp.int32))
    is_in = found.status == status.OK
    after = world.replace(
        cache=cache,
        pool=page_bytes.copy(world.pool, found.source[None], found.target[None]),
        sequences=world.sequences.at[row].set(jnp.where(is_in, sequence, NOBODY)),
        computed=world.computed.at[row].set(found.num_tokens),
    )
    hits, num_woken = full_hits(world, sequence, known)
    need = num_pages_for(known, before.page_size) - hits
    fits = need <= before.num_free + before.num_cached - num_woken
    copies = (found.target < before.num_pages).astype(jnp.int32)
    # Where hashes collide a page may be missed.
    wrong_hits = (found.num_tokens // before.page_size != hits) & (hits * before.page_size < known)
    faults = {
        "tokens found": count((found.num_tokens < 0) | (found.num_tokens >= known)),
        "hits": jnp.where(world.collides, 0, count(is_in & wrong_hits)),
        "statuses": jnp.where(world.collides, 0, count(is_in != fits)),
        "all or nothing": jnp.where(is_in, 0, differences(before, cache)),
        "evictions": bad_evictions(world, cache, copies),
        "entered": left_out(start.cache, before),
    }
    return _finish(allowed, after, start, faults)


def _append(world: CachedWorld, counts: jax.Array) -> tuple[CachedWorld, Faults]:
    """Rows get pages for tokens, as far as they have a sequence."""
    before = world.cache
    counts = jnp.where(world.sequences == NOBODY, 0, counts)
    cache, appended = world.verbs.append(before, counts, None)
    available = before.num_free + before.num_cached
    expected = page_bytes.append(
        before.page_indices,
        before.lengths,
        counts,
        available,
        before.num_pages,
        before.page_size,
    )
    is_ok = expected.statuses == status.OK
    failed = ~is_ok[:, None] & (cache.page_indices != before.page_indices)
    faults = {
        "statuses": count(appended.status != expected.statuses),
        "copies": count(appended.sources != expected.sources),
        "lengths": count(cache.lengths != before.lengths + jnp.where(is_ok, counts, 0)),
        "all or nothing": count(failed),
        "evictions": bad_evictions(world, cache, expected.demand),
    }
    pool = page_bytes.copy(world.pool, appended.sources, appended.targets)
    return _finish(~world.is_full, world.replace(cache=cache, pool=pool), world, faults)


def _share(world: CachedWorld, arguments: jax.Array) -> tuple[CachedWorld, Faults]:
    """The first empty row shares a row's tokens or all but the last, or becomes its sibling."""
    source, less, is_sibling = arguments
    is_empty = world.sequences == NOBODY
    target = jnp.argmax(is_empty).astype(jnp.int32)
    sequence = world.sequences[source]
    common = jnp.asarray(COMMON).at[sequence].get(mode="fill", fill_value=0)
    length = world.cache.lengths[source]
    num_tokens = jnp.where(is_sibling > 0, jnp.minimum(length, common), length - less)
    sibling = jnp.asarray(SIBLINGS).at[sequence].get(mode="fill", fill_value=NOBODY)
    allowed = jnp.any(is_empty) & (num_tokens > 0)
    share = world.verbs.share
    assert share is not None
    cache = share(world.cache, source, target, num_tokens)
    size = cache.page_size
    in_full = num_tokens // size * size  # of a full page all is shared, or nothing
    expected = jnp.where(length >= in_full + size, in_full, num_tokens)
    after = world.replace(
        cache=cache,
        sequences=world.sequences.at[target].set(jnp.where(is_sibling > 0, sibling, sequence)),
        computed=world.computed.at[target].set(expected),
        is_full=~world.is_idle,
    )
    faults = {"lengths": count(cache.lengths[target] != expected)}
    return _finish(allowed & (expected > 0), after, world, faults)


def _settle(world: CachedWorld, arguments: jax.Array) -> tuple[CachedWorld, Faults]:
    """The step runs: what is planned is written, and then rows give up pages for their twins."""
    del arguments
    none = jnp.zeros(world.sequences.shape, jnp.bool_)
    after = world.replace(
        cache=world.verbs.settle(world.cache, world.held, none),
        pool=world.executed,
        computed=world.cache.lengths,
        is_full=jnp.asarray(False),
    )
    had_twin = world.cache.twins < world.cache.num_pages
    entered = after.cache.num_indexed - world.cache.num_indexed
    full = world.cache.lengths // world.cache.page_size
    is_due = jnp.any(had_twin) | (jnp.sum(full - world.cache.num_indexed) >= entering.ENTRIES)
    still_due = jnp.sum(full - after.cache.num_indexed) >= entering.ENTRIES
    faults = {
        "twins": count(after.cache.twins < world.cache.num_pages)
        + count(had_twin & (entered == 0)),
        "entered": count(
            jnp.where(is_due, still_due, jnp.any(entered != 0)) & has_room(world.cache)
        ),
    }
    return _finish(jnp.asarray(True), after, world, faults)


def _release(world: CachedWorld, rows: jax.Array) -> tuple[CachedWorld, Faults]:
    """Between two steps, rows become empty; what they have computed can be found."""
    gone = rows > 0
    entered = world.verbs.enter_computed(world.cache, world.held, gone)
    after = world.replace(
        cache=world.verbs.release(entered, gone),
        sequences=jnp.where(gone, NOBODY, world.sequences),
        computed=jnp.where(gone, 0, world.computed),
    )
    lengths = jnp.where(gone, 0, world.cache.lengths)
    faults = {
        "lengths": count(after.cache.lengths != lengths),
        "entered": left_out(world.cache, entered, gone),
        "twins": count(entered.twins < entered.num_pages),
    }
    return _finish(world.is_idle, after, world, faults)


def _put_back(world: CachedWorld, arguments: jax.Array) -> tuple[CachedWorld, Faults]:
    """Between two steps, pages of a sequence come from elsewhere, and nobody holds them."""
    sequence, wanted = arguments
    before, size = world.cache, world.cache.page_size
    tokens, salt = jnp.asarray(TOKENS)[sequence], jnp.asarray(SALTS)[sequence]
    chains = world.verbs.chains
    assert chains is not None
    found = chains.find(before, tokens, jnp.asarray(ROW_LEN, jnp.int32), salt)
    first = found.num_pages
    cache, pages = chains.put_back(before, tokens, first, wanted, salt, most=2)
    columns = first + jnp.arange(2, dtype=jnp.int32)
    values = jnp.asarray(PREFIXES)[sequence].reshape(-1, size)
    values = values.at[columns].get(mode="fill", fill_value=-1)
    after = world.replace(cache=cache, pool=world.pool.at[pages].set(values, mode="drop"))
    hits, _ = full_hits(world, sequence, jnp.asarray(ROW_LEN + 1, jnp.int32))
    num_kept = count(before.is_cached.at[found.pages].get(mode="fill", fill_value=False))
    room = before.num_free + before.num_cached - num_kept
    expected = jnp.minimum(jnp.minimum(wanted, ROW_LEN // size - first), room)
    num_put = count(pages < before.num_pages)
    is_whole = num_put == expected  # else a bucket was full
    used = jnp.sum(before.index.buckets < before.num_pages, axis=1, dtype=jnp.int32)
    has_room = jnp.max(used) + wanted <= before.index.buckets.shape[1]
    evicts = bad_evictions(world, cache, num_put, found.pages, pages)
    faults = {
        "hits": jnp.where(world.collides, 0, count(hits != first)),
        "put back": jnp.where(world.collides, 0, count(~is_whole & has_room)),
        "evictions": jnp.where(is_whole, evicts, 0),
        "all or nothing": count(cache.page_indices != before.page_indices)
        + count(cache.lengths != before.lengths),
    }
    return _finish(world.is_idle, after, world, faults)


VERB_CHECKS = (
    *("tokens found", "hits", "statuses", "all or nothing", "evictions"),
    *("copies", "lengths", "entered", "twins", "put back"),
)


def _finish(
    allowed: jax.Array, after: CachedWorld, before: CachedWorld, faults: Faults
) -> tuple[CachedWorld, Faults]:
    """What happened if it was allowed, and nothing else; unused slots are wiped."""
    cache = after.cache
    in_use = page_bytes.marked(after.pool, cache.page_indices, held_tokens(cache) & ~after.planned)
    pages = jnp.arange(cache.num_pages, dtype=jnp.int32)
    in_use |= cache.index.holds(pages)[:, None] & ~pending_slots(after)
    after = after.replace(pool=jnp.where(in_use, after.pool, 0))
    world = jax.tree.map(lambda new, old: jnp.where(allowed, new, old), after, before)
    return world, {
        name: jnp.where(allowed, faults.get(name, jnp.asarray(0, jnp.int32)), 0)
        for name in VERB_CHECKS
    }


def _key(world: CachedWorld) -> jax.Array:
    """All that the future depends on; of times only their order.

    Left out is what `faults_of` and `violations` find to follow from the rest.
    """
    cache, index = world.cache, world.cache.index
    pages = jnp.arange(cache.num_pages, dtype=jnp.int32)
    is_in, is_cached, usage = index.holds(pages), cache.is_cached, index.usage(pages)
    is_free = pages < cache.num_free
    is_policy = {name: world.policy == i for i, name in enumerate(EVICTION_POLICIES)}

    def order(times, which):
        earlier = which[None] & (times[None] < times[:, None])
        rank = jnp.sum(earlier, axis=1, dtype=jnp.int32) * 2 + (times == cache.step).astype(
            jnp.int32
        )
        return jnp.where(which, rank, -1)

    parts = [
        cache.page_indices,
        cache.lengths,
        jnp.where(is_free, cache.table.free_pages, -1),
        cache.num_free,
        cache.num_indexed,
        cache.twins,
        index.parents,
        jnp.where(is_in, index.newest_child, -1),
        order(usage.entered, is_in & is_policy["fifo"]),
        is_in & (usage.entered == cache.step),
        order(usage.last_used, is_cached),
        jnp.where(is_in & is_policy["lfu"], usage.num_uses, 0),
        world.replace(cache=None),
    ]
    return jnp.concatenate([x.reshape(-1).astype(jnp.int8) for x in jax.tree.leaves(parts)])
