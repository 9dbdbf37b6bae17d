"""Contiguous tables for tests: compiled verbs, what a reader sees, equality with the oracle."""

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from page_tables import i32
from paging_oracle import BuddyOracle

from jaxpage.paging import contiguous, status
from jaxpage.paging.contiguous import ContiguousTable

# slots, pages a slot, pages, page size
SHAPES = {"16 pages": (5, 8, 16, 1), "13 pages": (5, 6, 13, 2), "1 page": (2, 2, 1, 3)}
SOUND = [0, 0, 0, 0]
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())

reserve = jax.jit(contiguous.reserve)
append = jax.jit(contiguous.append)
release = jax.jit(contiguous.release)
violations = jax.jit(contiguous.violations)


@jax.jit
def observe(table: ContiguousTable) -> dict[str, jax.Array]:
    """All that a reader may ask of a table."""
    return {
        "page_indices": table.page_indices,
        "lengths": table.lengths,
        "held_pages": table.held_pages,
        "reserved_tokens": table.reserved_tokens,
        "num_free": table.num_free,
        "largest_order": table.largest[1] - 1,
        "violations": contiguous.violations(table),
    }


def reserve_rows(table: ContiguousTable, *num_tokens: int) -> tuple[ContiguousTable, list[int]]:
    """Reserves for rows 0, 1, ... in turn; returns the table and their statuses."""
    statuses = []
    for row, tokens in enumerate(num_tokens):
        table, row_status = reserve(table, i32(row), i32(tokens))
        statuses.append(int(row_status))
    return table, statuses


def leaves(table: ContiguousTable) -> list[list]:
    return [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(table)]


def assert_same(table: ContiguousTable, oracle: BuddyOracle) -> None:
    seen = {name: np.asarray(value).tolist() for name, value in observe(table).items()}
    assert seen["violations"] == SOUND
    assert seen["page_indices"] == oracle.page_indices()
    assert seen["lengths"] == [run.length if run else 0 for run in oracle.runs]
    assert seen["held_pages"] == [len(pages) for pages in oracle.page_lists()]
    assert seen["reserved_tokens"] == [run.reserved if run else 0 for run in oracle.runs]
    assert seen["num_free"] == oracle.num_free()
    assert seen["largest_order"] == oracle.largest_order()
    assert sum(seen["held_pages"]) + seen["num_free"] == oracle.num_pages


def commands(shape, max_size: int):
    """Lists of commands; a reservation goes to an empty row, if there is one."""
    num_slots, pages_per_slot, _, page_size = shape
    counts = st.lists(st.integers(0, 2 * page_size), min_size=num_slots, max_size=num_slots)
    rows = st.lists(st.booleans(), min_size=num_slots, max_size=num_slots)
    num_tokens = st.integers(1, pages_per_slot * page_size + 1)
    taking = st.tuples(st.just("reserve"), st.integers(0, 255), num_tokens)
    command = st.one_of(
        taking,
        taking,
        st.tuples(st.just("append"), counts),
        st.tuples(st.just("release"), rows),
    )
    return st.lists(command, max_size=max_size)


def apply(table: ContiguousTable, oracle: BuddyOracle, command) -> tuple[ContiguousTable, set[int]]:
    """Does one command to both; returns the table and the statuses met."""
    verb, *args = command
    if verb == "append":
        table, row_status = append(table, i32(args[0]))
        expected = oracle.append(args[0])
        assert np.asarray(row_status).tolist() == expected
        return table, set(expected)
    if verb == "release":
        oracle.release(args[0])
        return release(table, np.asarray(args[0])), set()
    empty = [row for row, run in enumerate(oracle.runs) if run is None]
    if not empty:
        return table, set()
    row, num_tokens = empty[args[0] % len(empty)], args[1]
    before = table
    table, row_status = reserve(table, i32(row), i32(num_tokens))
    assert int(row_status) == oracle.reserve(row, num_tokens)
    if int(row_status) != status.OK:
        assert leaves(table) == leaves(before)
    return table, {int(row_status)}
