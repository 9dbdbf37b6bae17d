"""The kernels of a model, timed one by one on the device that JAX finds."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from jaxpage.config import ModelConfig, Prices
from jaxpage.paging import kv_pool
from jaxpage.paging.kv_pool import KvPool
from jaxpage.sim import kernels
from jaxpage.sim.kernels import Work
from pallas_kernels.common.timing import calls_per_dispatch, in_one_dispatch, time_calls
from pallas_kernels.paged_attention import paged_attention

LEAST_CALLS = 8


class Measured(NamedTuple):
    """One kernel, timed."""

    group: str
    kind: int
    tokens: int
    work: Work
    seconds: float


def seconds_of(call: Callable[..., jax.Array], inputs: dict, link: str, repeats: int) -> float:
    """Median seconds of a call, of many in one dispatch."""
    num_calls = calls_per_dispatch(1, LEAST_CALLS)
    return time_calls(in_one_dispatch(call, [inputs], num_calls, link), num_calls, repeats).median_s


def tile_rows() -> int:
    """Rows that a product computes at once, as far as this device's kernels are known."""
    return kernels.TILE_ROWS if jax.default_backend() == "gpu" else 1


def products(model: ModelConfig, tokens: int, dtype: jnp.dtype, repeats: int) -> Iterator[Measured]:
    """The four products of a layer."""
    E, F, D = model.embed_dim, model.mlp_dim, model.head_dim
    heads = model.num_heads
    sizes = {
        "attn_pre_proj": (E, (heads + 2 * model.num_kv_heads) * D),
        "attn_post_proj": (heads * D, E),
        "mlp_up_proj": (E, 2 * F),
        "mlp_down_proj": (F, E),
    }
    for name, (inner, outer) in sizes.items():
        inputs = {
            "x": jnp.ones((tokens, inner), dtype),
            "weights": jnp.full((inner, outer), 1 / inner, dtype),
        }
        seconds = seconds_of(lambda x, weights: x @ weights, inputs, "x", repeats)
        work = kernels.product(tokens, inner, outer, dtype.itemsize, tile_rows())
        yield Measured(f"{model.name} {name} {tokens}", kernels.LINEAR, tokens, work, seconds)


def elementwise(
    model: ModelConfig, tokens: int, dtype: jnp.dtype, repeats: int
) -> Iterator[Measured]:
    """Norm, rotation, activation and sum of a layer."""
    E, F, D = model.embed_dim, model.mlp_dim, model.head_dim
    heads = model.num_heads + model.num_kv_heads

    def norm(x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True))

    def rope(x: jax.Array) -> jax.Array:
        left, right = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([left - right, left + right], axis=-1)

    def activation(gate: jax.Array, x: jax.Array) -> jax.Array:
        return jax.nn.silu(gate) * x

    def ones(*shape: int) -> jax.Array:
        return jnp.ones(shape, dtype)

    cases = (
        (kernels.NORM, norm, {"x": ones(tokens, E)}, 2 * E),
        (kernels.ROPE, rope, {"x": ones(tokens, heads, D)}, 2 * heads * D),
        (kernels.ACTIVATION, activation, {"gate": ones(tokens, F), "x": ones(tokens, F)}, 3 * F),
        (kernels.ADD, lambda x, y: x + y, {"x": ones(tokens, E), "y": ones(tokens, E)}, 3 * E),
    )
    for kind, call, inputs, values in cases:
        seconds = seconds_of(call, inputs, "x", repeats)
        work = kernels.elementwise(tokens, values, dtype.itemsize)
        group = f"{model.name} {kernels.KINDS[kind]} {tokens}"
        yield Measured(group, kind, tokens, work, seconds)


def attention(
    model: ModelConfig,
    batch: int,
    queries: int,
    context: int,
    page_size: int,
    dtype: jnp.dtype,
    repeats: int,
) -> Measured:
    """Attention of one layer: `batch` sequences of `context` tokens, the last `queries` of each."""
    pages_a_row = -(-context // page_size)
    shape = (batch * pages_a_row, model.num_kv_heads, page_size, model.head_dim)
    table = jnp.arange(batch * pages_a_row, dtype=jnp.int32).reshape(batch, pages_a_row)
    inputs = {
        "q": jnp.ones((batch * queries, model.num_heads, model.head_dim), dtype),
        "k_pages": jnp.ones(shape, dtype),
        "v_pages": jnp.ones(shape, dtype),
        "lengths": jnp.full((batch,), context, jnp.int32),
        "page_indices": table,
    }
    if queries > 1:
        inputs["cu_q_lens"] = queries * jnp.arange(batch + 1, dtype=jnp.int32)
    seconds = seconds_of(attend, inputs, "q", repeats)
    seen = context - queries + (queries + 1) / 2  # on average
    work = kernels.attention(
        batch * queries,
        batch * queries * seen,
        batch * context,
        batch * kernels.tiles_of(queries),
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        itemsize=dtype.itemsize,
    )
    kind = kernels.PREFILL if queries > 1 else kernels.DECODE
    group = f"{model.name} {kernels.KINDS[kind]} {batch}x{queries} of {context}"
    return Measured(group, kind, batch * queries, work, seconds)


def attend(**inputs: Any) -> jax.Array:
    """Paged attention as this machine does it best."""
    return cast(jax.Array, paged_attention(**inputs))


def moves(
    model: ModelConfig, num_pages: int, page_size: int, dtype: jnp.dtype, repeats: int
) -> Measured:
    """Pages of all layers, to the host and back."""
    shape = (model.num_layers, num_pages, model.num_kv_heads, page_size, model.head_dim)

    def filled() -> KvPool:
        return KvPool(jnp.ones(shape, dtype), jnp.ones(shape, dtype))

    pages, count = jnp.arange(num_pages, dtype=jnp.int32), jnp.int32(num_pages)
    on_host = jax.device_put(filled(), jax.memory.Space.Host)

    @partial(jax.jit, donate_argnums=(0, 1))
    def there_and_back(pool, host):
        host = kv_pool.move_out(pool, host, pages, pages, count)
        host, pool = jax.lax.optimization_barrier((host, pool))
        return kv_pool.move_in(host, pool, pages, pages, count), host

    state = (filled(), on_host)

    def run():
        nonlocal state
        state = there_and_back(*state)
        return state

    copies = 2 * num_pages
    seconds = time_calls(run, copies, repeats).median_s * copies
    num_bytes = copies * kv_pool.page_bytes(model, page_size, dtype)
    work = kernels.host_copy(num_bytes, copies)
    return Measured(f"{model.name} {num_pages} pages", kernels.HOST_COPY, 0, work, seconds)


def measured_prices(model: ModelConfig, page_size: int, dtype: jnp.dtype) -> Prices:
    """What `--preemption=auto` weighs, timed on this machine in a second or two."""
    tokens = 256
    layer_s = sum(row.seconds for row in products(model, tokens, dtype, repeats=3))
    prompt = attention(model, 1, tokens, 1024, page_size, dtype, repeats=3)
    pairs = float(prompt.work.flops) / (4 * model.num_heads * model.head_dim)
    moved = moves(model, 8, page_size, dtype, repeats=3)
    return Prices(
        token_s=model.num_layers * layer_s / tokens,
        pair_s=model.num_layers * prompt.seconds / pairs,
        page_s=moved.seconds / float(moved.work.items),
    )
