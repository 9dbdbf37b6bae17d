"""So many users who ask one request after the other, simulated by pages and without."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxpage.config import EngineConfig
from jaxpage.paging.allocator import ALLOCATORS, CACHED
from jaxpage.scheduling.policies import POLICIES
from jaxpage.sim import lengths as length_sets
from jaxpage.sim import runs
from jaxpage.sim.cost_model import CostModel
from jaxpage.sim.lengths import Lengths
from jaxpage.sim.trace import Arrival


class Served(NamedTuple):
    """Means over the steps in which requests wait, so before the first user has none left."""

    tokens_per_s: float  # of output
    batched: float  # sequences that run
    kv_tokens: int  # that find room, or all that the users can fill
    preemptions: int


def requests_of(lengths: Lengths, prefix_len: int) -> list[Arrival]:
    """All there from the start, with `prefix_len` common tokens before each prompt."""
    longer = lengths._replace(prompts=prefix_len + lengths.prompts)
    times_s = np.zeros(len(lengths.prompts))
    return length_sets.requests_of(longer, times_s, content=range(prefix_len))


def serve(
    cost: CostModel, requests: Sequence[Arrival], users: int, max_tokens: int, *, is_paged: bool
) -> Served:
    """By pages with the prefix cache, or contiguous: `max_tokens` reserved for everyone.

    Over all steps if none waits, as when all are served at once.
    """
    size = cost.page_size
    pages_per_slot = -(-max_tokens // size)
    # More than all users can fill is of no use, and takes time to simulate; runs of contiguous
    # pages are a power of two.
    room = runs.kv_tokens_in(cost.shape, cost.device, cost.num_devices)
    num_pages = min(room // size, users * (1 << (pages_per_slot - 1).bit_length()))
    config = EngineConfig(
        num_slots=users,
        num_pages=num_pages,
        page_size=size,
        pages_per_slot=pages_per_slot,
        num_requests=2 * users,
        token_buckets=(max(2048, users),),
        headroom_pages=int(is_paged),
        log_steps=1024,
    )
    allocator = CACHED["lru"] if is_paged else ALLOCATORS["max"]
    run = runs.run(requests, cost, config, allocator, POLICIES["fcfs"])
    waits = run.steps["num_waiting"] > 0
    if not waits.any():
        waits[:] = True
    steps = {name: column[waits] for name, column in run.steps.items()}
    return Served(
        tokens_per_s=float(np.sum(steps["num_sampled"]) / np.sum(steps["seconds"])),
        batched=float(np.mean(steps["num_running"])),
        kv_tokens=num_pages * size,
        preemptions=int(np.sum(run.num_preemptions)),
    )
