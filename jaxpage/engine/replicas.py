"""The serving state on a mesh, and a step of every replica in one program.

Replicas stand along the mesh's axis `data`. Their states are one `EngineState`: the pages of all
stand in one pool, replica after replica, and every other leaf has a leading axis of them. The KV
heads of pages are divided along `model`; everything else of a replica, its scheduler above all,
each of its devices has whole, and computes alike from the same.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxpage.engine.step import EngineState
from jaxpage.model.sharding import DATA, MODEL, on_mesh

WHOLE = PartitionSpec(DATA)
PAGES = PartitionSpec(None, DATA, MODEL)  # [L, data * P, K, S, D]


def partition(state: EngineState) -> EngineState:
    """The `PartitionSpec` of each leaf of the replicas' states."""
    return _map(lambda _: WHOLE, lambda _: PAGES, state)


def shardings(state: EngineState, mesh: Mesh) -> EngineState:
    """The sharding of each leaf of the replicas' states."""
    return on_mesh(partition(state), mesh)


def stacked(state: EngineState, mesh: Mesh) -> EngineState:
    """The states of all replicas, from the one with which each begins."""
    num_replicas = mesh.shape[DATA]

    def of_all(leaf: jax.Array) -> jax.Array:
        return jnp.broadcast_to(leaf, (num_replicas, *leaf.shape))

    def pages_of_all(leaf: jax.Array) -> jax.Array:
        return jnp.tile(leaf, (1, num_replicas, 1, 1, 1))

    return _map(of_all, pages_of_all, state)


def on_each(
    function: Callable[..., EngineState],
    mesh: Mesh,
    state: EngineState,
    *arguments: Any,
    lie: tuple[Any, ...] | None = None,
) -> EngineState:
    """`function(state, *arguments)` of every replica, on all of its devices.

    `function` sees a replica's state without the leading axis, and of pages what the device holds.
    Replicas need not do as much as each other. How arguments `lie` on the mesh is said by trees of
    `PartitionSpec`; by default every device has them whole.
    """
    specs = partition(state)

    def local(state, *arguments):
        # Pages have no axis to take off: XLA's CPU would copy them for that.
        state = _map(lambda leaf: leaf[0], lambda leaf: leaf, state)
        state = function(state, *arguments)
        return _map(lambda leaf: leaf[None], lambda leaf: leaf, state)

    # Unchecked: that all devices of a replica decide alike follows from their sums being the same,
    # which types cannot tell; `tests/test_sharding.py` compares what they hold.
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs, *(lie or [PartitionSpec()] * len(arguments))),
        out_specs=specs,
        check_vma=False,
    )
    return run(state, *arguments)


def _map(of_rest: Callable, of_pages: Callable, state: EngineState) -> EngineState:
    """`of_pages` of the leaves that hold pages, and `of_rest` of all others."""
    pools = state.pool, state.host_pool
    pool, host_pool = jax.tree.map(of_pages, pools)
    rest = jax.tree.map(of_rest, state.replace(pool=None, host_pool=None))
    return rest.replace(pool=pool, host_pool=host_pool)


def own_row(row: jax.Array, num_rows: int) -> jax.Array:
    """`row`, counted over all replicas, as a row of this one; `num_rows` if it is another's."""
    row = row - lax.axis_index(DATA) * num_rows
    return jnp.where((row >= 0) & (row < num_rows), row, num_rows)
