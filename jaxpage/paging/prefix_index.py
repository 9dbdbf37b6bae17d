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

from jaxpage.paging.eviction import Usage
from jaxpage.paging.in_place import first_read, once

_ENTERED = Usage._fields.index("entered")
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
    usages: jax.Array  # i32[P, 4], the fields of `Usage`

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
        """What an eviction policy may know of pages."""
        return Usage(*jnp.moveaxis(self.usages[page], -1, 0))


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
    steps: jax.Array  # i32[K], in which they became full, or a later one
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
        usages=jnp.zeros((num_pages, len(Usage._fields)), jnp.int32),
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
    entered = _at(index.usages, child)[_ENTERED]
    agreed = jnp.where((child < null) & (entered < step), agreed, 0)
    return Match(
        pages=pages,
        num_pages=num_pages,
        partial=jnp.where(agreed > 0, child, null),
        num_tokens=num_pages * page_size + agreed,
    )


def enter(
    index: PrefixIndex, entries: Entries, num_rows: int, hash_fn: HashFn = mix
) -> tuple[PrefixIndex, jax.Array, jax.Array]:
    """Enters pages, of which some may be there: another row has entered them.

    Of each row the entries go in up to the first that cannot: because an equal page is there
    in its place, or its bucket is full. Of equal entries the lowest page goes in. Returns how many
    did, `i32[num_rows]`, and the equal page that stopped the row, `i32[num_rows]`, `P` for none.
    """
    null, pages, parents = index.num_pages, entries.pages, entries.parents
    number = jnp.arange(pages.shape[0])
    earlier = number[:, None] > number[None]
    follows = (entries.row[:, None] == entries.row[None]) & earlier  # in a row
    is_there = index.holds(pages)
    is_live = (pages < null) & ~is_there
    # Rows may share a page that is to be entered: if one row enters it, to the others it is there.
    is_repeat = is_live & jnp.any((pages[:, None] == pages[None]) & earlier, axis=1)
    is_new = is_live & ~is_repeat
    digests = once(_digests(index, entries, follows, hash_fn))
    bucket = bucket_of(index, digests)
    there = once(index.buckets[bucket])  # [K, WAYS]
    index = index.replace(  # which means nothing before they are entered
        tokens=index.tokens.at[jnp.where(is_new, pages, null)].set(entries.tokens, mode="drop")
    )
    equal = _equal(index, entries, is_new, digests, there)
    equal = once(jnp.where(is_repeat & (equal == null), pages, equal))

    goes = is_new & (equal == null)
    rank = once(jnp.sum((bucket[:, None] == bucket[None]) & earlier & goes[None], axis=1))
    way, has_way = once(_empty_way(there == null, rank))
    stops = is_live & ~(goes & has_way)
    is_behind = once(jnp.any(follows & stops[None], axis=1))
    is_first_stop = stops & ~is_behind
    stays = (pages < null) & ~stops & ~is_behind

    enters = stays & ~is_there
    page = jnp.where(enters, pages, null)
    parent = jnp.where(enters, parents, null)
    page, parent = once((page, parent))
    is_newest = ~jnp.any((parent[:, None] == parent[None]) & (page[:, None] > page[None]), axis=1)
    usage = Usage(
        entered=entries.steps,
        last_used=entries.steps,
        num_uses=jnp.ones_like(entries.steps),
        depth=entries.depth,
    )
    usage = jnp.stack(usage, axis=1)
    index = index.replace(
        buckets=index.buckets.at[jnp.where(enters, bucket, index.buckets.shape[0]), way].set(
            page, mode="drop"
        ),
        parents=index.parents.at[page].set(parents, mode="drop"),
        digests=index.digests.at[page].set(digests, mode="drop"),
        usages=index.usages.at[page].set(usage, mode="drop"),
        num_children=index.num_children.at[parent].add(1, mode="drop"),
        newest_child=index.newest_child.at[jnp.where(is_newest, parent, null)].set(
            page, mode="drop"
        ),
    )
    counts = jnp.zeros((num_rows,), jnp.int32)
    counts = counts.at[entries.row].add(stays.astype(jnp.int32), mode="drop")
    equal = jnp.where(index.holds(equal), equal, null)  # its own row may have stopped before it
    equals = jnp.full((num_rows,), null, jnp.int32)
    equals = equals.at[jnp.where(is_first_stop, entries.row, num_rows)].set(equal, mode="drop")
    return index, counts, equals


