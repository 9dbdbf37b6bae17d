"""A tiny prefix cache with the bytes of its pages, for searches over all event sequences.

The KV of a token depends on all before it, and on the salt: its stand-in is the number of that
prefix, so that a row which reads another's page in its place is seen. What is planned is written
when the step ends (`settle`), as by the executor, and slots that nobody has any use for are wiped.
"""

import jax
import jax.numpy as jnp
import numpy as np
import page_bytes
from event_search import Faults, Universe, Verb
from flax import struct
from jax import lax
from page_bytes import count, differences, span

from jaxpage.paging import prefix_cache, prefix_index, status
from jaxpage.paging.allocator import Allocator, Prompt, with_prefix_cache
from jaxpage.paging.eviction import EVICTION_POLICIES
from jaxpage.paging.page_table import num_pages_for
from jaxpage.paging.prefix_cache import PrefixCache

# (salt, tokens), the sibling that a row may become when it shares, and their common tokens
SEQUENCES = [
    (0, (1, 1, 1, 1, 1, 1), 1, 3),
    (0, (1, 1, 1, 2, 1, 1), 0, 3),
    (1, (1, 1, 1, 1, 1, 1), 2, 6),
    (0, (2, 1, 1, 1, 2, 1), 3, 6),
]
NOBODY = len(SEQUENCES)
ROW_LEN = 6
TOKENS = np.asarray([tokens for _, tokens, _, _ in SEQUENCES], np.int32)
SALTS = np.asarray([salt for salt, _, _, _ in SEQUENCES], np.int32)
SIBLINGS = np.asarray([sibling for _, _, sibling, _ in SEQUENCES], np.int32)
COMMON = np.asarray([common for _, _, _, common in SEQUENCES], np.int32)


def _number_prefixes() -> np.ndarray:
    """A number from 1 for each prefix of each sequence, alike where the prefixes are."""
    numbers: dict[tuple, int] = {}
    return np.asarray(
        [
            [
                numbers.setdefault((salt, tokens[: i + 1]), len(numbers) + 1)
                for i in range(len(tokens))
            ]
            for salt, tokens, _, _ in SEQUENCES
        ],
        np.int32,
    )


PREFIXES = _number_prefixes()


class CachedWorld(struct.PyTreeNode):
    """A cache, the bytes of its pages, the sequences of its rows, and of which kind it is."""

    cache: PrefixCache
    pool: jax.Array  # i32[P, S]
    sequences: jax.Array  # i32[B], NOBODY in empty rows
    computed: jax.Array  # i32[B], tokens before those that this step computes
    is_full: jax.Array  # bool[], rows of this step have been shared: nothing may join it
    policy: jax.Array  # i32[], of EVICTION_POLICIES
    collides: jax.Array  # bool[], all pages have one hash

    @property
    def is_idle(self) -> jax.Array:
        """No step is under way: nothing is planned, and no row waits for its twin."""
        has_twin = jnp.any(self.cache.twins < self.cache.num_pages)
        return jnp.all(self.computed == self.cache.lengths) & ~has_twin

    @property
    def planned(self) -> jax.Array:
        """Tokens of this step, `bool[B, N]`."""
        return span(self.computed, self.cache.lengths, ROW_LEN)

    @property
    def expected(self) -> jax.Array:
        """What rows must read, `i32[B, N]`."""
        return jnp.asarray(PREFIXES).at[self.sequences].get(mode="fill", fill_value=0)

    @property
    def executed(self) -> jax.Array:
        """The pool when this step has run."""
        return page_bytes.write(self.pool, self.cache.page_indices, self.planned, self.expected)

    def score(self, usage) -> jax.Array:
        return lax.switch(self.policy, list(EVICTION_POLICIES.values()), usage)

    def hash(self, tokens, positions) -> jax.Array:
        return jnp.where(self.collides, jnp.uint32(0), prefix_index.mix(tokens, positions))

    @property
    def verbs(self) -> Allocator[PrefixCache]:
        return with_prefix_cache(self.score, self.hash)


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
        check=_check,
        key=_key,
    )


# --- events --------------------------------------------------------------------------------------


def _admit(world: CachedWorld, arguments: jax.Array) -> tuple[CachedWorld, Faults]:
    """The first empty row gets a sequence, of which some tokens are known."""
    sequence, known = arguments
    before = world.cache
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
    hits, num_woken = _hits(world, sequence, known)
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
        "evictions": _bad_evictions(world, cache, copies),
    }
    return _finish(allowed, after, world, faults)


def _append(world: CachedWorld, counts: jax.Array) -> tuple[CachedWorld, Faults]:
    """Rows get pages for tokens, as far as they have a sequence; full pages become findable."""
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
        "evictions": _bad_evictions(world, cache, expected.demand),
    }
    cache = world.verbs.enter(cache, jnp.asarray(TOKENS), world.sequences, jnp.asarray(SALTS))
    faults["entered"] = _left_out(before, cache)
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
    after = world.replace(
        cache=world.verbs.settle(world.cache),
        pool=world.executed,
        computed=world.cache.lengths,
        is_full=jnp.asarray(False),
    )
    null = world.cache.num_pages
    num_indexed = world.cache.num_indexed + (world.cache.twins < null).astype(jnp.int32)
    faults = {
        "twins": count(after.cache.twins < null) + count(after.cache.num_indexed != num_indexed),
    }
    return _finish(jnp.asarray(True), after, world, faults)


