"""Page tables for tests: compiled verbs, what a reader sees, and comparison with the oracle."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paging_oracle import PageTableOracle

from jaxpage.paging import page_table
from jaxpage.paging.allocator import Table
from jaxpage.paging.page_table import PageTable

# slots, pages a slot, pages, page size: pools that are not powers of two, and too small for all
SHAPES = {"pages of 3": (4, 4, 9, 3), "pages of 1": (3, 8, 13, 1), "a full pool": (5, 3, 16, 4)}
BOUNDS = (None, 1, 3)
SOUND = [0, 0, 0, 0, 0]
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())

append_all = jax.jit(page_table.append, static_argnames="max_new_pages")
share = jax.jit(page_table.share)
fork = jax.jit(page_table.fork)
release = jax.jit(page_table.release)
violations = jax.jit(page_table.violations)


def append(table: PageTable, counts, **bound) -> tuple[PageTable, jax.Array]:
    """The table and the statuses of `page_table.append`."""
    table, appended = append_all(table, counts, **bound)
    return table, appended.status


def copies_of(table: PageTable, appended: page_table.Appended) -> list[tuple[int, int, int]]:
    """(row, source, target) of each copy that `append` asks for."""
    pairs = zip(appended.sources.tolist(), appended.targets.tolist(), strict=True)
    null = table.num_pages
    found = [(row, *pair) for row, pair in enumerate(pairs) if pair != (null, null)]
    assert all(page != null for _, *pages in found for page in pages)
    return found


@jax.jit
def observe(table: PageTable) -> dict[str, jax.Array]:
    """All that a reader may ask of a table."""
    return {
        "page_indices": table.page_indices,
        "lengths": table.lengths,
        "ref_counts": table.ref_counts,
        "free_pages": table.free_pages,
        "num_free": table.num_free,
        "held_pages": table.held_pages,
        "reserved_tokens": table.reserved_tokens,
        "owners": page_table.page_owners(table.page_indices, table.num_pages),
        "violations": page_table.violations(table),
    }


def i32(values) -> jax.Array:
    return jnp.asarray(np.asarray(values, np.int32))


def mask(table: Table, *rows: int) -> np.ndarray:
    return np.isin(np.arange(table.lengths.shape[0]), rows)


def with_stack(table: PageTable, *top: int) -> PageTable:
    """A table of empty rows whose next pages are `top`, in this order."""
    rest = [page for page in range(table.num_pages) if page not in top]
    return dataclasses.replace(table, free_pages=i32([*rest, *reversed(top)]))


def pages_of(table: PageTable, row: int) -> list[int]:
    return np.asarray(table.page_indices)[row, : int(table.held_pages[row])].tolist()


def free_set(table: PageTable) -> set[int]:
    return set(np.asarray(table.free_pages)[: int(table.num_free)].tolist())


def leaves(table: PageTable) -> list[list]:
    return [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(table)]


def assert_same(table: PageTable, oracle: PageTableOracle) -> None:
    seen = {name: np.asarray(value) for name, value in observe(table).items()}
    assert seen["violations"].tolist() == SOUND
    assert seen["page_indices"].tolist() == oracle.page_indices()
    assert seen["lengths"].tolist() == oracle.lengths
    assert seen["ref_counts"].tolist() == oracle.ref_counts
    assert seen["free_pages"][: seen["num_free"]].tolist() == oracle.stack
    assert seen["held_pages"].tolist() == [len(pages) for pages in oracle.rows]
    assert seen["reserved_tokens"].tolist() == [
        len(pages) * oracle.page_size for pages in oracle.rows
    ]
    for page, owner in enumerate(seen["owners"].tolist()):
        assert owner in (oracle.holders(page) or [len(oracle.rows)])
    owned = {page for pages in oracle.rows for page in pages}
    assert len(owned) + int(seen["num_free"]) == oracle.num_pages


def commands(shape, max_size: int):
    """Lists of commands; numbers that name a row or a length are reduced to what is possible."""
    num_slots, _, _, page_size = shape
    number = st.integers(0, 255)
    counts = st.lists(
        st.sampled_from((0, 0, 1, 1, page_size, 2 * page_size + 1)),
        min_size=num_slots,
        max_size=num_slots,
    )
    rows = st.lists(st.booleans(), min_size=num_slots, max_size=num_slots)
    command = st.one_of(
        st.tuples(st.just("append"), counts, st.sampled_from(BOUNDS)),
        st.tuples(st.just("share"), number, number, number),
        st.tuples(st.just("fork"), number, number),
        st.tuples(st.just("release"), rows),
    )
    return st.lists(command, max_size=max_size)


def random_script(shape, seed: int, size: int) -> list[tuple]:
    rng = np.random.default_rng(seed)
    num_slots, _, _, page_size = shape
    script: list[tuple] = []
    for verb in rng.choice(["append", "share", "fork", "release"], size, p=[0.6, 0.15, 0.1, 0.15]):
        if verb == "append":
            counts = rng.choice([0, 1, page_size, 2 * page_size + 1], num_slots)
            script.append((verb, counts, BOUNDS[rng.integers(len(BOUNDS))]))
        elif verb == "release":
            script.append((verb, rng.random(num_slots) < 0.4))
        else:
            script.append((verb, *rng.integers(0, 256, 3).tolist()))
    return script


def apply(table: PageTable, oracle: PageTableOracle, command) -> tuple[PageTable, set[int]]:
    """Does one command to both; returns the table and the statuses met."""
    verb, *args = command
    if verb == "append":
        counts, bound = args
        table, appended = append_all(table, i32(counts), max_new_pages=bound)
        expected = oracle.append(counts, bound)
        assert appended.status.tolist() == expected
        assert copies_of(table, appended) == oracle.copies
        return table, set(expected)
    if verb == "release":
        oracle.release(args[0])
        return release(table, np.asarray(args[0])), set()
    empty = [row for row, length in enumerate(oracle.lengths) if length == 0]
    full = [row for row, length in enumerate(oracle.lengths) if length > 0]
    if not empty or not full:
        return table, set()
    source, target = full[args[0] % len(full)], empty[args[1] % len(empty)]
    length = oracle.lengths[source]
    if verb == "fork":
        oracle.share(source, target, length)
        return fork(table, i32(source), i32(target)), set()
    num_tokens = args[2] % (length + 1)
    oracle.share(source, target, num_tokens)
    return share(table, i32(source), i32(target), i32(num_tokens)), set()
