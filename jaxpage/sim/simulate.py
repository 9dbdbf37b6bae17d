"""Serving as the engine plans it, on a device that is not here: a cost model says what steps take.

The loop holds the very `plan_step` and `commit_step` of the engine. In place of the model stands
`cost_model.step_seconds`, in place of the host a trace: what is due arrives between two steps, and
where nothing is to be done the clock goes on to the next arrival. The next turn of a conversation
is due a while after the one before is done.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxpage.config import EngineConfig
from jaxpage.paging import priority_queue
from jaxpage.paging.allocator import Allocator
from jaxpage.paging.priority_queue import PriorityQueue, first_key
from jaxpage.scheduling import state as scheduler_state
from jaxpage.scheduling.accounting import record_step
from jaxpage.scheduling.batch import of_slots
from jaxpage.scheduling.beams import num_candidates
from jaxpage.scheduling.one_thread import ON_ONE_THREAD
from jaxpage.scheduling.policies import PolicyFn
from jaxpage.scheduling.state import (
    DONE,
    FREE,
    PATIENT,
    Beams,
    Requests,
    SchedulerState,
    greedy,
    request_row,
)
from jaxpage.scheduling.step import Outcome, Plan, commit_step, plan_step
from jaxpage.sim import branching, clock, decode_runs, step_log
from jaxpage.sim import trace as traces
from jaxpage.sim.clock import Time
from jaxpage.sim.cost_model import CostModel, load_of, step_seconds
from jaxpage.sim.step_log import Step, StepLog
from jaxpage.sim.trace import Trace

MOST_IDLE = 8  # steps that only make way for others


class Served(struct.PyTreeNode):
    """What became of the sequences of a trace, in its `n` rows."""

    first_tokens: Time  # [n], when the first output token was there, `never` before
    finishes: Time  # [n]
    num_preemptions: jax.Array  # i32[n]
    cached_lens: jax.Array  # i32[n], tokens found in the prefix cache at first admission


class Simulation(struct.PyTreeNode):
    """The scheduler's state, and what the world around it knows."""

    scheduler: SchedulerState
    now: Time
    num_arrived: jax.Array  # i32[], sequences of the trace that have rows, or had
    num_done: jax.Array  # i32[], of these
    head: jax.Array  # i32[], of those that follow none the next to arrive
    turns: PriorityQueue  # those that are due by the end of another, by when; of none without such
    numbers: jax.Array  # i32[R], the sequence of the trace in each row
    served: Served
    log: StepLog
    num_planned: jax.Array  # i32[], steps that were; the others were known from those before
    is_steady: jax.Array  # bool[], the next step may begin a run; see `decode_runs`
    num_idle: jax.Array  # i32[], steps without work since the last one with some

    @property
    def is_stuck(self) -> jax.Array:
        """Whether nothing is done although requests wait, `bool[]`: a fault of the scheduler."""
        return self.num_idle > MOST_IDLE


def create(trace: Trace, config: EngineConfig, allocator: Allocator) -> Simulation:
    """Before the first arrival."""
    n, rows = trace.num_rows, config.num_requests

    def zeros(count: int) -> jax.Array:
        return jnp.zeros((count,), jnp.int32)

    return Simulation(
        scheduler=scheduler_state.create(config, allocator),
        now=clock.create(0.0),
        num_arrived=jnp.asarray(0, jnp.int32),
        num_done=jnp.asarray(0, jnp.int32),
        head=trace.next_heads[0],
        turns=priority_queue.create(n if trace.has_followers else 1),
        numbers=jnp.full((rows,), n, jnp.int32),
        served=Served(clock.never((n,)), clock.never((n,)), zeros(n), zeros(n)),
        log=step_log.create(config.log_steps),
        num_planned=jnp.asarray(0, jnp.int32),
        is_steady=jnp.asarray(False),
        num_idle=jnp.asarray(0, jnp.int32),
    )


@partial(
    jax.jit,
    static_argnames=("config", "allocator", "policy", "singly"),
    donate_argnames=("simulation",),
    compiler_options=ON_ONE_THREAD,
)
def simulate_steps(
    simulation: Simulation,
    trace: Trace,
    cost: CostModel,
    *,
    config: EngineConfig,
    allocator: Allocator,
    policy: PolicyFn,
    singly: bool = False,
) -> Simulation:
    """Runs until all sequences are done or the log is full; starts a new log."""
    return _simulate(simulation, trace, cost, config, allocator, policy, singly)


