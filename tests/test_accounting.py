"""Where the memory is: shares that add up to the pool, counted again token by token, and the
paper's definitions on its own example (Fig 3)."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxpage.config import EngineConfig
from jaxpage.paging import contiguous, page_table, status
from jaxpage.paging.allocator import ALLOCATORS, Prompt, Table
from jaxpage.scheduling.accounting import StepRecord, measure_memory

SHARES = ("token_states", "reservation", "internal", "external", "cached", "idle")
CONFIG = EngineConfig(
    num_slots=4, num_pages=13, page_size=3, pages_per_slot=5, num_requests=6, token_buckets=(4,)
)

measure = jax.jit(measure_memory)


@functools.cache
def verbs(name: str):
    """`admit` and `append` of an allocator, compiled."""
    allocator = ALLOCATORS[name]
    return jax.jit(allocator.admit), jax.jit(allocator.append)


def i32(value) -> jax.Array:
    return jnp.asarray(np.asarray(value, np.int32))


def shares_of(table: Table, final_lens, slots, num_waiting: int) -> dict[str, int]:
    found = measure(table, i32(final_lens), i32(slots), i32(num_waiting))
    assert set(found) == set(SHARES) < set(StepRecord._fields)
    return {name: int(found[name]) for name in SHARES}


def shares_by_counting(table: Table, final_by_slot: list[int], waits: bool) -> dict[str, int]:
    """Gives every token of the pool to one share, by the definitions and one at a time."""
    found: dict[str, int] = dict.fromkeys(SHARES, 0)
    lengths, reserved, held_pages = (
        np.asarray(x) for x in (table.lengths, table.reserved_tokens, table.held_pages)
    )
    in_use = 0
    for slot, final in enumerate(final_by_slot):
        held = int(held_pages[slot]) * CONFIG.page_size
        in_use += held
        for token in range(held):
            if token < lengths[slot]:
                found["token_states"] += 1
            elif token >= reserved[slot]:
                found["external"] += 1  # the buddy's rounding
            elif token < final:
                found["reservation"] += 1
            else:
                found["internal"] += 1
    free = CONFIG.num_pages * CONFIG.page_size - in_use
    found["external" if waits else "idle"] += free
    return found


sequences = st.tuples(st.integers(1, 14), st.integers(1, 14), st.integers(0, 15))


@pytest.mark.parametrize("name", ALLOCATORS)
def test_the_shares_are_those_of_counting_and_add_up_to_the_pool(name):
    admit, append = verbs(name)
    reserve = ALLOCATORS[name].reserve
    met = set()

    @settings(max_examples=80, deadline=None, derandomize=True)
    @given(
        rows=st.lists(sequences, max_size=CONFIG.num_slots),
        num_waiting=st.integers(0, 2),
        order=st.permutations(range(CONFIG.num_requests)),
    )
    def check(rows, num_waiting, order):
        table = ALLOCATORS[name].create(CONFIG)
        slots = [CONFIG.num_requests] * CONFIG.num_slots  # none
        finals, final_by_slot = [0] * CONFIG.num_requests, [0] * CONFIG.num_slots
        for slot, (prompt, outputs, written) in enumerate(rows):
            final = min(prompt + outputs, CONFIG.max_seq_len)
            known = min(written, final)
            reserved = int(reserve(i32(prompt), i32(final), CONFIG.max_seq_len))
            prompt = Prompt(i32([0] * 15), *(i32(n) for n in (known, 0, known, reserved)))
            table, outcome = admit(table, i32(slot), prompt, i32(0))
            if outcome.status != status.OK:
                continue
            table, _ = append(table, i32(np.where(np.arange(4) == slot, known, 0)))
            slots[slot] = order[slot]
            finals[order[slot]] = final_by_slot[slot] = final
        found = shares_of(table, finals, slots, num_waiting)
        assert found == shares_by_counting(table, final_by_slot, num_waiting > 0)
        assert sum(found.values()) == CONFIG.num_pages * CONFIG.page_size
        assert min(found.values()) >= 0
        met.update(share for share, tokens in found.items() if tokens)

    check()
    # Pages fit to a page, and the Oracle never reserves what is not used.
    assert met == set(SHARES) - {"cached"} - ({"internal"} if name == "oracle" else set())


# --- the paper's example -------------------------------------------------------------------------

# Fig 3: A has 7 prompt states and the one being generated, 2 more to come, and 2048 slots; B has
# 3 and one, 1 more to come, and 512 slots. A slot is a page of one token.
PAPER_FINALS, PAPER_LENGTHS, PAPER_RESERVED = (10, 5), (8, 4), (2048, 512)


def paper_table(num_pages: int) -> contiguous.ContiguousTable:
    table = contiguous.create(2, 2048, num_pages, 1)
    for row, tokens in enumerate(PAPER_RESERVED):
        table, outcome = contiguous.reserve(table, i32(row), i32(tokens))
        assert outcome == status.OK
    return contiguous.append(table, i32(PAPER_LENGTHS))[0]


def test_figure_3_has_the_papers_numbers():
    table = paper_table(4096)
    shares = shares_of(table, PAPER_FINALS, [0, 1], num_waiting=1)
    assert shares == {
        "token_states": 7 + 1 + 3 + 1,
        "reservation": 2 + 1,
        "internal": 2038 + 507,
        "external": 4096 - 2048 - 512,
        "cached": 0,
        "idle": 0,
    }
    only_a = shares_of(table, PAPER_FINALS, [0, 2], num_waiting=1)
    assert only_a["internal"] == 2038 + 512 - 4  # without an owner all that is left is unused
    assert only_a["reservation"] == 2


def test_what_is_free_is_idle_when_nobody_waits_and_external_when_somebody_does():
    table = paper_table(4096)
    calm = shares_of(table, PAPER_FINALS, [0, 1], num_waiting=0)
    busy = shares_of(table, PAPER_FINALS, [0, 1], num_waiting=3)
    assert (calm["idle"], calm["external"]) == (1536, 0)
    assert (busy["idle"], busy["external"]) == (0, 1536)


def test_pages_waste_at_most_the_rest_of_the_last_page_on_figure_3():
    table = page_table.create(2, 2048 // 16, 256, 16)
    table, _ = page_table.append(table, i32(PAPER_LENGTHS))
    shares = shares_of(table, PAPER_FINALS, [0, 1], num_waiting=1)
    assert shares == {
        "token_states": 12,
        "reservation": 3,
        "internal": 16 - 10 + 16 - 5,
        "external": 4096 - 32,
        "cached": 0,
        "idle": 0,
    }


def test_the_buddys_rounding_is_external_even_when_nobody_waits():
    table = contiguous.create(1, 8, 8, 2)
    table, _ = contiguous.reserve(table, i32(0), i32(9))  # five pages, held as eight
    table, _ = contiguous.append(table, i32([4]))
    shares = shares_of(table, [9], [0], num_waiting=0)
    assert shares == dict(zip(SHARES, (4, 5, 0, 7, 0, 0), strict=True))


def test_a_prompt_in_the_middle_of_its_parts_reserves_no_more_than_its_pages():
    table = page_table.create(1, 8, 8, 4)
    table, _ = page_table.append(table, i32([6]))  # of a prompt of 20
    shares = shares_of(table, [25], [0], num_waiting=0)
    assert shares == dict(zip(SHARES, (6, 2, 0, 0, 0, 24), strict=True))


def test_a_page_that_several_sequences_hold_counts_once():
    table = page_table.create(4, 5, 12, 4)
    table, _ = page_table.append(table, i32([6, 0, 0, 3]))
    table = page_table.fork(table, i32(0), i32(1))
    table = page_table.share(table, i32(0), i32(2), i32(4))
    table, _ = page_table.append(table, i32([0, 0, 1, 0]))
    # Rows 0 and 1 hold two pages with 6 tokens, row 2 the first of them and one with 1.
    shares = shares_of(table, [20, 6, 20, 3], [0, 1, 2, 3], num_waiting=0)
    assert shares == dict(zip(SHARES, (6 + 1 + 3, 2 + 3, 1, 0, 0, 32), strict=True))
