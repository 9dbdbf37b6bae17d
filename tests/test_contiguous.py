"""The buddy allocator against an oracle with free lists, the reservation rules, and the paper's
worked numbers (Figs 2 and 3)."""

import jax.numpy as jnp
import numpy as np
import pytest
from contiguous_tables import (
    SHAPES,
    SOUND,
    append,
    apply,
    assert_same,
    commands,
    every_shape,
    leaves,
    release,
    reserve,
    reserve_rows,
    violations,
)
from hypothesis import given, settings
from page_tables import i32, mask
from paging_oracle import BuddyOracle

from jaxpage.paging import contiguous, status

# --- random commands -----------------------------------------------------------------------------


def check_random_commands(shape, max_examples: int, max_size: int) -> set[int]:
    """Runs random scripts on the table and on the oracle; returns the statuses met in all."""
    met: set[int] = set()
    new_tree = contiguous.create(*shape).largest.tolist()

    @settings(max_examples=max_examples, deadline=None)
    @given(script=commands(shape, max_size))
    def check(script):
        table, oracle = contiguous.create(*shape), BuddyOracle(*shape)
        assert_same(table, oracle)
        for command in script:
            table, statuses = apply(table, oracle, command)
            assert_same(table, oracle)
            met.update(statuses)
        table = release(table, np.ones(shape[0], bool))
        assert table.largest.tolist() == new_tree

    check()
    return met


@every_shape
def test_random_commands_leave_the_table_as_the_oracle_and_sound_after_each(shape):
    check_random_commands(shape, max_examples=60, max_size=15)


@pytest.mark.slow
@every_shape
def test_long_random_commands_leave_the_table_as_the_oracle_and_sound_after_each(shape):
    met = check_random_commands(shape, max_examples=1500, max_size=60)
    assert met == {status.OK, status.OUT_OF_PAGES, status.SLOT_FULL}


def test_a_long_walk_meets_every_status_and_agrees_with_the_oracle():
    shape = SHAPES["13 pages"]
    rng = np.random.default_rng(0)
    table, oracle, met = contiguous.create(*shape), BuddyOracle(*shape), set()
    for verb in rng.choice(["reserve", "append", "release"], 200, p=[0.6, 0.2, 0.2]):
        arguments = {
            "reserve": (int(rng.integers(256)), int(rng.integers(1, 14))),
            "append": (rng.integers(0, 4, shape[0]),),
            "release": (rng.random(shape[0]) < 0.3,),
        }
        table, statuses = apply(table, oracle, (verb, *arguments[verb]))
        assert_same(table, oracle)
        met |= statuses
    assert met == {status.OK, status.OUT_OF_PAGES, status.SLOT_FULL}


# --- reserve, append, release --------------------------------------------------------------------


@pytest.mark.parametrize("num_pages", [1, 2, 3, 7, 8, 11])
def test_single_pages_fill_a_pool_of_any_size_from_the_left(num_pages):
    table = contiguous.create(num_pages + 1, 1, num_pages, 4)
    table, statuses = reserve_rows(table, *[4] * (num_pages + 1))
    assert statuses == [status.OK] * num_pages + [status.OUT_OF_PAGES]
    assert table.page_indices[:num_pages, 0].tolist() == list(range(num_pages))
    assert int(table.num_free) == 0
    assert violations(table).tolist() == SOUND


@pytest.mark.parametrize("num_pages", [3, 5, 6, 13])
def test_a_pool_that_is_no_power_of_two_serves_its_binary_digits_and_no_run_leaves_it(num_pages):
    digits = [1 << order for order in reversed(range(4)) if num_pages & (1 << order)]
    table = contiguous.create(4, 8, num_pages, 1)
    assert reserve_rows(table, digits[0] + 1)[1] != [status.OK]
    table, statuses = reserve_rows(table, *digits)
    assert statuses == [status.OK] * len(digits)
    assert int(table.num_free) == 0
    assert violations(table).tolist() == SOUND


def test_a_run_is_rounded_up_to_a_power_of_two_and_the_rule_remembers_what_it_asked():
    table, _ = reserve_rows(contiguous.create(2, 8, 16, 4), 17)
    assert table.held_pages.tolist() == [8, 0]
    assert table.reserved_tokens.tolist() == [17, 0]
    assert table.page_indices.tolist() == [list(range(8)), [16] * 8]


def test_a_run_goes_to_the_leftmost_place_even_where_a_later_hole_fits_better():
    table, _ = reserve_rows(contiguous.create(5, 8, 16, 1), 4, 1, 1)  # runs at 0, 4 and 5
    table = release(table, mask(table, 0, 1))  # holes: 0-3, 4, 6-7, 8-15
    table, row_status = reserve(table, i32(3), i32(1))
    assert int(row_status) == status.OK
    assert int(table.page_indices[3, 0]) == 0


def test_free_pages_in_pieces_do_not_serve_a_run_external_fragmentation():
    table, _ = reserve_rows(contiguous.create(5, 4, 4, 1), 1, 1, 1, 1)
    table = release(table, mask(table, 0, 2))
    after, row_status = reserve(table, i32(4), i32(2))
    assert int(table.num_free) == 2
    assert int(row_status) == status.OUT_OF_PAGES
    assert leaves(after) == leaves(table)


