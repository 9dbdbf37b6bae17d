"""A scheduler with its queue and a pretended executor, which draws from a script.

No model is needed: what request `i` gets at position `p` is written down beforehand.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scheduler_oracle import Ask

from jaxpage.config import EngineConfig
from jaxpage.paging.allocator import ALLOCATORS, Allocator
from jaxpage.scheduling import state as scheduler_state
from jaxpage.scheduling.accounting import record_step
from jaxpage.scheduling.policies import POLICIES
from jaxpage.scheduling.state import FINISH_REASONS, greedy, waiting_request
from jaxpage.scheduling.step import Outcome, commit_step, plan_step

EOS_IDS = (7, 8)
PHASES = ("free", "waiting", "preempted", "running", "done")
MOST_REQUESTS = 8  # of one workload
MOST_STEPS = 400

SMALL = EngineConfig(
    num_slots=4, num_pages=9, page_size=2, pages_per_slot=6, num_requests=5, token_buckets=(4, 7)
)
POOLS = {"paged": 9, "oracle": 16, "pow2": 16, "max": 16}  # of SMALL; 8 pages are one "max" run
ROOMY = dataclasses.replace(SMALL, num_pages=24)  # only tokens and slots are scarce
TIGHT = EngineConfig(
    num_slots=3, num_pages=8, page_size=1, pages_per_slot=8, num_requests=6, token_buckets=(6,)
)


def preempted_first(requests, computed):
    """Not one of ours: requests that lost their pages go before all others."""
    del computed
    return -requests.num_preemptions


CHOICES = POLICIES | {"preempted_first": preempted_first}

every_allocator = pytest.mark.parametrize("allocator", ALLOCATORS)
every_policy = pytest.mark.parametrize("policy", POLICIES)
invariant_or_not = pytest.mark.parametrize("batch_invariant", (False, True))

submit = jax.jit(scheduler_state.submit)
forget = jax.jit(scheduler_state.forget)


def invariant(config: EngineConfig) -> EngineConfig:
    return dataclasses.replace(
        config, batch_invariant=True, token_buckets=config.token_buckets[-1:]
    )


@functools.cache
def compile_step(config: EngineConfig, allocator: Allocator) -> Callable:
    """One step around an executor that reads a script; the policy is chosen when it runs.

    What the executor gives for slots that sample nothing is made to hurt whoever reads it.
    """

    def step(state, policy_index, outputs, fails):
        def policy(requests, computed):
            return lax.switch(policy_index, list(CHOICES.values()), requests, computed)

        planned, plan = plan_step(state, config, allocator, policy)
        requests = planned.requests
        arrival = requests.arrivals.at[plan.requests].get(mode="fill", fill_value=0)
        position = requests.num_tokens.at[plan.requests].get(mode="fill", fill_value=0)
        outcome = Outcome(
            tokens=jnp.where(plan.samples, outputs[arrival, position], EOS_IDS[0]),
            logprobs=jnp.where(plan.samples, logprob_at(arrival, position), jnp.nan),
            failed=fails[arrival, position] | ~plan.samples,
        )
        after = commit_step(planned, plan, outcome, allocator, EOS_IDS)
        violations = [jnp.sum(allocator.violations(s.table)) for s in (planned, after)]
        seen = {
            "plan": plan,
            "requests": after.requests,
            "slots": after.slots,
            "lengths": after.table.lengths,
            "page_indices": after.table.page_indices,
            "num_free": after.table.num_free,
            "step": after.step,
            "violations": jnp.stack(violations),
            "record": record_step(planned, plan),
        }
        return after, seen

    return jax.jit(step)


def logprob_at(number, position):
    """A log-probability that no other draw has."""
    return -(number * 100 + position) / 8


class Serving:
    """A scheduler with its queue and its pretended executor; requests are named by arrival."""

    def __init__(self, config: EngineConfig, allocator: str = "paged", policy: str = "fcfs"):
        self.config = config
        self.policy_index = np.int32(list(CHOICES).index(policy))
        self.allocator = ALLOCATORS[allocator]
        self.step_fn = compile_step(config, self.allocator)
        self.state = scheduler_state.create(config, self.allocator)
        self.outputs = np.zeros((MOST_REQUESTS, config.max_seq_len), np.int32)
        self.fails = np.zeros((MOST_REQUESTS, config.max_seq_len), bool)
        self.rows: dict[int, int] = {}  # of the queue, by arrival
        self.num_submitted = 0

    def submit(self, *asks: Ask) -> None:
        for ask in asks:
            number, self.num_submitted = self.num_submitted, self.num_submitted + 1
            for i, token in enumerate(ask.outputs):
                self.outputs[number, len(ask.prompt) + i] = token
                self.fails[number, len(ask.prompt) + i] = i == ask.fails_at
            row = min(set(range(self.config.num_requests)) - set(self.rows.values()))
            self.rows[number] = row
            reserved = self.allocator.reserve(
                jnp.int32(len(ask.prompt)), jnp.int32(ask.final_len), self.config.max_seq_len
            )
            request = waiting_request(
                ask.prompt,
                final_len=ask.final_len,
                reserved_len=int(reserved),
                max_len=self.config.max_seq_len,
                arrival=number,
                ignore_eos=ask.ignore_eos,
                group=row,
                priority=ask.priority,
                sampling=greedy(),
            )
            self.state = submit(self.state, np.int32(row), request)

    @property
    def has_room(self) -> bool:
        return len(self.rows) < self.config.num_requests

    def forget(self, number: int) -> None:
        self.state = forget(self.state, np.int32(self.rows.pop(number)))

    def step(self) -> dict:
        self.state, seen = self.step_fn(self.state, self.policy_index, self.outputs, self.fails)
        self.seen = jax.tree.map(np.asarray, seen)
        assert self.seen["violations"].tolist() == [0, 0]
        return self.seen

    def planned(self) -> dict[int, int]:
        """Tokens of the last step by request, those that run and brought none included."""
        plan = self.seen["plan"]
        counts = zip(plan.requests.tolist(), plan.counts.tolist(), strict=True)
        number_of = {row: number for number, row in self.rows.items()}
        return {number_of[row]: count for row, count in counts if row in number_of}

    def run(self, num_steps: int) -> list[dict[int, int]]:
        """Makes steps and returns what each planned."""
        plans = []
        for _ in range(num_steps):
            self.step()
            plans.append(self.planned())
        return plans

    def finish(self) -> None:
        for _ in range(MOST_STEPS):
            if all(self.phase(number) == "done" for number in self.rows):
                return
            self.step()
        pytest.fail("the requests never end")

    def of(self, name: str, number: int):
        return np.asarray(getattr(self.state.requests, name))[self.rows[number]]

    def phase(self, number: int) -> str:
        return PHASES[self.of("phases", number)]

    def reason(self, number: int) -> str:
        return FINISH_REASONS[self.of("finish_reasons", number)]

    def tokens(self, number: int) -> list[int]:
        return self.of("tokens", number)[: self.of("num_tokens", number)].tolist()