@partial(
    jax.jit,
    static_argnames=("config", "allocator", "policies"),
    donate_argnames=("simulations",),
)
def simulate_each(
    simulations: Simulation,
    trace: Trace,
    cost: CostModel,
    policy: jax.Array,
    *,
    config: EngineConfig,
    allocator: Allocator,
    policies: tuple[PolicyFn, ...],
) -> Simulation:
    """`simulate_steps` of many under `vmap`: all have a first axis of one size.

    Each has its trace, its cost, and of `policies` that of its number in `policy: i32[n]`. Page
    sizes and allocators are shapes and code: they need a program each. The plans are those of each
    alone; what a step takes may be rounded otherwise. On a CPU threads are many times faster
    (`experiments.bench_simulator --vmapped`).
    """

    def simulate(simulation: Simulation, trace: Trace, cost: CostModel, policy: jax.Array):
        def chosen(requests: Requests, computed: jax.Array) -> jax.Array:
            return lax.switch(policy, policies, requests, computed)

        return _simulate(simulation, trace, cost, config, allocator, chosen)

    return jax.vmap(simulate)(simulations, trace, cost, policy)


def _simulate(
    simulation: Simulation,
    trace: Trace,
    cost: CostModel,
    config: EngineConfig,
    allocator: Allocator,
    policy: PolicyFn,
    singly: bool = False,
) -> Simulation:
    log = simulation.log.replace(count=jnp.asarray(0, jnp.int32))

    def goes_on(simulation: Simulation) -> jax.Array:
        is_room = simulation.log.count < config.log_steps
        return is_room & (simulation.num_done < trace.count) & ~simulation.is_stuck

    def step(simulation: Simulation) -> Simulation:
        return simulate_step(simulation, trace, cost, config, allocator, policy, singly)

    # A run of steps begins from the record of one, and a new log has none.
    start = simulation.replace(log=log, is_steady=jnp.asarray(False))
    return lax.while_loop(goes_on, step, start)


def simulate_step(
    simulation: Simulation,
    trace: Trace,
    cost: CostModel,
    config: EngineConfig,
    allocator: Allocator,
    policy: PolicyFn,
    singly: bool = False,
) -> Simulation:
    """What is due arrives, and a step is planned, priced, and committed; before it, those alike.

    With `singly` there are none before it.
    """
    if not singly and decode_runs.can_run(config, allocator):
        simulation = _run_ahead(simulation, trace, cost, config, allocator)
    simulation = arrive(_wait_if_idle(simulation, trace), trace, config, allocator)
    scheduler, plan = plan_step(simulation.scheduler, config, allocator, policy)
    seconds = step_seconds(cost, _load(plan))
    now = clock.after(simulation.now, seconds)
    log = step_log.write(simulation.log, Step(record_step(scheduler, plan), seconds, now))
    outcome = _outcome(trace, simulation.numbers, scheduler.requests, plan, config)
    planned = scheduler
    scheduler = commit_step(scheduler, plan, outcome, allocator, eos_ids=())
    simulation = simulation.replace(
        scheduler=scheduler,
        now=now,
        log=log,
        num_planned=simulation.num_planned + 1,
        is_steady=decode_runs.is_steady(planned, plan, scheduler),
        num_idle=jnp.where(seconds > 0, 0, simulation.num_idle + 1),
    )
    return _note(simulation, trace, plan, config)


