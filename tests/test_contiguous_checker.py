"""The checker of contiguous tables finds every corruption, in its place."""

import dataclasses
import functools

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from contiguous_tables import (
    SHAPES,
    SOUND,
    append,
    apply,
    commands,
    reserve_rows,
    violations,
)
from hypothesis import given, settings
from page_tables import i32
from paging_oracle import BuddyOracle

from jaxpage.paging import contiguous, status
from jaxpage.paging.contiguous import ContiguousTable


@functools.cache
def sound_table(num_pages: int = 13) -> ContiguousTable:
    """Runs 0-3 (7 of 8 tokens written), 4 and 6-7; row 3 empty; free: 5 and from 8 on."""
    table, statuses = reserve_rows(contiguous.create(4, 8, num_pages, 2), 8, 1, 4)
    assert statuses == [status.OK] * 3
    assert table.starts.tolist() == [0, 4, 6, 0]
    return append(table, i32([7, 0, 0, 0]))[0]


def corrupted(changes, num_pages: int = 13) -> ContiguousTable:
    """The sound table with `changes[field] = (index, value)` set."""
    table = sound_table(num_pages)
    for name, (index, value) in changes.items():
        array = np.array(getattr(table, name))
        array[index] = value
        table = dataclasses.replace(table, **{name: jnp.asarray(array)})
    return table


# The tree over 13 pages has its root at 1 and page p at 16 + p. What is wrong, and what the checker
# must count: misplaced pages, tree nodes, unaligned runs, lengths.
CORRUPTIONS = {
    "a free leaf called taken": ({"largest": (16 + 9, 0)}, [0, 1, 0, 0]),
    "a taken leaf called free": ({"largest": (16 + 4, 1)}, [0, 1, 0, 0]),
    "a leaf outside the pool called free": ({"largest": (16 + 13, 1)}, [0, 1, 0, 0]),
    "a root that promises too much": ({"largest": (1, 5)}, [0, 1, 0, 0]),
    "a root that promises too little": ({"largest": (1, 1)}, [0, 1, 0, 0]),
    "a length beyond the reservation": ({"lengths": (0, 9)}, [0, 0, 0, 1]),
    "a negative length": ({"lengths": (1, -1)}, [0, 0, 0, 1]),
    "a length without a run": ({"lengths": (3, 1)}, [0, 0, 0, 1]),
    "a reservation beyond the run": ({"reserved_tokens": (1, 3)}, [0, 0, 0, 1]),
    "a reservation without a run": ({"reserved_tokens": (3, 1)}, [0, 0, 0, 1]),
    "a reservation below what is written": ({"reserved_tokens": (0, 6)}, [0, 0, 0, 1]),
}


@pytest.mark.parametrize("num_pages", [13, 16])
def test_the_checker_finds_nothing_in_the_sound_table(num_pages):
    assert violations(sound_table(num_pages)).tolist() == SOUND


@pytest.mark.parametrize("changes, counts", CORRUPTIONS.values(), ids=CORRUPTIONS.keys())
def test_the_checker_counts_each_corruption_in_its_place(changes, counts):
    assert violations(corrupted(changes)).tolist() == counts


def test_a_node_called_taken_hides_what_is_below_and_all_of_it_is_counted():
    counts = violations(corrupted({"largest": (6, 0)})).tolist()  # pages 8 to 11
    assert counts == [0, 1 + 2 + 4, 0, 0]


def test_two_runs_over_the_same_pages_are_counted_a_page():
    table = corrupted({"starts": (2, 2), "orders": (2, 1)})  # 2-3 lie in run 0-3; 6-7 are lost
    counts = violations(table).tolist()
    assert counts[0] == 2
    assert counts[1] > 0
    assert counts[2:] == [0, 0]


def test_a_run_off_its_alignment_is_counted():
    counts = violations(corrupted({"starts": (2, 5)})).tolist()  # 5-6 instead of 6-7
    assert counts[0] == 0
    assert counts[1] > 0
    assert counts[2:] == [1, 0]


# Pages of the pool are 0 to num_pages - 1; the tree has 16 leaves in either case.
@pytest.mark.parametrize("num_pages, start, outside", [(13, 12, 1), (13, 14, 2), (16, 16, 2)])
@pytest.mark.parametrize("far", [0, 1000])
def test_a_run_that_leaves_the_pool_is_counted_a_page(num_pages, start, outside, far):
    table = corrupted({"starts": (2, start + far)}, num_pages)
    assert int(violations(table)[0]) == (2 if far else outside)


def test_a_run_before_the_pool_is_counted_a_page():
    assert int(violations(corrupted({"starts": (2, -2)}))[0]) == 2


def test_a_run_longer_than_the_tree_says_is_counted():
    counts = violations(corrupted({"orders": (1, 1)})).tolist()  # 4-5, while 5 is free in the tree
    assert counts[0] == 0
    assert counts[1] > 0


def test_a_run_that_the_table_forgot_is_counted():
    counts = violations(corrupted({"orders": (1, -1)})).tolist()
    assert counts[1] > 0


def is_hidden(node: int, tree: np.ndarray) -> bool:
    """Whether a node lies below one that holds 0, where values have no meaning."""
    while node > 1:
        node //= 2
        if tree[node] == 0:
            return True
    return False


@settings(max_examples=150, deadline=None)
@given(
    script=commands(SHAPES["13 pages"], 8),
    field=st.sampled_from(("starts", "orders", "largest")),
    position=st.integers(0, 255),
    value=st.integers(-2, 17),
)
def test_any_one_changed_number_breaks_an_invariant(script, field, position, value):
    table, oracle = contiguous.create(*SHAPES["13 pages"]), BuddyOracle(*SHAPES["13 pages"])
    for command in script:
        table, _ = apply(table, oracle, command)
    array = np.array(getattr(table, field))
    place = position % array.size
    if field == "starts" and oracle.runs[place] is None:
        return
    if field == "largest" and (place == 0 or is_hidden(place, array)):
        return
    if field == "orders":  # any negative order says that there is no run
        value = max(value, -1)
    changed = array[place] != value
    array[place] = value
    counts = violations(dataclasses.replace(table, **{field: jnp.asarray(array)}))
    assert bool(np.any(np.asarray(counts))) == changed
