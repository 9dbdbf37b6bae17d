"""The kernel for this machine's GPU, and whether it may be taken unasked."""

import functools
import importlib
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention import reference

# Module by compute capability, as CUDA writes it: one whole, or its first number.
KERNELS = {"9.0": "kernel_sm90", "8": "kernel_sm80"}
TOLERANCE = 2.0**-6  # of the check below; outputs there are means of values up to 4, in bfloat16


def card() -> Any:
    """The GPU, a `jax.Device`, that JAX runs on by default; None if it runs on something else."""
    return jax.devices()[0] if jax.default_backend() == "gpu" else None


def kernel_of_card() -> ModuleType:
    """The module whose `attend` this machine's GPU runs.

    Raises:
      NotImplementedError: JAX runs on no GPU, or on one that no kernel is for.
    """
    device = card()
    capability = str(getattr(device, "compute_capability", "unknown"))
    name = KERNELS.get(capability) or KERNELS.get(capability.partition(".")[0])
    if name is None:
        found = f"{device.device_kind} ({capability})" if device else jax.default_backend()
        raise NotImplementedError(
            f'"mosaic_gpu" needs an NVIDIA GPU of compute capability {" or ".join(KERNELS)}, and '
            f'JAX runs on {found}: use implementation="xla".'
        )
    return importlib.import_module(f"pallas_kernels.paged_attention.{name}")


def reason_against(q, k_pages, page_indices, *, is_ragged: bool) -> str | None:
    """Why a call with arrays of these shapes does not take the kernel unasked; None if it does."""
    try:
        kernel_of_card().check(q, k_pages, page_indices, is_ragged=is_ragged)
    except (NotImplementedError, ValueError) as error:
        return str(error)
    return fault_here()


@functools.cache
def fault_here() -> str | None:
    """What is wrong with the kernel on this very card, once a process; None if nothing is.

    A mixed step is computed by the kernel and by the reference, with NaN wherever neither may
    look. What compiles for a card and equals the reference under the interpreter may still fail
    on the card, a driver or a version that nobody has tried.
    """
    with ThreadPoolExecutor(1) as pool:  # the caller may be tracing; another thread is not
        try:
            error = pool.submit(_largest_error).result()
        except Exception as error:  # of a compiler, a driver or a card: of any class
            return f"it fails on this card: {type(error).__name__}: {str(error)[:300]}"
    if not error <= TOLERANCE:  # NaN is not
        return f"its largest error on this card is {error:.3g}, more than {TOLERANCE}"
    return None


def _largest_error() -> float:
    arguments = _mixed_step()
    options = {"sm_scale": 0.125, "soft_cap": None, "window": None}
    found, wanted = (
        jax.jit(functools.partial(attend, **options))(*arguments)[0]
        for attend in (kernel_of_card().attend, reference.attend)
    )
    return float(jnp.max(jnp.abs(found - wanted)))


def _mixed_step() -> tuple[jax.Array, ...]:
    """q, k_pages, v_pages, lengths, page_indices, cu_q_lens: rows of 5, 1 and 1 queries."""
    page_size, head_dim, num_pages = 16, 64, 8
    lengths = jnp.array([21, 1, 70], jnp.int32)
    page_indices = jnp.array([[6, 1, 99, 99, 99], [4, 99, 99, 99, 99], [3, 5, 0, 7, 2]], jnp.int32)
    used = jnp.zeros((num_pages, page_size), bool)
    for row, length in zip(page_indices, lengths, strict=True):
        token = jnp.arange(length)
        used = used.at[row[token // page_size], token % page_size].set(True)
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (7, 4, head_dim), jnp.bfloat16)
    k_pages, v_pages = (
        jnp.where(
            used[:, None, :, None],
            jax.random.normal(key, (num_pages, 2, page_size, head_dim), jnp.bfloat16),
            jnp.array(jnp.nan, jnp.bfloat16),
        )
        for key in keys[1:]
    )
    cu_q_lens = jnp.array([0, 5, 6, 7], jnp.int32)
    return q, k_pages, v_pages, lengths, page_indices, cu_q_lens
