"""All sequences of events up to a depth on tiny pools, and random ones: no state breaks anything.

After each event the invariants hold, every row reads back its own tokens from the bytes of its
pages, and the event did what a model of a few lines says. Each test prints what it went through.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from cached_events import cached_universe
from event_search import Report, Universe, Verb, explore, try_every_sequence, walk
from paged_world import paged_universe

from jaxpage.paging import entering, prefix_index
from jaxpage.paging.eviction import EVICTION_POLICIES

# slots, pages a slot, pages, page size
TINY, SMALL, WIDE = (2, 2, 3, 2), (2, 3, 4, 2), (3, 3, 4, 2)
MIXED = [("lru", False), ("lfu", True), ("fifo", True), ("deepest", False)]  # hashes that collide?
EVERY_KIND = [(policy, collides) for policy in EVICTION_POLICIES for collides in (False, True)]


@pytest.fixture
def narrow(monkeypatch):
    """Buckets that fill up, and full pages that enter the index in several turns."""
    monkeypatch.setattr(prefix_index, "WAYS", 3)
    monkeypatch.setattr(entering, "ENTRIES", 2)


@pytest.fixture
def show(capsys):
    def show(*reports: Report) -> None:
        with capsys.disabled():
            print("", *reports, sep="\n    ")

    return show


# --- the page table ------------------------------------------------------------------------------


def test_every_sequence_of_three_events_leaves_the_page_table_and_its_bytes_right(show):
    universe = paged_universe("page table", WIDE)
    batch = len(universe.events) ** 3
    show(
        try_every_sequence(universe, depth=3),
        explore(universe, depth=5, batch=batch),
        walk(universe, num_walks=batch, depth=6),
    )


@pytest.mark.slow
def test_no_sequence_of_events_of_any_length_breaks_a_page_table_of_two_rows(show):
    report = explore(paged_universe("page table, two rows", SMALL), depth=40, batch=20_000)
    show(report)
    assert report.is_closed


@pytest.mark.slow
def test_millions_of_events_leave_the_page_table_and_its_bytes_right(show):
    universe = paged_universe("page table", WIDE)
    batch = 40_000
    show(explore(universe, depth=8, batch=batch), walk(universe, num_walks=batch, depth=100))


# --- the prefix cache ----------------------------------------------------------------------------


def test_every_sequence_of_two_events_leaves_the_prefix_cache_and_its_bytes_right(narrow, show):
    universe = cached_universe("prefix cache", WIDE, MIXED)
    batch = universe.num_starts * len(universe.events) ** 2
    show(
        try_every_sequence(universe, depth=2),
        explore(universe, depth=5, batch=batch),
        walk(universe, num_walks=batch, depth=25),
    )


@pytest.mark.slow
@pytest.mark.parametrize("shape", [SMALL, WIDE], ids=["two rows", "three rows"])
def test_millions_of_events_leave_the_prefix_cache_and_its_bytes_right(shape, narrow, show):
    universe = cached_universe(f"prefix cache, {shape[0]} rows", shape, EVERY_KIND)
    depth = {SMALL: 8, WIDE: 6}[shape]
    batch = 16_000
    show(explore(universe, depth, batch), walk(universe, num_walks=batch, depth=150))


# --- the search itself ---------------------------------------------------------------------------


def dials(limit: int) -> Universe:
    """Two numbers below five; each event adds to one of them. Their sum must stay below `limit`."""

    def turn(dials, dial):
        return dials.at[dial[0]].set((dials[dial[0]] + 1) % 5), {}

    return Universe(
        name="dials",
        kinds=["zeros"],
        starts=np.zeros((1, 2), np.int32),
        verbs={"turn": Verb(turn, np.asarray([[0], [1]], np.int32))},
        check=lambda dials: {"sum": (jnp.sum(dials) >= limit).astype(jnp.int32)},
        key=lambda dials: dials.astype(jnp.int8),
    )


def test_a_search_counts_sequences_states_and_distinct_states():
    assert try_every_sequence(dials(9), 3) == Report("dials", 3, 8, 24, 9)
    assert explore(dials(9), 2, batch=3) == Report("dials", 2, 6, 6, 5)


def test_a_search_ends_when_no_event_leads_to_a_new_state():
    report = explore(dials(9), 50, batch=7)
    assert report.is_closed and report.num_distinct == 25 and report.num_visited == 2 * 26


def test_a_fault_is_told_with_the_fewest_events_that_lead_to_it():
    with pytest.raises(
        AssertionError, match=r"sum.* after zeros: turn \[0\], turn \[0\], turn \[0\]$"
    ):
        explore(dials(3), 4, batch=5)
    with pytest.raises(AssertionError, match=r"sum.* after zeros: turn \[0\], turn \[0\]$"):
        try_every_sequence(dials(2), 3)
