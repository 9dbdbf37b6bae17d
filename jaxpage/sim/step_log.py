"""The log of simulated steps: their records, prices and ends, until the host reads them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jaxpage.scheduling.accounting import StepRecord
from jaxpage.sim import clock
from jaxpage.sim.clock import Time


class Step(NamedTuple):
    """A step and its price; of `log_steps` in the log."""

    record: StepRecord  # i32 each
    seconds: jax.Array  # f32, what it took
    end: Time  # when it was over


class StepLog(struct.PyTreeNode):
    """The steps since the host last read."""

    steps: Step  # [log_steps]
    count: jax.Array  # i32[], rows filled


def create(log_steps: int) -> StepLog:
    """An empty log of so many rows."""
    return StepLog(
        Step(
            record=StepRecord(*(jnp.zeros((log_steps,), jnp.int32) for _ in StepRecord._fields)),
            seconds=jnp.zeros((log_steps,), jnp.float32),
            end=clock.never((log_steps,)),
        ),
        count=jnp.asarray(0, jnp.int32),
    )


def write(log: StepLog, step: Step) -> StepLog:
    """With one row more; there must be room."""
    steps = jax.tree.map(lambda kept, new: kept.at[log.count].set(new), log.steps, step)
    return StepLog(steps, log.count + 1)
