"""A decoder of the Llama family over paged KV: one ragged step of tokens, any sequences mixed.

Parameters are those of `model.params`. Products run in the parameters' dtype; norms, rotary
angles, softmax and logits are float32. Keys and values are rounded to the pool's dtype.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxpage.config import ModelConfig
from jaxpage.model.params import Params
from jaxpage.paging import kv_pool
from jaxpage.paging.kv_pool import KvPool

# (q[T, H, D], k_pages, v_pages, lengths, page_indices, cu_q_lens) -> [T, H, D]
AttentionFn = Callable[..., jax.Array]


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
    params: Params, pool: KvPool, batch: Batch, config: ModelConfig, attention: AttentionFn
) -> tuple[jax.Array, KvPool]:
    """Runs all layers, writing the batch's keys and values on the way.

    Returns the normalized last states `[T, E]` and the pool. `params["layers"]` is the
    stacked dict, which is scanned, or a tuple of one dict a layer, which is unrolled.
    """
    x = params["embed"][batch.tokens]
    rope = rope_angles(batch.positions, config)

    def layer(carry, weights_and_index):
        x, pool = carry
        weights, index = weights_and_index
        h = rms_norm(x, weights["attn_norm"], config.norm_eps)
        q, k, v = _qkv(h, weights["qkv"])
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        pool = kv_pool.write(pool, index, k, v, batch.pages, batch.offsets)
        keys, values, page_indices = kv_pool.pages_of_layer(pool, index, batch.page_indices)
        attended = attention(
            q, keys, values, batch.lengths, page_indices, cu_q_lens=batch.cu_q_lens
        )
        x = x + _project(attended, weights["out"], num_contracted=3)
        h = rms_norm(x, weights["mlp_norm"], config.norm_eps)
        gate_up = _project(h, weights["gate_up"])
        h = jax.nn.silu(gate_up[:, 0]) * gate_up[:, 1]
        return (x + _project(h, weights["down"]), pool), None

    x, pool = _over_layers(layer, (x, pool), params["layers"])
    return rms_norm(x, params["final_norm"], config.norm_eps), pool


def logits(params: Params, x: jax.Array) -> jax.Array:
    """Next-token logits of states `[n, E]`, `f32[n, V]`."""
    head = params["head"] if "head" in params else params["embed"]
    return _project(x, head).astype(jnp.float32)


def unstack_layers(params: Params) -> Params:
    """The same parameters with a dict a layer, so that no product must first cut out its weights.

    A scan over stacked weights copies each layer's on the CPU, a fifth of a small batch's step.
    """
    layers = params["layers"]
    num_layers = jax.tree.leaves(layers)[0].shape[0]
    names = layers.keys()
    split = ({name: layers[name][i] for name in names} for i in range(num_layers))
    return {**params, "layers": tuple(split)}


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


def _qkv(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries `[T, H, D]`, keys and values `[T, K, D]` from `weight: [K, G + 2, D, E]`."""
    K, G, D = weight.shape[0], weight.shape[1] - 2, weight.shape[2]
    fused = _project(x, weight)
    return fused[:, :, :G].reshape(-1, K * G, D), fused[:, :, G], fused[:, :, G + 1]


def _project(x: jax.Array, weight: jax.Array, num_contracted: int = 1) -> jax.Array:
    """`x` times `weight: [out..., in...]`, of which the last `num_contracted` axes are in."""
    num_out = weight.ndim - num_contracted
    out_shape = weight.shape[:num_out]
    x = x.reshape(x.shape[0], -1)
    weight = weight.reshape(-1, x.shape[1])
    product = lax.dot_general(x, weight, (((1,), (1,)), ((), ())))
    return product.reshape(-1, *out_shape)


def _over_layers(layer, carry, layers):
    """Folds `layer(carry, (weights, index))` over stacked or separate layers."""
    if isinstance(layers, tuple):
        for index, weights in enumerate(layers):
            carry, _ = layer(carry, (weights, index))
        return carry
    num_layers = jax.tree.leaves(layers)[0].shape[0]
    return lax.scan(layer, carry, (layers, jnp.arange(num_layers, dtype=jnp.int32)))[0]