def _equal(
    index: PrefixIndex, entries: Entries, is_new: jax.Array, digests: jax.Array, there: jax.Array
) -> jax.Array:
    """A page that equals each entry: of its bucket, else the lowest of the new entries, else `P`.

    `there: i32[K, WAYS]` are the pages in its bucket. The tokens of one page of each are compared:
    of several alike, all but one merely collide.
    """
    null, pages, parents = index.num_pages, entries.pages, entries.parents
    alike = (there < null) & (_at(index.digests, there) == digests[:, None])
    alike &= _at(index.parents, there) == parents[:, None]
    found = jnp.min(jnp.where(alike, there, null), axis=1)
    alike = is_new[None] & (pages[:, None] > pages[None])
    alike &= (digests[:, None] == digests[None]) & (parents[:, None] == parents[None])
    beside = jnp.min(jnp.where(alike, pages[None], null), axis=1)
    candidates = once(jnp.stack([found, beside]))
    is_equal = jnp.all(_at(index.tokens, candidates) == entries.tokens[None], axis=2)
    # New entries that equal a page of the index do not go in.
    beside = jnp.where(is_equal[1], beside, null)
    return jnp.where(is_equal[0], found, beside)


def _empty_way(is_empty: jax.Array, rank: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The empty way after `rank: i32[K]` others, of `bool[K, WAYS]`; and whether there is one."""
    ways = jnp.arange(is_empty.shape[1])
    is_before = (ways[:, None] > ways[None])[None]
    empty_before = jnp.sum(is_empty[:, None] & is_before, axis=2)
    is_it = is_empty & (empty_before == rank[:, None])
    return jnp.argmax(is_it, axis=1), jnp.any(is_it, axis=1)


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


def note_use(index: PrefixIndex, pages: jax.Array, step: jax.Array, again: int) -> PrefixIndex:
    """Notes that distinct `pages: i32[n]` are used in `step`, `again` times more; `P` is none."""
    usage, usages = first_read(index.usage(pages), index.usages)
    usage = usage._replace(
        last_used=jnp.full_like(usage.last_used, step), num_uses=usage.num_uses + again
    )
    return index.replace(usages=usages.at[pages].set(jnp.stack(usage, axis=-1), mode="drop"))


def _digests(
    index: PrefixIndex, entries: Entries, follows: jax.Array, hash_fn: HashFn
) -> jax.Array:
    """The digest of each entry: that of what stands before its row's entries, and their sums."""
    page_size = index.page_size
    slots = jnp.arange(page_size, dtype=jnp.int32)[None]
    sums = hash_fn(entries.tokens, entries.depth[:, None] * page_size + slots)
    sums = jnp.sum(sums, axis=1, dtype=jnp.uint32)
    salt = entries.parents - index.num_pages - 1
    before = jnp.where(salt >= 0, _of_salt(salt, hash_fn), _at(index.digests, entries.parents))
    sums += jnp.where(entries.offset == 0, before, jnp.uint32(0))
    return sums + jnp.sum(jnp.where(follows, sums[None], jnp.uint32(0)), axis=1, dtype=jnp.uint32)


def _of_salt(salt: jax.Array, hash_fn: HashFn) -> jax.Array:
    return hash_fn(salt, jnp.full_like(salt, -1))


def bucket_of(index: PrefixIndex, digests: jax.Array) -> jax.Array:
    """The bucket in which pages with these digests are looked for."""
    return (_scramble(digests) % jnp.uint32(index.buckets.shape[0])).astype(jnp.int32)


def _at(values: jax.Array, index: jax.Array) -> jax.Array:
    """`values[index]`, and 0 outside."""
    return values.at[index].get(mode="fill", fill_value=0)
