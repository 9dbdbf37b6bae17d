"""The specification of paged attention: float32, dense, slow, and short enough to be believed.

Token t belongs to row b(t) and stands at position i(t) of that row. With the row's keys and values
read through its page table, query head h, KV head k = h // G and scores

    s[t, h, j] = cap(sm_scale * q[t, h] . K[k, j]),   cap(x) = soft_cap * tanh(x / soft_cap) or x,
    J(t)       = {j : i(t) - sliding_window < j <= i(t)},

the results are

    m[t, h]    = max_{j in J(t)} s[t, h, j]
    l[t, h]    = sum_{j in J(t)} exp(s[t, h, j] - m[t, h])
    out[t, h]  = sum_{j in J(t)} exp(s[t, h, j] - m[t, h]) V[k, j] / l[t, h].

Where J(t) is empty (padding, or a row of length 0): m = -inf, l = 0 and out = 0. A sink is one more
score of each head, without a value: it counts in m and l alone (`add_sinks`). Quantised pages hold
K / k_scale, one scale for each page and KV head, and the same for V.
"""

import jax
import jax.numpy as jnp


def token_rows(cu_q_lens: jax.Array, lengths: jax.Array, num_tokens: int):
    """The row of each token, and its position there (-1 for padding): two i32[T]."""
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    row = jnp.searchsorted(cu_q_lens[1:], token, side="right", method="compare_all")
    is_padding = row >= lengths.shape[0]
    row = jnp.minimum(row, lengths.shape[0] - 1).astype(jnp.int32)
    position = lengths[row] - (cu_q_lens[row + 1] - token)
    return row, jnp.where(is_padding, -1, position)


def add_sinks(out, m, total, sinks):
    """The results of attention without sinks -> with `sinks: f32[H]` (Xiao et al. 2023)."""
    sees = total > 0
    top = jnp.where(sees, jnp.maximum(m, sinks[None]), m)
    base = jnp.where(sees, top, 0.0)
    kept = total * jnp.exp(m - base)
    total = jnp.where(sees, kept + jnp.exp(sinks[None] - base), 0.0)
    return out * (kept / jnp.where(sees, total, 1.0))[..., None], top, total


def attend(
    q, k_pages, v_pages, lengths, page_indices, cu_q_lens, *,
    k_scales=None, v_scales=None, sm_scale, soft_cap, window,
):  # fmt: skip
    """q [T, H, D], lengths i32[B], cu_q_lens i32[B+1] -> out, m, l: f32 [T, H, D], [T, H], [T, H].

    The shapes and meanings are those of `paged_attention`; memory is O(T * M * S * K * D).
    """
    num_tokens, num_heads, head_dim = q.shape
    num_pages, num_kv_heads, page_size, _ = k_pages.shape
    table_tokens = page_indices.shape[1] * page_size
    row, position = token_rows(cu_q_lens, lengths, num_tokens)

    key_position = jnp.arange(table_tokens, dtype=jnp.int32)[None]  # [1, M*S]
    seen = key_position <= position[:, None]  # [T, M*S]
    if window is not None:
        seen &= key_position > position[:, None] - window

    def read(pages, scales):  # -> [T, K, M*S, D], zeros wherever the query may not look
        page_id = jnp.clip(page_indices, 0, num_pages - 1)[row]  # [T, M]
        rows = pages[page_id].astype(jnp.float32)  # [T, M, K, S, D]
        if scales is not None:
            rows *= scales[page_id][:, :, :, None, None]
        rows = jnp.swapaxes(rows, 1, 2)
        rows = rows.reshape(num_tokens, num_kv_heads, table_tokens, head_dim)
        return jnp.where(seen[:, None, :, None], rows, 0.0)

    q = q.astype(jnp.float32).reshape(num_tokens, num_kv_heads, -1, head_dim)
    s = sm_scale * jnp.einsum("tkgd,tkjd->tkgj", q, read(k_pages, k_scales), precision="highest")
    if soft_cap is not None:
        s = soft_cap * jnp.tanh(s / soft_cap)
    s = jnp.where(seen[:, None, None], s, -jnp.inf)
    m = s.max(axis=-1)
    p = jnp.where(seen[:, None, None], jnp.exp(s - m[..., None]), 0.0)
    total = p.sum(axis=-1)
    out = jnp.einsum("tkgj,tkjd->tkgd", p, read(v_pages, v_scales), precision="highest")
    out = out / jnp.where(total > 0, total, 1.0)[..., None]
    return (
        out.reshape(num_tokens, num_heads, head_dim),
        m.reshape(num_tokens, num_heads),
        total.reshape(num_tokens, num_heads),
    )
