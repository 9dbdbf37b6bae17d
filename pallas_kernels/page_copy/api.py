"""The public call and its two plain implementations.

On a GPU, XLA's gather and scatter go by way of a copy of all pages that move, so that every byte
crosses the memory bus four times. The kernel for Hopper moves it twice.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

Implementation = Literal["reference", "xla", "mosaic_gpu"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)


def copy_pages(
    pages: jax.Array,
    sources: jax.Array,
    targets: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """`pages` with page sources[i] also at targets[i], for each i; in place where donated.

    Args:
      pages: [P, ...], a page being whatever follows the first axis.
      sources, targets: i32[N]. A pair with either outside [0, P) copies nothing. No target may
        be another pair's target or source: what such a page holds then is anybody's guess
        (`conflicts` counts them).
      implementation: one of `IMPLEMENTATIONS`; None is the kernel where the card is a Hopper and a
        page a multiple of 16 bytes, and "xla" elsewhere.

    Raises:
      ValueError: shapes, dtypes or the implementation's name do not fit.
      NotImplementedError: the implementation named cannot do it here.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"{implementation=} is unknown: give None or one of {IMPLEMENTATIONS}.")
    if pages.ndim < 2 or pages.size == 0:
        raise ValueError(f"{pages.shape=} must be [P, ...] and hold something.")
    if sources.ndim != 1 or sources.shape != targets.shape:
        raise ValueError(f"{sources.shape=} and {targets.shape=} must both be [N].")
    for name, array in (("sources", sources), ("targets", targets)):
        if array.dtype != jnp.int32:
            raise ValueError(f"{name}.dtype={array.dtype} must be int32: use .astype(jnp.int32).")
    implementation = implementation or _best_here(pages)
    if implementation == "mosaic_gpu":
        if not _is_hopper():
            raise NotImplementedError(
                f'"mosaic_gpu" needs an NVIDIA Hopper GPU, and JAX runs on '
                f'{jax.devices()[0].device_kind}: use implementation="xla".'
            )
        from pallas_kernels.page_copy import kernel_sm90

        return kernel_sm90.copy(pages, sources, targets)
    return {"reference": reference, "xla": xla}[implementation](pages, sources, targets)


def _is_hopper() -> bool:
    return getattr(jax.devices()[0], "compute_capability", None) == "9.0"


def _best_here(pages: jax.Array) -> str:
    page_bytes = pages.size // pages.shape[0] * pages.dtype.itemsize
    return "mosaic_gpu" if _is_hopper() and page_bytes % 16 == 0 else "xla"


def reference(pages: jax.Array, sources: jax.Array, targets: jax.Array) -> jax.Array:
    """The specification: pair after pair."""

    def copy(i, copied):
        live = is_live(sources[i], targets[i], pages.shape[0])
        source, target = jnp.where(live, sources[i], 0), jnp.where(live, targets[i], 0)
        page = jnp.where(live, pages[source], copied[target])
        return copied.at[target].set(page)

    return lax.fori_loop(0, sources.shape[0], copy, pages)


def xla(pages: jax.Array, sources: jax.Array, targets: jax.Array) -> jax.Array:
    """A gather and a scatter."""
    num_pages = pages.shape[0]
    targets = jnp.where(is_live(sources, targets, num_pages), targets, num_pages)
    found = pages.at[jnp.clip(sources, 0, num_pages - 1)].get(mode="promise_in_bounds")
    return pages.at[targets].set(found, mode="drop")


def is_live(sources, targets, num_pages: int):
    """Which pairs copy something."""
    inside = (sources >= 0) & (sources < num_pages)
    return inside & (targets >= 0) & (targets < num_pages)


def conflicts(sources: jax.Array, targets: jax.Array, num_pages: int) -> jax.Array:
    """Pages that are the target of two pairs, or of one and the source of one: `i32[]`."""
    live = is_live(sources, targets, num_pages)

    def count(index):
        index = jnp.where(live, index, num_pages)
        return jnp.zeros((num_pages,), jnp.int32).at[index].add(1, mode="drop")

    written, read = count(targets), count(sources)
    return jnp.sum((written > 1) | ((written > 0) & (read > 0)), dtype=jnp.int32)
