"""The pool of KV pages of all layers, and the only code here that knows its layout.

Layout `[L, P, K, S, D]`, keys and values apart: a page of a layer is contiguous, a (page, head)
tile is one box, and the KV-head axis shards. Kernels see layer `l` as pages `l * P` and up of one
flat array, so that no layer is ever cut out of the pool, which would copy it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import SingleDeviceSharding
from jax.typing import DTypeLike

from jaxpage.config import EngineConfig, ModelConfig
from pallas_kernels.kv_write import write_kv


class KvPool(struct.PyTreeNode):
    """Keys and values of every page; a page means the same tokens in every layer."""

    keys: jax.Array  # [L, P, K, S, D]
    values: jax.Array  # [L, P, K, S, D]

    @property
    def num_pages(self) -> int:
        """Pages of one layer, `P`."""
        return self.keys.shape[1]

    @property
    def page_size(self) -> int:
        """Tokens a page, `S`."""
        return self.keys.shape[3]


def create(model: ModelConfig, config: EngineConfig, dtype: DTypeLike) -> KvPool:
    """A pool of zeros."""
    shape = _shape(model, config, config.num_pages)
    return KvPool(keys=jnp.zeros(shape, dtype), values=jnp.zeros(shape, dtype))


def create_on_host(
    model: ModelConfig, config: EngineConfig, dtype: DTypeLike, device: Any = None
) -> KvPool:
    """The pages of the host tier, zeros, in memory that `device` reaches (pinned, for a GPU)."""
    space = jax.memory.Space.Host
    if device is not None:
        space = SingleDeviceSharding(device, memory_kind="pinned_host")
    # From numpy, so that it never passes through the device's memory.
    zeros = np.zeros(_shape(model, config, config.host_pages), dtype)
    return KvPool(keys=jax.device_put(zeros, space), values=jax.device_put(zeros, space))


def _shape(model: ModelConfig, config: EngineConfig, num_pages: int) -> tuple[int, ...]:
    return (model.num_layers, num_pages, model.num_kv_heads, config.page_size, model.head_dim)


def num_pages_in(kv_bytes: int, model: ModelConfig, page_size: int, dtype: DTypeLike) -> int:
    """Pages that `kv_bytes` bytes hold, over all layers."""
    return kv_bytes // page_bytes(model, page_size, dtype)


def page_bytes(model: ModelConfig, page_size: int, dtype: DTypeLike) -> int:
    """Bytes of a page, over all layers."""
    return model.kv_bytes_per_token(dtype) * page_size


def write(
    pool: KvPool,
    layer: jax.Array | int,
    keys: jax.Array,
    values: jax.Array,
    pages: jax.Array,
    offsets: jax.Array,
) -> KvPool:
    """Writes tokens' `keys, values: [T, K, D]` of a layer to slots `offsets: i32[T]` of `pages`.

    A token whose page is not below `P` is written nowhere.
    """
    nowhere = pool.keys.shape[0] * pool.num_pages
    index = jnp.where(pages < pool.num_pages, pages + layer * pool.num_pages, nowhere)
    flat = (-1, *pool.keys.shape[2:])
    written = write_kv(
        pool.keys.reshape(flat), pool.values.reshape(flat), keys, values, index, offsets
    )
    return KvPool(*(pages.reshape(pool.keys.shape) for pages in written))


def copy_pages(pool: KvPool, sources: jax.Array, targets: jax.Array, count: jax.Array) -> KvPool:
    """Copies page `sources[i]` to page `targets[i]`, `i32[n]` each, in all layers, for `i < count`.

    One after the other, in place: a page may be read, and then be written by a later copy.
    """

    def copy(turn, pool):
        def move(pages):
            page = lax.dynamic_slice_in_dim(pages, sources[turn], 1, axis=1)
            return lax.dynamic_update_slice_in_dim(pages, page, targets[turn], axis=1)

        return jax.tree.map(move, pool)

    return lax.fori_loop(0, count, copy, pool)


def move_out(
    pool: KvPool, host: KvPool, sources: jax.Array, targets: jax.Array, count: jax.Array
) -> KvPool:
    """`host`, with pages `sources[i]` of the pool in its pages `targets[i]` for `i < count`."""
    return _move_pages(pool, host, sources, targets, count, jax.memory.Space.Host)


def move_in(
    host: KvPool, pool: KvPool, sources: jax.Array, targets: jax.Array, count: jax.Array
) -> KvPool:
    """`pool`, with pages `sources[i]` of the host in its pages `targets[i]` for `i < count`.

    In a step this comes after `move_out`: the other way round XLA copies the pool.
    """
    return _move_pages(host, pool, sources, targets, count, jax.memory.Space.Device)


def gather(pool: KvPool, host: KvPool, places: jax.Array) -> KvPool:
    """Copies of the pages at `places: i32[n]`, of the pool below `P` and of the host from there on.

    Zeros where there is no such place. The work follows the pages that there are.
    """
    shape = (pool.keys.shape[0], places.shape[0], *pool.keys.shape[2:])
    copies = KvPool(*(jnp.zeros(shape, pages.dtype) for pages in (pool.keys, pool.values)))
    start = 0
    for source in (pool, host) if host.num_pages > 0 else (pool,):
        is_there = (places >= start) & (places < start + source.num_pages)
        order = jnp.argsort(~is_there, stable=True).astype(jnp.int32)
        count = jnp.sum(is_there, dtype=jnp.int32)
        sources = places[order] - start
        copies = _move_pages(source, copies, sources, order, count, jax.memory.Space.Device)
        start += source.num_pages
    return copies


def fill(pool: KvPool, pages: KvPool, targets: jax.Array, count: jax.Array) -> KvPool:
    """`pool`, with page `i` of `pages` in its page `targets[i]`, `i32[n]`, for `i < count`."""
    sources = jnp.arange(targets.shape[0], dtype=jnp.int32)
    return _move_pages(pages, pool, sources, targets, count, jax.memory.Space.Device)


def wipe(pool: KvPool, pages: jax.Array, count: jax.Array) -> KvPool:
    """`pool`, with zeros in its `pages[i]`, `i32[n]`, for `i < count`."""
    return _wipe(pool, pages, count, jax.memory.Space.Device)


def wipe_on_host(host: KvPool, pages: jax.Array, count: jax.Array) -> KvPool:
    """`wipe`, of pages of the host."""
    return _wipe(host, pages, count, jax.memory.Space.Host)


def _wipe(pool: KvPool, pages: jax.Array, count: jax.Array, space: Any) -> KvPool:
    shape = (pool.keys.shape[0], 1, *pool.keys.shape[2:])
    zeros = KvPool(*(jnp.zeros(shape, pages.dtype) for pages in (pool.keys, pool.values)))
    return _move_pages(zeros, pool, jnp.zeros_like(pages), pages, count, space)


def _move_pages(
    source: KvPool,
    target: KvPool,
    sources: jax.Array,
    targets: jax.Array,
    count: jax.Array,
    space: Any,
) -> KvPool:
    # One page by one scalar index: anything more XLA computes on the host, on a copy of its pool.
    def move(turn, target):
        def put(pages, target_pages):
            page = lax.dynamic_slice_in_dim(pages, sources[turn], 1, axis=1)
            page = jax.device_put(page, space)
            return lax.dynamic_update_slice_in_dim(target_pages, page, targets[turn], axis=1)

        return jax.tree.map(put, source, target)

    return lax.fori_loop(0, count, move, target)


def pages_of_layer(
    pool: KvPool, layer: jax.Array | int, page_indices: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The pool as one list of pages, `[L * P, K, S, D]` twice, and a layer's indices into it."""
    flat = (-1, *pool.keys.shape[2:])
    indices = page_indices + layer * pool.num_pages
    return pool.keys.reshape(flat), pool.values.reshape(flat), indices
