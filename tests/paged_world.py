"""A tiny page table with the bytes of its pages, for searches over all event sequences.

What a row writes for its token `i` is a number of its own, so that a slot which another row or
another token overwrote is seen. Slots that no row holds are wiped.
"""

import jax
import jax.numpy as jnp
import numpy as np
import page_bytes
from event_search import Faults, Universe, Verb
from flax import struct
from page_bytes import count, span

from jaxpage.paging import page_table, status
from jaxpage.paging.allocator import PAGED
from jaxpage.paging.page_table import PageTable


class PagedWorld(struct.PyTreeNode):
    """A table, the bytes of its pages, and what each row must read."""

    table: PageTable
    pool: jax.Array  # i32[P, S]
    written: jax.Array  # i32[B, N], 0 past the row's length

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Rows, tokens that a row can have, tokens a page."""
        num_rows, row_len = self.written.shape
        return num_rows, row_len, self.table.page_size


def paged_universe(name: str, shape: tuple[int, int, int, int]) -> Universe:
    """Rows of `shape` (slots, pages a slot, pages, page size) append, share and are released."""
    num_rows, pages_per_slot, num_pages, page_size = shape
    one = np.eye(num_rows, dtype=np.int32)
    all_rows = np.ones((1, num_rows), np.int32)
    table = page_table.create(num_rows, pages_per_slot, num_pages, page_size)
    start = PagedWorld(
        table=table,
        pool=jnp.zeros((num_pages, page_size), jnp.int32),
        written=jnp.zeros((num_rows, pages_per_slot * page_size), jnp.int32),
    )
    pairs = [
        (a, b, less) for a in range(num_rows) for b in range(num_rows) if a != b for less in (0, 1)
    ]
    counts = np.concatenate([one, all_rows, (page_size + 1) * one, page_size * all_rows])
    return Universe(
        name=name,
        kinds=["an empty table"],
        starts=jax.tree.map(lambda x: np.asarray(x)[None], start),
        verbs={
            "append": Verb(lambda world, counts: _append(world, counts, None), counts),
            "append at most one page": Verb(
                lambda world, counts: _append(world, counts, 1), all_rows
            ),
            "share": Verb(_share, np.asarray(pairs, np.int32)),
            "release": Verb(_release, np.concatenate([one, all_rows])),
        },
        check=_check,
        key=_key,
    )


def _append(world: PagedWorld, counts: jax.Array, bound: int | None) -> tuple[PagedWorld, Faults]:
    """The rows' tokens get pages, the copies are made, and then the tokens are written."""
    before = world.table
    num_rows, row_len, page_size = world.sizes
    table, appended = PAGED.append(before, counts, bound)
    available = before.num_free if bound is None else jnp.minimum(before.num_free, bound)
    expected = page_bytes.append(
        before.page_indices, before.lengths, counts, available, before.num_pages, page_size
    )
    pool = page_bytes.copy(world.pool, appended.sources, appended.targets)
    is_new = span(before.lengths, table.lengths, row_len)
    own = jnp.arange(1, num_rows * row_len + 1, dtype=jnp.int32).reshape(num_rows, row_len)
    pool = page_bytes.write(pool, table.page_indices, is_new, own)
    is_ok = expected.statuses == status.OK
    failed = ~is_ok[:, None] & (table.page_indices != before.page_indices)
    faults = {
        "statuses": count(appended.status != expected.statuses),
        "copies": count(appended.sources != expected.sources),
        "lengths": count(table.lengths != before.lengths + jnp.where(is_ok, counts, 0)),
        "all or nothing": count(failed),
    }
    written = jnp.where(is_new, own, world.written)
    return _wiped(PagedWorld(table=table, pool=pool, written=written)), _all(faults)


def _share(world: PagedWorld, arguments: jax.Array) -> tuple[PagedWorld, Faults]:
    """Row `target`, if empty, holds the tokens of row `source`, or all but the last."""
    source, target, less = arguments
    lengths = world.table.lengths
    allowed = (lengths[target] == 0) & (lengths[source] > less)
    num_tokens = lengths[source] - less
    table = page_table.share(world.table, source, target, num_tokens)
    tokens = jnp.where(jnp.arange(world.sizes[1]) < num_tokens, world.written[source], 0)
    after = world.replace(table=table, written=world.written.at[target].set(tokens))
    took = jnp.where(allowed, table.num_free - world.table.num_free, 0)
    return _wiped(_where(allowed, after, world)), _all({"pages taken by sharing": took})


def _release(world: PagedWorld, rows: jax.Array) -> tuple[PagedWorld, Faults]:
    gone = rows > 0
    table = PAGED.release(world.table, gone)
    written = jnp.where(gone[:, None], 0, world.written)
    stays = jnp.where(gone, 0, table.lengths - world.table.lengths)
    faults = {"rows left": count(jnp.where(gone, table.lengths, stays) != 0)}
    return _wiped(world.replace(table=table, written=written)), _all(faults)


def _check(world: PagedWorld) -> Faults:
    """Faults of the world itself: invariants, bytes, and pages that are lost."""
    table = world.table
    holds = span(jnp.zeros_like(table.lengths), table.lengths, world.sizes[1])
    read = page_bytes.read(world.pool, table.page_indices)
    named = page_bytes.references(table.page_indices, table.num_pages) > 0
    return {
        "invariants": jnp.sum(PAGED.violations(table)),
        "bytes": count(holds & (read != world.written)),
        "free and held": jnp.abs(table.num_free + count(named) - table.num_pages),
        "fitting": _misjudged(table),
    }


def _misjudged(table: PageTable) -> jax.Array:
    """Rows of which `fitting` does not say what trying says."""
    num_rows = table.lengths.shape[0]
    row = jnp.arange(num_rows, dtype=jnp.int32)
    order, has_room = row[::-1], table.lengths < table.page_indices.shape[1] * table.page_size
    counts = has_room.astype(jnp.int32)

    def tried(i):
        first = row >= i  # the last row comes first
        trial, appended = PAGED.append(
            PAGED.release(table, ~first), jnp.where(first, counts, 0), None
        )
        del trial
        return ~jnp.any(appended.status == status.OUT_OF_PAGES)

    return count(PAGED.fitting(table, order, counts) != jax.vmap(tried)(row))


def _wiped(world: PagedWorld) -> PagedWorld:
    """With zeros in all slots that no row's tokens are in."""
    lengths = world.table.lengths
    holds = span(jnp.zeros_like(lengths), lengths, world.sizes[1])
    held = page_bytes.marked(world.pool, world.table.page_indices, holds)
    return world.replace(pool=jnp.where(held, world.pool, 0))


def _key(world: PagedWorld) -> jax.Array:
    """The whole world, but for what lies above the top of the stack."""
    table = world.table
    is_free = jnp.arange(table.num_pages) < table.num_free
    table = table.replace(free_pages=jnp.where(is_free, table.free_pages, -1))
    leaves = jax.tree.leaves(world.replace(table=table))
    return jnp.concatenate([leaf.reshape(-1).astype(jnp.int8) for leaf in leaves])


CHECKS = ("statuses", "copies", "lengths", "all or nothing", "pages taken by sharing", "rows left")


def _all(faults: Faults) -> Faults:
    """With a zero for each check that another verb makes."""
    return {name: faults.get(name, jnp.asarray(0, jnp.int32)) for name in CHECKS}


def _where(allowed: jax.Array, after: PagedWorld, before: PagedWorld) -> PagedWorld:
    return jax.tree.map(lambda new, old: jnp.where(allowed, new, old), after, before)
