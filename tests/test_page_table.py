"""The page table against an oracle in plain Python, and the paper's worked examples (Figs 6, 7)."""

import numpy as np
import pytest
from hypothesis import given, settings
from page_tables import (
    SHAPES,
    SOUND,
    append,
    apply,
    assert_same,
    commands,
    every_shape,
    fork,
    free_set,
    i32,
    leaves,
    mask,
    pages_of,
    random_script,
    release,
    share,
    violations,
    with_stack,
)
from paging_oracle import PageTableOracle

from jaxpage.paging import page_table, status
from jaxpage.paging.page_table import PageTable

# --- random commands -----------------------------------------------------------------------------


def run_on_both(shape, script) -> tuple[PageTable, set[int]]:
    table = page_table.create(*shape)
    oracle = PageTableOracle(*shape)
    assert_same(table, oracle)
    met: set[int] = set()
    for command in script:
        table, statuses = apply(table, oracle, command)
        assert_same(table, oracle)
        met |= statuses
    return table, met


def check_random_commands(shape, max_examples: int, max_size: int) -> set[int]:
    """Runs random scripts on the table and on the oracle; returns the statuses met in all."""
    met: set[int] = set()

    @settings(max_examples=max_examples, deadline=None)
    @given(script=commands(shape, max_size))
    def check(script):
        table, statuses = run_on_both(shape, script)
        met.update(statuses)
        table = release(table, np.ones(shape[0], bool))
        assert free_set(table) == set(range(shape[2]))
        assert violations(table).tolist() == SOUND

    check()
    return met


@every_shape
def test_random_commands_leave_the_table_as_the_oracle_and_sound_after_each(shape):
    check_random_commands(shape, max_examples=60, max_size=15)


@pytest.mark.slow
@every_shape
def test_long_random_commands_leave_the_table_as_the_oracle_and_sound_after_each(shape):
    met = check_random_commands(shape, max_examples=1500, max_size=60)
    assert met == set(status.SENTENCES)


def test_a_long_walk_meets_every_status_and_agrees_with_the_oracle():
    _, met = run_on_both(SHAPES["pages of 3"], random_script(SHAPES["pages of 3"], 0, 200))
    assert met == set(status.SENTENCES)


# --- append --------------------------------------------------------------------------------------


def test_a_new_table_hands_out_page_0_first():
    table, _ = append(page_table.create(2, 3, 6, 4), i32([5, 4]))
    assert [pages_of(table, row) for row in range(2)] == [[0, 1], [2]]


def test_a_page_is_taken_only_when_a_token_needs_it():
    table = page_table.create(1, 3, 6, 4)
    held = []
    for _ in range(9):
        table, _ = append(table, i32([1]))
        held.append(int(table.held_pages[0]))
    assert held == [1, 1, 1, 1, 2, 2, 2, 2, 3]


def test_running_out_of_pages_is_a_value_and_leaves_the_table_as_it_was():
    table, _ = append(page_table.create(2, 4, 5, 4), i32([7, 5]))
    after, row_status = append(table, i32([9, 0]))
    assert row_status.tolist() == [status.OUT_OF_PAGES, status.OK]
    assert leaves(after) == leaves(table)


def test_a_row_gets_all_of_its_pages_or_none():
    table = page_table.create(2, 4, 5, 4)
    table, row_status = append(table, i32([8, 13]))  # 2 pages, then 4 of the 3 that are left
    assert row_status.tolist() == [status.OK, status.OUT_OF_PAGES]
    assert table.lengths.tolist() == [8, 0]
    assert pages_of(table, 1) == []
    assert int(table.num_free) == 3


def test_no_later_row_overtakes_one_that_found_too_few_pages():
    table, _ = append(page_table.create(4, 4, 6, 4), i32([8, 4, 3, 0]))
    # Two pages are left: row 0 takes one, row 1 needs two, row 2 has room, row 3 needs one.
    after, row_status = append(table, i32([1, 8, 1, 1]))
    assert row_status.tolist() == [status.OK, status.OUT_OF_PAGES, status.OK, status.OUT_OF_PAGES]
    assert after.lengths.tolist() == [9, 4, 4, 0]
    assert int(after.num_free) == 1


@pytest.mark.parametrize("bound", [0, 1, 2, 3, 5, 8, 20])
def test_a_bound_on_new_pages_grants_in_order_and_never_loses_a_page(bound):
    shape = (3, 4, 8, 2)
    table, oracle = page_table.create(*shape), PageTableOracle(*shape)
    for counts in ([3, 1, 5], [3, 1, 5], [1, 4, 0], [2, 2, 2], [0, 3, 1]):
        free_before = int(table.num_free)
        table, row_status = append(table, i32(counts), max_new_pages=bound)
        assert row_status.tolist() == oracle.append(counts, bound)
        assert free_before - int(table.num_free) <= bound
        assert_same(table, oracle)


def test_a_row_that_would_outgrow_its_slot_is_refused_and_does_not_hold_up_the_next():
    table = page_table.create(2, 2, 8, 4)
    table, row_status = append(table, i32([9, 8]))
    assert row_status.tolist() == [status.SLOT_FULL, status.OK]
    assert table.lengths.tolist() == [0, 8]
    assert violations(table).tolist() == SOUND


