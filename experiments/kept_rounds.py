"""Dialogues whose rounds follow each other: what keeping their KV between rounds would give.

Beyond the paper, which keeps none. Histories are whole here and not their last 1,024 tokens, for a
history that is cut shares no prefix with itself. The rounds of a dialogue are those that fit into
`MAX_TOKENS`; a next one arrives a pause after the answer before it. Dialogues begin at random
instants (Poisson).
"""

import itertools
from typing import Any

import numpy as np

from experiments import rate_search
from experiments.paper_setups import MAX_TOKENS, Setup
from experiments.rate_search import Point
from jaxpage.paging.allocator import ALLOCATORS, CACHED
from jaxpage.scheduling.policies import POLICIES
from jaxpage.sim import arrivals, runs, synthetic
from jaxpage.sim.cost_model import Overhead
from jaxpage.sim.lengths import Rounds
from jaxpage.sim.trace import Arrival

SYSTEMS = {"paged": ALLOCATORS["paged"], "cached": CACHED["lru"]}


def requests_of(rounds: Rounds, num: int, rate: float, pause_s: float, seed: int) -> list[Arrival]:
    """At least `num` rounds, of whole dialogues by lot, about `rate` a second."""
    dialogues = synthetic.dialogues_of(rounds, MAX_TOKENS)
    rng = np.random.default_rng(seed)
    shuffled = [dialogues[number] for number in rng.permutation(len(dialogues))]
    ends = np.cumsum([len(dialogue) for dialogue in shuffled])
    most = min(int(np.searchsorted(ends, num)) + 1, len(shuffled))
    starts_s = arrivals.poisson(rng, most, rate * most / int(ends[most - 1]))
    return synthetic.multi_turn(shuffled[:most], starts_s, itertools.repeat(pause_s))


def compare(
    setup: Setup, requests: list[Arrival], rate: float, *, num_slots: int, overhead: Overhead
) -> dict[str, Any]:
    """The same requests with pages that are kept for the next round (`cached`), and without."""
    prompt_tokens = sum(request.prompt_len for request in requests)
    found: dict[str, Point] = {}
    for name, allocator in SYSTEMS.items():
        run = runs.run(
            requests,
            setup.cost(overhead),
            setup.config(allocator.name, num_slots),
            allocator,
            POLICIES["fcfs"],
        )
        found[name] = rate_search.point_of(rate, run) | {
            "prompt_tokens_found": float(np.sum(run.cached_lens) / prompt_tokens)
        }
    return found
