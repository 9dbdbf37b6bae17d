"""What does the scheduler cost alone, without a model, as slots and the pool grow?

    python -m experiments.bench_scheduler

One JSON row a size: microseconds a step of `plan_step` + `commit_step`, in the compiled loop, while
sequences arrive, run and end under a fake executor. A call of the loop has a price of its own,
whatever it runs: a call of no steps before each chunk tells it, as `call_us`, and it is not in
`step_us`. Half a minute to two. Expected: growth about linear in slots, none with the pool ten
times larger; less than a tenth of a millisecond at 256 slots.
It would be refuted by a step that scans the pool. With --beside_bare --eviction=lru
--preemption=fine --max_beams=4, so with all features on, the ratio should be at most 2.
"""

import itertools
import json
import time
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import lax

from experiments import common
from jaxpage.config import PREEMPTION_MODES, EngineConfig, require
from jaxpage.paging.allocator import ALLOCATORS, CACHED, Allocator
from jaxpage.paging.prefix_cache import PrefixCache
from jaxpage.scheduling import state as scheduler_state
from jaxpage.scheduling.beams import Candidates, num_candidates
from jaxpage.scheduling.one_thread import ON_ONE_THREAD
from jaxpage.scheduling.policies import POLICIES, PolicyFn
from jaxpage.scheduling.state import WAITING, Requests, SchedulerState
from jaxpage.scheduling.step import Outcome, commit_step, plan_step

FLAGS = flags.FLAGS

PAGE_SIZE = 16
PAGES_PER_SLOT = 64
PAGES_A_SLOT_HOLDS = 24  # on average, so that the pool is about full


def define_flags() -> None:
    flags.DEFINE_list("slots", ["64", "256", "1024", "4096"], "The numbers of slots to measure.")
    flags.DEFINE_list("pool_factors", ["1", "10"], "Pool sizes, as multiples of a full house.")
    flags.DEFINE_enum("allocator", "paged", sorted(ALLOCATORS), "Whose tables to measure.")
    flags.DEFINE_enum(
        "eviction", "off", ["off", *CACHED], "The prefix cache's eviction policy, or no cache."
    )
    flags.DEFINE_enum("preemption", "recompute", PREEMPTION_MODES, "The mode of preemption.")
    flags.DEFINE_integer("max_beams", 1, "The widest beam search to be ready for.", lower_bound=1)
    flags.DEFINE_enum("policy", "fcfs", sorted(POLICIES), "The order of requests.")
    flags.DEFINE_bool(
        "beside_bare",
        False,
        "Run in turn with pages alone (no prefix cache, host tier or beams), and tell the ratio.",
    )
    flags.DEFINE_integer("steps", 256, "How many steps to time at once.", lower_bound=1)


def main(_: list[str]) -> None:
    rows = []
    allocator = ALLOCATORS[FLAGS.allocator]
    if FLAGS.eviction != "off":
        require(FLAGS.allocator == "paged", f"--allocator={FLAGS.allocator} keeps no prefixes")
        allocator = CACHED[FLAGS.eviction]
    for num_slots in map(int, FLAGS.slots):
        for factor in map(int, FLAGS.pool_factors):
            config = EngineConfig(
                num_slots=num_slots,
                num_pages=num_slots * PAGES_A_SLOT_HOLDS * factor,
                page_size=PAGE_SIZE,
                pages_per_slot=PAGES_PER_SLOT,
                num_requests=2 * num_slots,
                token_buckets=(max(512, 2 * num_slots),),
                max_beams=FLAGS.max_beams,
                preemption=FLAGS.preemption,
                host_pages=0 if FLAGS.preemption == "recompute" else num_slots * PAGES_PER_SLOT,
            )
            measured = measure_beside_bare if FLAGS.beside_bare else measure
            rows.append(measured(config, allocator, FLAGS.policy, FLAGS.steps))
            print(json.dumps(rows[-1]), flush=True)
    common.print_last_line({"rows": rows, **common.provenance()})


def measure(
    config: EngineConfig,
    allocator: Allocator,
    policy: str,
    steps_at_once: int,
    is_full: bool = False,
) -> dict:
    """Median microseconds a step over the chunks of steps in which most slots run.

    With `is_full` no page is free when that begins: queues of other prompts went before.
    """
    load = Load(config, allocator, policy, steps_at_once, is_full)
    while not load.is_over:
        load.advance()
    return load.row()


def measure_beside_bare(
    config: EngineConfig, allocator: Allocator, policy: str, steps_at_once: int
) -> dict:
    """`measure`, chunk by chunk in turn with the same load on pages alone, and the ratio."""
    plain = replace(config, max_beams=1, preemption="recompute", host_pages=0)
    load = Load(config, allocator, policy, steps_at_once)
    bare = Load(plain, ALLOCATORS["paged"], policy, steps_at_once)
    while not (load.is_over and bare.is_over):
        for each in (load, bare):
            if not each.is_over:
                each.advance()
    row, beside = load.row(), bare.row()
    with_calls = [each["step_us"] + each["call_us"] / steps_at_once for each in (row, beside)]
    return row | {
        "bare_us": beside["step_us"],
        "ratio": row["step_us"] / beside["step_us"],
        "ratio_with_calls": with_calls[0] / with_calls[1],
    }


