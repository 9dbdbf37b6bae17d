"""Where does the time of a decode step go?

    python -m experiments.bench_step --dtype=float32 --num_slots=32

Fills all slots with ShareGPT prompts of the bench, decodes until every one generates, and
then times, on that very state, a whole step and each part of it alone: matrix products of the
layers, attention, the output head, sampling, the scheduler. About a minute. Parts are timed in
turn, round after round, so that a busy machine slows all alike; "rest" is what the parts leave of
the step: norms, rotary embedding, KV writes, packing.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import lax

from experiments import common
from jaxpage.checkpoint.load import LoadedModel
from jaxpage.config import require
from jaxpage.engine import step
from jaxpage.engine.host import Engine
from jaxpage.engine.loop import COMPILER_OPTIONS
from jaxpage.engine.request import Request
from jaxpage.model import llama, sampling
from jaxpage.paging import kv_pool
from jaxpage.scheduling.step import Outcome, commit_step, plan_step

FLAGS = flags.FLAGS

NEW_TOKENS = 96  # tokens generated before the step that is timed


def define_flags() -> None:
    common.define_model_flags()
    common.define_engine_flags(prefix_cache=False)
    flags.adopt_module_key_flags(common)
    common.define_workload_flag("as many ShareGPT prompts as there are slots")
    flags.DEFINE_integer("rounds", 10, "How often to time each part.", lower_bound=1)


def main(_: list[str]) -> None:
    model = common.load_flagged_model()
    requests = requests_for(model)
    config = common.config_for(model, requests)
    engine = common.build_engine(model, config)
    engine.compile()
    for row, request in enumerate(requests):
        engine.submit(request, (row,))
    while num_generated(engine) < NEW_TOKENS:
        engine.advance(8)
    parts = time_parts(build_parts(engine), FLAGS.rounds)
    common.print_last_line(report(parts) | common.provenance())


def requests_for(model: LoadedModel) -> list[Request]:
    """A request a slot, none of which ends while steps are timed."""
    given = common.workload_flagged()
    if given is None:
        return common.bench_requests(model, FLAGS.num_slots, 2 * NEW_TOKENS)
    require(
        len(given) >= FLAGS.num_slots,
        f"--workload has {len(given)} requests for --num_slots={FLAGS.num_slots}: give one a slot",
    )
    return [replace(r, max_new_tokens=2 * NEW_TOKENS) for r in given[: FLAGS.num_slots]]


def num_generated(engine: Engine) -> int:
    """Output tokens of the request that has fewest."""
    requests = engine.state.scheduler.requests
    return int(jnp.min(requests.num_tokens - requests.prompt_lens))


def build_parts(engine: Engine) -> dict[str, Callable[[], object]]:
    """Functions that run the next decode step, or one part of it alone."""
    setup, params = engine.setup, engine.params
    state = jax.tree.map(jnp.copy, engine.state)  # the engine donates its own
    scheduler, plan = jax.jit(partial(plan_step, config=setup.engine, allocator=setup.allocator,
                                      policy=setup.policy))(state.scheduler)  # fmt: skip
    bucket = min(size for size in setup.engine.token_buckets if size >= int(plan.num_tokens))
    pool, requests = state.pool, scheduler.requests
    batch = step.pack(plan, requests, bucket, pool.page_size, pool.num_pages)
    model = setup.model
    x = params["embed"][batch.tokens]
    q = jnp.zeros((bucket, model.num_heads, model.head_dim), x.dtype) + x[:, :1, None]
    nothing = Outcome(
        tokens=jnp.zeros_like(plan.counts),
        logprobs=jnp.zeros(plan.counts.shape, jnp.float32),
        failed=jnp.zeros_like(plan.samples),
    )

    def products(layers, x):
        def layer(index, x):
            qkv = llama.project_layer(x, layers["qkv"], index)
            attended = qkv[:, :, :-2]
            x = x + llama.project_layer(attended, layers["out"], index)
            gate_up = llama.project_layer(x, layers["gate_up"], index)
            return x + llama.project_layer(gate_up[:, 0] * gate_up[:, 1], layers["down"], index)

        return lax.fori_loop(0, model.num_layers, layer, x)

    def attention(q, pool):
        def layer(index, q):
            keys, values, pages = kv_pool.pages_of_layer(pool, index, batch.page_indices)
            return setup.attention(q, keys, values, batch.lengths, pages, cu_q_lens=batch.cu_q_lens)

        return lax.fori_loop(0, model.num_layers, layer, q)

    def schedule(scheduler):
        scheduler, plan = plan_step(scheduler, setup.engine, setup.allocator, setup.policy)
        return commit_step(scheduler, plan, nothing, setup.allocator, model.eos_ids)

    logits = jax.jit(llama.logits)(params, x)
    settings = jax.tree.map(lambda leaf: leaf[:bucket], requests.sampling)
    seen = requests.tokens[:bucket]
    sample = jax.jit(sampling.sample)

    def whole():
        engine.advance(1)  # donates its state, as in serving
        return engine.state.scheduler.step

    return {
        "step": whole,
        "products": partial(
            jax.jit(products, compiler_options=COMPILER_OPTIONS), params["layers"], x
        ),
        "attention": partial(jax.jit(attention), q, pool),
        "head": partial(jax.jit(llama.logits), params, x),
        "sampling": partial(sample, logits, settings, plan.lengths[:bucket], seen),
        "scheduler": partial(jax.jit(schedule), state.scheduler),
    }


def time_parts(parts: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each part, the parts taking turns."""
    samples: dict[str, list[float]] = {name: [] for name in parts}
    for index in range(rounds + 1):
        for name, part in parts.items():
            start_s = time.perf_counter()
            jax.block_until_ready(part())
            if index > 0:  # the first compiles
                samples[name].append(time.perf_counter() - start_s)
    return {name: float(np.median(times)) for name, times in samples.items()}


def report(parts: dict[str, float]) -> dict:
    """Milliseconds and shares of the step; the rest is what the parts do not explain."""
    whole = parts["step"]
    times = {name: seconds for name, seconds in parts.items() if name != "step"}
    times["rest"] = whole - sum(times.values())
    return {
        "step_ms": whole * 1e3,
        **{f"{name}_ms": seconds * 1e3 for name, seconds in times.items()},
        **{f"{name}_share": seconds / whole for name, seconds in times.items()},
    }


if __name__ == "__main__":
    define_flags()
    common.run(main)
