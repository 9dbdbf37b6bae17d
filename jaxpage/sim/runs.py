"""A whole simulated run: from a trace to a timeline of requests and the columns of all steps."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxpage.config import EngineConfig, require
from jaxpage.paging.allocator import Allocator
from jaxpage.scheduling.policies import PolicyFn
from jaxpage.sim import clock, simulate
from jaxpage.sim import trace as traces
from jaxpage.sim.branching import Branching
from jaxpage.sim.cost_model import CostModel
from jaxpage.sim.device import DeviceSpec
from jaxpage.sim.metrics import Steps, Timeline
from jaxpage.sim.shapes import ModelShape
from jaxpage.sim.step_log import StepLog
from jaxpage.sim.trace import Arrival

# What vLLM leaves to weights and KV by default (gpu_memory_utilization); the rest is activations.
USABLE_MEMORY = 0.9


class Run(NamedTuple):
    """What came of simulating requests, in the order of the trace."""

    timeline: Timeline
    num_preemptions: np.ndarray  # i64[n], of all samples of a request
    cached_lens: np.ndarray  # i64[n], prompt tokens found in the prefix cache
    steps: Steps  # of every step, with "seconds", what it took, and "end_s", when it was over


def kv_tokens_in(shape: ModelShape, device: DeviceSpec, num_devices: int) -> int:
    """Tokens whose KV finds room beside the weights in `USABLE_MEMORY` of the devices' memory.

    Raises:
      ConfigError: the weights alone do not find room.
    """
    usable = USABLE_MEMORY * device.memory_bytes * num_devices
    weights = shape.num_params * shape.itemsize
    tokens = int((usable - weights) // shape.kv_bytes_per_token)
    require(
        tokens > 0,
        f"{shape.name} has {weights / 1e9:.1f} GB of weights, and {num_devices} x {device.name} "
        f"{usable / 1e9:.1f} GB for them and KV: take more devices",
    )
    return tokens


def run(
    requests: Sequence[Arrival],
    cost: CostModel,
    config: EngineConfig,
    allocator: Allocator,
    policy: PolicyFn,
    *,
    tokens_each: int = 1,
    branching: Branching | None = None,
    until_s: float = np.inf,
    on_progress: Callable[[int], object] | None = None,
) -> Run:
    """Simulates until the last request is done; `on_progress` hears of how many sequences are.

    Soon after `until_s`, when the log is full, it stops; times that are not known then are NaN.

    Raises:
      ConfigError: as `trace.create`; or the cost model's pages have another size.
    """
    require(
        cost.page_size == config.page_size,
        f"pages of {cost.page_size} tokens are priced, and of {config.page_size} simulated",
    )
    trace = traces.create(requests, config, allocator, tokens_each=tokens_each, branching=branching)
    simulation = simulate.create(trace, config, allocator)
    logs: list[dict[str, np.ndarray]] = []
    while (num_done := int(simulation.num_done)) < int(trace.count):
        if on_progress is not None:
            on_progress(num_done)
        simulation = simulate.simulate_steps(
            simulation, trace, cost, config=config, allocator=allocator, policy=policy
        )
        if bool(simulation.is_stuck):
            raise AssertionError(f"nothing can be done, with {num_done} sequences done")
        logs.append(_read(simulation.log))
        if logs[-1]["end_s"][-1] > until_s:
            break
    served = simulation.served
    return Run(
        timeline=_timeline(requests, trace, served),
        num_preemptions=_by_request(np.add, trace, np.asarray(served.num_preemptions)),
        cached_lens=_by_request(np.maximum, trace, np.asarray(served.cached_lens)),
        steps={name: np.concatenate([log[name] for log in logs]) for name in logs[0]},
    )


def _read(log: StepLog) -> dict[str, np.ndarray]:
    count, (record, seconds, end) = int(log.count), log.steps
    columns = {name: np.array(column)[:count] for name, column in record._asdict().items()}
    columns |= {"seconds": np.array(seconds)[:count], "end_s": clock.to_seconds(end)[:count]}
    return columns


def _timeline(
    requests: Sequence[Arrival], trace: traces.Trace, served: simulate.Served
) -> Timeline:
    firsts, finishes = clock.to_seconds(served.first_tokens), clock.to_seconds(served.finishes)
    arrival_s = np.array([request.arrival_s for request in requests])
    finish_s = _by_request(np.maximum, trace, finishes)
    follows = np.array([-1 if each.follows is None else each.follows for each in requests])
    return Timeline(
        arrival_s=np.where(follows < 0, arrival_s, finish_s[follows] + arrival_s),
        first_token_s=_by_request(np.minimum, trace, firsts),
        finish_s=finish_s,
        output_lens=np.array([request.output_len for request in requests]),
    )


def _by_request(combine: np.ufunc, trace: traces.Trace, values: np.ndarray) -> np.ndarray:
    """Of the sequences of each request, together."""
    count = int(trace.count)
    leaders = np.asarray(trace.leaders)[:count]
    return combine.reduceat(values[:count], np.flatnonzero(leaders == np.arange(count)))
