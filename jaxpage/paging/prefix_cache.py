"""The automatic prefix cache: a page table whose full pages stay findable after their sequences.

A page is free, held by a row, or *cached*: held by nobody and in the prefix index. Full pages enter
the index when the step that computes them is planned, so that a prompt can share what another one
computes in the same step. Cached pages are as good as free: when the stack runs short they leave
the index, leaf first, in the order of an eviction policy.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxpage.paging import eviction, page_table, prefix_index, ragged, status
from jaxpage.paging.eviction import EvictionQueue, ScoreFn
from jaxpage.paging.in_place import first_read
from jaxpage.paging.page_table import Appended, PageTable, num_pages_for
from jaxpage.paging.prefix_index import Entries, HashFn, PrefixIndex

ENTRIES = 32  # pages that enter the index in one turn


class PrefixCache(struct.PyTreeNode):
    """A page table, the index over its pages, and the queue of those that may leave it.

    The first `num_indexed[b]` pages of row `b` are in the index, each the parent of the next; so
    whoever holds a page holds all before it, and the cached pages below a cached one are cached.
    """

    table: PageTable
    index: PrefixIndex
    queue: EvictionQueue
    num_cached: jax.Array  # i32[], pages in the index that nobody holds
    num_indexed: jax.Array  # i32[B], pages
    twins: jax.Array  # i32[B], the page that equals the row's next one to be entered; P for none
    step: jax.Array  # i32[], the clock of the policies

    @property
    def page_indices(self) -> jax.Array:
        return self.table.page_indices

    @property
    def lengths(self) -> jax.Array:
        return self.table.lengths

    @property
    def num_free(self) -> jax.Array:
        """Pages on the stack, `i32[]`."""
        return self.table.num_free

    @property
    def num_pages(self) -> int:
        return self.table.num_pages

    @property
    def page_size(self) -> int:
        return self.table.page_size

    @property
    def num_hosted(self) -> jax.Array:
        return self.table.num_hosted

    @property
    def held_pages(self) -> jax.Array:
        return self.table.held_pages

    @property
    def reserved_tokens(self) -> jax.Array:
        return self.table.reserved_tokens

    @property
    def is_first_holder(self) -> jax.Array:
        return self.table.is_first_holder

    @property
    def is_cached(self) -> jax.Array:
        """Pages that nobody holds and the index does, `bool[P]`."""
        pages = jnp.arange(self.num_pages, dtype=jnp.int32)
        return (self.table.ref_counts == 0) & self.index.holds(pages)

    @property
    def is_shared(self) -> jax.Array:
        return self.table.is_shared


class Found(NamedTuple):
    """What `admit` found for a row, and the copy that it asks for (`NULL_PAGE` for none)."""

    status: jax.Array  # i32[]
    num_tokens: jax.Array  # i32[], that need not be computed
    source: jax.Array  # i32[], page
    target: jax.Array  # i32[], page


def create(num_slots: int, pages_per_slot: int, num_pages: int, page_size: int) -> PrefixCache:
    """Empty rows over a free pool, and an empty index."""
    return PrefixCache(
        table=page_table.create(num_slots, pages_per_slot, num_pages, page_size),
        index=prefix_index.create(num_pages, page_size),
        queue=eviction.create(num_pages),
        num_cached=jnp.asarray(0, jnp.int32),
        num_indexed=jnp.zeros((num_slots,), jnp.int32),
        twins=jnp.full((num_slots,), num_pages, jnp.int32),
        step=jnp.asarray(0, jnp.int32),
    )


def admit(
    cache: PrefixCache,
    row: jax.Array,
    tokens: jax.Array,
    num_tokens: jax.Array,
    salt: jax.Array,
    soon: jax.Array,
    owed: jax.Array,
    *,
    score: ScoreFn,
    hash_fn: HashFn,
) -> tuple[PrefixCache, Found]:
    """Gives the empty row `row` the longest cached prefix of its `num_tokens` known tokens.

    The last token is always left to compute, for its logits. Nothing changes unless the pages for
    `soon` tokens can be had beside `owed` ones; they are not taken yet. A page that agrees only
    in part is copied: the row gets a page of its own for it.
    """
    null = cache.num_pages
    found = prefix_index.match(cache.index, tokens, num_tokens - 1, salt, cache.step, hash_fn)
    found, cache = first_read(found, cache)
    pages = found.pages
    wakes = _at(cache.table.ref_counts, pages, fill=1) == 0
    num_woken = jnp.sum(wakes, dtype=jnp.int32)
    available = cache.num_free + cache.num_cached - num_woken - owed
    enough = num_pages_for(soon, cache.page_size) - found.num_pages <= available

    def nothing():
        return jnp.full_like(pages, null), jnp.full_like(found.partial, null)

    pages, partial = lax.cond(enough, lambda: (pages, found.partial), nothing)
    num_tokens = jnp.where(enough, found.num_tokens, 0)
    cache = _take(cache, pages)
    copies = partial < null
    cache = make_room(cache, copies.astype(jnp.int32), score)
    table = cache.table
    target = jnp.where(copies, table.free_pages[jnp.maximum(table.num_free - 1, 0)], null)
    pages = pages.at[jnp.where(copies, found.num_pages, pages.shape[0])].set(target, mode="drop")
    row = jnp.where(enough, row, table.lengths.shape[0])
    table = table.replace(
        page_indices=table.page_indices.at[row].set(pages, mode="drop"),
        lengths=table.lengths.at[row].set(num_tokens, mode="drop"),
        ref_counts=table.ref_counts.at[target].set(1, mode="drop"),
        num_free=table.num_free - copies.astype(jnp.int32),
    )
    cache = cache.replace(
        table=table, num_indexed=cache.num_indexed.at[row].set(found.num_pages, mode="drop")
    )
    outcome = jnp.where(enough, status.OK, status.OUT_OF_PAGES)
    return cache, Found(outcome, num_tokens, source=partial, target=target)


def append(
    cache: PrefixCache, counts: jax.Array, max_new_pages: int | None = None, *, score: ScoreFn
) -> tuple[PrefixCache, Appended]:
    """`page_table.append`, for which cached pages leave as far as the stack is short."""
    cache = make_room(cache, jnp.sum(page_table.demand(cache.table, counts)), score)
    table, appended = page_table.append(cache.table, counts, max_new_pages)
    return cache.replace(table=table), appended


def fitting(cache: PrefixCache, order: jax.Array, counts: jax.Array) -> jax.Array:
    """`page_table.fitting`, for which cached pages are free ones."""
    return page_table.fitting(cache.table, order, counts, cache.num_cached)


def enter(
    cache: PrefixCache,
    tokens: jax.Array,
    sequences: jax.Array,
    salts: jax.Array,
    *,
    hash_fn: HashFn,
) -> PrefixCache:
    """Makes the rows' full pages findable.

    Row `b` holds tokens of `tokens[sequences[b]]`, of `i32[R, N]`, with `salts: i32[R]`. Where an
    equal page is there already it is remembered as the row's twin, for `settle`. A turn of the loop
    takes `ENTRIES` pages, so that the work follows how many became full.
    """
    page_size, num_rows = cache.page_size, cache.lengths.shape[0]
    pending = cache.lengths // page_size - cache.num_indexed
    pending = jnp.where(cache.table.num_hosted > 0, 0, pending)

    def enter_some(carry):
        cache, pending = carry
        flat = ragged.expand(pending, ENTRIES)
        row = flat.row
        column = _at(cache.num_indexed, row) + flat.offset
        sequence = _at(sequences, row, fill=tokens.shape[0])
        slots = jnp.arange(page_size, dtype=jnp.int32)[None]
        before = cache.page_indices.at[row, jnp.maximum(column - 1, 0)].get(
            mode="fill", fill_value=cache.num_pages
        )
        entries = Entries(
            pages=cache.page_indices.at[row, column].get(mode="fill", fill_value=cache.num_pages),
            parents=jnp.where(column > 0, before, cache.index.root(_at(salts, sequence))),
            tokens=tokens.at[sequence[:, None], column[:, None] * page_size + slots].get(
                mode="fill", fill_value=0
            ),
            row=row,
            offset=flat.offset,
            depth=column,
        )
        index, entered, twins = prefix_index.enter(
            cache.index, entries, num_rows, cache.step, hash_fn
        )
        tried = jnp.clip(ENTRIES - (jnp.cumsum(pending) - pending), 0, pending)
        pending = jnp.where(entered == tried, pending - tried, 0)
        cache = cache.replace(
            index=index,
            num_indexed=cache.num_indexed + entered,
            twins=jnp.minimum(cache.twins, twins),
        )
        return cache, pending

    cache = cache.replace(twins=jnp.full_like(cache.twins, cache.num_pages))
    return lax.while_loop(lambda carry: jnp.any(carry[1] > 0), enter_some, (cache, pending))[0]


def share(
    cache: PrefixCache, source: jax.Array, target: jax.Array, num_tokens: jax.Array
) -> PrefixCache:
    """`page_table.share`; the target's full pages are in the index as far as the source's are."""
    shared = jnp.minimum(cache.num_indexed[source], num_tokens // cache.page_size)
    return cache.replace(
        table=page_table.share(cache.table, source, target, num_tokens),
        num_indexed=cache.num_indexed.at[target].set(shared),
    )


def settle(cache: PrefixCache) -> PrefixCache:
    """Ends a step: rows give up pages that have an equal in the index, and hold that one."""
    null = cache.num_pages

    def give_up(cache):
        row = jnp.argmax(cache.twins < null)
        twin, column = cache.twins[row], cache.num_indexed[row]
        own, row = first_read(cache.page_indices[row, column], row)
        cache = _take(cache, twin[None])
        table = cache.table
        ref_counts = table.ref_counts.at[own].add(-1)
        table = table.replace(
            page_indices=table.page_indices.at[row, column].set(twin), ref_counts=ref_counts
        )
        table = page_table.free(table, jnp.where(ref_counts[own] == 0, own, null)[None])
        return cache.replace(
            table=table,
            num_indexed=cache.num_indexed.at[row].add(1),
            twins=cache.twins.at[row].set(null),
        )

    cache = lax.while_loop(lambda cache: jnp.any(cache.twins < null), give_up, cache)
    return cache.replace(step=cache.step + 1)


def release(cache: PrefixCache, rows: jax.Array, *, score: ScoreFn) -> PrefixCache:
    """Empties `rows: bool[B]`; their pages that nobody holds stay cached if the index has them."""
    null = cache.num_pages

    def release_next(carry):
        cache, rows = carry
        row = jnp.argmax(rows)
        table, unowned = page_table.release_row(cache.table, row)
        stays = (unowned < null) & cache.index.holds(unowned)
        kept = jnp.where(stays, unowned, null)
        index = cache.index.replace(
            last_used=cache.index.last_used.at[kept].set(cache.step, mode="drop")
        )
        last = jnp.max(jnp.where(stays, jnp.arange(unowned.shape[0], dtype=jnp.int32), -1))
        cache = cache.replace(
            table=page_table.free(table, jnp.where(stays, null, unowned)),
            index=index,
            num_cached=cache.num_cached + jnp.sum(stays, dtype=jnp.int32),
            num_indexed=cache.num_indexed.at[row].set(0),
            twins=cache.twins.at[row].set(null),
        )
        # Of a chain only the last can be a leaf.
        cache = _enqueue_leaf(cache, jnp.where(last >= 0, unowned[last], null), score)
        return cache, rows.at[row].set(False)

    return lax.while_loop(lambda carry: jnp.any(carry[1]), release_next, (cache, rows))[0]


def make_room(cache: PrefixCache, num_pages: jax.Array, score: ScoreFn) -> PrefixCache:
    """Evicts cached pages until `num_pages` are free, or none is cached."""

    def evict(cache):
        page = eviction.first(cache.queue)
        index, parent = prefix_index.drop(cache.index, page)
        cache = cache.replace(
            table=page_table.free(cache.table, page[None]),
            index=index,
            queue=eviction.remove(cache.queue, page),
            num_cached=cache.num_cached - 1,
            twins=jnp.where(cache.twins == page, cache.num_pages, cache.twins),
        )
        return _enqueue_leaf(cache, parent, score)

    return lax.while_loop(
        lambda cache: (cache.num_free < num_pages) & (cache.num_cached > 0), evict, cache
    )


def forget(cache: PrefixCache, page: jax.Array) -> PrefixCache:
    """Takes a page that rows hold out of the index, if it is there; no page there may follow it."""
    index, _ = prefix_index.drop(cache.index, page)  # its parent is held, and so never queued
    return cache.replace(index=index)


def violations(cache: PrefixCache) -> jax.Array:
    """Counts broken invariants, `i32[10]`: those of the page table, and

    6. pages of the index that their bucket does not name once, or other pages that a bucket names;
    7. parents that are not in the index, or whose children are miscounted;
    8. rows whose first `num_indexed` pages are not a chain of the index, or not full;
    9. pages that are queued and not leaves that nobody holds, or the reverse; or minima of blocks;
    10. a wrong `num_cached`, or a twin that is not in the index.
    """
    null, index, queue = cache.num_pages, cache.index, cache.queue
    pages = jnp.arange(null, dtype=jnp.int32)
    is_in, is_cached = index.holds(pages), cache.is_cached
    expected = is_in.astype(jnp.int32)

    def count(broken: jax.Array) -> jax.Array:
        return jnp.sum(broken, dtype=jnp.int32)

    named = jnp.zeros((null,), jnp.int32).at[index.buckets].add(1, mode="drop")
    own_bucket = index.buckets[prefix_index.bucket_of(index, index.digests)]
    in_own = jnp.sum(own_bucket == pages[:, None], axis=1, dtype=jnp.int32)

    parents = jnp.where(is_in, index.parents, null)
    children = jnp.zeros((null,), jnp.int32).at[parents].add(1, mode="drop")
    orphans = is_in & (parents < null) & ~index.holds(parents)

    columns = jnp.arange(cache.page_indices.shape[1], dtype=jnp.int32)[None]
    chained = columns < cache.num_indexed[:, None]
    before = jnp.roll(cache.page_indices, 1, axis=1)
    row_parents = _at(index.parents, cache.page_indices, fill=null)
    follows = jnp.where(columns > 0, row_parents == before, row_parents > null)
    unfull = cache.num_indexed > cache.lengths // cache.page_size

    queued = queue.scores.reshape(-1)[:null] < eviction.NEVER
    leaves = is_cached & (index.num_children == 0)
    lowest = [jnp.min(queue.scores, axis=1), queue.lowest_scores]
    ties = jnp.where(queue.scores == lowest[0][:, None], queue.last_used, eviction.NEVER)
    lost_twins = (cache.twins < null) & ~index.holds(cache.twins)
    more = [
        count((named != expected) | (in_own != expected)),
        count(orphans) + count(is_in & (children != index.num_children)),
        count(chained & ~follows) + count(unfull),
        count(queued != leaves)
        + count(lowest[0] != lowest[1])
        + count(jnp.min(ties, axis=1) != queue.lowest_used),
        (cache.num_cached != count(is_cached)).astype(jnp.int32) + count(lost_twins),
    ]
    return jnp.concatenate([page_table.violations(cache.table, is_in), jnp.stack(more)])


def _take(cache: PrefixCache, pages: jax.Array) -> PrefixCache:
    """Adds a reference to each of `pages: i32[n]`, a chain of the index; `P` is none."""
    null = cache.num_pages
    owners, pages = first_read(_at(cache.table.ref_counts, pages, fill=1), pages)
    wakes = owners == 0
    # Only the last of a chain can be a leaf, and be queued.
    last = jnp.where(wakes, pages, -1)[jnp.maximum(jnp.sum(pages < null) - 1, 0)]
    index = cache.index
    return cache.replace(
        table=cache.table.replace(ref_counts=cache.table.ref_counts.at[pages].add(1, mode="drop")),
        index=index.replace(
            last_used=index.last_used.at[pages].set(cache.step, mode="drop"),
            num_uses=index.num_uses.at[pages].add(1, mode="drop"),
        ),
        queue=eviction.remove(cache.queue, jnp.where(last >= 0, last, eviction.NEVER)),
        num_cached=cache.num_cached - jnp.sum(wakes, dtype=jnp.int32),
    )


def _enqueue_leaf(cache: PrefixCache, page: jax.Array, score: ScoreFn) -> PrefixCache:
    """Queues `page: i32[]` if it is a page, cached, and no page of the index follows it."""
    index = cache.index
    is_leaf = (page < cache.num_pages) & (_at(index.num_children, page) == 0)
    owners, cache = first_read(_at(cache.table.ref_counts, page, fill=1), cache)
    is_leaf &= owners == 0
    there = jnp.where(is_leaf, page, 0)
    usage = index.usage(there)
    queue = eviction.put(
        cache.queue, jnp.where(is_leaf, page, eviction.NEVER), score(usage), usage.last_used
    )
    return cache.replace(queue=queue)


def _at(values: jax.Array, index: jax.Array, fill: int = 0) -> jax.Array:
    """`values[index]`, and `fill` outside."""
    return values.at[index].get(mode="fill", fill_value=fill)
