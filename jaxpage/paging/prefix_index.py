"""Full pages by what they hold: the prefix index, a hash table in which tokens are the proof.

A page is known by a salt, the page before it and its own tokens. Its hash, over all tokens up to
its end, only says where to look: a page found there is compared in full, so that a collision costs
a hit and never correctness. Buckets have room for few pages; one that finds its bucket full is not
entered. Everything is vector operations over pages and tokens: no chain is walked.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxpage.paging.eviction import Usage
from jaxpage.paging.in_place import first_read

WAYS = 8  # pages a bucket; with four places a page, one in 4,000 finds its bucket full

# (token, its position in the sequence) -> u32; a prefix hashes to the sum over its tokens.
HashFn = Callable[[jax.Array, jax.Array], jax.Array]


class PrefixIndex(struct.PyTreeNode):
    """What is recorded of every page, and the buckets by which pages are found.

    `parents[p]` is the page before page `p`, `P + 1 + salt` at the start of a sequence, and `P`
    where `p` is not in the index; the rest is meaningless there, but that it has no children.
    """

    buckets: jax.Array  # i32[C, WAYS], pages; P where empty
    tokens: jax.Array  # i32[P, S]
    parents: jax.Array  # i32[P]
    digests: jax.Array  # u32[P], hash of all tokens up to the page's end, and the salt
    num_children: jax.Array  # i32[P], pages in the index that name it as parent
    newest_child: jax.Array  # i32[P], P for none
    depth: jax.Array  # i32[P], pages before it
    entered: jax.Array  # i32[P], steps
    last_used: jax.Array  # i32[P], steps
    num_uses: jax.Array  # i32[P]

    @property
    def num_pages(self) -> int:
        return self.parents.shape[0]

    @property
    def page_size(self) -> int:
        return self.tokens.shape[1]

    def root(self, salt: jax.Array) -> jax.Array:
        """What stands for the page before the first, of sequences with this salt."""
        return self.num_pages + 1 + salt

    def holds(self, pages: jax.Array) -> jax.Array:
        """Which of `pages` are in the index; none outside of the pool is."""
        parents = self.parents.at[pages].get(mode="fill", fill_value=self.num_pages)
        return parents != self.num_pages

    def usage(self, page: jax.Array) -> Usage:
        """What an eviction policy may know of a page."""
        return Usage(
            self.entered[page], self.last_used[page], self.num_uses[page], self.depth[page]
        )


class Match(NamedTuple):
    """The longest prefix found: full pages, and a page of which the first tokens agree."""

    pages: jax.Array  # i32[M]; P after the last
    num_pages: jax.Array  # i32[]
    partial: jax.Array  # i32[], the page that agrees in part, P for none
    num_tokens: jax.Array  # i32[], tokens in all


class Entries(NamedTuple):
    """Pages to enter, of several rows: a row's stand in order, each the parent of the next."""

    pages: jax.Array  # i32[K]; P for none
    parents: jax.Array  # i32[K]
    tokens: jax.Array  # i32[K, S]
    row: jax.Array  # i32[K]
    offset: jax.Array  # i32[K], of the row's entries
    depth: jax.Array  # i32[K]


def mix(tokens: jax.Array, positions: jax.Array) -> jax.Array:
    """A hash of tokens with their positions: two rounds of the finaliser of MurmurHash3."""
    return _scramble(_scramble(tokens.astype(jnp.uint32)) ^ positions.astype(jnp.uint32))


