"""The page table against an oracle in plain Python, its checker on corrupted tables, the paper's
worked examples (Figs 6 and 7), and ragged arithmetic against NumPy."""

import dataclasses
import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from paging_oracle import PageTableOracle

from jaxpage.paging import page_table, ragged, status
from jaxpage.paging.page_table import PageTable

# slots, pages a slot, pages, page size: pools that are not powers of two, and too small for all
SHAPES = {"pages of 3": (4, 4, 9, 3), "pages of 1": (3, 8, 13, 1), "a full pool": (5, 3, 16, 4)}
BOUNDS = (None, 1, 3)
SOUND = [0, 0, 0, 0, 0]
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())

append = jax.jit(page_table.append, static_argnames="max_new_pages")
share = jax.jit(page_table.share)
fork = jax.jit(page_table.fork)
release = jax.jit(page_table.release)
violations = jax.jit(page_table.violations)
expand = jax.jit(ragged.expand, static_argnames="capacity")


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


def mask(table: PageTable, *rows: int) -> np.ndarray:
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


# --- random commands -----------------------------------------------------------------------------


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


def apply(table: PageTable, oracle: PageTableOracle, command) -> tuple[PageTable, set[int]]:
    """Does one command to both; returns the table and the statuses met."""
    verb, *args = command
    if verb == "append":
        counts, bound = args
        table, row_status = append(table, i32(counts), max_new_pages=bound)
        expected = oracle.append(counts, bound)
        assert np.asarray(row_status).tolist() == expected
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
    never = {status.SHARED_PAGE} if shape[-1] == 1 else set()  # a page of one slot has no room left
    assert met == set(status.SENTENCES) - never


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


def test_a_shared_partial_page_refuses_tokens_and_its_rows_stay_unchanged():
    table, _ = append(page_table.create(3, 4, 8, 4), i32([6, 0, 3]))
    table = fork(table, i32(0), i32(1))
    after, row_status = append(table, i32([1, 5, 1]))
    assert row_status.tolist() == [status.SHARED_PAGE, status.SHARED_PAGE, status.OK]
    assert after.lengths.tolist() == [6, 6, 4]
    assert after.page_indices.tolist() == table.page_indices.tolist()
    assert violations(after).tolist() == SOUND


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


def test_a_full_source_page_shared_in_part_is_closed_to_the_sharer_only():
    table, _ = append(page_table.create(2, 4, 8, 4), i32([8, 0]))
    table = share(table, i32(0), i32(1), i32(7))
    table, row_status = append(table, i32([1, 1]))
    assert row_status.tolist() == [status.OK, status.SHARED_PAGE]
    assert table.lengths.tolist() == [9, 7]


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


# --- the checker ---------------------------------------------------------------------------------


@functools.cache
def sound_table() -> PageTable:
    """Rows of pages [0, 1], [2, 3, 4], [0, 1] and none; pages 9 to 5 on the stack, 5 on top."""
    table, _ = append(page_table.create(4, 4, 10, 4), i32([6, 9, 0, 0]))
    return share(table, i32(0), i32(2), i32(5))


def corrupted(**changes) -> PageTable:
    """The sound table with entries set: `field=(index, value)`, or `field=value` for a scalar."""
    table = sound_table()
    for name, change in changes.items():
        array = np.array(getattr(table, name))
        index, value = change if isinstance(change, tuple) else ((), change)
        array[index] = value
        table = dataclasses.replace(table, **{name: jnp.asarray(array)})
    return table


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
    "a negative length": ({"lengths": (3, -1)}, [0, 0, 0, 0, 1]),
}


def test_the_checker_finds_nothing_in_the_sound_table():
    assert pages_of(sound_table(), 1) == [2, 3, 4]
    assert violations(sound_table()).tolist() == SOUND


@pytest.mark.parametrize("changes, counts", CORRUPTIONS.values(), ids=CORRUPTIONS.keys())
def test_the_checker_counts_each_corruption_in_its_place(changes, counts):
    assert violations(corrupted(**changes)).tolist() == counts


@settings(max_examples=150, deadline=None)
@given(
    script=commands(SHAPES["pages of 3"], 8),
    field=st.sampled_from(("page_indices", "ref_counts", "free_pages", "num_free")),
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


# --- ragged arithmetic ---------------------------------------------------------------------------


def expand_by_numpy(counts, capacity: int) -> tuple[np.ndarray, ...]:
    row = np.repeat(np.arange(len(counts)), counts)
    offset = np.concatenate([np.arange(count) for count in counts])
    live = np.arange(capacity) < len(row)
    fill = np.zeros(capacity, int)
    row = np.concatenate([row, fill + len(counts)])[:capacity]
    return row, np.concatenate([offset, fill])[:capacity], live


@settings(max_examples=100, deadline=None)
@given(
    counts=st.lists(st.sampled_from((0, 0, 1, 2, 5)), min_size=6, max_size=6),
    capacity=st.sampled_from((1, 7, 30)),
)
def test_expand_lists_rows_as_numpy_does_and_cuts_at_capacity(counts, capacity):
    result = expand(i32(counts), capacity=capacity)
    for got, want in zip(result, expand_by_numpy(counts, capacity), strict=True):
        assert np.asarray(got).tolist() == want.tolist()


@pytest.mark.parametrize("counts", [[4], [0], [0, 0, 3], [3, 0, 0], [1, 0, 0, 2], [2, 2]])
def test_expand_fills_a_capacity_of_exactly_the_sum(counts):
    capacity = max(sum(counts), 1)
    result = expand(i32(counts), capacity=capacity)
    assert int(np.sum(np.asarray(result.live))) == sum(counts)
    for got, want in zip(result, expand_by_numpy(counts, capacity), strict=True):
        assert np.asarray(got).tolist() == want.tolist()
