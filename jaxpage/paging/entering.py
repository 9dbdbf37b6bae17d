"""How full pages enter the prefix index, and what becomes of those that equal a page of it.

While a step is planned they enter before each lookup, so that a prompt can share what another one
computes in the same step. Nobody else looks: between two steps they enter when a row is about to
give its pages up, and otherwise in bulk, since a turn costs about as much for one page as for many.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpage.paging import page_table, prefix_index, ragged
from jaxpage.paging.cache_state import PrefixCache, at, take, unqueue
from jaxpage.paging.in_place import first_read, once
from jaxpage.paging.prefix_index import Entries, HashFn

ENTRIES = 32  # pages that enter the index in one turn


class Sequences(NamedTuple):
    """What the rows of a table hold: row `b` the start of `tokens[rows[b]]`, and of its salt."""

    tokens: jax.Array  # i32[R, N]
    salts: jax.Array  # i32[R]
    rows: jax.Array  # i32[B]; R for an empty row


def enter(
    cache: PrefixCache, sequences: Sequences, counts: jax.Array, *, hash_fn: HashFn
) -> PrefixCache:
    """Makes all full pages findable, with those that the `counts: i32[B]` tokens of a step fill.

    Where an equal page is there already it is remembered as the row's twin, for `settle`, and the
    row enters no more until then: its chain would not be one. The work follows the pages.
    """
    computed = cache.lengths - counts

    def enter_next(carry):
        cache, pending = carry
        cache, tried, entered = _enter_some(cache, pending, sequences, computed, hash_fn)
        return cache, jnp.where(entered == tried, pending - tried, 0)

    start = (cache, _pending(cache))
    return lax.while_loop(lambda carry: jnp.any(carry[1] > 0), enter_next, start)[0]


def enter_computed(
    cache: PrefixCache, sequences: Sequences, rows: jax.Array, *, hash_fn: HashFn
) -> PrefixCache:
    """Between two steps, makes full pages of `rows: bool[B]` findable, and all if they fill a turn.

    Rows give up pages that have an equal in the index, hold that one, and go on from there.
    """

    def goes_on(carry):
        cache, pending = carry
        is_worth_it = jnp.any(rows & (pending > 0)) | (jnp.sum(pending) >= ENTRIES)
        return is_worth_it | jnp.any(cache.twins < cache.null)

    def enter_next(carry):
        cache, pending = carry
        before = cache.num_indexed
        cache, tried, _ = _enter_some(cache, pending, sequences, cache.lengths, hash_fn)
        cache = _take_twins(cache)
        entered = cache.num_indexed - before
        is_stuck = (tried > 0) & (entered == 0)  # its bucket is full
        return cache, jnp.where(is_stuck, 0, pending - entered)

    return lax.while_loop(goes_on, enter_next, (cache, _pending(cache)))[0]


def settle(
    cache: PrefixCache, sequences: Sequences, rows: jax.Array, *, hash_fn: HashFn
) -> PrefixCache:
    """Ends a step, after which `rows: bool[B]` give their pages up: see `enter_computed`."""
    cache = cache.replace(step=cache.step + 1)
    return enter_computed(cache, sequences, rows, hash_fn=hash_fn)


def _pending(cache: PrefixCache) -> jax.Array:
    """Full pages of each row that are not in the index yet, `i32[B]`."""
    pending = cache.lengths // cache.page_size - cache.num_indexed
    return jnp.where(cache.table.num_hosted == 0, pending, 0)


def _enter_some(
    cache: PrefixCache,
    pending: jax.Array,
    sequences: Sequences,
    computed: jax.Array,
    hash_fn: HashFn,
) -> tuple[PrefixCache, jax.Array, jax.Array]:
    """Enters the next `ENTRIES` of the `pending: i32[B]` pages, row after row.

    The first `computed: i32[B]` tokens of each row are of earlier steps. Returns for each row how
    many pages were tried, and how many entered: as many, or those before a twin or a full bucket.
    """
    page_size, num_rows = cache.page_size, cache.lengths.shape[0]
    tokens, num_sequences = sequences.tokens, sequences.tokens.shape[0]
    pages_per_sequence = tokens.shape[1] // page_size
    flat = ragged.expand(pending, ENTRIES)
    row = flat.row
    column = at(cache.num_indexed, row) + flat.offset
    sequence = at(sequences.rows, row, fill=num_sequences)
    flat, row, column, sequence = once((flat, row, column, sequence))
    before = cache.page_indices.at[row, jnp.maximum(column - 1, 0)].get(
        mode="fill", fill_value=cache.null
    )
    root = cache.index.root(at(sequences.salts, sequence))
    is_computed = (column + 1) * page_size <= at(computed, row)
    entries = Entries(
        pages=cache.page_indices.at[row, column].get(mode="fill", fill_value=cache.null),
        parents=jnp.where(column > 0, before, root),
        tokens=at(tokens.reshape(-1, page_size), sequence * pages_per_sequence + column),
        steps=cache.step - is_computed.astype(jnp.int32),
        row=row,
        offset=flat.offset,
        depth=column,
    )
    index, entered, twins = prefix_index.enter(cache.index, entries, num_rows, hash_fn)
    tried = jnp.clip(ENTRIES - (jnp.cumsum(pending) - pending), 0, pending)
    # A page that two rows hold is its own twin until one of them has entered it.
    older = jnp.where(entered > 0, cache.null, cache.twins)
    cache = cache.replace(
        index=index,
        num_indexed=cache.num_indexed + entered,
        twins=jnp.minimum(older, twins),
    )
    return cache, tried, entered


def _take_twins(cache: PrefixCache) -> PrefixCache:
    """Gives each row that has a twin that page in place of its own."""
    null = cache.null

    def give_up(cache):
        row = jnp.argmax(cache.twins < null)
        twin, column = cache.twins[row], cache.num_indexed[row]
        own, row = first_read(cache.page_indices[row, column], row)
        cache, twin = _back_by_trade(cache, own, twin)
        gives = jnp.where(twin < null, own, null)
        cache = take(cache, twin[None])
        ref_counts = cache.table.ref_counts.at[gives].add(-1, mode="drop")
        pages = cache.page_indices.at[row, jnp.where(twin < null, column, null)]
        table = cache.table.replace(
            page_indices=pages.set(twin, mode="drop"), ref_counts=ref_counts
        )
        unowned = jnp.where(at(ref_counts, gives, fill=1) == 0, gives, null)
        return cache.replace(
            table=page_table.free(table, unowned[None]),
            num_indexed=cache.num_indexed.at[row].add((twin < null).astype(jnp.int32)),
            twins=cache.twins.at[row].set(null),
        )

    return lax.while_loop(lambda cache: jnp.any(cache.twins < null), give_up, cache)


def _back_by_trade(
    cache: PrefixCache, own: jax.Array, twin: jax.Array
) -> tuple[PrefixCache, jax.Array]:
    """A twin on the host gets the place of `own`, which equals it: it is back, and nothing moves.

    Returns the twin that may be taken: none if others hold `own`, whose bytes then stay theirs.
    """
    if cache.tier.num_pages == 0:
        return cache, twin
    null, owners = cache.null, cache.table.ref_counts
    hosted, is_shared = cache.tier.is_hosted(twin), owners[own] > 1
    (hosted, is_shared, is_idle), cache = first_read((hosted, is_shared, owners[twin] == 0), cache)
    back = jnp.where(hosted & ~is_shared, twin, null)
    away = jnp.where(hosted & ~is_shared, own, null)
    parent = jnp.where(back < null, cache.index.parents[twin], null)
    cache = unqueue(cache, back)
    table = cache.table
    names = jnp.any(table.page_indices == back, axis=1) & (back < null)
    (source, target), tier = first_read(
        (table.tier.places[own], table.tier.places[twin]), table.tier
    )
    places = tier.places.at[back].set(source, mode="drop").at[away].set(target, mode="drop")
    was_cached = ((back < null) & is_idle).astype(jnp.int32)
    cache = cache.replace(
        table=table.replace(
            tier=tier.replace(places=places), num_hosted=table.num_hosted - names.astype(jnp.int32)
        ),
        hosted_children=cache.hosted_children.at[parent].add(-1, mode="drop"),
        num_cached=cache.num_cached + was_cached,
        num_host_cached=cache.num_host_cached - was_cached,
    )
    return cache, jnp.where(hosted & is_shared, null, twin)
