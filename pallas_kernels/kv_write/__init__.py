"""Writing new keys and values into pages: one scatter, in place where the pages are donated.

There is no kernel for it, for want of a need: compiled for H100, XLA's scatter has no temporaries,
and a rotary embedding of the keys before it becomes part of it (`tests/test_kv_write.py`). It moves
what it must: new values once in, once out.
"""

import jax
import jax.numpy as jnp


def write_kv(
    k_pages: jax.Array,
    v_pages: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    pages: jax.Array,
    offsets: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Puts each token's keys and values into its slot, rounded to the pages' dtype.

    Args:
      k_pages, v_pages: [P, K, S, D].
      keys, values: [T, K, D].
      pages: i32[T], the page of each token. One outside [0, P) is written nowhere.
      offsets: i32[T], its slot in the page, in [0, S). No two tokens may have the same slot.

    Raises:
      ValueError: shapes or dtypes do not fit.
    """
    _check(k_pages, v_pages, keys, values, pages, offsets)
    num_pages = k_pages.shape[0]
    index = jnp.where((pages >= 0) & (pages < num_pages), pages, num_pages)
    if index.shape == (1,):
        # XLA turns a scatter of one into a slice update that copies the pages; of two, it does not.
        index = jnp.concatenate([index, jnp.full((1,), num_pages, index.dtype)])
        offsets, keys, values = (jnp.repeat(x, 2, axis=0) for x in (offsets, keys, values))

    def scatter(held: jax.Array, new: jax.Array) -> jax.Array:
        return held.at[index, :, offsets].set(new.astype(held.dtype), mode="drop")

    return scatter(k_pages, keys), scatter(v_pages, values)


def _check(k_pages, v_pages, keys, values, pages, offsets) -> None:
    if k_pages.ndim != 4 or k_pages.shape != v_pages.shape:
        raise ValueError(f"{k_pages.shape=} and {v_pages.shape=} must both be [P, K, S, D].")
    _, num_heads, _, head_dim = k_pages.shape
    shape = (pages.shape[0], num_heads, head_dim) if pages.ndim == 1 else None
    if keys.shape != shape or values.shape != shape or offsets.shape != pages.shape:
        raise ValueError(
            f"{keys.shape=} and {values.shape=} must be [T, K={num_heads}, D={head_dim}], with "
            f"{pages.shape=} and {offsets.shape=} both [T]."
        )
    for name, array in (("pages", pages), ("offsets", offsets)):
        if array.dtype != jnp.int32:
            raise ValueError(f"{name}.dtype={array.dtype} must be int32: use .astype(jnp.int32).")
