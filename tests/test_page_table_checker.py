"""The checker of the page table finds every corruption, in its place."""

import dataclasses
import functools

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from page_tables import (
    SHAPES,
    SOUND,
    append,
    apply,
    commands,
    i32,
    pages_of,
    share,
    violations,
)
from paging_oracle import PageTableOracle

from jaxpage.paging import page_table, tiers
from jaxpage.paging.host_tier import HostTier
from jaxpage.paging.page_table import PageTable


@functools.cache
def sound_table() -> PageTable:
    """Rows of pages [0, 1], [2, 3, 4], [0, 1] and none; pages 9 to 5 on the stack, 5 on top."""
    table, _ = append(page_table.create(4, 4, 10, 4), i32([6, 9, 0, 0]))
    return share(table, i32(0), i32(2), i32(5))


def corrupted(**changes) -> PageTable:
    """The sound table with entries set: `field=(index, value)`, or `field=value` for a scalar."""
    return changed(sound_table(), changes)


def changed[T: (PageTable, HostTier)](state: T, changes: dict) -> T:
    for name, change in changes.items():
        array = np.array(getattr(state, name))
        index, value = change if isinstance(change, tuple) else ((), change)
        array[index] = value
        state = dataclasses.replace(state, **{name: jnp.asarray(array)})
    return state


# What is wrong, and what the checker must count: references, free xor owned, entries, repeated,
# ranges.
CORRUPTIONS = {
    "a reference too many": ({"ref_counts": (3, 2)}, [1, 0, 0, 0, 0]),
    "a reference too few": ({"ref_counts": (1, 1)}, [1, 0, 0, 0, 0]),
    "a reference on a free page": ({"ref_counts": (9, 1)}, [1, 0, 0, 0, 0]),
    "a negative reference count": ({"ref_counts": (9, -1)}, [1, 0, 0, 0, 0]),
    "a page twice in the stack": ({"free_pages": (5, 5), "num_free": 6}, [0, 1, 0, 0, 0]),
    "a page twice in the stack, one lost": ({"free_pages": (0, 5)}, [0, 2, 0, 0, 0]),
    "an owned page in the stack": ({"free_pages": (5, 3), "num_free": 6}, [0, 1, 0, 0, 0]),
    "no page in the stack, one lost": ({"free_pages": (0, 10)}, [0, 1, 0, 0, 0]),
    "a negative page in the stack, one lost": ({"free_pages": (0, -1)}, [0, 1, 0, 0, 0]),
    "a leaked page": ({"num_free": 4}, [0, 1, 0, 0, 0]),
    "a free count one too high": ({"num_free": 6}, [0, 1, 0, 0, 0]),
    "a free count below zero": ({"num_free": -1}, [0, 5, 0, 0, 1]),
    "a free count above the pool": ({"num_free": 11}, [0, 5, 0, 0, 1]),
    "an owned page past the end": ({"page_indices": ((0, 2), 3)}, [1, 0, 1, 0, 0]),
    "a free page past the end": ({"page_indices": ((0, 2), 9)}, [1, 1, 1, 0, 0]),
    "-1 past the end": ({"page_indices": ((0, 2), -1)}, [0, 0, 1, 0, 0]),
    "more than P past the end": ({"page_indices": ((0, 2), 11)}, [0, 0, 1, 0, 0]),
    "a missing entry": ({"page_indices": ((1, 1), 10)}, [1, 1, 1, 0, 0]),
    "-1 for an entry": ({"page_indices": ((1, 1), -1)}, [1, 1, 1, 0, 0]),
    "a page twice in a row": ({"page_indices": ((1, 2), 2)}, [2, 1, 0, 1, 0]),
    "another row's page": ({"page_indices": ((1, 2), 0)}, [2, 1, 0, 0, 0]),
    "a length that claims a page more": ({"lengths": (0, 9)}, [0, 0, 1, 0, 0]),
    "a length that forgets a page": ({"lengths": (0, 4)}, [0, 0, 1, 0, 0]),
    "a length beyond the slot": ({"lengths": (1, 17)}, [0, 0, 1, 0, 1]),
    "more than P for an entry": ({"page_indices": ((1, 1), 11)}, [1, 1, 1, 0, 0]),
    "a page of the host too many": ({"num_hosted": (1, 1)}, [0, 0, 0, 0, 1]),
    "a negative length": ({"lengths": (3, -1)}, [0, 0, 0, 0, 1]),
}


