"""A tiny model in a small engine, and requests for it."""

import jax
import jax.numpy as jnp

from jaxpage.config import EngineConfig, ModelConfig
from jaxpage.engine.host import Engine
from jaxpage.engine.request import Request
from jaxpage.engine.step import Setup
from jaxpage.model.params import init_params
from jaxpage.model.placement import serving_params
from jaxpage.model.presets import PRESETS
from jaxpage.paging.allocator import ALLOCATORS, CACHED
from jaxpage.scheduling.policies import POLICIES
from pallas_kernels.paged_attention import paged_attention

TINY = PRESETS["tiny"]
CONFIG = EngineConfig(
    num_slots=4,
    num_pages=24,
    page_size=4,
    pages_per_slot=12,
    num_requests=8,
    token_buckets=(4, 16),
)
PROMPTS = [tuple(range(1, 4 + 3 * i)) for i in range(6)]
REQUESTS = [Request(str(i), ids, 9, ignore_eos=True) for i, ids in enumerate(PROMPTS)]


def setup_of(
    config: EngineConfig = CONFIG, model: ModelConfig = TINY, allocator="paged", policy="fcfs"
) -> Setup:
    return Setup(model, config, (ALLOCATORS | CACHED)[allocator], POLICIES[policy], paged_attention)


def params_of(model: ModelConfig = TINY, dtype=jnp.float32):
    return serving_params(init_params(model, jax.random.key(3), jnp.float32), dtype)


def build(setup: Setup | None = None, params=None, kv_dtype=jnp.float32) -> Engine:
    setup = setup or setup_of()
    return Engine(params if params is not None else params_of(setup.model), setup, kv_dtype)


def outputs(results) -> list[list[int]]:
    return [result.output_ids for result in results]
