"""The public call: checks the arguments, picks an implementation, casts the result."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention import gpu, reference, xla
from pallas_kernels.paged_attention.config import QUANTISED

Implementation = Literal["reference", "xla", "mosaic_gpu"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)
Shaped = jax.Array | jax.ShapeDtypeStruct


def resolve_implementation(
    implementation: str | None = None,
    q: Shaped | None = None,
    k_pages: Shaped | None = None,
    page_indices: Shaped | None = None,
    cu_q_lens: Shaped | None = None,
) -> str:
    """The name of the implementation that a call with these arrays would use.

    `None` picks the best one that works here: on a GPU that has a kernel, that kernel, if it takes
    the arrays and has given the reference's result on this very card; otherwise XLA. Without
    arrays, what a decode step of bfloat16 with head dim 128 would use. `gpu.reason_against` says
    why a kernel is not taken.

    Raises:
      ValueError: the name is not one of `IMPLEMENTATIONS`.
      NotImplementedError: the name is known, but cannot run here.
    """
    if implementation is None:
        if gpu.card() is None:
            return "xla"
        usual = ((1, 1, 128), (1, 1, 16, 128))
        q, k_pages = (
            jax.ShapeDtypeStruct(shape, jnp.bfloat16) if x is None else x
            for x, shape in zip((q, k_pages), usual, strict=True)
        )
        if page_indices is None:
            page_indices = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        against = gpu.reason_against(q, k_pages, page_indices, is_ragged=cu_q_lens is not None)
        return "mosaic_gpu" if against is None else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{implementation=} is unknown: give None or one of {IMPLEMENTATIONS}.")
    if implementation == "mosaic_gpu":
        gpu.kernel_of_card()
    return implementation


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    lengths: jax.Array,
    page_indices: jax.Array,
    *,
    cu_q_lens: jax.Array | None = None,
    k_scales: jax.Array | None = None,
    v_scales: jax.Array | None = None,
    sinks: jax.Array | None = None,
    sm_scale: float | None = None,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    return_residuals: bool = False,
    implementation: str | None = None,
):
    """Causal attention of each row's last queries over the KV pages that its table names.

    Letters: B rows, T tokens in this step, P pages, M pages per row, S tokens per page, H = K * G
    query heads over K KV heads, D head dim. Query head h reads KV head h // G.

    A row's result is the same bit for bit whoever else is in the batch, in whatever order.

    Args:
      q: [B, H, D] for decode (`cu_q_lens` is None): one query per row, at position length - 1.
        [T, H, D] for ragged steps: row b's queries are q[cu_q_lens[b]:cu_q_lens[b+1]], its last
        positions. Tokens from cu_q_lens[B] on are padding.
      k_pages, v_pages: [P, K, S, D]. Slots that hold no live token may hold anything, NaN included.
      lengths: i32[B], live KV tokens per row, this step's included; 0 for an empty row.
      page_indices: i32[B, M]; entry j names the page of tokens [j*S, (j+1)*S). Entries beyond the
        row's ceil(length / S) live pages may be anything; so may those that `sliding_window`
        hides from every query of this step.
      cu_q_lens: i32[B+1], running sum of the rows' query counts, from 0 to at most T.
      k_scales, v_scales: f32[P, K], for quantised pages (int8 or float8_e4m3fn): what page p holds
        for KV head k stands for its values times scales[p, k]. Pages in use must have finite ones.
      sinks: f32[H], one more score of each query head, that takes weight and has no value.
      sm_scale: factor on the scores, D**-0.5 if None.
      soft_cap: if given, scores become soft_cap * tanh(score / soft_cap).
      sliding_window: if given, position i sees positions i - sliding_window + 1 .. i only.
      return_residuals: also return what merging split KV needs.
      implementation: one of `IMPLEMENTATIONS`, or None for `resolve_implementation`'s choice.

    Returns:
      out of q's shape and dtype, zeros for padding and empty rows; with `return_residuals`
      (out, (m, l)), both f32[.., H]: the largest score, and the sum of exp(score - m), sinks
      included.

    Raises:
      ValueError: shapes, dtypes or options do not fit; the message says which and what would.
      NotImplementedError: the implementation named cannot run here.
    """
    lengths, page_indices = jnp.asarray(lengths), jnp.asarray(page_indices)
    cu_q_lens = None if cu_q_lens is None else jnp.asarray(cu_q_lens)
    _check_arrays(q, k_pages, v_pages, sinks)
    _check_scales(k_pages, k_scales, v_scales)
    _check_rows(q, lengths, page_indices, cu_q_lens)
    _check_options(soft_cap, sliding_window)
    implementation = resolve_implementation(implementation, q, k_pages, page_indices, cu_q_lens)
    if implementation == "reference" and cu_q_lens is None:
        cu_q_lens = jnp.arange(q.shape[0] + 1, dtype=jnp.int32)
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    out, m, total = _attend_of(implementation)(
        q, k_pages, v_pages, lengths, page_indices, cu_q_lens, k_scales=k_scales,
        v_scales=v_scales, sm_scale=scale, soft_cap=soft_cap, window=sliding_window,
    )  # fmt: skip
    if sinks is not None:
        out, m, total = reference.add_sinks(out, m, total, sinks)
    return (out.astype(q.dtype), (m, total)) if return_residuals else out.astype(q.dtype)


def _attend_of(implementation: str):
    if implementation == "mosaic_gpu":  # whoever has no GPU need not import its compiler
        return gpu.kernel_of_card().attend
    return {"reference": reference.attend, "xla": xla.attend}[implementation]


def _check_arrays(q, k_pages, v_pages, sinks):
    if q.ndim != 3:
        raise ValueError(f"{q.shape=} must be [B or T, H, D].")
    if k_pages.ndim != 4 or k_pages.shape != v_pages.shape:
        raise ValueError(f"{k_pages.shape=} and {v_pages.shape=} must both be [P, K, S, D].")
    if min(k_pages.shape) == 0:
        raise ValueError(f"{k_pages.shape=} has no elements: allocate at least one page.")
    if q.shape[2] != k_pages.shape[3]:
        raise ValueError(f"{q.shape=} and {k_pages.shape=} must have the same last axis, D.")
    if q.shape[1] == 0 or q.shape[1] % k_pages.shape[1]:
        raise ValueError(f"H={q.shape[1]} query heads must be a multiple of K={k_pages.shape[1]}.")
    if k_pages.dtype != v_pages.dtype:
        raise ValueError(
            f"{k_pages.dtype=!s} and {v_pages.dtype=!s} must be equal: cast one of them."
        )
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"{q.dtype=!s} must be floating: cast it.")
    if sinks is not None and (sinks.shape != q.shape[1:2] or sinks.dtype != jnp.float32):
        raise ValueError(f"{sinks.shape=}, {sinks.dtype=!s} must be float32 [H={q.shape[1]}].")


def _check_scales(k_pages, k_scales, v_scales):
    is_quantised = k_pages.dtype.name in QUANTISED
    if not is_quantised and not jnp.issubdtype(k_pages.dtype, jnp.floating):
        raise ValueError(f"{k_pages.dtype=!s} must be floating or one of {QUANTISED}: cast it.")
    shape = k_pages.shape[:2]
    for name, scales in (("k_scales", k_scales), ("v_scales", v_scales)):
        if (scales is not None) != is_quantised:
            raise ValueError(
                f"{name} is {'missing' if scales is None else 'given'}, and {k_pages.dtype=!s}: "
                f"scales go with pages of {QUANTISED}, and with no others."
            )
        if scales is not None and (scales.shape != shape or scales.dtype != jnp.float32):
            raise ValueError(f"{name}: {scales.shape=}, {scales.dtype=!s} must be float32 {shape}.")


def _check_rows(q, lengths, page_indices, cu_q_lens):
    if lengths.ndim != 1 or lengths.shape[0] == 0:
        raise ValueError(f"{lengths.shape=} must be [B] with B >= 1.")
    (num_rows,) = lengths.shape
    if page_indices.ndim != 2 or page_indices.shape[0] != num_rows or page_indices.shape[1] == 0:
        raise ValueError(f"{page_indices.shape=} must be [B={num_rows}, M] with M >= 1.")
    if cu_q_lens is None and q.shape[0] != num_rows:
        raise ValueError(
            f"{q.shape=} must hold one query for each of B={num_rows} rows: "
            "give cu_q_lens when rows have other numbers of queries."
        )
    if cu_q_lens is not None and cu_q_lens.shape != (num_rows + 1,):
        raise ValueError(f"{cu_q_lens.shape=} must be [B + 1 = {num_rows + 1}], starting at 0.")
    named = {"lengths": lengths, "page_indices": page_indices, "cu_q_lens": cu_q_lens}
    for name, array in named.items():
        if array is not None and array.dtype != jnp.int32:
            raise ValueError(f"{name}.dtype={array.dtype} must be int32: use .astype(jnp.int32).")


def _check_options(soft_cap, sliding_window):
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"{soft_cap=} must be positive: give None for no cap.")
    if sliding_window is not None and not sliding_window >= 1:
        raise ValueError(f"{sliding_window=} must be at least 1: give None for no window.")
