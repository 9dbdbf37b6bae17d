"""Ragged arithmetic against NumPy."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxpage.paging import ragged

expand = jax.jit(ragged.expand, static_argnames="capacity")


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
    result = expand(jnp.asarray(np.asarray(counts, np.int32)), capacity=capacity)
    for got, want in zip(result, expand_by_numpy(counts, capacity), strict=True):
        assert np.asarray(got).tolist() == want.tolist()


@pytest.mark.parametrize("counts", [[4], [0], [0, 0, 3], [3, 0, 0], [1, 0, 0, 2], [2, 2]])
def test_expand_fills_a_capacity_of_exactly_the_sum(counts):
    capacity = max(sum(counts), 1)
    result = expand(jnp.asarray(np.asarray(counts, np.int32)), capacity=capacity)
    assert int(np.sum(np.asarray(result.live))) == sum(counts)
    for got, want in zip(result, expand_by_numpy(counts, capacity), strict=True):
        assert np.asarray(got).tolist() == want.tolist()
