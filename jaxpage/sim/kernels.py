"""How long kernels take: rooflines of which a device reaches a part, and a price for each launch.

A kernel has floating point operations to do, bytes to move, and items to go through (tiles of
queries, copies, peers). The slower of the first two decides, the other shows where they are close:

    seconds = launch + item * items + ((flops / roof)^p + (bytes / roof)^p)^(1 / p)

All parameters are positive; `sim.calibrate` fits them to measured rows. A kernel with nothing to do
takes no time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxpage.sim.device import DeviceSpec

KINDS = (
    "linear", "norm", "rope", "activation", "add", "decode", "prefill", "all_reduce", "host_copy"
)  # fmt: skip
LINEAR, NORM, ROPE, ACTIVATION, ADD, DECODE, PREFILL, ALL_REDUCE, HOST_COPY = range(len(KINDS))
TILE_ROWS = 64  # of a product on the GPUs that were measured
TILE_QUERIES = 128  # so do attention's, in the kernels that were measured

Numbers = jax.Array | np.ndarray | float


class Work(NamedTuple):
    """What kernels have to do on one device; all of one shape."""

    flops: Numbers  # f32
    bytes: Numbers  # f32
    items: Numbers  # f32


class Efficiency(NamedTuple):
    """What a device makes of its peaks; `f32[]` of one kind of kernel, or `f32[n]` of several."""

    compute: Numbers  # of the peak, a fraction
    memory: Numbers  # of the peak of memory, link or bus, a fraction
    launch_s: Numbers
    item_s: Numbers
    sharpness: Numbers  # `p - 1`


def roofs(device: DeviceSpec) -> tuple[jax.Array, jax.Array]:
    """Operations and bytes a second at the most, of each of `KINDS`; `f32[kinds]` each."""
    rates = [device.bytes_per_s] * len(KINDS)
    rates[ALL_REDUCE], rates[HOST_COPY] = device.link_bytes_per_s, device.host_bytes_per_s
    flops = jnp.full((len(KINDS),), device.flops_per_s, jnp.float32)
    return flops, jnp.asarray(rates, jnp.float32)


def kernel_seconds(
    efficiency: Efficiency, flops_per_s: jax.Array, bytes_per_s: jax.Array, work: Work
) -> jax.Array:
    """Seconds that each kernel takes, `f32`; all arguments of one shape, or that broadcast."""
    compute = work.flops / (flops_per_s * efficiency.compute)
    memory = work.bytes / (bytes_per_s * efficiency.memory)
    p = 1 + efficiency.sharpness
    slower, faster = jnp.maximum(compute, memory), jnp.minimum(compute, memory)
    # Powers of the ratio: those of seconds would underflow, and have no gradient at zero.
    ratio = jnp.where(faster > 0, faster, 1.0) / jnp.where(slower > 0, slower, 1.0)
    smooth = slower * jnp.where(faster > 0, (1 + ratio**p) ** (1 / p), 1.0)
    seconds = efficiency.launch_s + efficiency.item_s * work.items + smooth
    return jnp.where(slower > 0, seconds, 0.0)


def product(
    rows: ArrayLike,
    inner: ArrayLike,
    outer: ArrayLike,
    itemsize: int = 2,
    tile_rows: int = TILE_ROWS,
) -> Work:
    """`[rows, inner] @ [inner, outer]`, of which the second is read from memory."""
    rows, inner, outer = (jnp.asarray(x, jnp.float32) for x in (rows, inner, outer))
    padded = jnp.ceil(rows / tile_rows) * tile_rows
    num_bytes = itemsize * (inner * outer + rows * (inner + outer))
    return Work(
        flops=2 * padded * inner * outer,
        bytes=jnp.where(rows > 0, num_bytes, 0.0),
        items=jnp.zeros_like(rows),
    )


def elementwise(rows: ArrayLike, values: ArrayLike, itemsize: int = 2) -> Work:
    """A kernel that moves `values` numbers a row in all, read or written."""
    num_bytes = itemsize * jnp.asarray(rows, jnp.float32) * jnp.asarray(values, jnp.float32)
    return Work(jnp.zeros_like(num_bytes), num_bytes, jnp.zeros_like(num_bytes))


def attention(
    queries: ArrayLike,
    pairs: ArrayLike,
    context: ArrayLike,
    tiles: ArrayLike,
    *,
    num_heads: ArrayLike,
    num_kv_heads: ArrayLike,
    head_dim: ArrayLike,
    itemsize: int = 2,
) -> Work:
    """Attention of `queries` tokens over `context` tokens in memory, in `pairs` of both.

    The queries are in `tiles`, as `tiles_of` counts them; with many sequences all are sums.
    """
    queries, pairs, context = (jnp.asarray(x, jnp.float32) for x in (queries, pairs, context))
    num_heads, num_kv_heads, head_dim = (
        jnp.asarray(x, jnp.float32) for x in (num_heads, num_kv_heads, head_dim)
    )
    read = 2 * num_kv_heads * head_dim * context + 2 * num_heads * head_dim * queries
    return Work(
        flops=4 * num_heads * head_dim * pairs,
        bytes=itemsize * read,
        items=jnp.asarray(tiles, jnp.float32),
    )


def tiles_of(queries: ArrayLike) -> jax.Array:
    """Tiles of a sequence's queries, `f32`."""
    return jnp.ceil(jnp.asarray(queries, jnp.float32) / TILE_QUERIES)


def all_reduce(num_bytes: ArrayLike, num_devices: ArrayLike) -> Work:
    """A sum over devices of `num_bytes` that each has, and gets; a ring's bytes, none alone."""
    num_bytes, num_devices = (jnp.asarray(x, jnp.float32) for x in (num_bytes, num_devices))
    sent = 2 * (num_devices - 1) / num_devices * num_bytes
    return Work(jnp.zeros_like(sent), sent, jnp.broadcast_to(num_devices - 1, sent.shape))


def host_copy(num_bytes: ArrayLike, copies: ArrayLike) -> Work:
    """`copies` copies of `num_bytes` in all between the device and the host."""
    num_bytes = jnp.asarray(num_bytes, jnp.float32)
    copies = jnp.asarray(copies, jnp.float32)
    return Work(flops=jnp.zeros_like(num_bytes), bytes=num_bytes, items=copies)
