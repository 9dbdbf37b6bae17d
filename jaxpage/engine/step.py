"""One step of the engine: plan, execute on the model, commit. All pure.

The executor here is the model. It packs the plan's tokens, row after row, into the smallest token
bucket that holds them; each bucket is a branch of one `lax.switch`, so that a step of eight tokens
does not pay for five hundred.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxpage.config import EngineConfig, ModelConfig, require
from jaxpage.model import llama, sampling, sharding
from jaxpage.model.llama import AttentionFn, Batch
from jaxpage.model.params import Params
from jaxpage.paging import kv_pool, page_table, ragged
from jaxpage.paging.allocator import Allocator
from jaxpage.paging.in_place import first_read
from jaxpage.paging.kv_pool import KvPool
from jaxpage.scheduling import beams
from jaxpage.scheduling import state as scheduler_state
from jaxpage.scheduling.accounting import StepRecord, record_step
from jaxpage.scheduling.batch import of_slots
from jaxpage.scheduling.beams import Candidates
from jaxpage.scheduling.policies import PolicyFn
from jaxpage.scheduling.state import Requests, SchedulerState
from jaxpage.scheduling.step import Outcome, Plan, commit_step, plan_step


@dataclass(frozen=True)
class Setup:
    """The static choices of a compiled engine: configurations and strategies.

    On a mesh (`sharding.make_mesh`) the model is one that its devices can divide, and the engine's
    capacities are those of one replica.
    """

    model: ModelConfig
    engine: EngineConfig
    allocator: Allocator
    policy: PolicyFn
    attention: AttentionFn
    mesh: Mesh | None = None

    @property
    def axis(self) -> str | None:
        """The mesh axis along which layers are divided, None on a single device."""
        return None if self.mesh is None else sharding.MODEL

    @property
    def num_replicas(self) -> int:
        """Schedulers that serve side by side, each with pages of its own."""
        return 1 if self.mesh is None else self.mesh.shape[sharding.DATA]


class StepLog(struct.PyTreeNode):
    """Records of the steps since the host last read, in a buffer of `log_steps` rows."""

    records: StepRecord  # i32[log_steps] each
    owners: jax.Array  # i32[log_steps, P], see `owners_of_pages`; [log_steps, 0] if not kept
    count: jax.Array  # i32[], rows filled


class EngineState(struct.PyTreeNode):
    """The whole of serving, in one pytree."""

    scheduler: SchedulerState
    pool: KvPool
    host_pool: KvPool  # the pages of the host tier
    log: StepLog


def create(setup: Setup, kv_dtype: DTypeLike, device: Any = None) -> EngineState:
    """A state with no requests, an empty pool and an empty log.

    The host's pages are in memory that `device` can reach, the default one if none is given.

    Raises:
      ConfigError: as `create_on_device`.
    """
    host_pool = kv_pool.create_on_host(setup.model, setup.engine, kv_dtype, device)
    return EngineState(**create_on_device(setup, kv_dtype), host_pool=host_pool)


def create_on_device(setup: Setup, kv_dtype: DTypeLike) -> dict[str, Any]:
    """The fields of such a state but the host's pages: all that can be made inside `jit`.

    Raises:
      ConfigError: the allocator or the vocabulary is too small for what the configuration asks.
    """
    config = setup.engine
    require(
        not config.zero_freed or setup.allocator.tier is not None,
        f"zero_freed with allocator={setup.allocator.name}: only pages are wiped one by one; "
        "take paged",
    )
    most = beams.num_candidates(config.max_beams, setup.model.eos_ids)
    require(
        most <= setup.model.vocab_size,
        f"max_beams={config.max_beams} looks at {most} next tokens, and {setup.model.name} has "
        f"only {setup.model.vocab_size}: search with fewer beams",
    )
    rows = config.log_steps
    columns = config.num_pages if config.record_page_map else 0
    records = (jnp.zeros((rows,), jnp.int32) for _ in StepRecord._fields)  # each its own buffer
    return {
        "scheduler": scheduler_state.create(config, setup.allocator),
        "pool": kv_pool.create(setup.model, config, kv_dtype),
        "log": StepLog(
            records=StepRecord(*records),
            owners=jnp.zeros((rows, columns), jnp.int32),
            count=jnp.asarray(0, jnp.int32),
        ),
    }


def engine_step(params: Params, state: EngineState, setup: Setup) -> EngineState:
    """Plans a step, runs the model on it, and commits what it sampled."""
    return step_and_outcome(params, state, setup)[0]


def step_and_outcome(
    params: Params, state: EngineState, setup: Setup
) -> tuple[EngineState, Plan, Outcome]:
    """`engine_step`, for those who want to know what was planned and what came of it too."""
    with jax.named_scope("plan"):
        scheduler, plan = plan_step(state.scheduler, setup.engine, setup.allocator, setup.policy)
        log = _write_log(state.log, scheduler, plan, setup.engine)
    with jax.named_scope("move"):
        pool, host_pool = move_pages(state.pool, state.host_pool, plan, setup.engine)
    pool, outcome = execute(params, pool, plan, scheduler.requests, setup)
    with jax.named_scope("commit"):
        scheduler = commit_step(scheduler, plan, outcome, setup.allocator, setup.model.eos_ids)
    state = EngineState(scheduler=scheduler, pool=pool, host_pool=host_pool, log=log)
    return state, plan, outcome


def move_pages(
    pool: KvPool, host_pool: KvPool, plan: Plan, config: EngineConfig
) -> tuple[KvPool, KvPool]:
    """Makes the moves and copies of a plan, and wipes what it says, in the order of `Plan`."""
    if config.host_pages > 0:
        host_pool = kv_pool.move_out(pool, host_pool, *plan.moves_out)
        host_pool, pool = first_read(host_pool, pool)
    pool = kv_pool.copy_pages(pool, *plan.copies)
    if config.zero_freed:
        pool = kv_pool.wipe(pool, *plan.freed)
    if config.host_pages > 0:
        pool = kv_pool.move_in(host_pool, pool, *plan.moves_in)
    if config.host_pages > 0 and config.zero_freed:
        pool, host_pool = first_read(pool, host_pool)
        host_pool = kv_pool.wipe_on_host(host_pool, *plan.host_freed)
    return pool, host_pool


def wipe_freed(state: EngineState, setup: Setup) -> EngineState:
    """Wipes the pages that the last step freed, for which no step has come yet."""
    tier = setup.allocator.tier
    if not setup.engine.zero_freed or tier is None:
        return state
    nothing = jnp.zeros((0,), jnp.int32)
    table, freed, host_freed = tier.take_freed(state.scheduler.table, nothing)
    host_pool = state.host_pool
    if setup.engine.host_pages > 0:
        host_pool = kv_pool.wipe_on_host(host_pool, *host_freed)
    scheduler = state.scheduler.replace(table=table)
    pool = kv_pool.wipe(state.pool, *freed)
    return state.replace(scheduler=scheduler, pool=pool, host_pool=host_pool)


def execute(
    params: Params, pool: KvPool, plan: Plan, requests: Requests, setup: Setup
) -> tuple[KvPool, Outcome]:
    """Carries out a plan with the model: writes KV, and samples where the plan says so."""
    buckets = setup.engine.token_buckets
    chosen = _smallest_holding(plan.num_tokens, buckets)
    branches = [partial(_forward_bucket, bucket, setup) for bucket in buckets]
    with jax.named_scope("forward"):
        states, pool = lax.switch(chosen, branches, params, pool, plan, requests)
    with jax.named_scope("sample"):
        outcome = lax.cond(
            jnp.any(plan.samples),
            lambda: _sample(params, states, plan, requests, setup),
            lambda: _nothing_sampled(setup),
        )
    return pool, outcome


def pack(plan: Plan, requests: Requests, num_tokens: int, page_size: int, null_page: int) -> Batch:
    """The plan's tokens as a batch of `num_tokens`, padded at its end."""
    tokens = ragged.expand(plan.counts, num_tokens)
    row, live = tokens.row, tokens.live
    first = (plan.lengths - plan.counts).at[row].get(mode="fill", fill_value=0)
    positions = jnp.where(live, first + tokens.offset, 0)
    request = plan.requests.at[row].get(mode="fill", fill_value=requests.phases.shape[0])
    token_ids = requests.tokens.at[request, positions].get(mode="fill", fill_value=0)
    pages = plan.page_indices.at[row, positions // page_size].get(mode="fill", fill_value=null_page)
    ends = jnp.cumsum(plan.counts)
    return Batch(
        tokens=token_ids,
        positions=positions,
        pages=pages,
        offsets=positions % page_size,
        cu_q_lens=jnp.concatenate([jnp.zeros((1,), jnp.int32), ends]),
        # Rows that bring nothing have nothing to attend to.
        lengths=jnp.where(plan.counts > 0, plan.lengths, 0),
        page_indices=plan.page_indices,
    )


def _smallest_holding(num_tokens: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    """The index of the first of the ascending `sizes` that is at least `num_tokens`."""
    return jnp.sum(num_tokens > jnp.asarray(sizes[:-1], jnp.int32), dtype=jnp.int32)


def _forward_bucket(
    bucket: int, setup: Setup, params: Params, pool: KvPool, plan: Plan, requests: Requests
) -> tuple[jax.Array, KvPool]:
    """Last states of the rows that sample, one by one, then zeros: `[B, E]`; and the pool."""
    batch = pack(plan, requests, bucket, pool.page_size, pool.num_pages)
    states, pool = llama.forward(params, pool, batch, setup.model, setup.attention, setup.axis)
    nowhere = bucket + 1
    slot = plan.states.at[_sampling_slots(plan)].get(mode="fill", fill_value=plan.states.shape[0])
    end = batch.cu_q_lens[1:].at[slot].get(mode="fill", fill_value=nowhere)
    # Filled, not only indexed: with one slot XLA would cut the state out of the layers' loop, and
    # then copy the pool where the branches end.
    return states.at[end - 1].get(mode="fill", fill_value=0), pool


def _sampling_slots(plan: Plan) -> jax.Array:
    """The slots that sample, ascending, and then `B`: `i32[B]`."""
    return ragged.expand(plan.samples.astype(jnp.int32), plan.samples.shape[0]).row


def _sample(
    params: Params, states: jax.Array, plan: Plan, requests: Requests, setup: Setup
) -> Outcome:
    """Samples from the states of `_forward_bucket`; the head multiplies few rows if few sample."""
    config, num_slots = setup.engine, setup.engine.num_slots
    slot = _sampling_slots(plan)
    request = plan.requests.at[slot].get(mode="fill", fill_value=requests.phases.shape[0])
    position = requests.num_tokens.at[request].get(mode="fill", fill_value=0)
    settings = jax.tree.map(
        lambda leaf: leaf.at[request].get(mode="fill", fill_value=0), requests.sampling
    )
    settings = settings.replace(
        repetition_penalty=jnp.where(
            settings.repetition_penalty == 0, 1.0, settings.repetition_penalty
        )
    )
    sizes = tuple(sorted({min(size, num_slots) for size in config.token_buckets}))
    logits = lax.switch(
        _smallest_holding(jnp.sum(plan.samples, dtype=jnp.int32), sizes),
        [partial(_padded_logits, size, setup.axis) for size in sizes],
        params,
        states,
    )
    tokens, logprobs, failed = sampling.sample(
        logits, settings, position, _history(requests, request, position, logits.shape[-1])
    )

    def by_slot(values: jax.Array) -> jax.Array:
        nothing = jnp.zeros((num_slots, *values.shape[1:]), values.dtype)
        return nothing.at[slot].set(values, mode="drop")

    outcome = Outcome(by_slot(tokens), by_slot(logprobs), by_slot(failed))
    nothing = _nothing_sampled(setup).candidates
    if nothing is None:
        return outcome
    candidates = lax.cond(
        jnp.any(of_slots(requests.beams.widths, request) > 0),
        lambda: Candidates(*map(by_slot, sampling.likeliest(logits, nothing.tokens.shape[1]))),
        lambda: nothing,
    )
    return outcome._replace(candidates=candidates)


def _padded_logits(size: int, axis: str | None, params: Params, states: jax.Array) -> jax.Array:
    """Logits of the first `size` of `states: [B, E]`, zeros for the rest, `f32[B, V]`."""
    logits = llama.logits(params, states[:size], axis)
    return jnp.pad(logits, ((0, states.shape[0] - size), (0, 0)))


def _history(requests: Requests, request: jax.Array, lengths: jax.Array, nothing: int) -> jax.Array:
    """The known tokens of each request, `i32[n, N]`, and `nothing` past their end."""
    tokens = requests.tokens.at[request].get(mode="fill", fill_value=nothing)
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    return jnp.where(index < lengths[:, None], tokens, nothing)


def _nothing_sampled(setup: Setup) -> Outcome:
    num_slots = setup.engine.num_slots
    of_each = (num_slots, beams.num_candidates(setup.engine.max_beams, setup.model.eos_ids))
    candidates = Candidates(jnp.zeros(of_each, jnp.int32), jnp.zeros(of_each, jnp.float32))
    return Outcome(
        tokens=jnp.zeros((num_slots,), jnp.int32),
        logprobs=jnp.zeros((num_slots,), jnp.float32),
        failed=jnp.zeros((num_slots,), jnp.bool_),
        candidates=candidates if of_each[1] > 0 else None,
    )


def _write_log(
    log: StepLog, scheduler: SchedulerState, plan: Plan, config: EngineConfig
) -> StepLog:
    record = record_step(scheduler, plan)
    records = jax.tree.map(lambda kept, new: kept.at[log.count].set(new), log.records, record)
    owners = log.owners
    if config.record_page_map:
        owners = owners.at[log.count].set(owners_of_pages(scheduler))
    return StepLog(records=records, owners=owners, count=log.count + 1)


def owners_of_pages(scheduler: SchedulerState) -> jax.Array:
    """The request that holds each page, `i32[P]`; `R` if none does.

    `R + 1` is a page that is cached and held by none, `R + 2` one that several hold.
    """
    table, nobody = scheduler.table, scheduler.requests.phases.shape[0]
    slots = page_table.page_owners(table.in_pool, table.num_pages)
    owners = scheduler.slots.at[slots].get(mode="fill", fill_value=nobody)
    for of_page, owner in ((table.is_cached, nobody + 1), (table.is_shared, nobody + 2)):
        pages = table.tier.in_pool(jnp.arange(of_page.shape[0], dtype=jnp.int32))
        owners = owners.at[jnp.where(of_page, pages, table.num_pages)].set(owner, mode="drop")
    return owners
