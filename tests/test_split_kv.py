"""What the GPU kernels read: which blocks, which pages, and each of them how often."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.paged_attention import kernel_sm80, kernel_sm90, split_kv
from pallas_kernels.paged_attention.config import Tile, geometry_of

TILE = Tile(block_tokens=64, stages=2, split_tokens=128)
NUM_PAGES, ROW = 64, 1


def geometry(page_size: int, *, is_ragged: bool):
    q = jax.ShapeDtypeStruct((3, 4, 64), jnp.bfloat16)
    pages = jax.ShapeDtypeStruct((NUM_PAGES, 2, page_size, 64), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((2, 640 // page_size), jnp.int32)
    return geometry_of(q, pages, table, is_ragged=is_ragged, tile=TILE)


class Recorder:
    """A reference that remembers what it was indexed with."""

    def __init__(self, index=None):
        self.index = index

    @property
    def at(self):
        return self

    def __getitem__(self, index):
        return Recorder(index)


def work_of(split: int, place, window, shape):
    return split_kv.work_of(0, split, np.asarray(place, np.int32)[:, None], window, shape, TILE)


steps = st.tuples(
    st.integers(0, 639),  # position of the first query
    st.integers(1, 8),  # queries
    st.none() | st.integers(1, 200),  # window
).filter(lambda step: step[0] + step[1] <= 640)


@settings(deadline=None, max_examples=60)
@given(step=steps, is_ragged=st.booleans())
def test_splits_share_out_the_blocks_that_any_query_sees(step, is_ragged):
    position, count, window = step
    count = count if is_ragged else 1
    shape = geometry(16, is_ragged=is_ragged)
    blocks, seen = Counter(), np.zeros((shape.tile_lines, 640), bool)
    for split in range(shape.num_splits):
        work = work_of(split, (ROW, position, count), window, shape)
        blocks.update(int(work.first_block) + i for i in range(int(work.num_blocks)))
        lines = lambda: jnp.arange(shape.tile_lines, dtype=jnp.int32)  # noqa: E731
        first, end = split_kv.seen_keys(lines, work, window, shape)
        key = np.arange(640)
        mine = (key >= np.asarray(first)[..., None]) & (key < np.asarray(end)[..., None])
        mine = np.broadcast_to(mine, seen.shape)
        assert not (seen & mine).any()
        seen |= mine
    query = position + np.arange(shape.tile_lines)[:, None] // shape.group_rows
    want = (np.arange(640) <= query) & (np.arange(640) > query - (window or 640))
    live = slice(0, count * shape.group_rows)
    np.testing.assert_array_equal(seen[live], want[live])
    any_seen = np.flatnonzero(want[live].any(axis=0))
    needed = range(any_seen[0] // 64, any_seen[-1] // 64 + 1)
    assert blocks == Counter(needed)  # each once


@pytest.mark.parametrize("page_size", [8, 16, 64, 128])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("kernel", [kernel_sm80, kernel_sm90], ids=["sm80", "sm90"])
def test_each_token_is_copied_once_and_no_page_that_nobody_sees(
    monkeypatch, kernel, page_size, window
):
    copies = []
    shape = geometry(page_size, is_ragged=False)
    length = 333
    table = np.full((2, shape.table_pages), 10**6, np.int32)
    num_live = -(-length // page_size)
    # Page 0 is the stand-in of sm80 for what nobody sees, page P that of sm90, which reads nothing.
    table[ROW, :num_live] = 1 + np.random.default_rng(0).permutation(NUM_PAGES - 1)[:num_live]

    def record(source, target, *barrier):
        copies.append((source.index, target.index))

    monkeypatch.setattr(kernel.plgpu, "copy_gmem_to_smem", record)
    machine = kernel_sm80.Machine(record, None, None)  # pyright: ignore[reportArgumentType]
    head = 1
    for split in range(shape.num_splits):
        work = work_of(split, (ROW, length - 1, 1), window, shape)
        for step in range(int(work.num_blocks)):
            token = (work.first_block + step) * TILE.block_tokens
            where = {"table_ref": table, "geometry": shape, "tile": TILE}
            if kernel is kernel_sm80:
                sources = ((Recorder(), Recorder()),)
                kernel._copy_block(token, work, head, sources, machine=machine, **where)
            else:
                ring = kernel_sm90.Ring(Recorder(), Recorder())
                pages = split_kv.Pages(Recorder(), None)
                kernel._copy_block(token, work, head, 0, ((pages, ring),), **where)
    tokens = Counter()
    for (page, of_head, inside), _ in copies:
        assert int(of_head) == head
        if int(page) in (0, NUM_PAGES):
            continue
        for i in range(int(inside.size)):
            tokens[int(page), int(inside.start) + i] += 1
    first = 0 if window is None else length - window
    for j in range(first, length):
        assert tokens[int(table[ROW, j // page_size]), j % page_size] == 1
    assert {page for page, _ in tokens} == set(table[ROW, first // page_size : num_live].tolist())
