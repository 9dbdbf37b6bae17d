"""What the processes of one run have to know alike.

Each host runs the same code on the same requests, and calls the same programs in the same order:
else one would wait for another for ever. So whatever decides is the same in all: arrays are read
whole, and time, and what one process alone knows, is agreed on. All processes have to ask alike.
One process agrees with itself at no cost.
"""

import zlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxpage.config import require
from jaxpage.engine import loop


def are_several() -> bool:
    """Whether there are others; unlike JAX's own count it takes hold of no device."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes results."""
    return not are_several() or jax.process_index() == 0


def compile_all() -> None:
    """Compiles what agreeing takes, so that serving does not."""
    of_first(0.0)
    any_of(False)
    require_alike("nothing")


def on_host(tree: Any, mesh: Mesh | None) -> Any:
    """The arrays of a tree as they are, whole, even if parts of them lie with other processes."""
    if are_several():
        assert mesh is not None
        tree = loop.on_all(tree, mesh=mesh)
    return jax.tree.map(np.array, tree)


def of_first(value: float) -> float:
    """The value that the first process gives."""
    if not are_several():
        return value
    halves = np.array([value], np.float64).view(np.uint32)  # arrays of JAX have 32 bits
    return float(np.asarray(multihost_utils.broadcast_one_to_all(halves)).view(np.float64)[0])


def any_of(value: bool) -> bool:
    """Whether one of them says yes."""
    if not are_several():
        return value
    return bool(np.any(multihost_utils.process_allgather(np.array(value))))


def require_alike(what: str, *values: object) -> None:
    """Refuses what the processes were given differently, as far as it is seen when printed.

    Raises:
      ConfigError: in all of them.
    """
    if not are_several():
        return
    here = np.array(zlib.crc32(repr(values).encode()), np.uint32)
    everywhere = np.ravel(multihost_utils.process_allgather(here)).tolist()
    require(
        len(set(everywhere)) == 1,
        f"the processes were given different {what}, with checksums {everywhere}: give all of them "
        "the same",
    )
