"""What a serving program takes of each device, known before anything is allocated.

The program is the one that serves: `loop.serve_steps`, compiled ahead of time from shapes alone.
"""

import math
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxpage.engine import loop, replicas, step
from jaxpage.engine.step import EngineState, Setup
from jaxpage.model import sharding
from jaxpage.model.llama import LAYER_SCOPE
from jaxpage.model.params import Params, is_spec, param_specs

_COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


class Footprint(NamedTuple):
    """Bytes of one device. The first three follow from shapes, the next two say what XLA made."""

    weights: int
    kv: int
    scheduler: int  # requests, tables, logs: all of the state that is no KV
    arguments: int  # all that is there before and after a step
    temporaries: int  # of a step
    collectives_per_layer: int
    compile_s: float

    @property
    def total(self) -> int:
        """What a device must have. The state is updated where it is, and counts once."""
        return self.arguments + self.temporaries


def measure(setup: Setup, dtype: DTypeLike, kv_dtype: DTypeLike) -> Footprint:
    """The footprint of `setup`, on a mesh whose devices need not be here.

    Raises:
      Whatever the compiler says of a program that it cannot make.
    """
    assert setup.mesh is not None
    start_s = time.perf_counter()
    params, state = abstract_params(setup, dtype), abstract_state(setup, kv_dtype)
    scalar = NamedSharding(setup.mesh, PartitionSpec())
    steps = jax.ShapeDtypeStruct((), jnp.int32, sharding=scalar)
    # A kernel compiles for the default device.
    with jax.default_device(setup.mesh.devices.flat[0]):
        compiled = loop.serve_steps.lower(params, state, steps, setup=setup).compile()
    compile_s = time.perf_counter() - start_s
    analysis: Any = compiled.memory_analysis()
    kv_bytes = device_bytes((state.pool, state.host_pool))
    return Footprint(
        weights=device_bytes(params),
        kv=kv_bytes,
        scheduler=device_bytes(state) - kv_bytes,
        arguments=analysis.argument_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes,
        collectives_per_layer=collectives_in_layer(compiled.as_text() or ""),
        compile_s=compile_s,
    )


def abstract_params(setup: Setup, dtype: DTypeLike) -> Params:
    """Shapes of the parameters where they lie on the mesh."""
    assert setup.mesh is not None
    return jax.tree.map(
        lambda spec, place: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=place),
        param_specs(setup.model),
        sharding.param_shardings(setup.model, setup.mesh),
        is_leaf=is_spec,
    )


def abstract_state(setup: Setup, kv_dtype: DTypeLike) -> EngineState:
    """Shapes of the states of all replicas where they lie on the mesh."""
    assert setup.mesh is not None
    mesh = setup.mesh
    state = jax.eval_shape(lambda: replicas.stacked(step.create(setup, kv_dtype), mesh))
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        state,
        replicas.shardings(state, mesh),
    )


def device_bytes(tree: Any) -> int:
    """What one device holds of arrays or their shapes, all of which are sharded evenly."""
    leaves = jax.tree.leaves(tree)
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
    )


def collectives_in_layer(hlo: str) -> int:
    """Collectives of a layer, in a compiled program's text; the most of any token bucket's."""
    in_layer = rf" (?:{_COLLECTIVES})(?:-start)?\(.*op_name=\"([^\"]*/{LAYER_SCOPE})/"
    scopes = re.findall(in_layer, hlo)
    return max((scopes.count(scope) for scope in set(scopes)), default=0)