def _scramble(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def create(num_pages: int, page_size: int) -> PrefixIndex:
    """An empty index over a pool."""

    def full(value: int) -> jax.Array:
        return jnp.full((num_pages,), value, jnp.int32)

    num_buckets = max(1 << (4 * num_pages - 1).bit_length(), WAYS) // WAYS
    return PrefixIndex(
        buckets=jnp.full((num_buckets, WAYS), num_pages, jnp.int32),
        tokens=jnp.zeros((num_pages, page_size), jnp.int32),
        parents=full(num_pages),
        digests=jnp.zeros((num_pages,), jnp.uint32),
        num_children=full(0),
        newest_child=full(num_pages),
        depth=full(0),
        entered=full(0),
        last_used=full(0),
        num_uses=full(0),
    )


def match(
    index: PrefixIndex,
    tokens: jax.Array,
    limit: jax.Array,
    salt: jax.Array,
    step: jax.Array,
    hash_fn: HashFn = mix,
) -> Match:
    """Finds the longest prefix of the first `limit` of `tokens: i32[N]`.

    The last page may agree in part, if it was entered before `step`: what this step
    computes can be read by others, but not yet copied.
    """
    null, page_size = index.num_pages, index.page_size
    by_page = tokens.reshape(-1, page_size)
    ends = (jnp.arange(by_page.shape[0], dtype=jnp.int32) + 1) * page_size
    positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    sums = jnp.sum(hash_fn(tokens, positions).reshape(by_page.shape), axis=1, dtype=jnp.uint32)
    digests = jnp.cumsum(sums) + _of_salt(salt, hash_fn)

    there = index.buckets[bucket_of(index, digests)]
    alike = (there < null) & (_at(index.digests, there) == digests[:, None])
    # The tokens of one page are compared: of several alike, all but one merely collide.
    found = jnp.min(jnp.where(alike, there, null), axis=1)
    same = jnp.all(_at(index.tokens, found) == by_page, axis=1)
    before = jnp.concatenate([index.root(salt)[None], found[:-1]])
    proved = (found < null) & same & (_at(index.parents, found) == before) & (ends <= limit)
    num_pages = jnp.sum(jnp.cumprod(proved.astype(jnp.int32)), dtype=jnp.int32)
    pages = jnp.where(ends <= num_pages * page_size, found, null)

    last = jnp.where(num_pages > 0, pages[num_pages - 1], null)
    child = index.newest_child.at[last].get(mode="fill", fill_value=null)
    rest = tokens.at[num_pages * page_size + jnp.arange(page_size)].get(mode="fill", fill_value=-1)
    agrees = jnp.cumprod((_at(index.tokens, child) == rest).astype(jnp.int32))
    agreed = jnp.minimum(jnp.sum(agrees, dtype=jnp.int32), limit - num_pages * page_size)
    agreed = jnp.where((child < null) & (_at(index.entered, child) < step), agreed, 0)
    return Match(
        pages=pages,
        num_pages=num_pages,
        partial=jnp.where(agreed > 0, child, null),
        num_tokens=num_pages * page_size + agreed,
    )


def enter(
    index: PrefixIndex, entries: Entries, num_rows: int, step: jax.Array, hash_fn: HashFn = mix
) -> tuple[PrefixIndex, jax.Array, jax.Array]:
    """Enters pages, of which some may be there: another row has entered them.

    Of each row the entries go in up to the first that cannot: because an equal page is there
    in its place, or its bucket is full. Returns how many did, `i32[num_rows]`, and the equal page
    that stopped the row, `i32[num_rows]`, `P` for none.
    """
    null, live = index.num_pages, entries.pages < index.num_pages
    is_there = index.holds(entries.pages)
    # Rows may share a page that is to be entered: one row enters it, to the others it is there.
    number = jnp.arange(live.shape[0])
    is_same = entries.pages[:, None] == entries.pages[None]
    is_repeat = live & ~is_there & jnp.any(is_same & (number[:, None] > number[None]), axis=1)
    new = jnp.where(is_there | is_repeat, null, entries.pages)
    index = index.replace(
        tokens=index.tokens.at[new].set(entries.tokens, mode="drop"),
        parents=index.parents.at[new].set(entries.parents, mode="drop"),
        digests=index.digests.at[new].set(_digests(index, entries, hash_fn), mode="drop"),
    )
    bucket = bucket_of(index, _at(index.digests, entries.pages))
    buckets, placed, equal = _place(index, entries._replace(pages=new), bucket)
    placed |= is_there
    equal = jnp.where(is_repeat, entries.pages, equal)

    furthest = jnp.iinfo(jnp.int32).max
    stops = jnp.where(live & ~placed, entries.offset, furthest)
    first_stop = jnp.full((num_rows,), furthest, jnp.int32).at[entries.row].min(stops, mode="drop")
    until = _at(first_stop, entries.row)
    stays, stop = placed & (entries.offset < until), live & (entries.offset == until)

    gone = placed & ~stays & ~is_there
    gone_way = jnp.argmax(buckets[bucket] == entries.pages[:, None], axis=1)
    gone_row = jnp.where(gone, bucket, buckets.shape[0])
    index = index.replace(
        buckets=buckets.at[gone_row, gone_way].set(null, mode="drop"),
        parents=index.parents.at[jnp.where(stays, null, new)].set(null, mode="drop"),
    )
    index = _record(index, entries, stays & ~is_there, step)
    counts = jnp.zeros((num_rows,), jnp.int32)
    counts = counts.at[entries.row].add(stays.astype(jnp.int32), mode="drop")
    equal = jnp.where(index.holds(equal), equal, null)  # one of them may just have left again
    stop_row = jnp.where(stop, entries.row, num_rows)
    return (
        index,
        counts,
        jnp.full((num_rows,), null, jnp.int32).at[stop_row].set(equal, mode="drop"),
    )


def _place(
    index: PrefixIndex, entries: Entries, bucket: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gives every entry an empty place in its bucket, unless an equal page is there.

    Returns the buckets, which entries have a place, `bool[K]`, and the pages that equal the others,
    `i32[K]`, `P` for none. In a turn all try the first empty place; the lowest page gets it.
    """
    null, live = index.num_pages, entries.pages < index.num_pages
    digests = _at(index.digests, entries.pages)[:, None]

    def place(carry):
        buckets, open_, placed, equal = carry
        there = buckets[bucket]
        alike = (there < null) & open_[:, None] & (_at(index.digests, there) == digests)
        alike &= _at(index.parents, there) == entries.parents[:, None]
        # The tokens of one page are compared: of several alike, all but one merely collide.
        candidate = jnp.min(jnp.where(alike, there, null), axis=1)
        same = jnp.all(_at(index.tokens, candidate) == entries.tokens, axis=-1)
        equal = jnp.where(same, jnp.minimum(equal, candidate), equal)
        empty = there == null
        tries = open_ & (equal == null) & jnp.any(empty, axis=1)
        row, way = jnp.where(tries, bucket, buckets.shape[0]), jnp.argmax(empty, axis=1)
        buckets = buckets.at[row, way].min(entries.pages, mode="drop")
        wins = tries & (buckets[bucket, way] == entries.pages)
        return buckets, tries & ~wins, placed | wins, equal

    nothing = jnp.full_like(entries.pages, null)
    start = (index.buckets, live, jnp.zeros_like(live), nothing)
    buckets, _, placed, equal = lax.while_loop(lambda carry: jnp.any(carry[1]), place, start)
    return buckets, placed, equal


def _record(index: PrefixIndex, entries: Entries, stays: jax.Array, step: jax.Array) -> PrefixIndex:
    """What is known of the entries that stay, and of their parents."""
    null = index.num_pages
    pages = jnp.where(stays, entries.pages, null)
    parents = jnp.where(stays, entries.parents, null)
    newest_child = index.newest_child.at[parents].set(null, mode="drop")
    return index.replace(
        num_children=index.num_children.at[parents].add(1, mode="drop"),
        newest_child=newest_child.at[parents].min(pages, mode="drop"),
        depth=index.depth.at[pages].set(entries.depth, mode="drop"),
        entered=index.entered.at[pages].set(step, mode="drop"),
        last_used=index.last_used.at[pages].set(step, mode="drop"),
        num_uses=index.num_uses.at[pages].set(1, mode="drop"),
    )


def drop(index: PrefixIndex, page: jax.Array) -> tuple[PrefixIndex, jax.Array]:
    """Takes out a page that is in the index and that no page there follows; or none.

    Returns its parent too, which is a page or not; `num_children` of a page is up to date.
    """
    null = index.num_pages
    parent, page = first_read(index.parents.at[page].get(mode="fill", fill_value=null), page)
    bucket = bucket_of(index, _at(index.digests, page))
    bucket = jnp.where(page < null, bucket, index.buckets.shape[0])
    row = _at(index.buckets, bucket)
    newest = index.newest_child.at[parent].get(mode="fill", fill_value=null)
    index = index.replace(
        buckets=index.buckets.at[bucket].set(jnp.where(row == page, null, row), mode="drop"),
        parents=index.parents.at[page].set(null, mode="drop"),
        num_children=index.num_children.at[parent].add(-1, mode="drop"),
        newest_child=index.newest_child.at[parent].set(
            jnp.where(newest == page, null, newest), mode="drop"
        ),
    )
    return index, parent


def _digests(index: PrefixIndex, entries: Entries, hash_fn: HashFn) -> jax.Array:
    """The digest of each entry: that of what stands before its row's entries, and their sums."""
    page_size, row, offset = index.page_size, entries.row, entries.offset
    slots = jnp.arange(page_size, dtype=jnp.int32)[None]
    sums = hash_fn(entries.tokens, entries.depth[:, None] * page_size + slots)
    sums = jnp.sum(sums, axis=1, dtype=jnp.uint32)
    salt = entries.parents - index.num_pages - 1
    before = jnp.where(salt >= 0, _of_salt(salt, hash_fn), _at(index.digests, entries.parents))
    sums += jnp.where(offset == 0, before, jnp.uint32(0))
    counts = (row[:, None] == row[None]) & (offset[:, None] >= offset[None])
    return jnp.sum(jnp.where(counts, sums[None], jnp.uint32(0)), axis=1, dtype=jnp.uint32)


def _of_salt(salt: jax.Array, hash_fn: HashFn) -> jax.Array:
    return hash_fn(salt, jnp.full_like(salt, -1))


def bucket_of(index: PrefixIndex, digests: jax.Array) -> jax.Array:
    """The bucket in which pages with these digests are looked for."""
    return (_scramble(digests) % jnp.uint32(index.buckets.shape[0])).astype(jnp.int32)


def _at(values: jax.Array, index: jax.Array) -> jax.Array:
    """`values[index]`, and 0 outside."""
    return values.at[index].get(mode="fill", fill_value=0)
