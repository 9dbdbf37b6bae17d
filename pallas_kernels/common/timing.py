"""Times on a GPU: many calls in one dispatch, medians over repeats, and the card's own copy."""

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

WARM_UPS = 3


class Times(NamedTuple):
    """Seconds that one call takes, over repeats."""

    median_s: float
    p10_s: float
    p90_s: float


def in_one_dispatch(
    call: Callable[..., jax.Array], inputs: Sequence[Mapping[str, jax.Array]], num_calls: int,
    link: str,
) -> Callable[[], list[jax.Array]]:  # fmt: skip
    """One program that calls `call(**inputs[i % len(inputs)])` for i in range(num_calls), in order.

    A call of some microseconds takes less time than its dispatch: one by one, the dispatch would
    be timed. Each call waits for the result of the one before, by way of its input `link`, so that
    XLA neither runs two at once nor drops one that it has seen before.
    """
    call = jax.jit(call)  # traced and lowered once for all

    def program(inputs):
        outs = []
        for i in range(num_calls):
            arguments = dict(inputs[i % len(inputs)])
            if outs:
                linked = (arguments[link], outs[-1])
                arguments[link], outs[-1] = lax.optimization_barrier(linked)
            outs.append(call(**arguments))
        return outs

    compiled = jax.jit(program).lower(list(inputs)).compile()
    return partial(compiled, list(inputs))


def calls_per_dispatch(num_inputs: int, least: int) -> int:
    """Calls such that every input comes up equally often."""
    return -(-least // num_inputs) * num_inputs


def time_calls(run: Callable[[], Any], num_calls: int, repeats: int) -> Times:
    """Times of one of the `num_calls` calls in `run()`; a repeat is one `run()` to its end."""
    for _ in range(WARM_UPS):
        jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append((time.perf_counter() - start_s) / num_calls)
    return times_of(seconds)


def times_of(seconds: Sequence[float]) -> Times:
    """Median and 10th and 90th percentile."""
    p10_s, median_s, p90_s = (float(x) for x in np.percentile(seconds, (10, 50, 90)))
    return Times(median_s, p10_s, p90_s)


def copy_bytes_per_s(num_bytes: int, repeats: int) -> float:
    """Bytes read and written a second while the device copies `num_bytes` within its memory."""
    source = jax.random.bits(jax.random.key(0), (num_bytes // 4,), jnp.uint32)
    copy = jax.jit(jnp.copy)
    return 2 * source.nbytes / time_calls(lambda: copy(source), 1, repeats).median_s


def dispatch_s(repeats: int) -> float:
    """Seconds from the dispatch of a program that does next to nothing to its end."""
    one, add = jnp.float32(1), jax.jit(lambda x: x + x)
    return time_calls(lambda: add(one), 1, repeats).median_s


def one_line(error: Exception) -> str:
    """The start of an error's message."""
    return " ".join(str(error).split())[:300]


def missing_gpu() -> str | None:
    """What is needed and what was found instead of a GPU; None if there is one."""
    needed = "this needs an NVIDIA GPU and JAX with CUDA (pip install 'jax[cuda12]')"
    try:
        device = jax.devices()[0]
    except RuntimeError as error:
        return f"{needed}, and JAX found none: {one_line(error)}"
    if device.platform == "gpu":
        return None
    return f"{needed}, and JAX runs on {device.platform} ({device.device_kind})"


def provenance() -> dict[str, Any]:
    """Where a time came from: commit, device and jax."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    device = jax.devices()[0].device_kind
    return {"commit": commit or None, "device": device, "jax": jax.__version__}