def test_free_neighbours_that_are_not_buddies_do_not_merge():
    table, _ = reserve_rows(contiguous.create(5, 4, 4, 1), 1, 1, 1, 1)
    table = release(table, mask(table, 1, 2))
    assert int(reserve(table, i32(4), i32(2))[1]) == status.OUT_OF_PAGES
    table = release(table, mask(table, 0))
    table, row_status = reserve(table, i32(4), i32(2))
    assert int(row_status) == status.OK
    assert table.page_indices[4].tolist() == [0, 1, 4, 4]


def test_more_tokens_than_a_slot_can_have_are_refused_even_in_an_empty_pool():
    table = contiguous.create(2, 3, 16, 4)
    after, statuses = reserve_rows(table, 13, 12)
    assert statuses == [status.SLOT_FULL, status.OK]
    assert after.held_pages.tolist() == [0, 4]
    assert after.page_indices.tolist() == [[16, 16, 16], [0, 1, 2]]


def test_tokens_beyond_the_reservation_are_refused_and_the_row_stays_unchanged():
    table, _ = reserve_rows(contiguous.create(3, 4, 8, 4), 6, 8)
    table, row_status = append(table, i32([7, 8, 1]))
    assert row_status.tolist() == [status.SLOT_FULL, status.OK, status.SLOT_FULL]
    assert table.lengths.tolist() == [0, 8, 0]
    table, row_status = append(table, i32([6, 1, 0]))
    assert row_status.tolist() == [status.OK, status.SLOT_FULL, status.OK]
    assert table.lengths.tolist() == [6, 8, 0]


def test_several_rows_released_at_once_merge_back_into_the_whole_pool():
    new = contiguous.create(5, 8, 13, 1)
    table, _ = reserve_rows(new, 2, 1, 3, 1, 1)
    table = release(table, mask(table, 0, 1, 2, 3, 4))
    assert table.largest.tolist() == new.largest.tolist()
    assert int(table.num_free) == 13
    assert leaves(release(table, mask(table, 0, 1))) == leaves(table)


# --- reservation rules ---------------------------------------------------------------------------


def test_an_output_of_25_reserves_32_under_the_pow2_rule():
    assert int(contiguous.next_pow2(i32(25))) == 32
    assert int(contiguous.reserve_pow2(i32(100), i32(125), 2048)) == 132


def test_next_pow2_is_the_least_power_of_two_that_is_no_less():
    n = np.arange(1, 4097)
    expected = [next(1 << k for k in range(13) if 1 << k >= value) for value in n]
    assert contiguous.next_pow2(i32(n)).tolist() == expected
    assert jnp.left_shift(1, contiguous.log2_ceil(i32(n))).tolist() == expected


def test_the_pow2_rule_over_reserves_the_output_by_less_than_2x_and_stops_at_the_most():
    prompt, output = (grid.ravel() for grid in np.meshgrid(np.arange(0, 50), np.arange(1, 80)))
    final = prompt + output
    reserved = np.asarray(contiguous.reserve_pow2(i32(prompt), i32(final), 10_000))
    assert np.all(reserved >= final)
    assert np.all(reserved - prompt < 2 * output)
    capped = np.asarray(contiguous.reserve_pow2(i32(prompt), i32(final), 130))
    assert capped.tolist() == np.minimum(reserved, 130).tolist()
    assert capped.max() == 130


def test_max_reserves_the_most_for_all_and_oracle_what_each_will_have():
    prompt, final = i32([3, 100]), i32([5, 2000])
    assert contiguous.reserve_max(prompt, final, 2048).tolist() == [2048, 2048]
    assert contiguous.reserve_oracle(prompt, final, 2048).tolist() == [5, 2000]


# --- the paper's worked numbers ------------------------------------------------------------------


def test_figure_3_request_a_never_uses_2038_of_2048_slots_and_b_507_of_512():
    table = contiguous.create(2, 2048, 2048 + 512, 1)
    for row, max_len in enumerate((2048, 512)):
        reserved = contiguous.reserve_max(i32(7), i32(10), max_len)
        table, row_status = reserve(table, i32(row), reserved)
        assert int(row_status) == status.OK
    final_len = np.array([10, 5])  # prompt, the token of this iteration, those still to come
    table, _ = append(table, i32([7, 3]))
    assert table.lengths.tolist() == [7, 3]
    table, _ = append(table, i32([1, 1]))
    assert (final_len - np.asarray(table.lengths)).tolist() == [2, 1]
    assert table.held_pages.tolist() == [2048, 512]
    assert (np.asarray(table.held_pages) - final_len).tolist() == [2038, 507]
    assert int(table.page_indices[1, 0]) == 2048


@pytest.mark.parametrize("page_size, num_pages", [(1, 15_728), (16, 983)])
def test_figure_2_max_fits_7_requests_of_2048_and_wastes_8_9_percent_outside(page_size, num_pages):
    num_slots = 12 * 2**30 // 819_200
    assert num_slots == 15_728 == num_pages * page_size
    table = contiguous.create(8, 2048 // page_size, num_pages, page_size)
    table, statuses = reserve_rows(table, *[2048] * 8)
    assert statuses == [status.OK] * 7 + [status.OUT_OF_PAGES]
    external = int(table.num_free) * page_size
    assert external == num_slots - 7 * 2048
    assert f"{external / num_slots:.1%}" == "8.9%"
