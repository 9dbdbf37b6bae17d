"""The scheduler under a cost model: it plans what the engine plans, and its times add up."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_engine import CONFIG, PROMPTS, REQUESTS, build, setup_of

from jaxpage.config import ConfigError, EngineConfig
from jaxpage.paging.allocator import ALLOCATORS, CACHED
from jaxpage.scheduling.policies import fcfs, shortest_first
from jaxpage.sim import clock, cost_model, simulate
from jaxpage.sim import trace as traces
from jaxpage.sim.cost_model import CostModel, Load, Overhead
from jaxpage.sim.device import DEVICES
from jaxpage.sim.shapes import SHAPES
from jaxpage.sim.simulate import Simulation
from jaxpage.sim.trace import Arrival, Trace

COST = cost_model.create(SHAPES["opt-13b"], DEVICES["a100-40gb"], page_size=CONFIG.page_size)
PAGED = ALLOCATORS["paged"]
TIGHT = replace(CONFIG, num_pages=12)  # so that sequences are preempted


def run(
    requests,
    config: EngineConfig = CONFIG,
    allocator=PAGED,
    cost: CostModel = COST,
    tokens_each=1,
    singly=False,
) -> tuple[Trace, Simulation, list[dict[str, np.ndarray]]]:
    """Until all is done; the records of all steps, with their seconds."""
    trace = traces.create(requests, config, allocator, tokens_each=tokens_each)
    simulation = simulate.create(trace, config, allocator)
    logs = []
    while int(simulation.num_done) < int(trace.count):
        simulation = step(simulation, trace, config, allocator, cost, singly)
        assert not bool(simulation.is_stuck)
        rows, steps = slice(int(simulation.log.count)), simulation.log.steps
        columns = {k: np.array(v[rows]) for k, v in steps.record._asdict().items()}
        logs.append(columns | {"seconds": np.array(steps.seconds[rows])})
    return trace, simulation, logs


def step(simulation, trace, config, allocator, cost=COST, singly=False) -> Simulation:
    return simulate.simulate_steps(
        simulation, trace, cost, config=config, allocator=allocator, policy=fcfs, singly=singly
    )


def joined(logs, name: str) -> np.ndarray:
    return np.concatenate([log[name] for log in logs])


@pytest.mark.in_ci("paged-config0")
@pytest.mark.parametrize(
    ("allocator", "config"),
    [
        ("paged", replace(TIGHT, preemption="swap", host_pages=24)),
        ("lru", TIGHT),
        ("lru", replace(TIGHT, preemption="fine", host_pages=8, transfer_budget=1)),
        ("pow2", CONFIG),
    ],
)
def test_engine_and_simulator_make_identical_plans(allocator, config):
    """They do all that a plan says, step by step: to tables, queue and host, and in the records."""
    config = replace(config, log_steps=1)
    setup = setup_of(config, allocator=allocator)
    said = build(setup).serve(REQUESTS)[0]
    engine = build(setup)
    for row, request in enumerate(REQUESTS):
        engine.submit(request, [row])
    requests = [
        Arrival(0.0, len(prompt), 9, content=(*prompt, *result.output_ids))
        for prompt, result in zip(PROMPTS, said, strict=True)
    ]
    trace = traces.create(requests, config, setup.allocator)
    simulation = simulate.create(trace, config, setup.allocator)
    records = []
    while int(simulation.num_done) < len(REQUESTS):
        engine.advance(1)
        simulation = step(simulation, trace, config, setup.allocator)
        served, simulated = engine.state.scheduler, simulation.scheduler
        same = np.testing.assert_array_equal
        jax.tree.map(same, served.table, simulated.table)
        same(served.slots, simulated.slots)
        for name in ("tokens", "num_tokens", "computed_lens", "first_steps", "final_steps"):
            same(getattr(served.requests, name), getattr(simulated.requests, name), name)
        jax.tree.map(same, engine.state.log.records, simulation.log.steps.record)
        records.append({k: int(v[0]) for k, v in simulation.log.steps.record._asdict().items()})
    assert not bool(jnp.any(engine.state.scheduler.unfinished))
    assert any(record["num_preempted"] for record in records) == (config.num_pages < 24)
    assert any(record["moved_in"] for record in records) == (config.host_pages > 0)
    np.testing.assert_array_equal(
        simulation.served.cached_lens[:6], [result.num_cached_tokens for result in said]
    )


@pytest.mark.in_ci("paged-config2")
@pytest.mark.parametrize(
    ("allocator", "config"),
    [
        ("paged", CONFIG),
        ("paged", TIGHT),
        ("paged", replace(TIGHT, headroom_pages=1, log_steps=5)),
        ("paged", replace(TIGHT, preemption="fine", host_pages=8)),
        ("pow2", replace(CONFIG, num_pages=28)),
    ],
)
def test_runs_of_decode_steps_are_what_steps_taken_singly_are(allocator, config):
    """To the bit: when each request was served, and every record of every step."""
    num_together = 0
    for seed in range(4):
        rng = np.random.default_rng(seed)
        gaps_s = rng.exponential([0.02, 0.3, 2.0][seed % 3], 24)
        requests = [
            Arrival(at_s, *rng.integers(1, 12, 2).tolist(), num_samples=1 + i % 2)
            for i, at_s in enumerate(np.cumsum(gaps_s).tolist())
        ]
        _, singly, each = run(requests, config, ALLOCATORS[allocator], singly=True)
        _, together, runs = run(requests, config, ALLOCATORS[allocator])
        same = np.testing.assert_array_equal
        jax.tree.map(same, singly.served, together.served)
        jax.tree.map(same, singly.now, together.now)
        for name in each[0]:
            same(joined(each, name), joined(runs, name), name)
        num_together += len(joined(runs, "step")) - int(together.num_planned)
        assert int(singly.num_planned) == len(joined(each, "step"))
    assert num_together > 40


def test_a_request_alone_takes_the_sum_of_its_steps():
    _, simulation, logs = run([Arrival(100.0, 7, 3)])
    np.testing.assert_array_equal(joined(logs, "num_tokens"), [7, 1, 1])
    prefill = load(tokens=7, samples=1, prefill_tokens=7, prefill_pairs=28, prefill_context=7)
    decodes = [
        load(tokens=1, samples=1, decodes=1, decode_context=length, prefill_tiles=0)
        for length in (8, 9)
    ]
    prices = [float(cost_model.step_seconds(COST, each)) for each in (prefill, *decodes)]
    np.testing.assert_allclose(joined(logs, "seconds"), prices, rtol=1e-6)
    served = simulation.served
    assert clock.to_seconds(served.first_tokens)[0] == pytest.approx(100 + prices[0], abs=1e-8)
    assert clock.to_seconds(served.finishes)[0] == pytest.approx(100 + sum(prices), abs=1e-8)


def load(**sums: float) -> Load:
    some = dict.fromkeys(Load._fields, 0.0) | {"prefill_tiles": 1.0} | sums
    return Load(**{name: jnp.float32(value) for name, value in some.items()})


def test_the_clock_waits_for_arrivals_and_for_nothing_else():
    _, simulation, logs = run([Arrival(0.0, 4, 2), Arrival(50.0, 4, 2), Arrival(50.0, 4, 2)])
    firsts = clock.to_seconds(simulation.served.first_tokens)
    assert firsts[0] < 1 and 50 < firsts[1] < 51 and firsts[1] == firsts[2]
    assert len(joined(logs, "step")) == 4
    busy_s = joined(logs, "seconds").astype(np.float64).sum()
    idle_s = 50 - clock.to_seconds(simulation.served.finishes)[0]
    assert float(clock.to_seconds(simulation.now)) == pytest.approx(busy_s + idle_s, abs=1e-7)


def test_who_arrives_while_a_step_runs_joins_the_next():
    _, simulation, logs = run([Arrival(0.0, 4, 3), Arrival(1e-9, 4, 3)])
    np.testing.assert_array_equal(joined(logs, "num_running"), [1, 2, 2, 1])
    assert bool(jnp.all(simulation.served.finishes.seconds[:2] == 0))


def test_who_finds_no_row_waits_outside_and_is_served_in_order():
    config = replace(CONFIG, num_requests=2, num_slots=2)
    _, simulation, _ = run([Arrival(0.0, 4, 5 + i % 3) for i in range(9)], config)
    firsts = clock.to_seconds(simulation.served.first_tokens)[:9]
    assert (np.diff(firsts) >= 0).all()
    assert int(simulation.num_arrived) == int(simulation.num_done) == 9


def test_samples_arrive_together_and_share_their_prompt():
    config = replace(CONFIG, num_requests=5)
    requests = [Arrival(0.0, 9, 4, num_samples=3), Arrival(0.0, 9, 4, num_samples=3)]
    trace, simulation, logs = run(requests, config)
    np.testing.assert_array_equal(trace.leaders[:6], [0, 0, 0, 3, 3, 3])
    # Three rows are left of five, too few for the second until the first is done.
    assert joined(logs, "num_running").max() == 3
    # A prompt once each, and then a token a sequence.
    assert joined(logs, "num_tokens").sum() == 2 * (9 + 3 * 3)
    firsts = clock.to_seconds(simulation.served.first_tokens)
    assert firsts[0] == firsts[1] == firsts[2] < firsts[3]


def test_content_that_begins_alike_is_found_and_no_other():
    config, lru = replace(CONFIG, num_pages=48), CACHED["lru"]
    requests = [
        Arrival(0.0, 16, 4, content=(7, 8)),
        Arrival(10.0, 16, 4, content=(7, 9)),
        Arrival(20.0, 16, 4),
        Arrival(30.0, 16, 4),
    ]
    _, simulation, _ = run(requests, config, lru, tokens_each=8)
    np.testing.assert_array_equal(simulation.served.cached_lens[:4], [0, 8, 0, 0])


@pytest.mark.slow
def test_where_the_host_reads_changes_nothing():
    requests = [Arrival(0.01 * i, 5 + i, 9) for i in range(7)]
    once = run(requests, TIGHT)[1]
    often = run(requests, replace(TIGHT, log_steps=3))[1]
    jax.tree.map(np.testing.assert_array_equal, once.served, often.served)
    assert int(once.served.num_preemptions.sum()) > 0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ([], "at least one request"),
        ([Arrival(1.0, 4, 2), Arrival(0.5, 4, 2)], "request 1 arrives before"),
        ([Arrival(-1.0, 4, 2)], "times must be from 0"),
        ([Arrival(0.0, 0, 2)], "request 0: prompt_len=0 must be positive"),
        ([Arrival(0.0, 4, 45)], r"4 \+ 45 tokens are more than the 48 of a slot"),
        ([Arrival(0.0, 4, 40, num_samples=4)], "request 0 can need 41 pages of the 24"),
        ([Arrival(0.0, 4, 2, num_samples=5)], "5 sequences are more than the 4"),
    ],
)
def test_a_trace_that_cannot_be_served_is_refused(wrong, words):
    with pytest.raises(ConfigError, match=words):
        traces.create(wrong, CONFIG, PAGED)


def test_a_run_that_is_larger_than_the_pool_is_refused():
    config = replace(CONFIG, num_pages=15, pages_per_slot=12)
    request = [Arrival(0.0, 30, 6)]  # 9 pages, so a run of 16
    traces.create(request, config, PAGED)
    with pytest.raises(ConfigError, match="needs a run of 16 pages, a power of two, of the 15"):
        traces.create(request, config, ALLOCATORS["oracle"])


def test_simulations_under_vmap_make_the_plans_of_each_alone():
    """Of other arrivals, lengths, hosts and policies; the price of a step may round otherwise."""
    rng, policies = np.random.default_rng(5), (fcfs, shortest_first)
    cases = []
    for number in range(3):
        times = np.cumsum(rng.exponential(0.05 * (number + 1), 9))
        prompts, outputs = rng.integers(1, 14, (2, 9)).tolist()
        requests = list(map(Arrival, times.tolist(), prompts, outputs))
        cost = cost_of_host(0.01 * number)
        cases.append((traces.create(requests, TIGHT, PAGED), cost, number % 2))

    def stacked(trees):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    trace, cost, policy = map(stacked, zip(*cases, strict=True))
    starts = stacked([simulate.create(each, TIGHT, PAGED) for each, _, _ in cases])
    together = simulate.simulate_each(
        starts, trace, cost, policy, config=TIGHT, allocator=PAGED, policies=policies
    )
    assert np.array_equal(together.num_done, trace.count)
    for number, (trace, cost, policy) in enumerate(cases):
        alone = simulate.simulate_steps(
            simulate.create(trace, TIGHT, PAGED), trace, cost,
            config=TIGHT, allocator=PAGED, policy=policies[policy],
        )  # fmt: skip
        found = jax.tree.map(lambda leaf, number=number: leaf[number], together)
        rows = slice(int(alone.log.count))
        assert int(found.log.count) == int(alone.log.count) > 20
        for name, column in alone.log.steps.record._asdict().items():
            assert np.array_equal(getattr(found.log.steps.record, name)[rows], column[rows]), name
        # A price is a sum of some twenty float32.
        np.testing.assert_allclose(
            found.log.steps.seconds[rows], alone.log.steps.seconds[rows], 20 * 2**-24
        )


def cost_of_host(step_s: float) -> CostModel:
    return COST.replace(overhead=Overhead(jnp.float32(step_s), jnp.float32(0)))