class Load:
    """A queue full of requests, and the scheduler that runs them, a chunk of steps at a time."""

    def __init__(
        self,
        config: EngineConfig,
        allocator: Allocator,
        policy: str,
        steps_at_once: int,
        is_full: bool = False,
    ):
        self._config, self._allocator = config, allocator
        self._limit = jnp.int32(steps_at_once)
        self._steps = compiled_steps(config, allocator, POLICIES[policy])
        self._calls_us: list[float] = []  # of no steps
        self._samples: list[tuple[float, int, float]] = []  # mean of slots that run, steps, us
        state = scheduler_state.create(config, allocator)
        blank = jax.tree.map(np.array, state.requests)
        state = _with_queue(state, blank, config, allocator, seed=0)
        state, _, _ = jax.block_until_ready(self._steps(state, jnp.int32(1)))  # compiles
        for seed in itertools.count(1) if is_full else ():
            assert isinstance(state.table, PrefixCache)  # nobody else keeps pages
            if int(state.table.num_free) == 0:
                break
            state, _, _ = self._steps(state, jnp.int32(1_000_000))
            state = _with_queue(state, blank, config, allocator, seed)
        self._state = state

    @property
    def is_over(self) -> bool:
        return not bool(jnp.any(self._state.unfinished))

    def advance(self) -> None:
        """Runs and times a chunk."""
        nothing = jnp.int32(0)
        self._run(nothing)  # others have run since: both calls after it find warm caches
        self._calls_us.append(self._run(nothing)[2])
        count, running, elapsed_us = self._run(self._limit)
        self._samples.append((running / count, count, elapsed_us))

    def _run(self, limit: jax.Array) -> tuple[int, int, float]:
        """Steps run, rows that ran in them, and microseconds of the call."""
        start_s = time.perf_counter()
        self._state, count, running = jax.block_until_ready(self._steps(self._state, limit))
        elapsed_us = (time.perf_counter() - start_s) * 1e6
        return int(count), int(running), elapsed_us

    def row(self) -> dict:
        """What came of it."""
        busiest = max(mean_running for mean_running, _, _ in self._samples)
        call_us = float(np.median(self._calls_us))
        busy = [
            (elapsed_us - call_us) / count
            for running, count, elapsed_us in self._samples
            if running > 0.8 * busiest
        ]
        return {
            "num_slots": self._config.num_slots,
            "num_pages": self._config.num_pages,
            "step_us": float(np.median(busy)),
            "call_us": call_us,
            "mean_running_at_most": busiest,
            "steps": int(self._state.step),
            "violations": int(jnp.sum(self._allocator.violations(self._state.table))),
        }


def compiled_steps(config: EngineConfig, allocator: Allocator, policy: PolicyFn):
    """A function of a state, donated, and how many steps at most: state, steps, rows that ran."""
    nothing_fails = Outcome(
        tokens=jnp.full((config.num_slots,), 5, jnp.int32),
        logprobs=jnp.zeros((config.num_slots,), jnp.float32),
        failed=jnp.zeros((config.num_slots,), jnp.bool_),
        candidates=_no_candidates(config) if config.max_beams > 1 else None,
    )

    def step(carry):
        state, count, running = carry
        state, plan = plan_step(state, config, allocator, policy)
        running = running + jnp.sum(state.running, dtype=jnp.int32)
        state = commit_step(state, plan, nothing_fails, allocator, eos_ids=(2,))
        return state, count + 1, running

    @partial(jax.jit, donate_argnums=0, compiler_options=ON_ONE_THREAD)
    def steps(state: SchedulerState, limit: jax.Array):
        def goes_on(carry):
            return (carry[1] < limit) & jnp.any(carry[0].unfinished)

        zero = jnp.asarray(0, jnp.int32)
        return lax.while_loop(goes_on, step, (state, zero, zero))

    return steps


def _no_candidates(config: EngineConfig) -> Candidates:
    shape = (config.num_slots, num_candidates(config.max_beams, eos_ids=(2,)))
    return Candidates(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))


def _with_queue(
    state: SchedulerState, blank: Requests, config: EngineConfig, allocator: Allocator, seed: int
) -> SchedulerState:
    """With a queue full of requests of random lengths, all waiting, in `blank`, an empty one."""
    rng = np.random.default_rng(seed)
    prompt_lens = rng.integers(20, 300, config.num_requests).astype(np.int32)
    output_lens = rng.integers(20, 400, config.num_requests).astype(np.int32)
    final_lens = jnp.asarray(prompt_lens + output_lens)
    reserved_lens = allocator.reserve(jnp.asarray(prompt_lens), final_lens, config.max_seq_len)
    tokens = rng.integers(0, 50_000, blank.tokens.shape).astype(np.int32)
    requests = jax.tree.map(jnp.array, blank).replace(
        tokens=jnp.asarray(tokens),
        prompt_lens=jnp.asarray(prompt_lens),
        num_tokens=jnp.asarray(prompt_lens).copy(),
        final_lens=final_lens,
        reserved_lens=reserved_lens.copy(),
        arrivals=jnp.arange(config.num_requests, dtype=jnp.int32),
        phases=jnp.full((config.num_requests,), WAITING, jnp.int32),
    )
    return state.replace(requests=requests)


if __name__ == "__main__":
    define_flags()
    common.run(main)
