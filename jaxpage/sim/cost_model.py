"""How long a step takes on a device that is not here: the sum of its kernels, and what each moves.

A step is known by a few sums over its rows, so that its price is a few vector operations inside
`jit`, whatever the number of slots. Kernels run one after the other, as they do on one stream;
moves to and from the host are not overlapped.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from jaxpage.config import Prices, require
from jaxpage.sim import kernels
from jaxpage.sim.device import DeviceSpec
from jaxpage.sim.efficiencies import A100_MEASURED
from jaxpage.sim.kernels import KINDS, Efficiency, Work, kernel_seconds, roofs
from jaxpage.sim.shapes import ModelShape


class Load(NamedTuple):
    """What a step computes and moves: sums over its rows, `f32[]` each.

    A row that computes one token decodes; the others bring a prompt, or a part of one.
    """

    tokens: jax.Array
    samples: jax.Array  # rows that need logits
    decodes: jax.Array  # rows that decode
    decode_context: jax.Array  # tokens that they read
    prefill_tokens: jax.Array
    prefill_pairs: jax.Array  # of a token and one that it sees
    prefill_context: jax.Array  # tokens that are read for them
    prefill_tiles: jax.Array
    moved_pages: jax.Array  # to the host and back
    copied_pages: jax.Array  # within the pool


class Overhead(NamedTuple):
    """What the host adds to a step, beside its kernels: seconds."""

    step_s: jax.typing.ArrayLike = 0.0
    row_s: jax.typing.ArrayLike = 0.0  # for each row that samples


NO_OVERHEAD = Overhead()


class CostModel(struct.PyTreeNode):
    """A model on a device of a kind, or spread over several of them."""

    efficiency: Efficiency  # f32[kinds] each
    overhead: Overhead  # f32[] each
    copied_share: jax.Array  # f32[], of the tokens that decoding rows read, copied in each step
    shape: ModelShape = struct.field(pytree_node=False)
    device: DeviceSpec = struct.field(pytree_node=False)
    num_devices: int = struct.field(pytree_node=False)
    page_size: int = struct.field(pytree_node=False)


def create(
    shape: ModelShape,
    device: DeviceSpec,
    *,
    num_devices: int = 1,
    page_size: int = 16,
    overhead: Overhead = NO_OVERHEAD,
    efficiencies: dict[str, Efficiency] | None = None,
    copied_share: float = 0.0,
) -> CostModel:
    """The cost of `shape` on `num_devices` devices; by default as efficient as A100s measured.

    `copied_share` is for beams whose KV cannot be shared: of all that they read, the part that is
    copied in each step from a beam that goes on to a row that does not.

    Raises:
      ConfigError: the heads cannot be dealt out evenly, or a kind of kernel has no efficiency.
    """
    require(num_devices > 0, f"num_devices={num_devices} must be positive")
    require(
        shape.num_heads % num_devices == 0,
        f"num_devices={num_devices} must divide the {shape.num_heads} heads of {shape.name}",
    )
    known = A100_MEASURED | (efficiencies or {})
    columns = zip(*(known[kind] for kind in KINDS), strict=True)
    return CostModel(
        efficiency=Efficiency(*(jnp.asarray(column, jnp.float32) for column in columns)),
        overhead=Overhead(*(jnp.asarray(seconds, jnp.float32) for seconds in overhead)),
        copied_share=jnp.asarray(copied_share, jnp.float32),
        shape=shape,
        device=device,
        num_devices=num_devices,
        page_size=page_size,
    )


def load_of(
    counts: jax.Array,
    lengths: jax.Array,
    samples: jax.Array,
    moved_pages: jax.Array,
    copied_pages: jax.Array,
) -> Load:
    """The load of a plan: rows append `counts: i32[B]` to be `lengths: i32[B]` tokens long."""
    computed, context = counts.astype(jnp.float32), lengths.astype(jnp.float32)
    decodes, prefills = counts == 1, counts > 1

    def total(values: jax.Array, rows: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(rows, values, 0.0))

    pairs = computed * (context - computed) + computed * (computed + 1) / 2
    return Load(
        tokens=jnp.sum(computed),
        samples=jnp.sum(samples.astype(jnp.float32)),
        decodes=jnp.sum(decodes.astype(jnp.float32)),
        decode_context=total(context, decodes),
        prefill_tokens=total(computed, prefills),
        prefill_pairs=total(pairs, prefills),
        prefill_context=total(context, prefills),
        prefill_tiles=total(kernels.tiles_of(computed), prefills),
        moved_pages=moved_pages.astype(jnp.float32),
        copied_pages=copied_pages.astype(jnp.float32),
    )


def step_seconds(cost: CostModel, load: Load) -> jax.Array:
    """Seconds of a step, `f32[]`; an empty one takes none.

    Between barriers: fused with its surroundings XLA rounds it differently, and a load is to have
    one price wherever it is asked.
    """
    load = lax.optimization_barrier(load)
    kinds, works, times = zip(*_kernels(cost, load), strict=True)
    which = np.asarray(kinds)
    work = Work(*(jnp.stack(column) for column in zip(*works, strict=True)))
    efficiency = jax.tree.map(lambda column: column[which], cost.efficiency)
    flops_per_s, bytes_per_s = (rate[which] for rate in roofs(cost.device))
    seconds = kernel_seconds(efficiency, flops_per_s, bytes_per_s, work)
    total = jnp.sum(seconds * np.asarray(times, np.float32))
    host = cost.overhead.step_s + cost.overhead.row_s * load.samples
    return lax.optimization_barrier(jnp.where(total > 0, total + host, 0.0))


def _kernels(cost: CostModel, load: Load) -> list[tuple[int, Work, int]]:
    """The kernels of a step: kind, work on one device, and how often it runs."""
    shape, tp, L = cost.shape, cost.num_devices, cost.shape.num_layers
    E, F, D, T = shape.embed_dim, shape.mlp_dim, shape.head_dim, load.tokens
    heads, kv_heads = shape.num_heads / tp, max(shape.num_kv_heads / tp, 1)
    inputs, itemsize = shape.num_mlp_inputs, shape.itemsize
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": D}
    decode = kernels.attention(
        load.decodes, load.decode_context, load.decode_context, load.decodes,
        itemsize=shape.kv_itemsize, **sizes,
    )  # fmt: skip
    prefill = kernels.attention(
        load.prefill_tokens, load.prefill_pairs, load.prefill_context, load.prefill_tiles,
        itemsize=shape.kv_itemsize, **sizes,
    )  # fmt: skip
    page_bytes = shape.kv_bytes_per_token * cost.page_size * kv_heads / shape.num_kv_heads
    product = partial(kernels.product, itemsize=itemsize, tile_rows=cost.device.tile_rows)
    layers = [
        (kernels.LINEAR, product(T, E, (heads + 2 * kv_heads) * D), 1),
        (kernels.LINEAR, product(T, heads * D, E), 1),
        (kernels.LINEAR, product(T, E, inputs * F / tp), 1),
        (kernels.LINEAR, product(T, F / tp, E), 1),
        (kernels.NORM, kernels.elementwise(T, 2 * E, itemsize), 2),
        (kernels.ROPE, kernels.elementwise(T, 2 * (heads + kv_heads) * D, itemsize), 1),
        (kernels.ACTIVATION, kernels.elementwise(T, (inputs + 1) * F / tp, itemsize), 1),
        (kernels.ADD, kernels.elementwise(T, 3 * E, itemsize), 2),
        (kernels.DECODE, decode, 1),
        (kernels.PREFILL, prefill, 1),
    ]
    if tp > 1:
        layers.append((kernels.ALL_REDUCE, kernels.all_reduce(T * E * itemsize, tp), 2))
    copied_pages = load.copied_pages + cost.copied_share * load.decode_context / cost.page_size
    moved, copied = load.moved_pages * page_bytes, 2 * copied_pages * page_bytes
    return [
        *((kind, work, L * times) for kind, work, times in layers),
        (kernels.LINEAR, product(load.samples, E, shape.vocab_size / tp), 1),
        (kernels.HOST_COPY, kernels.host_copy(moved, load.moved_pages), 1),
        (kernels.ADD, kernels.elementwise(copied, 1, 1), 1),
    ]


def prices(cost: CostModel) -> Prices:
    """What `preemption="auto"` weighs, by this model: slopes in steps of some hundred tokens."""

    def seconds(**sums: float) -> float:
        some = {"tokens": 512.0, "samples": 1.0} | sums
        load = Load(*(jnp.float32(some.get(name, 0.0)) for name in Load._fields))
        return float(step_seconds(cost, load))

    prompt = {"prefill_tokens": 512.0, "prefill_tiles": 4.0}
    near, far = (
        seconds(prefill_pairs=512 * context, prefill_context=context, **prompt)
        for context in (2048.0, 4096.0)
    )
    return Prices(
        token_s=(seconds(tokens=1024.0) - seconds()) / 512,
        pair_s=(far - near) / (512 * 2048),
        page_s=(seconds(moved_pages=100.0) - seconds()) / 100,
    )
