"""The scheduler's whole memory: requests by number, sequences by slot, and the page table.

A request keeps its prompt and what it has generated in one row of `tokens`, so that a preempted
one is computed again from there: nothing else has to be saved.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike

from jaxpage.config import EngineConfig, require
from jaxpage.paging.allocator import Allocator, Table

# Phases of a request.
FREE, WAITING, PREEMPTED, RUNNING, DONE, HELD = range(6)  # HELD: what a beam search keeps

# Why a request is done.
NOT_DONE, STOP, LENGTH, ERROR, CANCELLED = range(5)
FINISH_REASONS = ("", "stop", "length", "error", "cancelled")

# When a beam search is over that has kept as many sequences as it has beams: at once; when no beam
# would be better if it ended now; or when none can come to be. Beside each what a user writes, as
# in transformers, for `early_stopping`.
IMPATIENT, PATIENT, EXHAUSTIVE = range(3)
PATIENCE: dict[bool | str, int] = {True: IMPATIENT, False: PATIENT, "never": EXHAUSTIVE}


class Sampling(struct.PyTreeNode):
    """How to choose the next token, for each of `n` requests or slots.

    `temperature` 0 means greedy; `top_k` 0 and `top_p` 1 mean no cut; `repetition_penalty` 1 means
    none. `seed` is the request's own: no two draws of it share a key, whoever shares the batch.
    """

    temperature: jax.Array  # f32[n]
    top_k: jax.Array  # i32[n]
    top_p: jax.Array  # f32[n]
    repetition_penalty: jax.Array  # f32[n]
    seed: jax.Array  # u32[n]


def greedy() -> Sampling:
    """The likeliest token always, for one request; scalars."""
    return Sampling(
        temperature=jnp.float32(0),
        top_k=jnp.int32(0),
        top_p=jnp.float32(1),
        repetition_penalty=jnp.float32(1),
        seed=jnp.uint32(0),
    )


class Beams(struct.PyTreeNode):
    """Beam search, for each of `n` sequences; see `scheduling.beams`."""

    widths: jax.Array  # i32[n], beams of its request; 0 where none are searched
    scores: jax.Array  # f32[n], log probability of all output; with length penalty where HELD
    length_penalties: jax.Array  # f32[n], the power of the length that divides a score
    patience: jax.Array  # i32[n], what it waits for once as many have ended as there are beams


class Requests(struct.PyTreeNode):
    """All sequences held, `R` rows; a row is reused once its sequence is done and read.

    Most requests are one sequence, and the words are one here. A request that wants several has as
    many rows, of equal arrival and prompt; a beam search has twice its width.
    """

    tokens: jax.Array  # i32[R, N], prompt, then output
    logprobs: jax.Array  # f32[R, N], of output tokens, at their positions
    prompt_lens: jax.Array  # i32[R]
    num_tokens: jax.Array  # i32[R], tokens known: prompt and output so far
    final_lens: jax.Array  # i32[R], tokens at which the request ends by length
    reserved_lens: jax.Array  # i32[R], tokens whose memory it is given if all is given at once
    salts: jax.Array  # i32[R], only requests with the same may share cached pages
    cached_lens: jax.Array  # i32[R], tokens that were cached when it was first admitted
    computed_lens: jax.Array  # i32[R], tokens that have ever been computed, or found cached
    groups: jax.Array  # i32[R], the row of the first sequence of the same request
    arrivals: jax.Array  # i32[R], order of arrival
    priorities: jax.Array  # i32[R], see `policies.priority`
    phases: jax.Array  # i32[R]
    finish_reasons: jax.Array  # i32[R]
    ignore_eos: jax.Array  # bool[R]
    num_preemptions: jax.Array  # i32[R]
    first_steps: jax.Array  # i32[R], step that gave the first output token, -1 before
    final_steps: jax.Array  # i32[R], step that ended it, -1 before
    sampling: Sampling  # of R
    beams: Beams  # of R


class SchedulerState(struct.PyTreeNode):
    """Everything that `plan_step` reads and `commit_step` writes."""

    requests: Requests
    table: Table
    slots: jax.Array  # i32[B], the request that runs there; R for none
    step: jax.Array  # i32[], steps committed

    @property
    def running(self) -> jax.Array:
        """Slots that hold a sequence, `bool[B]`."""
        return self.slots < self.requests.phases.shape[0]

    @property
    def unfinished(self) -> jax.Array:
        """Requests that wait or run, `bool[R]`."""
        phases = self.requests.phases
        return (phases != FREE) & (phases != DONE) & (phases != HELD)


def create(config: EngineConfig, allocator: Allocator) -> SchedulerState:
    """A state with no requests.

    Raises:
      ConfigError: the allocator cannot do what the configuration asks.
    """
    require(
        config.max_beams == 1 or allocator.share is not None,
        f"max_beams={config.max_beams}: beams share pages, and allocator={allocator.name} "
        "has none to share: take paged",
    )
    require(
        config.host_pages == 0 or allocator.tier is not None,
        f"host_pages={config.host_pages}: pages move one by one, and allocator={allocator.name} "
        "has none that could: take paged, or no pages on the host",
    )
    require(
        config.host_pages == 0 or config.preemption != "recompute" or allocator.caches,
        f"host_pages={config.host_pages} with preemption='recompute': without a prefix cache none "
        "would go there: take the cache, or another mode",
    )
    R, N = config.num_requests, config.max_seq_len

    def ints(value: int = 0) -> jax.Array:
        return jnp.full((R,), value, jnp.int32)

    def floats(value: float) -> jax.Array:
        return jnp.full((R,), value, jnp.float32)

    requests = Requests(
        tokens=jnp.zeros((R, N), jnp.int32),
        logprobs=jnp.zeros((R, N), jnp.float32),
        prompt_lens=ints(),
        num_tokens=ints(),
        final_lens=ints(),
        reserved_lens=ints(),
        salts=ints(),
        cached_lens=ints(),
        computed_lens=ints(),
        groups=jnp.arange(R, dtype=jnp.int32),
        arrivals=ints(),
        priorities=ints(),
        phases=ints(FREE),
        finish_reasons=ints(NOT_DONE),
        ignore_eos=jnp.zeros((R,), jnp.bool_),
        num_preemptions=ints(),
        first_steps=ints(-1),
        final_steps=ints(-1),
        sampling=Sampling(
            temperature=floats(0.0),
            top_k=ints(),
            top_p=floats(1.0),
            repetition_penalty=floats(1.0),
            seed=jnp.zeros((R,), jnp.uint32),
        ),
        beams=Beams(
            widths=ints(),
            scores=floats(0.0),
            length_penalties=floats(1.0),
            patience=ints(PATIENT),
        ),
    )
    return SchedulerState(
        requests=requests,
        table=allocator.create(config),
        slots=jnp.full((config.num_slots,), R, jnp.int32),
        step=jnp.asarray(0, jnp.int32),
    )


def waiting_request(
    prompt_ids: Sequence[int],
    *,
    final_len: int,
    reserved_len: int,
    max_len: int,
    arrival: int,
    ignore_eos: bool,
    sampling: Sampling,
    group: int,
    salt: int = 0,
    priority: int = 0,
    beams: Beams | None = None,
    held: bool = False,
) -> Requests:
    """One row of `Requests`, without the leading axis: a new request of `final_len` tokens at most.

    `reserved_len` is what the allocator's rule reserves for it; `max_len` is `N`, the row's
    capacity; `sampling` holds scalars; `group` is the row of the request's first sequence, this
    row if it has no other; `salt` is the number of those who may share cached pages. Of a beam
    search, with scalars in `beams`, half of the rows are `held`.
    """
    tokens = np.zeros((max_len,), np.int32)
    tokens[: len(prompt_ids)] = prompt_ids
    return request_row(
        jnp.asarray(tokens),
        len(prompt_ids),
        final_len=final_len,
        reserved_len=reserved_len,
        arrival=arrival,
        ignore_eos=ignore_eos,
        sampling=sampling,
        group=group,
        salt=salt,
        priority=priority,
        beams=beams,
        held=held,
    )


def request_row(
    tokens: jax.Array,
    prompt_len: ArrayLike,
    *,
    final_len: ArrayLike,
    reserved_len: ArrayLike,
    arrival: ArrayLike,
    ignore_eos: ArrayLike,
    sampling: Sampling,
    group: ArrayLike,
    salt: ArrayLike = 0,
    priority: ArrayLike = 0,
    beams: Beams | None = None,
    held: bool = False,
) -> Requests:
    """`waiting_request`, inside of a program too: `tokens: i32[N]` open with the prompt."""
    no_beams = Beams(jnp.int32(0), jnp.float32(0), jnp.float32(1), jnp.int32(PATIENT))

    def integer(value: ArrayLike) -> jax.Array:
        return jnp.asarray(value, jnp.int32)

    return Requests(
        tokens=tokens,
        logprobs=jnp.zeros(tokens.shape, jnp.float32),
        prompt_lens=integer(prompt_len),
        num_tokens=integer(prompt_len),
        final_lens=integer(final_len),
        reserved_lens=integer(reserved_len),
        salts=integer(salt),
        cached_lens=integer(0),
        computed_lens=integer(0),
        groups=integer(group),
        arrivals=integer(arrival),
        priorities=integer(priority),
        phases=integer(HELD if held else WAITING),
        finish_reasons=integer(NOT_DONE),
        ignore_eos=jnp.asarray(ignore_eos),
        num_preemptions=integer(0),
        first_steps=integer(-1),
        final_steps=integer(-1),
        sampling=sampling,
        beams=no_beams if beams is None else beams,
    )


def submit(state: SchedulerState, row: jax.Array, request: Requests) -> SchedulerState:
    """Puts `request`, one row without the leading axis, in the free row `row`; in none for `R`."""
    requests = jax.tree.map(
        lambda held, new: held.at[row].set(new, mode="drop"), state.requests, request
    )
    return state.replace(requests=requests)


def forget(state: SchedulerState, row: jax.Array) -> SchedulerState:
    """Frees the row of a request that is done; none for `R`."""
    phases = state.requests.phases.at[row].set(FREE, mode="drop")
    return state.replace(requests=state.requests.replace(phases=phases))
