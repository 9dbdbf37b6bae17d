"""A decoder of the Llama family over paged KV: one ragged step of tokens, any sequences mixed.

Parameters are those of `model.params`. Products run in the parameters' dtype; norms, rotary
angles, softmax and logits are float32. Keys and values are rounded to the pool's dtype.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxpage.config import ModelConfig
from jaxpage.model import sharding
from jaxpage.model.params import Params
from jaxpage.paging import kv_pool
from jaxpage.paging.kv_pool import KvPool

# (q[T, H, D], k_pages, v_pages, lengths, page_indices, *, cu_q_lens) -> [T, H, D]
AttentionFn = Callable[..., Any]
LAYER_SCOPE = "layer"  # in the names of a layer's operations


class Batch(struct.PyTreeNode):
    """`T` tokens of `B` rows, row after row; the last of them may be padding.

    Row `b` brings the tokens `cu_q_lens[b]` to `cu_q_lens[b + 1]`, the last of its
    `lengths[b]`. Padding has page `P`, where nothing is written.
    """

    tokens: jax.Array  # i32[T]
    positions: jax.Array  # i32[T]
    pages: jax.Array  # i32[T], page that takes the token's keys and values
    offsets: jax.Array  # i32[T], slot in that page
    cu_q_lens: jax.Array  # i32[B + 1]
    lengths: jax.Array  # i32[B]
    page_indices: jax.Array  # i32[B, M]


def forward(
    params: Params,
    pool: KvPool,
    batch: Batch,
    config: ModelConfig,
    attention: AttentionFn,
    axis: str | None = None,
) -> tuple[jax.Array, KvPool]:
    """Runs all layers, writing the batch's keys and values on the way.

    Returns the normalized last states `[T, E]` and the pool. A leaf of `params["layers"]` is
    stacked on its first axis, or `LayersApart`. Under `shard_map` parameters and pool are a
    device's parts of them, which those of mesh axis `axis` make whole (see `sharding`).
    """
    rope = rope_angles(batch.positions, config)
    weights = params["layers"]

    @jax.named_scope(LAYER_SCOPE)
    def layer(index: jax.Array, carry: tuple[jax.Array, KvPool]) -> tuple[jax.Array, KvPool]:
        x, pool = carry
        h = rms_norm(x, weights["attn_norm"][index], config.norm_eps)
        qkv = project_layer(h, weights["qkv"], index)  # [T, K, G + 2, D]
        q, k, v = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
        q = q.reshape(q.shape[0], -1, config.head_dim)  # this device's heads
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        pool = kv_pool.write(pool, index, k, v, batch.pages, batch.offsets)
        keys, values, page_indices = kv_pool.pages_of_layer(pool, index, batch.page_indices)
        attended = attention(
            q, keys, values, batch.lengths, page_indices, cu_q_lens=batch.cu_q_lens
        )
        attended = attended.reshape(qkv[:, :, :-2].shape)  # [T, K, G, D]
        x = x + sharding.all_reduce(project_layer(attended, weights["out"], index), axis)
        h = rms_norm(x, weights["mlp_norm"][index], config.norm_eps)
        gate_up = project_layer(h, weights["gate_up"], index)  # [T, 2, F]
        h = jax.nn.silu(gate_up[:, 0]) * gate_up[:, 1]
        return x + sharding.all_reduce(project_layer(h, weights["down"], index), axis), pool

    x = sharding.embed(params["embed"], batch.tokens, axis)
    x, pool = lax.fori_loop(0, config.num_layers, layer, (x, pool))
    return rms_norm(x, params["final_norm"], config.norm_eps), pool


def logits(params: Params, x: jax.Array, axis: str | None = None) -> jax.Array:
    """Next-token logits of states `[n, E]`, `f32[n, V]`; `axis` as in `forward`."""
    head = params["head"] if "head" in params else params["embed"]
    num_rows = x.shape[0]
    if num_rows == 1 and head.dtype == jnp.bfloat16:
        # A CPU takes several times as long for one row of bfloat16 as for four.
        x = jnp.pad(x, ((0, 3), (0, 0)))
    return sharding.gather_vocab(project(x, head)[:num_rows].astype(jnp.float32), axis)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """`x` over its root mean square along the last axis, times `weight`."""
    x32 = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype) * weight[None]


def rope_angles(positions: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary angles of `positions: i32[T]`, `f32[T, D / 2]` each.

    Frequencies follow Llama 3.1's scaling if the config has one: wavelengths longer than
    the original context are stretched by `factor`, short ones kept, those between interpolated.
    """
    half = config.head_dim // 2
    exponents = jnp.arange(half, dtype=jnp.float32) / half
    frequencies = jnp.float32(config.rope_theta) ** -exponents
    scaling = config.rope_scaling
    if scaling is not None:
        turns = scaling.original_max_position * frequencies / (2 * jnp.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = kept * frequencies + (1 - kept) * frequencies / scaling.factor
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates each pair (i, i + D / 2) of `x: [T, heads, D]` by its position's angle."""
    cos, sin = (table[:, None] for table in rope)
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return rotated.astype(x.dtype)


def project(x: jax.Array, weight: jax.Array, *, is_transposed: bool = False) -> jax.Array:
    """`x: [n, in...]` times `weight: [out..., in...]`, as one product of matrices.

    A transposed weight is `[in..., out...]`.
    """
    num_in = x.ndim - 1
    x = x.reshape(x.shape[0], -1)
    if is_transposed:
        out_shape, weight, axis = weight.shape[num_in:], weight.reshape(x.shape[1], -1), 0
    else:
        out_shape, weight, axis = weight.shape[:-num_in], weight.reshape(-1, x.shape[1]), 1
    dimensions = (((1,), (axis,)), ((), ()))
    # In float32 a GPU would otherwise round both to tf32, of ten bits.
    product = lax.dot_general(x, weight, dimensions, precision=lax.Precision.HIGHEST)
    return product.reshape(-1, *out_shape)


class LayersApart(struct.PyTreeNode):
    """The matrices of one leaf, an array a layer."""

    matrices: tuple[jax.Array, ...]
    is_transposed: bool = struct.field(pytree_node=False)  # as in `project`


def project_layer(x: jax.Array, weights: jax.Array | LayersApart, index: jax.Array) -> jax.Array:
    """`x` times the weights of layer `index`.

    Stacked weights are indexed. Of `LayersApart` the layer's array is chosen by a branch, since the
    CPU backend would first copy a slice of a stack: a seventh of a small batch's step, half of one
    token's. Only the product is inside the branch, so that a layer still compiles once.
    """
    if not isinstance(weights, LayersApart):
        return project(x, lax.dynamic_index_in_dim(weights, index, keepdims=False))
    multiply = partial(project, is_transposed=weights.is_transposed)
    return lax.switch(index, [partial(multiply, weight=w) for w in weights.matrices], x)