def arrive(
    simulation: Simulation, trace: Trace, config: EngineConfig, allocator: Allocator
) -> Simulation:
    """Gives rows to the sequences that are due, those of one request at once or not at all.

    Who finds no row waits outside, in order. A beam has a second row, for what its search keeps.
    """

    def submit_next(simulation: Simulation) -> Simulation:
        number, scheduler = _next(simulation, trace)[0], simulation.scheduler
        row = jnp.argmax(scheduler.requests.phases == FREE).astype(jnp.int32)
        leader = trace.leaders[number]
        of_leader = jnp.argmax(simulation.numbers == leader).astype(jnp.int32)
        prompt, output = trace.prompt_lens[number], trace.output_lens[number]
        positions = jnp.arange(scheduler.requests.tokens.shape[1], dtype=jnp.int32)
        # Where nothing can be shared each is a request of its own, as for the engine's host.
        shares = (leader != number) & (allocator.share is not None)
        new_row = partial(
            request_row,
            jnp.where(positions < prompt, traces.tokens_of(trace, leader, positions), 0),
            prompt,
            final_len=prompt + output,
            reserved_len=trace.reserved_lens[number],
            arrival=simulation.num_arrived - (number - leader),
            ignore_eos=True,
            sampling=greedy(),
            group=jnp.where(shares, of_leader, row),
        )
        numbers = simulation.numbers.at[row].set(number)
        if config.max_beams == 1:
            scheduler = scheduler_state.submit(scheduler, row, new_row())
        else:
            width = trace.widths[number]
            request = new_row(beams=_beams(width, 0.0))
            scheduler = scheduler_state.submit(scheduler, row, request)
            free = jnp.argmax(scheduler.requests.phases == FREE).astype(jnp.int32)
            free = jnp.where(width > 0, free, numbers.shape[0])
            kept = new_row(beams=_beams(width, -jnp.inf), held=True)
            scheduler = scheduler_state.submit(scheduler, free, kept)
            numbers = numbers.at[free].set(trace.num_rows, mode="drop")
        return _leave_outside(simulation, trace, number).replace(
            scheduler=scheduler, num_arrived=simulation.num_arrived + 1, numbers=numbers
        )

    return lax.while_loop(
        lambda simulation: _arrives(simulation, trace, simulation.now), submit_next, simulation
    )


def _beams(width: jax.Array, score: float) -> Beams:
    """Of a row: of a live beam, or with a score that any other betters, kept."""
    return Beams(width, jnp.float32(score), jnp.float32(1), jnp.int32(PATIENT))


def _arrives(simulation: Simulation, trace: Trace, now: Time) -> jax.Array:
    """Whether a sequence of the trace is due, and there are rows for its request."""
    number, time = _next(simulation, trace)
    num_free = jnp.sum(simulation.scheduler.requests.phases == FREE, dtype=jnp.int32)
    is_leader = trace.leaders[number] == number
    rows = trace.num_samples[number] + trace.widths[number]
    has_rows = num_free >= jnp.where(is_leader, rows, 1)
    return clock.is_due(time, now) & has_rows


def _next(simulation: Simulation, trace: Trace) -> tuple[jax.Array, Time]:
    """The sequence that arrives next, and when; at no time if none is known to."""
    number = jnp.minimum(simulation.head, trace.num_rows - 1)
    is_left = simulation.head < trace.count
    time = clock.choose(is_left, trace.arrivals[number], clock.never())
    if not trace.has_followers:
        return number, time
    turn, turn_time = priority_queue.first(simulation.turns), Time(*first_key(simulation.turns))
    # The sequences of a request arrive together.
    is_leader = trace.leaders[number] == number
    is_turn = clock.is_due(turn_time, time) & (is_leader | ~is_left)
    is_turn &= turn_time.seconds < priority_queue.NEVER
    return jnp.where(is_turn, turn, number), clock.choose(is_turn, turn_time, time)


def _leave_outside(simulation: Simulation, trace: Trace, number: jax.Array) -> Simulation:
    """Without the sequence among those that are still to come."""
    is_head = number == simulation.head
    head = jnp.where(is_head, trace.next_heads[number + 1], simulation.head)
    if not trace.has_followers:
        return simulation.replace(head=head)
    turn = jnp.where(is_head, priority_queue.NEVER, number)
    return simulation.replace(head=head, turns=priority_queue.remove(simulation.turns, 0, turn))


def _run_ahead(
    simulation: Simulation,
    trace: Trace,
    cost: CostModel,
    config: EngineConfig,
    allocator: Allocator,
) -> Simulation:
    scheduler, log, now = decode_runs.run_ahead(
        simulation.scheduler,
        simulation.log,
        simulation.now,
        simulation.is_steady,
        partial(_arrives, simulation, trace),
        partial(step_seconds, cost),
        config,
        allocator,
    )
    return simulation.replace(scheduler=scheduler, log=log, now=now)


def _wait_if_idle(simulation: Simulation, trace: Trace) -> Simulation:
    """The clock at the next arrival, if nothing is there to be done before."""
    arrived = simulation.num_arrived
    is_idle = (arrived < trace.count) & (simulation.num_done == arrived)
    later = clock.latest(simulation.now, _next(simulation, trace)[1])
    return simulation.replace(now=clock.choose(is_idle, later, simulation.now))


