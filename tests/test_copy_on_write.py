"""Copy-on-write: who copies, who writes in place, and the paper's examples (Figs 8, 9)."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from page_tables import (
    SOUND,
    append,
    append_all,
    apply,
    copies_of,
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

from jaxpage.paging import fitting, kv_pool, page_table, status
from jaxpage.paging.kv_pool import KvPool


def shared_by(num_rows: int, num_pages: int = 8):
    """`num_rows` rows of 6 tokens in pages 0 and 1 of 4, page 1 half full; one row more, empty."""
    table, _ = append(page_table.create(num_rows + 1, 4, num_pages, 4), i32([6] + [0] * num_rows))
    for row in range(1, num_rows):
        table = fork(table, i32(0), i32(row))
    return table


def test_of_two_owners_that_write_at_once_the_first_copies_and_the_last_writes_in_place():
    table, appended = append_all(shared_by(2), i32([1, 1, 0]))
    assert appended.status.tolist() == [status.OK] * 3
    assert copies_of(table, appended) == [(0, 1, 2)]
    assert [pages_of(table, row) for row in range(2)] == [[0, 2], [0, 1]]
    assert table.ref_counts.tolist()[:3] == [2, 1, 1]
    assert violations(table).tolist() == SOUND


def test_an_owner_that_does_not_write_keeps_the_page_as_it_is():
    table, appended = append_all(shared_by(3), i32([1, 0, 6, 0]))
    assert copies_of(table, appended) == [(0, 1, 2), (2, 1, 3)]
    assert [pages_of(table, row) for row in range(3)] == [[0, 2], [0, 1], [0, 3, 4]]
    assert table.lengths.tolist() == [7, 6, 12, 0]
    assert violations(table).tolist() == SOUND


def test_a_copy_comes_before_the_pages_that_a_row_grows_into():
    table, appended = append_all(shared_by(2), i32([7, 0, 0]))
    assert copies_of(table, appended) == [(0, 1, 2)]
    assert pages_of(table, 0) == [0, 2, 3, 4]


def test_without_a_page_for_a_copy_no_owner_writes():
    table = shared_by(2, num_pages=2)
    after, appended = append_all(table, i32([1, 1, 0]))
    # The second would be the last owner only if the first had got its copy.
    assert appended.status.tolist() == [status.OUT_OF_PAGES, status.OUT_OF_PAGES, status.OK]
    assert copies_of(after, appended) == [] and leaves(after) == leaves(table)


def test_a_bound_on_new_pages_counts_copies():
    table, appended = append_all(shared_by(3), i32([1, 1, 1, 0]), max_new_pages=1)
    assert appended.status.tolist() == [status.OK, *[status.OUT_OF_PAGES] * 2, status.OK]
    assert copies_of(table, appended) == [(0, 1, 2)]
    assert violations(table).tolist() == SOUND


def test_a_row_that_outgrows_its_slot_copies_nothing():
    table, appended = append_all(shared_by(2), i32([20, 1, 0]))
    assert appended.status.tolist() == [status.SLOT_FULL, status.OK, status.OK]
    assert copies_of(table, appended) == [(1, 1, 2)]


def test_a_full_source_page_shared_in_part_is_copied_by_the_sharer_only():
    table, _ = append(page_table.create(2, 4, 8, 4), i32([8, 0]))
    table = share(table, i32(0), i32(1), i32(7))
    table, appended = append_all(table, i32([1, 1]))
    assert appended.status.tolist() == [status.OK, status.OK]
    assert copies_of(table, appended) == [(1, 1, 3)]
    assert [pages_of(table, row) for row in range(2)] == [[0, 1, 2], [0, 3]]


# --- who fits ------------------------------------------------------------------------------------

fitting_rows = jax.jit(fitting.fitting)


def check_fitting(num_tables: int) -> Counter:
    """Compares with trying, on random tables; counts which of (shared, not all fit) were met."""
    shape = (4, 4, 9, 3)
    met = Counter()
    for seed in range(num_tables):
        rng = np.random.default_rng(seed)
        table, oracle = page_table.create(*shape), PageTableOracle(*shape)
        for command in random_script(shape, seed, int(rng.integers(1, 12))):
            table, _ = apply(table, oracle, command)
        order = rng.permutation(shape[0])
        # Nobody outgrows its slot: a scheduler does not ask for that.
        room = shape[1] * shape[3] - np.asarray(oracle.lengths)
        counts = rng.integers(0, np.minimum(room, 2 * shape[3]) + 1) * (rng.random(4) < 0.8)
        want = oracle.fitting(order, counts)
        assert fitting_rows(table, i32(order), i32(counts)).tolist() == want, seed
        owned = sum(map(len, oracle.rows))
        met[owned > shape[2] - len(oracle.stack), not all(want)] += 1
    return met


def test_rows_fit_that_could_append_if_those_after_them_gave_up_their_pages():
    met = check_fitting(300)
    assert min(met[is_shared, True] for is_shared in (False, True)) > 10, met


@pytest.mark.slow
def test_rows_fit_as_trying_says_on_many_tables():
    assert len(check_fitting(20_000)) == 4


def test_a_row_whose_page_others_give_up_needs_no_copy():
    table = shared_by(3, num_pages=2)  # no page is free
    fits = fitting_rows(table, i32([2, 0, 1, 3]), i32([1, 0, 1, 0]))
    assert fits.tolist() == [False, False, True, False]


# --- the bytes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("jitted", [False, True])
def test_a_page_is_copied_in_every_layer_and_nothing_else_is(jitted):
    rng = np.random.default_rng(0)
    keys, values = (rng.standard_normal((3, 6, 2, 4, 8)).astype(np.float32) for _ in range(2))
    pool = KvPool(jnp.asarray(keys), jnp.asarray(values))
    copy = jax.jit(kv_pool.copy_pages) if jitted else kv_pool.copy_pages
    # Page 4 is copied, and then written over; the last pair is past the count.
    copied = copy(pool, i32([1, 4, 1, 5, 2]), i32([0, 3, 4, 4, 2]), i32(4))
    for before, after in ((keys, copied.keys), (values, copied.values)):
        want = before.copy()
        want[:, [0, 3, 4]] = before[:, [1, 4, 5]]
        np.testing.assert_array_equal(after, want)


# --- the paper's worked examples -----------------------------------------------------------------


def test_figure_8_the_first_sample_copies_page_1_to_3_and_the_second_writes_in_place():
    table = with_stack(page_table.create(2, 4, 9, 4), 7, 1, 3)
    table, _ = append(table, i32([7, 0]))
    table = fork(table, i32(0), i32(1))
    assert [pages_of(table, row) for row in range(2)] == [[7, 1], [7, 1]]
    assert table.ref_counts[jnp.asarray([7, 1])].tolist() == [2, 2]
    table, appended = append_all(table, i32([1, 0]))
    assert copies_of(table, appended) == [(0, 1, 3)]
    assert int(table.ref_counts[1]) == 1
    table, appended = append_all(table, i32([0, 1]))
    assert copies_of(table, appended) == []
    assert [pages_of(table, row) for row in range(2)] == [[7, 3], [7, 1]]
    assert violations(table).tolist() == SOUND


def test_figure_9_beams_0_and_3_die_and_1_and_2_go_on_twice_each():
    table = with_stack(page_table.create(4, 5, 13, 4), 0, 1, 3, 5, 6, 7, 2, 4, 8)
    table, _ = append(table, i32([16, 0, 0, 0]))
    for row, shared in ((1, 12), (2, 12), (3, 4)):
        table = share(table, i32(0), i32(row), i32(shared))
        table, _ = append(table, i32(np.where(np.arange(4) == row, 16 - shared, 0)))
    beams = [[0, 1, 3, 5], [0, 1, 3, 6], [0, 1, 3, 7], [0, 2, 4, 8]]
    assert [pages_of(table, row) for row in range(4)] == beams
    assert free_set(table) == {9, 10, 11, 12}

    table = release(table, mask(table, 0, 3))
    assert free_set(table) == {9, 10, 11, 12} | {2, 4, 5, 8}
    table = fork(fork(table, i32(1), i32(0)), i32(2), i32(3))
    table, appended = append_all(table, i32([1, 1, 1, 1]))
    assert copies_of(table, appended) == []  # their last pages are full
    pages = [pages_of(table, row) for row in range(4)]
    # Beams 0 and 1 of the figure are rows 0 and 1 here, 2 and 3 are rows 2 and 3.
    assert [p[:4] for p in pages] == [[0, 1, 3, 6], [0, 1, 3, 6], [0, 1, 3, 7], [0, 1, 3, 7]]
    assert len({p[4] for p in pages}) == 4
    assert table.ref_counts[jnp.asarray([0, 1, 3, 6, 7])].tolist() == [4, 4, 4, 2, 2]
    assert violations(table).tolist() == SOUND
