"""The kernel for this machine's GPU, and whether it may be taken unasked."""

import functools
import importlib
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention import reference
from pallas_kernels.paged_attention.config import QUANTISED

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
    kernel = kernel_of(capability)
    if kernel is None:
        found = f"{device.device_kind} ({capability})" if device else jax.default_backend()
        raise NotImplementedError(
            f'"mosaic_gpu" needs an NVIDIA GPU of compute capability {" or ".join(KERNELS)}, and '
            f'JAX runs on {found}: use implementation="xla".'
        )
    return kernel


def kernel_of(capability: str) -> ModuleType | None:
    """The module for cards of a compute capability, as "9.0"; None if there is none."""
    name = KERNELS.get(capability) or KERNELS.get(capability.partition(".")[0])
    return importlib.import_module(f"pallas_kernels.paged_attention.{name}") if name else None


def reason_against(q, k_pages, page_indices, *, is_ragged: bool) -> str | None:
    """Why a call with arrays of these shapes does not take the kernel unasked; None if it does."""
    try:
        kernel = kernel_of_card()
        kernel.check(q, k_pages, page_indices, is_ragged=is_ragged)
    except (NotImplementedError, ValueError) as error:
        return str(error)
    group = q.shape[1] // k_pages.shape[1]
    page_size, head_dim = k_pages.shape[2:]
    split = kernel.tile_of(q, k_pages).split_tokens
    call = Call(q.dtype.name, k_pages.dtype.name, group, page_size, head_dim, is_ragged, split)
    return fault_here(call)


class Call(NamedTuple):
    """Calls for which a kernel is checked together: they run the same code."""

    q_dtype: str
    pages_dtype: str
    group: int  # query heads to a KV head, G
    page_size: int
    head_dim: int
    is_ragged: bool
    split_tokens: int  # of the kernel's tile


@functools.cache
def fault_here(call: Call) -> str | None:
    """What is wrong with the kernel on this very card, once a process; None if nothing is.

    A small step is computed by the kernel and by the reference, with NaN wherever neither may
    look. What compiles for a card and equals the reference under the interpreter may still fail
    on the card, a driver or a version that nobody has tried.
    """
    with ThreadPoolExecutor(1) as pool:  # the caller may be tracing; another thread is not
        try:
            error = pool.submit(_largest_error, call).result()
        except Exception as error:  # of a compiler, a driver or a card: of any class
            return f"it fails on this card: {type(error).__name__}: {str(error)[:300]}"
    if not error <= TOLERANCE:  # NaN is not
        return f"its largest error on this card is {error:.3g}, more than {TOLERANCE}"
    return None


def _largest_error(call: Call) -> float:
    arguments = _step_of(call)
    options = {"sm_scale": call.head_dim**-0.5, "soft_cap": None, "window": None}
    lens = jnp.arange(arguments["q"].shape[0] + 1, dtype=jnp.int32)
    wanted = reference.attend(**{"cu_q_lens": lens} | arguments, **options)[0]
    decode = {} if call.is_ragged else {"cu_q_lens": None}
    kernel = functools.partial(kernel_of_card().attend, **decode, **options)
    return float(jnp.max(jnp.abs(jax.jit(kernel)(**arguments)[0] - wanted)))


def _step_of(call: Call) -> dict[str, jax.Array]:
    """Rows of 5, 1 and 1 queries, or of one each, in shuffled pages; the table's rest is wild.

    One is longer than a split, and with it the ring in shared memory is filled more than once.
    """
    long = call.split_tokens + 6
    lengths = np.array([21, 1, long] if call.is_ragged else [21, 1, long, 5, 33], np.int32)
    num_live = -(-lengths // call.page_size)
    rng = np.random.default_rng(0)
    order = rng.permutation(num_live.sum() + 1).astype(np.int32)
    table = np.full((len(lengths), num_live.max() + 1), 99_999, np.int32)
    table[np.arange(table.shape[1]) < num_live[:, None]] = order[: num_live.sum()]
    used = np.zeros((len(order), call.page_size), bool)
    for row, length in zip(table, lengths, strict=True):
        token = np.arange(length)
        used[row[token // call.page_size], token % call.page_size] = True

    num_kv_heads, dtype = 2, jnp.dtype(call.pages_dtype)
    size = 30 if dtype == jnp.int8 else 1  # what a standard deviation is in the pages
    q_shape = (7 if call.is_ragged else len(lengths), num_kv_heads * call.group, call.head_dim)
    step = {
        "q": jnp.asarray(rng.standard_normal(q_shape), call.q_dtype),
        "lengths": jnp.asarray(lengths),
        "page_indices": jnp.asarray(table),
    }
    for name in ("k_pages", "v_pages"):
        drawn = rng.standard_normal((len(order), num_kv_heads, call.page_size, call.head_dim))
        drawn = np.clip(size * drawn, -127, 127)
        dead = 127 if dtype == jnp.int8 else np.nan  # int8 has no NaN
        step[name] = jnp.asarray(np.where(used[:, None, :, None], drawn, dead), dtype)
    if call.pages_dtype in QUANTISED:
        for name in ("k_scales", "v_scales"):  # no two alike, so that none can stand for another
            drawn = rng.uniform(0.5, 1.0, (len(order), num_kv_heads)) / size
            scales = np.where(used.any(axis=1)[:, None], drawn, np.nan)
            step[name] = jnp.asarray(scales, jnp.float32)
    if call.is_ragged:
        step["cu_q_lens"] = jnp.array([0, 5, 6, 7], jnp.int32)
    return step
