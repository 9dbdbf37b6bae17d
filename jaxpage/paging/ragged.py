"""Ragged arithmetic: rows of different lengths as flat arrays of one static capacity."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Ragged(NamedTuple):
    """The flat view of rows: entry `i` is element `offset[i]` of row `row[i]`, if `live[i]`."""

    row: jax.Array  # i32[capacity]; where not live: the number of rows
    offset: jax.Array  # i32[capacity]
    live: jax.Array  # bool[capacity]


def expand(counts: jax.Array, capacity: int) -> Ragged:
    """Lists every element of rows with `counts: i32[B]` elements, row after row.

    Elements beyond `capacity` are left out: the caller keeps `sum(counts) <= capacity`.
    """
    ends = jnp.cumsum(counts)
    starts = ends - counts
    # A one where a row starts; rows of no elements add up at the next row's start.
    marks = jnp.zeros((capacity,), jnp.int32).at[starts].add(1, mode="drop")
    index = jnp.arange(capacity, dtype=jnp.int32)
    row = jnp.cumsum(marks) - 1
    live = index < ends[-1]
    offset = jnp.where(live, index - starts.at[row].get(mode="fill", fill_value=0), 0)
    return Ragged(jnp.where(live, row, counts.shape[0]), offset, live)
