"""One program on many devices: layers divided along `model`, replicas along `data`."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from test_golden import LONGEST, check
from test_golden import REQUESTS as GOLDEN_REQUESTS
from tiny_engine import CONFIG, REQUESTS, TINY, outputs, setup_of

from jaxpage.checkpoint.load import load_model
from jaxpage.config import ConfigError, EngineConfig, ModelConfig
from jaxpage.engine import footprint
from jaxpage.engine.host import Engine
from jaxpage.engine.request import Result
from jaxpage.model import llama, sharding
from jaxpage.model.llama import Batch
from jaxpage.model.params import Params, init_params
from jaxpage.paging import kv_pool
from pallas_kernels.paged_attention import paged_attention

# Two KV heads, so that four or eight devices share them.
MODEL = replace(TINY, num_heads=16, embed_dim=64)
MESHES = ["data:1,model:8", "data:2,model:4", "data:4,model:2", "data:8,model:1"]


@cache
def params_of(model: ModelConfig) -> Params:
    return init_params(model, jax.random.key(3), jnp.float32)


def engine_on(mesh_text, config=CONFIG, model=MODEL, allocator="lru") -> Engine:
    params = params_of(model)
    if mesh_text is None:
        return Engine(params, setup_of(config, model, allocator), jnp.float32)
    mesh = sharding.make_mesh(mesh_text)
    divisible, params = sharding.divide(model, params, mesh)
    setup = replace(setup_of(config, divisible, allocator), mesh=mesh)
    return Engine(params, setup, jnp.float32)


def held_by_each(leaf: jax.Array) -> dict[int, list[np.ndarray]]:
    """What the devices of each replica hold of an array, by replica."""
    held: dict[int, list[np.ndarray]] = {}
    for shard in leaf.addressable_shards:
        held.setdefault(shard.index[0].start or 0, []).append(np.array(shard.data))
    return held


def rounding_of(result: Result) -> np.ndarray:
    """The deviations that rounding gives the log probabilities of an output; see `rounding`."""
    tokens = [*result.request.prompt_ids, *result.output_ids]
    padded = jnp.array(tokens + [0] * (CONFIG.max_seq_len - len(tokens)), jnp.int32)
    found = np.asarray(rounding.deviations(params_of(MODEL), padded, model=MODEL))
    return found[len(result.request.prompt_ids) - 1 : len(tokens) - 1]


@pytest.mark.in_ci("data:2,model:4")
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_prints_what_one_device_prints(mesh):
    expected, _ = engine_on(None).serve(REQUESTS)
    engine = engine_on(mesh)
    results, journal = engine.serve(REQUESTS)
    assert outputs(results) == outputs(expected)
    # Of some fifty differences of two computations none is beyond five deviations by chance.
    for result, other in zip(results, expected, strict=True):
        apart = np.subtract(result.logprobs, other.logprobs)
        assert np.all(np.abs(apart) <= 5 * 2**0.5 * rounding_of(other))
    num_replicas = int(mesh[len("data:")])
    assert engine.state.log.count.shape == (num_replicas,)
    num_busy = min(num_replicas, len(REQUESTS))
    assert [record["step"] for record in journal.records].count(0) == num_busy
    leaves = jax.tree.leaves((engine.state.scheduler, engine.state.log))
    for leaf in (leaf for leaf in leaves if leaf.size > 0):  # of none JAX says that all have it
        for copies in held_by_each(leaf).values():
            assert len(copies) == 8 // num_replicas
            for copy in copies[1:]:
                np.testing.assert_array_equal(copy, copies[0])
    violations = jax.vmap(engine.setup.allocator.violations)(engine.state.scheduler.table)
    assert not np.any(violations)


def test_a_layer_needs_two_collectives_and_the_pool_is_not_copied():
    # Layers enough that a page's KV is far larger than what the scheduler knows of it.
    config = replace(CONFIG, num_pages=32 * CONFIG.num_pages)
    engine = engine_on("data:2,model:4", config, replace(MODEL, num_layers=16), "paged")
    found = footprint.measure(engine.setup, jnp.float32, jnp.float32)
    assert found.collectives_per_layer == 2
    known = found.weights + found.kv + found.scheduler
    assert abs(known - found.arguments) <= 0.01 * found.arguments
    assert found.weights == footprint.device_bytes(engine.params)
    assert found.kv == footprint.device_bytes(engine.state.pool)
    assert found.temporaries < 0.1 * found.kv


@pytest.mark.parametrize("copies", [1, 2, 4])
def test_shared_kv_heads_change_no_state(copies):
    params = params_of(MODEL)
    divisible = sharding.divisible_model(MODEL, MODEL.num_kv_heads * copies)
    assert divisible.num_kv_heads == MODEL.num_kv_heads * copies
    repeated = sharding.repeat_kv_heads(params, MODEL, divisible)
    tokens = jnp.array([5, 9, 7, 1, 88], jnp.int32)
    states = []
    for model, weights in ((MODEL, params), (divisible, repeated)):
        pool = kv_pool.create(model, CONFIG, jnp.float32)
        batch = Batch(
            tokens=tokens,
            positions=jnp.arange(5, dtype=jnp.int32),
            pages=jnp.array([3, 3, 3, 3, 1], jnp.int32),
            offsets=jnp.array([0, 1, 2, 3, 0], jnp.int32),
            cu_q_lens=jnp.array([0, 5], jnp.int32),
            lengths=jnp.array([5], jnp.int32),
            page_indices=jnp.array([[3, 1]], jnp.int32),
        )
        states.append(llama.forward(weights, pool, batch, model, paged_attention)[0])
    np.testing.assert_allclose(states[0], states[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model", "'model' must be data:N or model:N"),
        ("model:0", "'model:0' must be"),
        ("model:2,model:4", "each once"),
        ("tensor:4", "'tensor:4' must be"),
        ("data:3,model:4", "needs 12 devices, and there are 8"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_with_the_remedy(text, message):
    with pytest.raises(ConfigError, match=message):
        sharding.make_mesh(text)


@pytest.mark.parametrize(
    ("num_devices", "what"), [(3, "KV heads, MLP dim, vocabulary"), (32, "query heads"), (6, "MLP")]
)
def test_a_model_that_cannot_be_divided_is_refused_with_its_sizes(num_devices, what):
    with pytest.raises(ConfigError, match=f"divide .*{what}.* of tiny .KV heads 2, query heads 16"):
        sharding.divisible_model(MODEL, num_devices)


def test_moves_to_the_host_are_refused_on_a_mesh():
    config = replace(CONFIG, preemption="fine", host_pages=8)
    with pytest.raises(ConfigError, match=r"host_pages=8.*preemption=recompute"):
        engine_on("model:2", config)


def test_a_page_map_of_several_replicas_is_refused():
    with pytest.raises(ConfigError, match=r"record_page_map on 2 replicas.*data:1"):
        engine_on("data:2", replace(CONFIG, record_page_map=True))


@pytest.mark.slow
def test_the_real_model_on_a_mesh_prints_the_references_tokens():
    mesh = sharding.make_mesh("data:2,model:3")
    shardings = partial(sharding.stored_shardings, mesh=mesh)
    model = load_model("smollm2-135m", jnp.float32, shardings=shardings)
    config, params = sharding.divide(model.config, model.params, mesh)
    small = EngineConfig(
        num_slots=4,
        num_pages=40,
        page_size=8,
        pages_per_slot=-(-LONGEST // 8),
        num_requests=8,
        token_buckets=(4, 96),
    )
    setup = replace(setup_of(small, config, "lru"), mesh=mesh)
    check(Engine(params, setup, jnp.float32).serve(GOLDEN_REQUESTS)[0])
