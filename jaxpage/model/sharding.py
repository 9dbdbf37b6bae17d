"""How a model lies on a mesh of devices, of which each holds a part of every layer.

A mesh has two axes. Along `data` stand replicas that have weights, pages and a scheduler each;
along `model` the devices that share one replica: each holds some KV heads with their query heads
and their pages, some of the MLP, and some of the vocabulary. A step runs on all of them under one
`jax.shard_map`, each on what it holds. Attention and the scheduler then need no communication, and
a layer two all-reduces (Shoeybi et al. 2019, Megatron-LM, section 3).
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpage.config import ModelConfig, require
from jaxpage.model.params import Params, is_spec, param_specs

DATA, MODEL = "data", "model"
# Logical axes of `params.ParamSpec` that are divided, and along which axis of the mesh.
AXIS_RULES = {"vocab": MODEL, "kv_heads": MODEL, "mlp": MODEL}


def parse_mesh(text: str) -> tuple[int, int]:
    """The sizes of `data` and `model` in a text as `data:1,model:4`; one that is not named is 1.

    Raises:
      ConfigError: the text names another axis, one twice, or no positive number.
    """
    sizes = {}
    for part in text.split(","):
        name, _, size = part.strip().partition(":")
        is_new_axis = name in (DATA, MODEL) and name not in sizes
        require(
            is_new_axis and size.isdecimal() and int(size) > 0,
            f"mesh={text!r}: {part.strip()!r} must be data:N or model:N, each once, as in "
            "data:1,model:4",
        )
        sizes[name] = int(size)
    return sizes.get(DATA, 1), sizes.get(MODEL, 1)


def make_mesh(text: str, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that `text` describes (see `parse_mesh`) of the first of `devices`, by default all.

    Raises:
      ConfigError: the text is none, or there are too few devices.
    """
    shape = parse_mesh(text)
    devices = jax.devices() if devices is None else devices
    needed = shape[0] * shape[1]
    require(
        needed <= len(devices),
        f"mesh={text!r} needs {needed} devices, and there are {len(devices)}: make it smaller, or "
        f"set JAX_NUM_CPU_DEVICES={needed} to try it on a CPU",
    )
    require(
        needed == len(devices) or jax.process_count() == 1,
        f"mesh={text!r} is of {needed} devices, and the processes have {len(devices)}: "
        "in a run of several processes it has to take all",
    )
    return Mesh(np.array(devices[:needed]).reshape(shape), (DATA, MODEL))


def divisible_model(config: ModelConfig, num_devices: int) -> ModelConfig:
    """`config` with as many KV heads as `num_devices` can divide.

    More devices than KV heads share one: each gets a copy of it, with its pages, and a part of its
    query heads. The function computed is the same, and `repeat_kv_heads` gives its parameters.

    Raises:
      ConfigError: `num_devices` does not divide what has to be divided.
    """
    heads, group = config.num_kv_heads, config.group_size
    copies = max(num_devices // heads, 1)
    divides = {
        "KV heads": heads * copies % num_devices == 0,
        "query heads": group % copies == 0,
        "MLP dim": config.mlp_dim % num_devices == 0,
        "vocabulary": config.vocab_size % num_devices == 0,
    }
    wrong = [name for name, is_right in divides.items() if not is_right]
    require(
        not wrong,
        f"model:{num_devices} does not divide {', '.join(wrong)} of {config.name} (KV heads "
        f"{heads}, query heads {config.num_heads}, MLP {config.mlp_dim}, vocabulary "
        f"{config.vocab_size}): take another number of devices",
    )
    return replace(config, num_kv_heads=heads * copies)


def repeat_kv_heads(params: Params, config: ModelConfig, divisible: ModelConfig) -> Params:
    """The parameters of `divisible`, which `divisible_model` made of `config`, from its own."""
    copies = divisible.num_kv_heads // config.num_kv_heads
    if copies == 1:
        return params
    layers = dict(params["layers"])
    qkv, out = layers["qkv"], layers["out"]  # [L, K, G + 2, D, E], [L, E, K, G, D]
    queries, shared = qkv[:, :, :-2], jnp.repeat(qkv[:, :, -2:], copies, axis=1)
    num_layers, _, _, head_dim, embed_dim = qkv.shape
    heads, group = divisible.num_kv_heads, divisible.group_size
    queries = queries.reshape(num_layers, heads, group, head_dim, embed_dim)
    layers["qkv"] = jnp.concatenate([queries, shared], axis=2)
    layers["out"] = out.reshape(num_layers, embed_dim, heads, group, head_dim)
    return params | {"layers": layers}


def param_partition(config: ModelConfig) -> Params:
    """The `PartitionSpec` of each parameter, by `AXIS_RULES`."""
    return jax.tree.map(
        lambda spec: PartitionSpec(*(AXIS_RULES.get(axis) for axis in spec.axes)),
        param_specs(config),
        is_leaf=is_spec,
    )


def param_shardings(config: ModelConfig, mesh: Mesh) -> Params:
    """The sharding of each parameter; replicas have all the same."""
    return on_mesh(param_partition(config), mesh)


def on_mesh(partition: Any, mesh: Mesh) -> Any:
    """The shardings that a tree of `PartitionSpec` means on `mesh`."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        partition,
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )


def stored_shardings(config: ModelConfig, mesh: Mesh) -> Params:
    """Where parameters are to be read to, as they are stored; `divide` makes of them what serves.

    They are the serving ones, but for KV heads that several devices share: every device reads all.
    """
    shardings = param_shardings(config, mesh)
    if divisible_model(config, mesh.shape[MODEL]) != config:
        whole = NamedSharding(mesh, PartitionSpec())
        shardings["layers"] |= {"qkv": whole, "out": whole}
    return shardings


def divide(config: ModelConfig, params: Params, mesh: Mesh) -> tuple[ModelConfig, Params]:
    """The model that the devices of `mesh` can divide, and its parameters where they serve."""
    divisible = divisible_model(config, mesh.shape[MODEL])
    params = repeat_kv_heads(params, config, divisible)
    return divisible, jax.device_put(params, param_shardings(divisible, mesh))


# --- inside of `shard_map`: what the devices of a replica do together ----------------------------
# `axis` is None on a single device, where nothing has to be done.


def all_reduce(x: jax.Array, axis: str | None) -> jax.Array:
    """The sum of `x` over the devices of `axis`.

    On CPUs it is taken in the order of the devices: the bits are then the same whether they are of
    one process or of several, whose library begins each part of a sum elsewhere.
    """
    if axis is None:
        return x

    def in_order(x: jax.Array) -> jax.Array:
        return functools.reduce(jnp.add, lax.all_gather(x, axis))

    return lax.platform_dependent(x, cpu=in_order, default=lambda x: lax.psum(x, axis))


def embed(table: jax.Array, tokens: jax.Array, axis: str | None) -> jax.Array:
    """Rows `tokens: i32[T]` of a table `[V, E]`, of which each device holds an equal part."""
    if axis is None:
        return table[tokens]
    first = lax.axis_index(axis) * table.shape[0]
    is_here = (tokens >= first) & (tokens < first + table.shape[0])
    rows = table[jnp.where(is_here, tokens - first, 0)]
    # One device has the row, and all others zeros: the sum is exact.
    return lax.psum(jnp.where(is_here[:, None], rows, 0), axis)


def gather_vocab(logits: jax.Array, axis: str | None) -> jax.Array:
    """`[n, V]` from the devices' parts of it."""
    return logits if axis is None else lax.all_gather(logits, axis, axis=1, tiled=True)
