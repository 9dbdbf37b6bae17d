"""Dialogues whose rounds follow each other: what keeping their KV between rounds would give.

Beyond the paper, which keeps none. Histories are whole here and not their last 1,024 tokens, for a
history that is cut shares no prefix with itself. The rounds of a dialogue are those that fit into
`MAX_TOKENS`; a next one arrives when an answer as slow as the limit would be there, and a pause has
passed. Whole dialogues begin at random instants (Poisson).
"""

from typing import Any

import numpy as np

from experiments import rate_search
from experiments.paper_setups import MAX_TOKENS, PAGE_SIZE, Setup
from experiments.rate_search import Point
from jaxpage.paging.allocator import ALLOCATORS, CACHED
from jaxpage.scheduling.policies import POLICIES
from jaxpage.sim import arrivals, runs
from jaxpage.sim.lengths import Rounds
from jaxpage.sim.trace import Arrival

SYSTEMS = {"paged": ALLOCATORS["paged"], "cached": CACHED["lru"]}


def requests_of(
    rounds: Rounds, num: int, rate: float, seconds_per_token: float, pause_s: float, seed: int
) -> list[Arrival]:
    """At least `num` rounds, of whole dialogues by lot, `rate` a second, in the order of arrival.

    Content is numbered by page (`tokens_each=PAGE_SIZE`), and each dialogue has numbers of its own.
    """
    rounds = rounds.take(rounds.histories + rounds.said + rounds.answers <= MAX_TOKENS)
    rng = np.random.default_rng(seed)
    _, firsts, counts = np.unique(rounds.conversations, return_index=True, return_counts=True)
    order = rng.permutation(len(firsts))
    most = min(int(np.searchsorted(np.cumsum(counts[order]), num)) + 1, len(order))
    chosen = order[:most]
    starts_s = arrivals.poisson(rng, most, rate * most / int(np.sum(counts[chosen])))
    requests = []
    for dialogue, (now_s, which) in enumerate(zip(starts_s.tolist(), chosen, strict=True)):
        first_page = dialogue * (MAX_TOKENS // PAGE_SIZE)
        for row in range(firsts[which], firsts[which] + counts[which]):
            prompt, output = int(rounds.histories[row] + rounds.said[row]), int(rounds.answers[row])
            pages = -(-(prompt + output) // PAGE_SIZE)
            content = range(first_page, first_page + pages)
            requests.append(Arrival(now_s, prompt, output, content))
            now_s += output * seconds_per_token + pause_s
    return sorted(requests, key=lambda request: request.arrival_s)


def compare(
    setup: Setup, requests: list[Arrival], rate: float, *, num_slots: int, overhead_s: float
) -> dict[str, Any]:
    """The same requests with pages that are kept for the next round (`cached`), and without."""
    prompt_tokens = sum(request.prompt_len for request in requests)
    found: dict[str, Point] = {}
    for name, allocator in SYSTEMS.items():
        run = runs.run(
            requests,
            setup.cost(overhead_s),
            setup.config(allocator.name, num_slots),
            allocator,
            POLICIES["fcfs"],
            tokens_each=PAGE_SIZE,
        )
        found[name] = rate_search.point_of(rate, run) | {
            "prompt_tokens_found": float(np.sum(run.cached_lens) / prompt_tokens)
        }
    return found
