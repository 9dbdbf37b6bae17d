"""Converters of paged KV: round trips, and attention that does not care where its KV came from."""

import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import make_problem

from pallas_kernels.paged_attention import layouts, paged_attention

LENGTHS = (0, 1, 15, 16, 17, 48, 0)
S = 16


@pytest.mark.parametrize(
    ("to", "back", "axes"),
    [
        (layouts.to_head_major, layouts.from_head_major, (1, 0, 2, 3)),
        (layouts.to_nhd, layouts.from_nhd, (0, 2, 1, 3)),
    ],
)
def test_pages_go_to_the_other_layout_and_back(to, back, axes):
    pages = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    assert np.array_equal(to(pages), np.transpose(pages, axes))
    assert np.array_equal(back(to(pages)), pages)


def test_a_csr_table_lists_the_live_pages_row_by_row():
    problem = make_problem(LENGTHS)
    table = layouts.to_csr(jnp.asarray(problem.lengths), jnp.asarray(problem.page_indices), S)
    assert table.indptr.tolist() == [0, 0, 1, 2, 3, 5, 8, 8]
    assert table.last_page_len.tolist() == [0, 1, 15, 16, 1, 16, 0]
    live = [
        int(page)
        for row, length in enumerate(LENGTHS)
        for page in problem.page_indices[row, : -(-length // S)]
    ]
    assert table.indices[:8].tolist() == live


def test_attention_over_a_table_that_was_csr_is_the_same_to_the_bit():
    problem = make_problem(LENGTHS)
    lengths, page_indices = jnp.asarray(problem.lengths), jnp.asarray(problem.page_indices)
    width = page_indices.shape[1]
    table = layouts.to_csr(lengths, page_indices, S)
    again = layouts.from_csr(table, S, width)
    assert again[0].tolist() == list(LENGTHS)
    out = [
        np.asarray(paged_attention(problem.q, problem.k_pages, problem.v_pages, *rows)).tobytes()
        for rows in ((lengths, page_indices), again)
    ]
    assert out[0] == out[1]


def test_rows_of_more_pages_than_the_table_has_columns_are_told():
    lengths = jnp.asarray([5 * S, 2 * S + 1], jnp.int32)
    table = layouts.to_csr(lengths, jnp.arange(10, dtype=jnp.int32).reshape(2, 5), S)
    assert layouts.csr_rows_too_long(table, 3).tolist() == [True, False]
    assert layouts.csr_rows_too_long(table, 5).tolist() == [False, False]
