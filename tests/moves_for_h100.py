"""Compiles the moves, copies and wipes of a step's plan for an H100, and prints what XLA copies.

Run by the Python of the environment with the compilers: test_inspect does.
"""

import json
import os
import re
from collections import Counter

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import SingleDeviceSharding

from jaxpage.config import EngineConfig
from jaxpage.engine.step import move_pages
from jaxpage.paging.copies import Copies
from jaxpage.paging.freed import Freed
from jaxpage.paging.kv_pool import KvPool
from jaxpage.scheduling.step import Plan
from pallas_kernels.common.targets import device

POOL, HOST = (2, 1009, 2, 16, 64), (2, 503, 2, 16, 64)  # sizes that nothing else has
CONFIG = EngineConfig(
    num_slots=4,
    num_pages=POOL[1],
    page_size=POOL[3],
    pages_per_slot=8,
    num_requests=4,
    token_buckets=(16,),
    preemption="fine",
    host_pages=HOST[1],
    zero_freed=True,
)


def steps(keys, values, here, there, count):
    """A loop of as many steps as pages move in each."""
    # A pool of the host cannot be an argument where no card is.
    host = jnp.zeros(HOST, jnp.bfloat16)
    host = KvPool(*(jax.device_put(host, jax.memory.Space.Host) for _ in range(2)))
    none = jnp.asarray(0, jnp.int32)
    nobody = jnp.zeros((4,), jnp.int32)
    plan = Plan(
        requests=nobody,
        counts=nobody,
        samples=nobody > 0,
        states=nobody,
        lengths=nobody,
        page_indices=nobody,
        copies=Copies(here, there, count),
        moves_out=Copies(here, there, count),
        moves_in=Copies(there, here, count),
        freed=Freed(here, count),
        host_freed=Freed(there, count),
        num_found=none,
        num_preempted=none,
        num_recomputed=none,
    )

    def step(_, pools):
        pool, host = pools
        return move_pages(pool, host, plan, CONFIG)

    pool, host = lax.fori_loop(0, count, step, (KvPool(keys, values), host))
    return pool, jax.device_put(host, jax.memory.Space.Device)


def main() -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # else the CUDA plugin looks for a GPU
    here = SingleDeviceSharding(device("h100"))

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    pages, list_of_pages = array(POOL, jnp.bfloat16), array((8,), jnp.int32)
    with jax.default_device(device("h100")):
        compiled = (
            jax.jit(steps, donate_argnums=(0, 1))
            .lower(pages, pages, list_of_pages, list_of_pages, array((), jnp.int32))
            .compile()
        )
    copies = re.findall(r"= \w+\[([\d,]*)\]\S* (?:copy|copy-start)\(", compiled.as_text() or "")
    memory = compiled.memory_analysis()
    assert memory is not None
    print(
        json.dumps(
            {
                "copies": Counter(copies),
                "temp_bytes": memory.temp_size_in_bytes,
                "alias_bytes": memory.alias_size_in_bytes,
            }
        )
    )


if __name__ == "__main__":
    main()