def _load(plan: Plan):
    moved = plan.moves_out.count + plan.moves_in.count
    return load_of(plan.counts, plan.lengths, plan.samples, moved, plan.copies.count)


def _outcome(
    trace: Trace, numbers: jax.Array, requests: Requests, plan: Plan, config: EngineConfig
) -> Outcome:
    """Tokens as the trace has them, so that who goes on from an answer finds it cached.

    Those that may follow a beam are drawn.
    """
    number = numbers.at[plan.requests].get(mode="fill", fill_value=trace.num_rows)
    position = of_slots(requests.num_tokens, plan.requests)
    outcome = Outcome(
        tokens=traces.tokens_of(trace, number, position),
        logprobs=jnp.zeros(plan.requests.shape, jnp.float32),
        failed=jnp.zeros(plan.requests.shape, jnp.bool_),
    )
    count = num_candidates(config.max_beams, eos_ids=())
    if count == 0:
        return outcome
    searches = plan.samples & (of_slots(requests.beams.widths, plan.requests) > 0)
    last = requests.tokens.at[plan.requests, position - 1].get(mode="fill", fill_value=0)
    leader = trace.leaders.at[number].get(mode="fill", fill_value=0)
    nothing = branching.nothing(position.shape[0], count)
    candidates = lax.cond(
        jnp.any(searches),
        lambda: branching.candidates(trace.branching, leader, position, last, count),
        lambda: nothing,
    )
    return outcome._replace(candidates=candidates)


def _note(simulation: Simulation, trace: Trace, plan: Plan, config: EngineConfig) -> Simulation:
    """Notes who has a first token and who is done, whose rows are free, and next turns due."""
    scheduler, served, now = simulation.scheduler, simulation.served, simulation.now
    requests, rows = scheduler.requests, plan.requests
    nobody = served.num_preemptions.shape[0]
    number = simulation.numbers.at[rows].get(mode="fill", fill_value=nobody)
    is_first = plan.samples & (of_slots(requests.first_steps, rows) == scheduler.step - 1)
    is_done = plan.samples & (of_slots(requests.phases, rows) == DONE)
    first, done = jnp.where(is_first, number, nobody), jnp.where(is_done, number, nobody)

    def at(times: Time, which: jax.Array) -> Time:
        return jax.tree.map(lambda kept, new: kept.at[which].set(new, mode="drop"), times, now)

    served = Served(
        first_tokens=at(served.first_tokens, first),
        finishes=at(served.finishes, done),
        num_preemptions=served.num_preemptions.at[done].set(
            of_slots(requests.num_preemptions, rows), mode="drop"
        ),
        cached_lens=served.cached_lens.at[done].set(
            of_slots(requests.cached_lens, rows), mode="drop"
        ),
    )
    if config.max_beams > 1:  # what a search kept was in no slot
        phases = jnp.where(requests.phases == DONE, FREE, requests.phases)
    else:
        gone = jnp.where(is_done, rows, requests.phases.shape[0])
        phases = requests.phases.at[gone].set(FREE, mode="drop")
    requests = requests.replace(phases=phases)
    simulation = simulation.replace(
        scheduler=scheduler.replace(requests=requests),
        served=served,
        num_done=simulation.num_done + jnp.sum(is_done, dtype=jnp.int32),
    )
    return _await_turns(simulation, trace, done) if trace.has_followers else simulation


def _await_turns(simulation: Simulation, trace: Trace, done: jax.Array) -> Simulation:
    """With the turns that follow `done: i32[B]`, each at its time; a turn of the loop for each."""
    n = trace.num_rows
    followers = trace.followers.at[done].get(mode="fill", fill_value=n)

    def await_next(carry):
        followers, turns = carry
        slot = jnp.argmax(followers < n)
        number = followers[slot]
        time = clock.add(simulation.now, trace.arrivals[number])
        turns = priority_queue.put(turns, 0, number, jnp.stack([time.seconds, time.nanos]))
        return followers.at[slot].set(n), turns

    start = (followers, simulation.turns)
    turns = lax.while_loop(lambda carry: jnp.any(carry[0] < n), await_next, start)[1]
    return simulation.replace(turns=turns)
