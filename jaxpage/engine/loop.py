"""The serving loop: one `lax.while_loop` in one jit, over the whole state, which is donated.

This is the only place that compiles or donates. The loop runs until there is something to say to
the host: `max_steps` are done, the log is full, a request has ended (if asked), or all have.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxpage.engine import chains, replicas, step
from jaxpage.engine.step import EngineState, Setup, create, engine_step, wipe_freed
from jaxpage.model.params import Params
from jaxpage.model.sharding import param_partition
from jaxpage.paging.kv_pool import KvPool
from jaxpage.scheduling import cancellation
from jaxpage.scheduling import state as scheduler_state
from jaxpage.scheduling.state import Requests, SchedulerState

# On a GPU, Triton's products would first copy a layer's weights out of their stack, in every step;
# cuBLAS is told where they begin. Elsewhere neither option means anything.
COMPILER_OPTIONS = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_enable_dynamic_slice_fusion": True,
}


@partial(
    jax.jit,
    static_argnames=("setup",),
    donate_argnames=("state",),
    compiler_options=COMPILER_OPTIONS,
)
def serve_steps(
    params: Params, state: EngineState, max_steps: jax.Array, *, setup: Setup
) -> EngineState:
    """Runs up to `max_steps` steps, fewer if all requests are done; starts a new log.

    On a mesh each replica runs its own, until it is done itself.
    """
    serve = partial(_serve, setup=setup)
    if setup.mesh is None:
        return serve(state, params, max_steps)
    lie = param_partition(setup.model), PartitionSpec()
    return replicas.on_each(serve, setup.mesh, state, params, max_steps, lie=lie)


def _serve(
    state: EngineState, params: Params, max_steps: jax.Array, *, setup: Setup
) -> EngineState:
    state = state.replace(log=state.log.replace(count=jnp.asarray(0, jnp.int32)))
    limit = jnp.minimum(max_steps, setup.engine.log_steps)

    def goes_on(state: EngineState) -> jax.Array:
        return (state.log.count < limit) & jnp.any(state.scheduler.unfinished)

    state = lax.while_loop(goes_on, lambda state: engine_step(params, state, setup), state)
    return wipe_freed(state, setup)


@partial(jax.jit, static_argnames=("setup", "dtype"))
def create_on_device(*, setup: Setup, dtype: DTypeLike) -> dict[str, Any]:
    """See `step.create_on_device`: one program, for one by one its arrays take a while."""
    return step.create_on_device(setup, dtype)


@partial(jax.jit, static_argnames=("setup", "dtype"))
def create_replicas(*, setup: Setup, dtype: DTypeLike) -> EngineState:
    """The states of all replicas of a mesh, with no requests; nothing is on the host yet."""
    assert setup.mesh is not None
    state = replicas.stacked(create(setup, dtype), setup.mesh)
    return lax.with_sharding_constraint(state, replicas.shardings(state, setup.mesh))


@partial(jax.jit, static_argnames=("mesh",))
def on_all[T](tree: T, *, mesh: Mesh) -> T:
    """A tree of arrays that every device of a mesh has whole, so that every process can read it."""
    return lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))


@partial(jax.jit, static_argnames=("mesh",), donate_argnames=("state",))
def submit(
    state: EngineState, row: jax.Array, request: Requests, *, mesh: Mesh | None = None
) -> EngineState:
    """Puts a request in the free row `row` of the queue; rows count over all replicas."""
    return _on_queue(scheduler_state.submit, mesh, state, row, request)


@partial(jax.jit, static_argnames=("mesh",), donate_argnames=("state",))
def forget(state: EngineState, row: jax.Array, *, mesh: Mesh | None = None) -> EngineState:
    """Frees the row of a request that is done and has been read; rows as in `submit`."""
    return _on_queue(scheduler_state.forget, mesh, state, row)


@partial(jax.jit, static_argnames=("setup",), donate_argnames=("state",))
def cancel(state: EngineState, row: jax.Array, *, setup: Setup) -> EngineState:
    """Ends the request that has the row, see `cancellation.cancel`; rows as in `submit`."""
    change = partial(cancellation.cancel, allocator=setup.allocator)
    return _on_queue(change, setup.mesh, state, row)


def _on_queue(
    change: Callable[..., SchedulerState],
    mesh: Mesh | None,
    state: EngineState,
    row: jax.Array,
    *arguments: Requests,
) -> EngineState:
    def changed(state: EngineState, row: jax.Array, *arguments: Requests) -> EngineState:
        if mesh is not None:
            row = replicas.own_row(row, state.scheduler.requests.phases.shape[0])
        return state.replace(scheduler=change(state.scheduler, row, *arguments))

    if mesh is None:
        return changed(state, row, *arguments)
    return replicas.on_each(changed, mesh, state, row, *arguments)


@partial(jax.jit, static_argnames=("setup",))
def find_chain(
    state: EngineState, tokens: jax.Array, num_tokens: jax.Array, salt: jax.Array, *, setup: Setup
) -> tuple[jax.Array, jax.Array]:
    """See `chains.find`."""
    return chains.find(state, tokens, num_tokens, salt, setup)


@partial(jax.jit, static_argnames=("most", "setup"))
def read_chain(
    state: EngineState,
    tokens: jax.Array,
    num_tokens: jax.Array,
    salt: jax.Array,
    first: jax.Array,
    *,
    most: int,
    setup: Setup,
) -> tuple[jax.Array, KvPool]:
    """See `chains.read`: copies, so the state stays as it is."""
    return chains.read(state, tokens, num_tokens, salt, first, most, setup)


@partial(jax.jit, static_argnames=("setup",), donate_argnames=("state",))
def put_back(
    state: EngineState,
    tokens: jax.Array,
    first: jax.Array,
    count: jax.Array,
    salt: jax.Array,
    pages: KvPool,
    *,
    setup: Setup,
) -> tuple[EngineState, jax.Array]:
    """See `chains.put_back`."""
    return chains.put_back(state, tokens, first, count, salt, pages, setup)
