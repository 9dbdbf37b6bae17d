"""Does a model fit on devices that are not here, and how many users fit beside it?

    .venv-inspect/bin/python -m experiments.plan_memory --target=h100 --mesh=data:1,model:8

Compiles the program that serves (scheduler, model, kernels, on the whole mesh) for the target, with
nothing allocated, and prints what it takes of each device: weights, KV, the scheduler's state, and
temporaries, as the compiler says. GPUs need the compilers of `make .venv-inspect/.installed` and
no GPU; --target=cpu needs neither. One to three minutes on two cores, 1.5 GB of memory.

Expected, of the article's Llama 3.1 70B in bfloat16: on four A100s of 80 GB its weights take 35 GB
each, and what is left holds some 140 users of 4,096 tokens, not the 256 of the article's sum, which
need 344 GB. Refuted if the program took copies of the weights or the pool. What does not fit is
refused with by how much, and the exit status is then 1. JAX takes three quarters of a GPU's memory
unless XLA_PYTHON_CLIENT_MEM_FRACTION says more: a plan that fills it needs 0.98 there.
"""

import math
import os
import sys
from functools import partial
from typing import Any

from absl import flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # else the CUDA plugin would look for a GPU
# XLA, which knows of no card here, warns that memory will be short by its own guess of a limit.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import jax.numpy as jnp

from experiments import common
from jaxpage.config import ConfigError, EngineConfig, ModelConfig, require
from jaxpage.engine import footprint
from jaxpage.engine.footprint import Footprint
from jaxpage.engine.sizing import engine_config
from jaxpage.engine.step import Setup
from jaxpage.model import sharding
from jaxpage.model.llama import AttentionFn
from jaxpage.model.params import num_parameters
from jaxpage.model.presets import PRESETS
from jaxpage.paging.allocator import CACHED
from jaxpage.paging.kv_pool import page_bytes
from jaxpage.scheduling.policies import POLICIES
from pallas_kernels.common import targets
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_attention.gpu import kernel_of

FLAGS = flags.FLAGS

TARGETS = {"a100-80gb": "a100", "h100": "h100", "h200": "h200"}
USER_TOKENS = 4096
GIB = 2**30


def define_flags() -> None:
    flags.DEFINE_string("model", "llama-3.1-70b", f"The model: {', '.join(PRESETS)}.")
    flags.DEFINE_enum("target", "h100", [*TARGETS, "cpu"], "The devices to plan for.")
    flags.DEFINE_string(
        "mesh", "data:1,model:8", "How many replicas, and how many devices share each."
    )
    flags.DEFINE_integer("max_seq_len", USER_TOKENS, "The longest sequence, in tokens.")
    flags.DEFINE_string(
        "kv_bytes", "auto", "Bytes of KV pages on each device, or auto: all that is left."
    )
    flags.DEFINE_integer(
        "reserved_bytes",
        GIB,
        "What of each device to leave to the driver, its libraries and the collectives' buffers; "
        "an assumption, which only a device can check.",
        lower_bound=0,
    )
    flags.DEFINE_enum(
        "dtype", "bfloat16", ["float32", "bfloat16"], "The precision of weights, keys and values."
    )
    flags.DEFINE_integer(
        "num_slots", 64, "How many sequences a replica runs at once.", lower_bound=1
    )
    flags.DEFINE_integer("page_size", 16, "How many tokens a page holds.", lower_bound=1)


def main(_: list[str]) -> None:
    name = FLAGS.model.replace("llama3", "llama-3")
    require(name in PRESETS, f"--model={FLAGS.model}: choose of {', '.join(PRESETS)}")
    data, model_size = sharding.parse_mesh(FLAGS.mesh)
    model = sharding.divisible_model(PRESETS[name], model_size)
    devices, capacity_bytes = devices_of(FLAGS.target, data * model_size)
    room_bytes = capacity_bytes - FLAGS.reserved_bytes
    weights_bytes = num_parameters(model) * jnp.dtype(FLAGS.dtype).itemsize // model_size
    refuse_unless(weights_bytes < room_bytes, "the weights alone", weights_bytes, room_bytes)
    mesh = sharding.make_mesh(FLAGS.mesh, devices)
    attention = attention_for(FLAGS.target)

    def measured(num_pages: int) -> tuple[EngineConfig, Footprint]:
        config = config_of(model, num_pages)
        setup = Setup(model, config, CACHED["lru"], POLICIES["fcfs"], attention, mesh)
        return config, footprint.measure(setup, FLAGS.dtype, FLAGS.dtype)

    pages_within = partial(pages_of, model, model_size)
    if FLAGS.kv_bytes == "auto":
        guess = room_bytes - weights_bytes - temporaries_guess(model)
        config, found = measured(pages_within(guess))
        if found.total > room_bytes:  # by what the guess was too low; temporaries stay the same
            config, found = measured(pages_within(found.kv - (found.total - room_bytes)))
    else:
        kv_bytes = kv_bytes_given()
        refuse_unless(
            weights_bytes + kv_bytes <= room_bytes, "weights and KV", weights_bytes + kv_bytes,
            room_bytes,
        )  # fmt: skip
        config, found = measured(pages_within(kv_bytes))
    row = row_of(config, found, capacity_bytes, data)
    print("\n".join(table(row)))
    common.print_last_line(row | common.provenance() | {"device": FLAGS.target})
    refuse_unless(row["fits"], "weights, KV and temporaries", found.total, room_bytes)