@functools.cache
def tiered_table() -> PageTable:
    """The sound table beside a host of 4 pages; page 4 of row 1 is on the host, 13 in its place."""
    table, _ = append(page_table.create(4, 4, 10, 4, host_pages=4), i32([6, 9, 0, 0]))
    return tiers.move_out(share(table, i32(0), i32(2), i32(5)), i32(1), i32(2))


# The same of the host: pages 10 to 12 are on its stack.
HOST_CORRUPTIONS = {
    "a page of the host that is not counted": ({"num_hosted": (1, 0)}, {}, [0, 0, 0, 0, 1]),
    "a page of the host too many": ({"num_hosted": (0, 1)}, {}, [0, 0, 0, 0, 1]),
    "two pages in one place": ({}, {"places": (3, 2)}, [0, 0, 0, 2, 0]),
    "a page nowhere": ({}, {"places": (3, 14)}, [0, 0, 0, 1, 1]),
    "a leaked page of the host": ({}, {"num_free": 2}, [0, 1, 0, 0, 0]),
    "an owned page in the host's stack": ({}, {"free_pages": (0, 4)}, [0, 2, 0, 0, 0]),
    "a page of the pool in the host's stack": ({}, {"free_pages": (0, 9)}, [0, 1, 0, 0, 0]),
    "a page of the host in the pool's stack": ({"free_pages": (0, 12)}, {}, [0, 1, 0, 0, 0]),
    "a free count above the host": ({}, {"num_free": 5}, [0, 0, 0, 0, 1]),
    "a free count below zero": ({}, {"num_free": -1}, [0, 3, 0, 0, 1]),
}


@pytest.mark.parametrize(
    "of_table, of_tier, counts", HOST_CORRUPTIONS.values(), ids=HOST_CORRUPTIONS.keys()
)
def test_the_checker_counts_each_corruption_of_the_host_tier(of_table, of_tier, counts):
    table = tiered_table()
    assert violations(table).tolist() == SOUND
    assert table.num_hosted.tolist() == [0, 1, 0, 0]
    table = dataclasses.replace(changed(table, of_table), tier=changed(table.tier, of_tier))
    assert violations(table).tolist() == counts


def test_the_checker_finds_nothing_in_the_sound_table():
    assert pages_of(sound_table(), 1) == [2, 3, 4]
    assert violations(sound_table()).tolist() == SOUND


@pytest.mark.parametrize("changes, counts", CORRUPTIONS.values(), ids=CORRUPTIONS.keys())
def test_the_checker_counts_each_corruption_in_its_place(changes, counts):
    assert violations(corrupted(**changes)).tolist() == counts


@settings(max_examples=150, deadline=None)
@given(
    script=commands(SHAPES["pages of 3"], 8),
    field=st.sampled_from(("page_indices", "ref_counts", "free_pages", "num_free", "num_hosted")),
    position=st.integers(0, 255),
    value=st.integers(-3, 12),
)
def test_any_one_changed_number_breaks_an_invariant(script, field, position, value):
    table = page_table.create(*SHAPES["pages of 3"])
    oracle = PageTableOracle(*SHAPES["pages of 3"])
    for command in script:
        table, _ = apply(table, oracle, command)
    array = np.array(getattr(table, field))
    # What lies above the top of the stack has no meaning.
    meaningful = int(table.num_free) if field == "free_pages" else array.size
    if meaningful == 0:
        return
    place = np.unravel_index(position % meaningful, array.shape)
    changed = array[place] != value
    array[place] = value
    counts = violations(dataclasses.replace(table, **{field: jnp.asarray(array)}))
    assert bool(np.any(np.asarray(counts))) == changed
