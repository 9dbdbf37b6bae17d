"""The pool of KV pages of all layers, and the only code here that knows its layout.

Layout `[L, P, K, S, D]`, keys and values apart: a page of a layer is contiguous, a (page, head)
tile is one box, and the KV-head axis shards. Kernels see layer `l` as pages `l * P` and up of one
flat array, so that no layer is ever cut out of the pool, which would copy it.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
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
    shape = (
        model.num_layers,
        config.num_pages,
        model.num_kv_heads,
        config.page_size,
        model.head_dim,
    )
    return KvPool(keys=jnp.zeros(shape, dtype), values=jnp.zeros(shape, dtype))


def num_pages_in(kv_bytes: int, model: ModelConfig, page_size: int, dtype: DTypeLike) -> int:
    """Pages that `kv_bytes` bytes hold, over all layers."""
    return kv_bytes // (model.kv_bytes_per_token(dtype) * page_size)


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


def pages_of_layer(
    pool: KvPool, layer: jax.Array | int, page_indices: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The pool as one list of pages, `[L * P, K, S, D]` twice, and a layer's indices into it."""
    flat = (-1, *pool.keys.shape[2:])
    indices = page_indices + layer * pool.num_pages
    return pool.keys.reshape(flat), pool.values.reshape(flat), indices