def devices_of(target: str, count: int) -> tuple[Any, int]:
    """Devices to compile for, and the bytes of memory of each."""
    if target == "cpu":
        if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
            jax.config.update("jax_num_cpu_devices", count)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return jax.devices(), memory // count
    try:
        return targets.devices(TARGETS[target], count), targets.memory_bytes(TARGETS[target])
    except ModuleNotFoundError as error:
        raise ConfigError(f"--target={target}: {error}") from error


def attention_for(target: str) -> AttentionFn:
    """What the target would run, unasked, if it has passed the check on the card."""
    if target == "cpu":
        return paged_attention
    kernel = kernel_of(targets.CAPABILITIES[TARGETS[target]])
    assert kernel is not None

    def attention(q, k_pages, v_pages, lengths, page_indices, *, cu_q_lens):
        scale = q.shape[-1] ** -0.5
        out, _, _ = kernel.attend(
            q, k_pages, v_pages, lengths, page_indices, cu_q_lens, sm_scale=scale, soft_cap=None,
            window=None,
        )  # fmt: skip
        return out.astype(q.dtype)

    return attention


def config_of(model: ModelConfig, num_pages: int) -> EngineConfig:
    """The engine's capacities by flag."""
    return engine_config(
        model,
        max_seq_len=FLAGS.max_seq_len,
        num_slots=FLAGS.num_slots,
        num_requests=2 * FLAGS.num_slots,
        page_size=FLAGS.page_size,
        kv_dtype=FLAGS.dtype,
        num_pages=num_pages,
    )


def pages_of(model: ModelConfig, model_size: int, device_bytes: int) -> int:
    """Pages of a replica in so many bytes of each of its devices, at least one.

    Raises:
      ConfigError: there is no room for one.
    """
    each = page_bytes(model, FLAGS.page_size, FLAGS.dtype) // model_size
    require(
        device_bytes >= each,
        f"{device_bytes:,} bytes of a device are left for KV, and a page of {FLAGS.page_size} "
        f"tokens takes {each:,}: take more devices for the model axis, or fewer slots",
    )
    return device_bytes // each


def temporaries_guess(model: ModelConfig) -> int:
    """More than temporaries have been: logits of all slots some times over, and a step's rest."""
    logits = 4 * FLAGS.num_slots * model.vocab_size
    return 6 * logits + GIB // 4


def kv_bytes_given() -> int:
    require(
        FLAGS.kv_bytes.isdecimal() and int(FLAGS.kv_bytes) > 0,
        f"--kv_bytes={FLAGS.kv_bytes} must be auto or a positive number of bytes",
    )
    return int(FLAGS.kv_bytes)


def row_of(config: EngineConfig, found: Footprint, capacity_bytes: int, replicas: int) -> dict:
    """The last line. Bytes are of a device, pages of a replica, users of all replicas."""
    pages_a_user = math.ceil(USER_TOKENS / FLAGS.page_size)
    return {
        "model": FLAGS.model,
        "target": FLAGS.target,
        "mesh": FLAGS.mesh,
        "weights_bytes": found.weights,
        "kv_bytes": found.kv,
        "scheduler_bytes": found.scheduler,
        "temp_bytes": found.temporaries,
        "arguments_bytes": found.arguments,
        "total_bytes": found.total,
        "reserved_bytes": FLAGS.reserved_bytes,
        "capacity_bytes": capacity_bytes,
        "num_pages": config.num_pages,
        "max_users_4096": replicas * (config.num_pages // pages_a_user),
        "num_slots": replicas * config.num_slots,
        "collectives_per_layer": found.collectives_per_layer,
        "fits": found.total + FLAGS.reserved_bytes <= capacity_bytes,
        "compile_s": round(found.compile_s, 1),
        "peak_rss_bytes": common.peak_rss_bytes(),
    }


def table(row: dict) -> list[str]:
    """The same for a reader."""
    capacity = row["capacity_bytes"]
    lines = [
        f"{row['model']} on {row['target']}, {row['mesh']}: of each device's {capacity:,} bytes"
    ]
    for name, label in (
        ("weights_bytes", "weights"),
        ("kv_bytes", "KV pages"),
        ("scheduler_bytes", "scheduler, requests, log"),
        ("temp_bytes", "temporaries of a step"),
        ("total_bytes", "total"),
        ("reserved_bytes", "left to the driver (assumed)"),
    ):
        lines.append(f"  {label:<29}{row[name]:>16,}  {row[name] / capacity:6.1%}")
    users, slots = row["max_users_4096"], row["num_slots"]
    lines.append(
        f"  {row['num_pages']:,} pages of {FLAGS.page_size} tokens a replica: {users} users with "
        f"{USER_TOKENS} tokens each" + (f", of whom {slots} run at once" if users > slots else "")
    )
    lines.append(
        f"  {row['collectives_per_layer']} collectives a layer; compiled in {row['compile_s']} s"
    )
    return lines


def refuse_unless(fits: bool, what: str, needed_bytes: int, room_bytes: int) -> None:
    if not fits:
        sys.exit(
            f"error: {what} of {FLAGS.model} take {needed_bytes:,} bytes of each device of "
            f"{FLAGS.mesh}, {needed_bytes - room_bytes:,} more than the {room_bytes:,} that "
            f"{FLAGS.target} has beside --reserved_bytes={FLAGS.reserved_bytes:,}: take more "
            "devices for the model axis, or fewer --kv_bytes or --num_slots"
        )


if __name__ == "__main__":
    define_flags()
    common.run(main)
