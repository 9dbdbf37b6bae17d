"""Parameters in the form in which this machine computes fastest; the values stay the same."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxpage.model.llama import LayersApart
from jaxpage.model.params import INPUT_AXES, Params

_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86 twice, Arm


def product_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype to multiply in for parameters rounded to `dtype`.

    A CPU without bfloat16 instructions multiplies float32 copies of bfloat16 weights
    faster than the weights themselves, and no less exactly.
    """
    dtype = np.dtype(dtype)
    if dtype == jnp.bfloat16 and jax.default_backend() == "cpu" and not cpu_has_bfloat16():
        return np.dtype(np.float32)
    return dtype


def cpu_has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor multiplies bfloat16 in hardware, as far as the system says."""
    if not cpuinfo.exists():
        return False
    for line in cpuinfo.read_text().splitlines():
        name, _, flags = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return bool(_BFLOAT16_FLAGS & set(flags.split()))
    return False


def serving_params(params: Params, dtype: DTypeLike) -> Params:
    """Parameters rounded to `dtype` in the form that serves fastest; empties `params`.

    On a CPU products are of `product_dtype`, and the matrices of the layers come apart (see
    `llama.project_layer`). Those of float32 are transposed: XLA's products of few rows take 13 to
    17 % less time so. In bfloat16 they would take 5 to 9 % more.
    """
    if jax.default_backend() != "cpu":
        return params
    target = product_dtype(dtype)

    def ready(leaf: jax.Array) -> jax.Array:
        return jax.block_until_ready(leaf.astype(target))

    def apart(leaf: jax.Array, axes: tuple[int, ...]) -> Iterator[jax.Array]:
        # By NumPy: XLA would compile a program for each shape, which takes longer than the copies.
        for matrix in np.asarray(leaf):
            yield jax.device_put(np.ascontiguousarray(matrix.transpose(axes)), leaf.sharding)

    is_transposed = target == np.float32

    def placed(name: str, leaf: jax.Array) -> jax.Array | LayersApart:
        if name not in INPUT_AXES:
            return ready(leaf)
        axes = tuple(range(leaf.ndim - 1))
        if is_transposed:
            axes = axes[-INPUT_AXES[name] :] + axes[: -INPUT_AXES[name]]
        return LayersApart(tuple(apart(ready(leaf), axes)), is_transposed)

    layers, stacked = {}, params.pop("layers")
    while stacked:  # leaf by leaf, so that two copies of the whole are never held
        name, leaf = stacked.popitem()
        layers[name] = placed(name, leaf)
    return {"layers": layers, **{name: ready(params.pop(name)) for name in tuple(params)}}
