"""Beam search in the simulator: candidates drawn by a stated law, decided by the scheduler."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_engine import CONFIG

from experiments.measure_branching import Seen, branching_of
from jaxpage.config import ConfigError, EngineConfig
from jaxpage.paging.allocator import ALLOCATORS
from jaxpage.scheduling.policies import fcfs
from jaxpage.scheduling.state import FREE
from jaxpage.sim import branching, clock, cost_model, simulate
from jaxpage.sim import trace as traces
from jaxpage.sim.branching import MEASURED
from jaxpage.sim.cost_model import CostModel, Load
from jaxpage.sim.device import DEVICES
from jaxpage.sim.shapes import SHAPES
from jaxpage.sim.simulate import Simulation
from jaxpage.sim.trace import Arrival, Trace

PAGED = ALLOCATORS["paged"]
SEARCHING = replace(CONFIG, num_slots=6, num_requests=20, num_pages=13, max_beams=3, log_steps=1)
COST = cost_model.create(SHAPES["opt-13b"], DEVICES["a100-40gb"], page_size=CONFIG.page_size)
SEARCHES = [Arrival(0.0, 9, 7, num_beams=3), Arrival(0.0, 5, 9, num_beams=2), Arrival(0.0, 4, 8)]
candidates = jax.jit(branching.candidates, static_argnames="count")


def start(requests, config: EngineConfig, allocator=PAGED) -> tuple[Trace, Simulation]:
    trace = traces.create(requests, config, allocator)
    return trace, simulate.create(trace, config, allocator)


def steps(requests, config: EngineConfig, allocator=PAGED):
    """The simulation after every look of the host, until all are done."""
    trace, simulation = start(requests, config, allocator)
    while int(simulation.num_done) < int(trace.count):
        simulation = simulate.simulate_steps(
            simulation, trace, COST, config=config, allocator=allocator, policy=fcfs
        )
        assert not bool(simulation.is_stuck)
        yield simulation


def column(simulation: Simulation, name: str) -> int:
    return int(getattr(simulation.log.steps.record, name)[0])


def plain_search(number: int, prompt_last: int, request: Arrival) -> list[tuple[list[int], float]]:
    """Output and log probability of the beams at the end, best first: in plain Python."""
    count = 2 * SEARCHING.max_beams
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    for new in range(request.output_len):
        children = []
        for output, total in beams:
            last = output[-1] if output else prompt_last
            where = (number, request.prompt_len + new, last)
            asked = [jnp.asarray([value], jnp.int32) for value in where]
            tokens, logprobs = candidates(MEASURED, *asked, count=count)
            for token, logprob in zip(tokens[0].tolist(), logprobs[0].tolist(), strict=True):
                children.append(([*output, token], total + logprob))
        beams = sorted(children, key=lambda child: -child[1])[: request.num_beams]
    return beams


def test_searches_end_at_their_length_with_the_best_of_plain_python():
    """Although pages run out and searches are preempted."""
    broken, shared, beams_known, preempted = [], 0, [], 0
    for simulation in steps(SEARCHES, SEARCHING):
        scheduler = simulation.scheduler
        broken.append(int(jnp.sum(PAGED.violations(scheduler.table))))
        shared += column(simulation, "named_pages") > column(simulation, "held_pages")
        preempted += column(simulation, "num_preempted")
        of_first = np.asarray(scheduler.requests.num_tokens)[[0, 2, 4]]
        beams_known.append(len(set(of_first.tolist())))
    assert set(broken) == {0} and shared > 5
    assert set(beams_known) == {1}  # its beams are always of one length
    assert preempted > 0
    assert int(scheduler.table.num_free) == SEARCHING.num_pages
    assert bool(jnp.all(scheduler.requests.phases == FREE))
    assert not np.isnan(clock.to_seconds(simulation.served.finishes)[:6]).any()
    held = jax.tree.map(np.asarray, scheduler.requests)
    for number, first_row, request in ((0, 0, SEARCHES[0]), (3, 6, SEARCHES[1])):
        prompt_len, final = request.prompt_len, request.prompt_len + request.output_len
        plain = plain_search(number, int(held.tokens[first_row, prompt_len - 1]), request)
        # After each beam's row comes one of those for what is kept.
        kept = range(first_row + 1, first_row + 2 * request.num_beams, 2)
        for row, (output, total) in zip(kept, plain, strict=True):
            assert held.num_tokens[row] == final
            assert held.tokens[row, prompt_len:final].tolist() == output
            logprobs = held.logprobs[row, prompt_len:final]
            assert np.sum(logprobs) == pytest.approx(total, abs=1e-4)


@pytest.mark.slow
def test_a_trace_without_beams_is_served_alike_whether_there_could_be_some():
    requests = [Arrival(0.02 * i, 5 + i, 9, num_samples=1 + i % 3) for i in range(4)]
    served = []
    for config in (SEARCHING, replace(SEARCHING, max_beams=1)):
        *_, last = steps(requests, config)
        served.append(last.served)
        assert int(last.served.num_preemptions.sum()) > 0
    jax.tree.map(np.testing.assert_array_equal, *served)


@pytest.mark.parametrize(("allocator", "groups"), [("paged", [0, 0, 0, 3]), ("oracle", range(4))])
def test_samples_are_one_group_only_where_they_can_share(allocator, groups):
    """A follower waits for the prompt of its leader, which contiguous memory cannot give it."""
    config, memory = replace(SEARCHING, max_beams=1, num_pages=16), ALLOCATORS[allocator]
    requests = [Arrival(0.0, 5, 4, num_samples=3), Arrival(0.0, 5, 4)]
    trace, simulation = start(requests, config, memory)
    arrived = simulate.arrive(simulation, trace, config, memory)
    assert np.asarray(arrived.scheduler.requests.groups)[:4].tolist() == list(groups)


def seen_of(law: branching.Branching, num_searches: int, width: int) -> Seen:
    search = np.repeat(np.arange(num_searches, dtype=np.int32), width)
    last = np.tile(np.arange(width, dtype=np.int32), num_searches)
    position = jnp.zeros_like(search)
    drawn = candidates(law, jnp.asarray(search), position, jnp.asarray(last), count=12)
    assert int(jnp.max(drawn.tokens)) < -1
    assert len(np.unique(drawn.tokens)) > 0.999 * drawn.tokens.size
    return Seen(search.astype(np.int64), np.asarray(drawn.logprobs, np.float64))


def test_draws_are_sorted_log_probabilities_and_follow_the_law():
    law = branching.Branching(*map(jnp.float32, (3.0, 1.9, 0.5)))
    seen = seen_of(law, num_searches=5000, width=3)
    assert (np.diff(seen.logprobs, axis=1) <= 0).all()
    assert np.exp(seen.logprobs).sum(axis=1).max() < 1 + 1e-5  # of rounding
    found = branching_of(seen)
    # Five standard errors, with exponential gaps (whose deviation is their mean) of which about
    # half are shared; the correlation's is that of as many pairs of heavy tails.
    assert found.first_gap == pytest.approx(3.0, rel=5 / 5000**0.5)
    assert found.gap == pytest.approx(1.9, rel=5 / 5000**0.5)
    assert found.common == pytest.approx(0.5, abs=0.08)
    same = seen_of(branching.Branching(*map(jnp.float32, (3.0, 1.9, 1.0))), 100, 3)
    np.testing.assert_array_equal(same.logprobs[::3], same.logprobs[1::3])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"num_beams": 4}, "num_beams=4 must be up to 3, the least of max_beams and half of"),
        ({"num_beams": 2, "num_samples": 2}, "num_samples=2 and num_beams=2: a search draws no"),
        ({"num_beams": 0}, "num_beams=0 must be positive"),
        ({"num_beams": 7}, "7 sequences are more than the 6 that can run"),
    ],
)
def test_searches_that_cannot_be_are_refused(wrong, words):
    with pytest.raises(ConfigError, match=words):
        traces.create([Arrival(0.0, 4, 2, **wrong)], SEARCHING, PAGED)


def test_beams_that_cannot_share_pay_for_copies_by_what_they_read():
    decodes = load(tokens=8, samples=8, decodes=8, decode_context=800)
    plain, copying = (cost_of(share) for share in (0.0, 0.25))
    # A quarter of 800 tokens is 50 pages of 4.
    copied = load(tokens=8, samples=8, decodes=8, decode_context=800, copied_pages=50)
    assert cost_model.step_seconds(copying, decodes) == cost_model.step_seconds(plain, copied)
    assert cost_model.step_seconds(copying, decodes) > cost_model.step_seconds(plain, decodes)


def cost_of(copied_share: float) -> CostModel:
    return cost_model.create(
        SHAPES["opt-13b"], DEVICES["a100-40gb"], page_size=4, copied_share=copied_share
    )


def load(**sums: float) -> Load:
    return Load(**{name: jnp.float32(sums.get(name, 0.0)) for name in Load._fields})