def test_appending_nothing_changes_nothing_even_with_a_shared_page_or_an_empty_pool():
    table, _ = append(page_table.create(3, 2, 2, 4), i32([6, 0, 0]))
    table = fork(table, i32(0), i32(1))
    after, row_status = append(table, i32([0, 0, 0]))
    assert row_status.tolist() == [status.OK] * 3
    assert leaves(after) == leaves(table)


# --- share, fork, release ------------------------------------------------------------------------


def test_the_last_owner_of_a_once_shared_page_writes_in_place():
    table, _ = append(page_table.create(2, 4, 8, 4), i32([6, 0]))
    table = fork(table, i32(0), i32(1))
    table = release(table, mask(table, 0))
    after, row_status = append(table, i32([0, 2]))
    assert row_status.tolist() == [status.OK, status.OK]
    assert pages_of(after, 1) == pages_of(table, 1)
    assert after.lengths.tolist() == [0, 8]


def test_rows_that_share_only_full_pages_grow_into_pages_of_their_own():
    table, _ = append(page_table.create(2, 4, 8, 4), i32([8, 0]))
    table = fork(table, i32(0), i32(1))
    table, row_status = append(table, i32([1, 1]))
    assert row_status.tolist() == [status.OK, status.OK]
    assert pages_of(table, 0) == [0, 1, 2]
    assert pages_of(table, 1) == [0, 1, 3]
    assert table.ref_counts.tolist() == [2, 2, 1, 1, 0, 0, 0, 0]


def test_sharing_takes_no_page_and_counts_one_reference_a_page():
    table, _ = append(page_table.create(3, 4, 8, 4), i32([10, 0, 0]))
    shared = share(table, i32(0), i32(2), i32(5))
    assert int(shared.num_free) == int(table.num_free)
    assert shared.ref_counts.tolist() == [2, 2, 1, 0, 0, 0, 0, 0]
    assert pages_of(shared, 2) == [0, 1]
    assert shared.lengths.tolist() == [10, 0, 5]
    assert leaves(share(table, i32(0), i32(2), i32(0))) == leaves(table)


def test_a_shared_page_is_free_only_when_its_last_row_is_released():
    table, _ = append(page_table.create(3, 4, 8, 4), i32([6, 0, 0]))
    table = fork(fork(table, i32(0), i32(1)), i32(1), i32(2))
    for row, (refs, num_free) in enumerate([(2, 6), (1, 6), (0, 8)]):
        table = release(table, mask(table, row))
        assert table.ref_counts.tolist()[:2] == [refs, refs]
        assert int(table.num_free) == num_free
        assert violations(table).tolist() == SOUND


def test_rows_that_share_pages_and_are_released_at_once_free_each_page_once():
    table, _ = append(page_table.create(4, 4, 8, 4), i32([10, 0, 0, 4]))
    table = share(fork(table, i32(0), i32(1)), i32(0), i32(2), i32(4))
    table = release(table, mask(table, 0, 1, 2))
    assert table.ref_counts.tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    assert free_set(table) == {0, 1, 2, 4, 5, 6, 7}
    assert int(table.num_free) == 7
    assert violations(table).tolist() == SOUND


def test_releasing_no_row_or_an_empty_row_changes_nothing():
    table, _ = append(page_table.create(3, 4, 8, 4), i32([10, 0, 4]))
    assert leaves(release(table, mask(table))) == leaves(table)
    assert leaves(release(table, mask(table, 1))) == leaves(table)


def test_every_status_has_a_sentence_and_ok_is_the_least():
    names = {name: value for name, value in vars(status).items() if isinstance(value, int)}
    assert set(status.SENTENCES) == set(names.values())
    assert len(names) == len(set(names.values()))
    assert min(names, key=names.__getitem__) == "OK"


# --- the paper's worked examples -----------------------------------------------------------------


def slot_of(table: PageTable, row: int, token: int) -> tuple[int, int]:
    """The physical page of a token and its slot there, counted from 1 as the paper counts."""
    return pages_of(table, row)[token // table.page_size], token % table.page_size + 1


def test_figure_6_a_prompt_of_7_takes_pages_7_and_1_and_generation_page_3():
    table = with_stack(page_table.create(1, 4, 9, 4), 7, 1, 3)
    table, _ = append(table, i32([7]))
    assert pages_of(table, 0) == [7, 1]
    table, _ = append(table, i32([1]))
    assert pages_of(table, 0) == [7, 1]
    assert slot_of(table, 0, 7) == (1, 4)
    table, _ = append(table, i32([1]))
    assert pages_of(table, 0) == [7, 1, 3]
    assert slot_of(table, 0, 8) == (3, 1)
    assert violations(table).tolist() == SOUND


def test_figure_7_a_second_request_takes_pages_5_and_2():
    table = with_stack(page_table.create(2, 4, 9, 4), 7, 1, 3, 5, 2)
    for counts in ([7, 0], [1, 0], [1, 0], [0, 7]):
        table, _ = append(table, i32(counts))
    assert [pages_of(table, row) for row in range(2)] == [[7, 1, 3], [5, 2]]
    table, _ = append(table, i32([1, 1]))
    assert [pages_of(table, row) for row in range(2)] == [[7, 1, 3], [5, 2]]
    assert slot_of(table, 1, 7) == (2, 4)
    assert violations(table).tolist() == SOUND
