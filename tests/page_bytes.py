"""What an executor does to the bytes of pages, what rows then read, and what appending must do.

A pool `i32[P, S]` has a number in each slot, 0 for nothing; rows have up to `N` tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpage.paging import status


def slots_of(page_indices: jax.Array, page_size: int) -> tuple[jax.Array, jax.Array]:
    """The page and the slot there of each token that rows can have, two `i32[B, N]`."""
    page = jnp.repeat(page_indices, page_size, axis=1)
    return page, jnp.broadcast_to(
        jnp.arange(page.shape[1], dtype=jnp.int32) % page_size, page.shape
    )


def span(first: jax.Array, last: jax.Array, size: int) -> jax.Array:
    """Which tokens are from `first: i32[B]` to before `last: i32[B]`, `bool[B, size]`."""
    position = jnp.arange(size, dtype=jnp.int32)[None]
    return (position >= first[:, None]) & (position < last[:, None])


def marked(pool: jax.Array, page_indices: jax.Array, which: jax.Array) -> jax.Array:
    """The slots of `which: bool[B, N]` tokens, `bool[P, S]`."""
    page, slot = slots_of(page_indices, pool.shape[1])
    page = jnp.where(which, page, pool.shape[0])
    return jnp.zeros(pool.shape, jnp.bool_).at[page, slot].set(True, mode="drop")


def write(
    pool: jax.Array, page_indices: jax.Array, which: jax.Array, values: jax.Array
) -> jax.Array:
    """The pool with `values: i32[B, N]` written for `which: bool[B, N]` tokens."""
    page, slot = slots_of(page_indices, pool.shape[1])
    page = jnp.where(which, page, pool.shape[0])
    return pool.at[page, slot].set(values, mode="drop")


def read(pool: jax.Array, page_indices: jax.Array) -> jax.Array:
    """What rows hold, `i32[B, N]`; -1 where they have no page."""
    page, slot = slots_of(page_indices, pool.shape[1])
    return pool.at[page, slot].get(mode="fill", fill_value=-1)


def copy(pool: jax.Array, sources: jax.Array, targets: jax.Array) -> jax.Array:
    """The pool after copies, one after the other; `P` is none."""
    for i in range(sources.shape[0]):
        content = pool.at[sources[i]].get(mode="fill", fill_value=-1)
        pool = pool.at[targets[i]].set(content, mode="drop")
    return pool


def references(page_indices: jax.Array, num_pages: int) -> jax.Array:
    """Entries that name each page, `i32[P]`."""
    return jnp.zeros((num_pages,), jnp.int32).at[page_indices].add(1, mode="drop")


class Expected(NamedTuple):
    """What appending must do, by row, and the pages that it would take if there were enough."""

    statuses: jax.Array  # i32[B]
    sources: jax.Array  # i32[B]
    demand: jax.Array  # i32[]


def append(
    page_indices: jax.Array,
    lengths: jax.Array,
    counts: jax.Array,
    available: jax.Array,
    num_pages: int,
    page_size: int,
) -> Expected:
    """One row after the other takes its pages of the `available`, or all later ones wait too."""
    owners = references(page_indices, num_pages)
    wished = owners  # if all rows got what they ask for
    left, ran_out, demand = available, jnp.asarray(False), jnp.asarray(0, jnp.int32)
    statuses, sources = [], []
    for row in range(lengths.shape[0]):
        length, after = lengths[row], lengths[row] + counts[row]
        held = -(-length // page_size)
        last = page_indices[row, jnp.maximum(held - 1, 0)]
        too_long = after > page_indices.shape[1] * page_size
        writes = (counts[row] > 0) & (length < held * page_size) & ~too_long

        def copies(owners, last=last, writes=writes):
            shared = owners.at[last].get(mode="fill", fill_value=0) > 1
            return (writes & shared).astype(jnp.int32)

        new = jnp.where(too_long, 0, -(-after // page_size) - held)
        wishes, is_copy = copies(wished), copies(owners)
        demand += new + wishes
        wished = wished.at[last].add(-wishes, mode="drop")
        need = new + is_copy
        ran_out |= need > left
        starved = (need > 0) & ran_out
        is_copy = jnp.where(starved, 0, is_copy)
        left -= jnp.where(starved, 0, need)
        owners = owners.at[last].add(-is_copy, mode="drop")
        outcome = jnp.where(starved, status.OUT_OF_PAGES, status.OK)
        statuses.append(jnp.where(too_long, status.SLOT_FULL, outcome))
        sources.append(jnp.where(is_copy > 0, last, num_pages))
    return Expected(jnp.stack(statuses), jnp.stack(sources), demand)


def count(broken: jax.Array) -> jax.Array:
    return jnp.sum(broken, dtype=jnp.int32)


def differences(one, other) -> jax.Array:
    """How many numbers of two pytrees differ."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return jnp.sum(jnp.stack([count(a != b) for a, b in pairs]))