def _release(world: CachedWorld, rows: jax.Array) -> tuple[CachedWorld, Faults]:
    """Between two steps, rows become empty."""
    gone = rows > 0
    after = world.replace(
        cache=world.verbs.release(world.cache, gone),
        sequences=jnp.where(gone, NOBODY, world.sequences),
        computed=jnp.where(gone, 0, world.computed),
    )
    lengths = jnp.where(gone, 0, world.cache.lengths)
    return _finish(world.is_idle, after, world, {"lengths": count(after.cache.lengths != lengths)})


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
    hits, _ = _hits(world, sequence, jnp.asarray(ROW_LEN + 1, jnp.int32))
    num_kept = count(before.is_cached.at[found.pages].get(mode="fill", fill_value=False))
    room = before.num_free + before.num_cached - num_kept
    expected = jnp.minimum(jnp.minimum(wanted, ROW_LEN // size - first), room)
    num_put = count(pages < before.num_pages)
    is_whole = num_put == expected  # else a bucket was full
    used = jnp.sum(before.index.buckets < before.num_pages, axis=1, dtype=jnp.int32)
    has_room = jnp.max(used) + wanted <= before.index.buckets.shape[1]
    evicts = _bad_evictions(world, cache, num_put, found.pages, pages)
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
    in_use = page_bytes.marked(after.pool, cache.page_indices, _held(cache) & ~after.planned)
    pages = jnp.arange(cache.num_pages, dtype=jnp.int32)
    in_use |= cache.index.holds(pages)[:, None] & ~_pending(after)
    after = after.replace(pool=jnp.where(in_use, after.pool, 0))
    world = jax.tree.map(lambda new, old: jnp.where(allowed, new, old), after, before)
    return world, {
        name: jnp.where(allowed, faults.get(name, jnp.asarray(0, jnp.int32)), 0)
        for name in VERB_CHECKS
    }


# --- what must hold ------------------------------------------------------------------------------


def _held(cache: PrefixCache) -> jax.Array:
    return span(jnp.zeros_like(cache.lengths), cache.lengths, ROW_LEN)


def _pending(world: CachedWorld) -> jax.Array:
    """Slots that this step writes, `bool[P, S]`."""
    return page_bytes.marked(world.pool, world.cache.page_indices, world.planned)


def _check(world: CachedWorld) -> Faults:
    """Faults of the world itself, now and as it is when the step has run."""
    cache = world.cache
    read = page_bytes.read(world.executed, cache.page_indices)
    named = page_bytes.references(cache.page_indices, cache.num_pages) > 0
    in_use = count(named) + cache.num_free + cache.num_cached
    queue, usage = cache.queue, cache.index.usage(jnp.arange(cache.num_pages, dtype=jnp.int32))
    scores, last_used = (x.reshape(-1)[: cache.num_pages] for x in (queue.scores, queue.last_used))
    is_leaf = cache.is_cached & (cache.index.num_children == 0)
    stale = (scores != world.score(usage)) | (last_used != usage.last_used)
    now = page_bytes.read(world.pool, cache.page_indices)
    waits = page_bytes.read(_pending(world).astype(jnp.int32), cache.page_indices) == 1
    return {
        "invariants": jnp.sum(world.verbs.violations(cache)),
        "bytes": count(_held(cache) & (read != world.expected)),
        "bytes before the step": count(_held(cache) & ~waits & (now != world.expected)),
        "free, held and cached": jnp.abs(in_use - cache.num_pages),
        "index": _misnamed(world),
        "queue": count(is_leaf & stale),
    }


def _misnamed(world: CachedWorld) -> jax.Array:
    """Pages of the index that do not hold what it says, or hold the same as another."""
    cache, size = world.cache, world.cache.page_size
    index, pool = cache.index, world.executed
    depth = index.depth
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


def _hits(world: CachedWorld, sequence: jax.Array, known: jax.Array) -> tuple[jax.Array, jax.Array]:
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


def _left_out(before: PrefixCache, after: PrefixCache) -> jax.Array:
    """Whether full pages waited and none became findable, though all had room in any bucket.

    Of rows that hold the same page only one enters it, and a row with a twin waits for that.
    """
    is_in = (after.num_indexed > before.num_indexed) | (after.twins < after.num_pages)
    wait = after.lengths // after.page_size - before.num_indexed
    used = jnp.sum(before.index.buckets < before.num_pages, axis=1, dtype=jnp.int32)
    has_room = jnp.max(used) + jnp.sum(wait) <= before.index.buckets.shape[1]
    return count(jnp.any(wait > 0) & ~jnp.any(is_in & (wait > 0)) & has_room)


def _bad_evictions(
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


def _key(world: CachedWorld) -> jax.Array:
    """All that the future depends on; of times only their order.

    Left out is what `_check` and `violations` find to follow from the rest.
    """
    cache, index = world.cache, world.cache.index
    pages = jnp.arange(cache.num_pages, dtype=jnp.int32)
    is_in, is_cached = index.holds(pages), cache.is_cached
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
        order(index.entered, is_in & is_policy["fifo"]),
        is_in & (index.entered == cache.step),
        order(index.last_used, is_cached),
        jnp.where(is_in & is_policy["lfu"], index.num_uses, 0),
        world.replace(cache=None),
    ]
    return jnp.concatenate([x.reshape(-1).astype(jnp.int8) for x in jax.tree.leaves(parts)])
