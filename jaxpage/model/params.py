"""The table of a Llama's parameters: one `ParamSpec` a leaf gives init, shardings and checks.

Weights are stored `[out, in]`. Projections that read the same input are one leaf, fused along an
axis that still shards: `qkv` groups, for every KV head, its `G` query heads, its key, its value.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxpage.config import ModelConfig

Params = dict  # nested dict of arrays, the shape of `param_specs`

# How many of a layer's last axes its input has; all axes before them are its output's.
INPUT_AXES = {"qkv": 1, "out": 3, "gate_up": 1, "down": 1}


@dataclass(frozen=True)
class ParamSpec:
    """Shape and logical axes of one leaf; `fan_in` scales its init, None starts it at one."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    fan_in: int | None = None


def param_specs(config: ModelConfig) -> dict:
    """The nested dict of `ParamSpec`, layers stacked on a leading axis `L`."""
    L, E, F, V = config.num_layers, config.embed_dim, config.mlp_dim, config.vocab_size
    K, G, D = config.num_kv_heads, config.group_size, config.head_dim

    def norm(*shape):
        return ParamSpec(shape, ("layers", "embed")[-len(shape) :])

    specs = {
        "embed": ParamSpec((V, E), ("vocab", "embed"), E),
        "layers": {
            "attn_norm": norm(L, E),
            "qkv": ParamSpec(
                (L, K, G + 2, D, E), ("layers", "kv_heads", "parts", None, "embed"), E
            ),
            "out": ParamSpec(
                (L, E, K, G, D), ("layers", "embed", "kv_heads", None, None), K * G * D
            ),
            "mlp_norm": norm(L, E),
            "gate_up": ParamSpec((L, 2, F, E), ("layers", "parts", "mlp", "embed"), E),
            "down": ParamSpec((L, E, F), ("layers", "embed", "mlp"), F),
        },
        "final_norm": norm(E),
    }
    if not config.tie_embeddings:
        specs["head"] = ParamSpec((V, E), ("vocab", "embed"), E)
    return specs


def is_spec(leaf) -> bool:
    """True for the leaves of `param_specs`, to walk it with `jax.tree`."""
    return isinstance(leaf, ParamSpec)


def init_params(config: ModelConfig, key: jax.Array, dtype: DTypeLike) -> Params:
    """Random parameters: norms one, matrices normal with deviation `fan_in ** -0.5`."""
    specs, treedef = jax.tree.flatten(param_specs(config), is_leaf=is_spec)
    keys = jax.random.split(key, len(specs))

    def matrix(shape: tuple[int, ...], fan_in: int, key: jax.Array) -> jax.Array:
        noise = jax.random.normal(key, shape, jnp.float32)
        return (noise / math.sqrt(fan_in)).astype(dtype)

    def leaf(spec: ParamSpec, key: jax.Array) -> jax.Array:
        if spec.fan_in is None:
            return jnp.ones(spec.shape, dtype)
        if spec.axes[0] != "layers":
            return matrix(spec.shape, spec.fan_in, key)
        # Layer by layer, so that billions of numbers never stand in float32.
        layer = partial(matrix, spec.shape[1:], spec.fan_in)
        return lax.map(layer, jax.random.split(key, spec.shape[0]))

    return treedef.unflatten([leaf(s, k) for s, k in zip(specs, keys, strict=True)])


def num_parameters(config: ModelConfig) -> int:
    """How many numbers the parameters hold."""
    return sum(math.prod(s.shape) for s in jax.tree.leaves(param_specs(config), is_leaf=is_spec))
