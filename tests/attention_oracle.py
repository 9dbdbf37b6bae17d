"""Paged attention problems with every unused byte poisoned, and an oracle in NumPy float64.

The oracle shares nothing with the code under test: it walks tokens, heads and keys one by one.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

# How tests run kernels for GPUs: None is on the card.
INTERPRET = None if jax.default_backend() == "gpu" else plgpu.InterpretGPUParams(detect_races=True)
needs_no_gpu = pytest.mark.skipif(INTERPRET is None, reason="there is a GPU")
BAD_PAGES = np.array([-1, -(2**31), 2**31 - 1, 10**6, -7], np.int32)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Arguments of one call; `cu_q_lens` is None for decode."""

    q: jax.Array
    k_pages: jax.Array
    v_pages: jax.Array
    lengths: np.ndarray
    page_indices: np.ndarray
    cu_q_lens: np.ndarray | None
    scales: dict[str, jax.Array] = dataclasses.field(default_factory=dict)  # of quantised pages

    def call(self, attention, **options):
        return attention(
            self.q,
            self.k_pages,
            self.v_pages,
            jnp.asarray(self.lengths),
            jnp.asarray(self.page_indices),
            cu_q_lens=None if self.cu_q_lens is None else jnp.asarray(self.cu_q_lens),
            **self.scales | options,
        )

    @property
    def q_lens(self) -> np.ndarray:
        return np.ones_like(self.lengths) if self.cu_q_lens is None else np.diff(self.cu_q_lens)

    def token_lengths(self) -> np.ndarray:
        """KV tokens that each query could see without a window: i32[T], 0 for padding."""
        cu = np.concatenate([[0], np.cumsum(self.q_lens)])
        seen = np.zeros(self.q.shape[0], np.int32)
        for row, length in enumerate(self.lengths):
            count = self.q_lens[row]
            seen[cu[row] : cu[row + 1]] = np.arange(length - count, length) + 1
        return seen


def make_problem(
    lengths,
    q_lens=None,
    *,
    num_tokens=None,
    num_kv_heads=2,
    group=2,
    page_size=16,
    head_dim=64,
    table_pages=None,
    dtype=jnp.float32,
    quantised=None,
    seed=0,
) -> Problem:
    """Rows of the given lengths, pages shuffled; unused slots NaN, unused entries out of range.

    `quantised` is a dtype of pages with scales, which are NaN for pages that nobody uses; in int8,
    which has no NaN, unused slots hold what the largest score would come from.
    """
    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths, np.int32)
    live_pages = -(-lengths // page_size)
    table_pages = table_pages or max(1, int(live_pages.max()) + 2)
    num_pages = int(live_pages.sum()) + 3
    free = iter(rng.permutation(num_pages))
    shape = (num_pages, num_kv_heads, page_size, head_dim)
    k_pages, v_pages = (np.full(shape, np.nan, np.float32) for _ in range(2))
    page_indices = rng.choice(BAD_PAGES, (len(lengths), table_pages))
    for row, length in enumerate(lengths):
        for slot in range(live_pages[row]):
            page = page_indices[row, slot] = next(free)
            live = min(page_size, length - slot * page_size)
            for pages in (k_pages, v_pages):
                pages[page, :, :live] = rng.standard_normal((num_kv_heads, live, head_dim))
    cu_q_lens = None
    if q_lens is not None:
        cu_q_lens = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
        num_tokens = num_tokens or int(cu_q_lens[-1])
    q_shape = (num_tokens or len(lengths), num_kv_heads * group, head_dim)
    q = jnp.asarray(rng.standard_normal(q_shape), dtype)
    scales = {}
    if quantised is not None:
        used = ~np.isnan(k_pages).all(axis=(2, 3))
        for name, factor in (("k_scales", 0.01), ("v_scales", 0.3)):
            drawn = factor * (1 + rng.random((num_pages, num_kv_heads)))
            scales[name] = jnp.asarray(np.where(used, drawn, np.nan), jnp.float32)
        k_pages, v_pages = (_quantise(pages, quantised) for pages in (k_pages, v_pages))
        dtype = quantised
    k_pages, v_pages = jnp.asarray(k_pages, dtype), jnp.asarray(v_pages, dtype)
    return Problem(q, k_pages, v_pages, lengths, page_indices, cu_q_lens, scales)


def _quantise(pages: np.ndarray, dtype) -> np.ndarray:
    if jnp.issubdtype(dtype, jnp.floating):
        return 8 * pages
    return np.nan_to_num(np.round(30 * pages), nan=127).clip(-127, 127)


def oracle(problem: Problem, *, sm_scale=None, soft_cap=None, sliding_window=None, sinks=None):
    """(out, m, l) in float64, one token, head and key at a time."""
    q, k_pages, v_pages = (
        np.asarray(x.astype(jnp.float32), np.float64)
        for x in (problem.q, problem.k_pages, problem.v_pages)
    )
    if problem.scales:
        k_pages = k_pages * np.asarray(problem.scales["k_scales"], np.float64)[..., None, None]
        v_pages = v_pages * np.asarray(problem.scales["v_scales"], np.float64)[..., None, None]
    _, num_heads, head_dim = q.shape
    page_size, group = k_pages.shape[2], num_heads // k_pages.shape[1]
    out, top, total = np.zeros_like(q), np.full(q.shape[:2], -np.inf), np.zeros(q.shape[:2])
    row_of_token = np.repeat(np.arange(len(problem.lengths)), problem.q_lens)
    seen = problem.token_lengths()
    for token, row in enumerate(row_of_token):
        first = 0 if sliding_window is None else max(0, seen[token] - sliding_window)
        keys = [
            (problem.page_indices[row, j // page_size], j % page_size)
            for j in range(first, seen[token])
        ]
        for head in range(num_heads if keys else 0):
            k = np.stack([k_pages[page, head // group, slot] for page, slot in keys])
            v = np.stack([v_pages[page, head // group, slot] for page, slot in keys])
            s = k @ q[token, head] * (head_dim**-0.5 if sm_scale is None else sm_scale)
            s = s if soft_cap is None else soft_cap * np.tanh(s / soft_cap)
            all_scores = s if sinks is None else np.append(s, float(sinks[head]))
            top[token, head] = all_scores.max()
            total[token, head] = np.exp(all_scores - all_scores.max()).sum()
            out[token, head] = np.exp(s - all_scores.max()) @ v / total[token, head]
    return out, top, total


def assert_close(got, want, problem: Problem, *, rounding=None):
    """Each token's and head's largest error, relative to its own largest value, is a few roundings.

    Errors grow as the square root of the number of summed terms, and the mean of n random values
    shrinks as 1 / sqrt(n): so the bound is some float32 roundings times the token's length, and one
    of the output's own, or `rounding` where something coarser is rounded on the way.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    error = np.abs(got - want).max(axis=-1)
    size = np.abs(want).max(axis=-1)
    terms = problem.token_lengths()[:, None] + problem.q.shape[-1]
    rounding = jnp.finfo(problem.q.dtype).eps if rounding is None else rounding
    bound = size * (rounding + 2 * jnp.finfo(jnp.float32).eps * terms)
    worst = np.unravel_index(np.argmax(error - bound), error.shape)
    assert (error <= bound).all(), f"token, head {worst}: {error[worst]} > {bound[worst]}"
