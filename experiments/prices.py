"""What `--preemption=auto` weighs: computing again and moving, on a named device or on this one."""

import jax.numpy as jnp
from absl import flags

from experiments.device_kernels import measured_prices
from jaxpage.config import ModelConfig, Prices
from jaxpage.sim import cost_model
from jaxpage.sim.device import DEVICES, find_device
from jaxpage.sim.shapes import shape_of

FLAGS = flags.FLAGS


def define_device_flag() -> None:
    """Whose times are weighed."""
    flags.DEFINE_string(
        "device",
        None,
        "Whose times --preemption=auto weighs: a JSON file as measure_device writes it, or one of "
        f"{', '.join(DEVICES)}. By default some kernels are timed on this machine.",
    )


def prices_by_flags(model: ModelConfig, dtype_name: str, page_size: int) -> Prices:
    """What `--preemption=auto` weighs, of `--device` or this machine."""
    dtype = jnp.dtype(dtype_name)
    if FLAGS.device is None:
        return measured_prices(model, page_size, dtype)
    shape = shape_of(model, dtype.itemsize, dtype.itemsize)
    device = find_device(FLAGS.device)
    return cost_model.prices(cost_model.create(shape, device, page_size=page_size))
