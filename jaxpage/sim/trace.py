"""What arrives when: sequences as arrays, in the order of their arrival."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxpage.config import EngineConfig, require
from jaxpage.paging import contiguous
from jaxpage.paging.allocator import Allocator
from jaxpage.paging.page_table import num_pages_for
from jaxpage.sim import clock
from jaxpage.sim.branching import MEASURED, Branching
from jaxpage.sim.clock import Time

FEWEST_ROWS = 64


@dataclass(frozen=True)
class Arrival:
    """A request of a trace: `num_samples` sequences, or the `num_beams` of a beam search.

    They share its prompt where the allocator can share.
    `content` says what its tokens are: `content[i]` stands for `Trace.tokens_each` of them, so
    that requests which begin with the same numbers can share pages. Without it nothing is shared,
    but with the request that this one follows. What a search answers is no part of it: that comes
    of the trace's `branching`.

    A request that follows another is the next turn of its conversation: it begins with all tokens
    of that one, answer included, and comes `arrival_s` after that one is done.
    """

    arrival_s: float
    prompt_len: int
    output_len: int
    content: Sequence[int] = ()
    num_samples: int = 1
    num_beams: int = 1  # from 2 on
    follows: int | None = None  # the number of an earlier request

    @property
    def num_sequences(self) -> int:
        """That run at once."""
        return max(self.num_samples, self.num_beams)


class Trace(struct.PyTreeNode):
    """Sequences in `n` rows, those of one request together; rows after the last never arrive.

    `n` is a power of two, so that traces of about the same length are one program.
    """

    count: jax.Array  # i32[], sequences
    arrivals: Time  # [n]; of who follows another, from when that is done
    prompt_lens: jax.Array  # i32[n]
    output_lens: jax.Array  # i32[n]
    reserved_lens: jax.Array  # i32[n], tokens that a contiguous allocator reserves
    leaders: jax.Array  # i32[n], the first sequence of the same request
    num_samples: jax.Array  # i32[n], sequences of the same request
    widths: jax.Array  # i32[n], beams of its request; 0 where none are searched
    threads: jax.Array  # i32[n], the first of the conversation; of all others their own number
    followers: jax.Array  # i32[n], the sequence that follows, `n` for none
    next_heads: jax.Array  # i32[n + 1], the first sequence from there on that follows none, or `n`
    content: jax.Array  # i32[n, W]; -1 where the tokens are its own
    branching: Branching  # what may follow a beam
    tokens_each: int = struct.field(pytree_node=False)
    has_followers: bool = struct.field(pytree_node=False)

    @property
    def num_rows(self) -> int:
        return self.prompt_lens.shape[0]


def create(
    requests: Sequence[Arrival],
    config: EngineConfig,
    allocator: Allocator,
    *,
    tokens_each: int = 1,
    branching: Branching | None = None,
) -> Trace:
    """A trace for an engine of that configuration; beams branch as measured, if not told else.

    Raises:
      ConfigError: times are unsorted or negative, a length is not positive, or a request can never
        be served: it is longer than a slot, or needs more pages, rows, slots or beams than there
        are.
    """
    require(len(requests) > 0, "a trace needs at least one request")
    for number, request in enumerate(requests):
        _check(number, request, config, shares=allocator.share is not None)
        _check_sequences(number, request, config)
    _check_turns(requests)
    arrival_s = np.array([request.arrival_s for request in requests], np.float64)
    _check_order(requests, arrival_s)
    repeats = np.array([request.num_sequences for request in requests])
    widths = [request.num_beams if request.num_beams > 1 else 0 for request in requests]
    firsts = np.cumsum(repeats) - repeats

    count = int(np.sum(repeats))
    # Powers of two, so that most traces run in a program that is compiled already.
    padding = max(FEWEST_ROWS, 1 << (count - 1).bit_length()) - count

    def padded(values: np.ndarray) -> np.ndarray:
        return np.pad(
            np.repeat(values, repeats, axis=0), [(0, padding), *[(0, 0)] * (values.ndim - 1)]
        )

    def column(values) -> jax.Array:
        return jnp.asarray(padded(np.asarray(values)), jnp.int32)

    prompts = column([request.prompt_len for request in requests])
    outputs = column([request.output_len for request in requests])
    width = max(1, *(len(request.content) for request in requests))
    content = np.full((len(requests), width), -1, np.int32)
    for number, request in enumerate(requests):
        content[number, : len(request.content)] = request.content
        if request.follows is not None:
            content[number] = content[request.follows]
    links = _links(requests, firsts, count + padding)
    reserved_lens = allocator.reserve(prompts, prompts + outputs, config.max_seq_len)
    if not allocator.grows:
        _check_reservations(np.asarray(reserved_lens)[:count], config)
    return Trace(
        count=jnp.asarray(count, jnp.int32),
        arrivals=clock.create(padded(arrival_s)),
        prompt_lens=prompts,
        output_lens=outputs,
        reserved_lens=reserved_lens,
        leaders=column(firsts),
        num_samples=column(repeats),
        widths=column(widths),
        content=column(content),
        branching=jax.tree.map(jnp.float32, branching or MEASURED),
        tokens_each=tokens_each,
        has_followers=any(request.follows is not None for request in requests),
        **{name: jnp.asarray(values, jnp.int32) for name, values in links.items()},
    )


def _links(requests: Sequence[Arrival], firsts: np.ndarray, n: int) -> dict[str, np.ndarray]:
    """Who follows whom, of `n` sequences, of which `firsts` are those that open a request."""
    threads, followers = np.arange(n), np.full(n, n)
    is_head = np.ones(n + 1, bool)
    for first, request in zip(firsts, requests, strict=True):
        if request.follows is not None:
            before = firsts[request.follows]
            followers[before], threads[first], is_head[first] = first, threads[before], False
    heads = np.where(is_head, np.arange(n + 1), n)
    return {
        "threads": threads,
        "followers": followers,
        "next_heads": np.minimum.accumulate(heads[::-1])[::-1],
    }


def _check_order(requests: Sequence[Arrival], arrival_s: np.ndarray) -> None:
    heads = np.array([n for n, request in enumerate(requests) if request.follows is None])
    later = np.flatnonzero(np.diff(arrival_s[heads]) < 0)
    require(
        len(later) == 0,
        f"request {heads[later[0] + 1] if len(later) else 0} arrives before the one ahead of it: "
        "sort the trace by time",
    )


def _check_turns(requests: Sequence[Arrival]) -> None:
    followed = set()
    for number, request in enumerate(requests):
        follows = request.follows
        if follows is None:
            continue
        require(
            follows in range(number) and follows not in followed,
            f"request {number}: follows={follows} must be the number of an earlier one that no "
            "other follows",
        )
        followed.add(follows)
        before = requests[follows]
        require(
            before.num_sequences == request.num_sequences == 1 and len(request.content) == 0,
            f"request {number} follows {follows}: turns of a conversation are one sequence each, "
            "and only the first has content",
        )
        known = before.prompt_len + before.output_len
        require(
            request.prompt_len > known,
            f"request {number}: prompt_len={request.prompt_len} must be more than the {known} "
            f"tokens of request {follows}, with which it begins",
        )


def _check(number: int, request: Arrival, config: EngineConfig, shares: bool) -> None:
    for name in ("prompt_len", "output_len", "num_samples", "num_beams"):
        value = getattr(request, name)
        require(value > 0, f"request {number}: {name}={value} must be positive")
    total = request.prompt_len + request.output_len
    require(
        total <= config.max_seq_len,
        f"request {number}: {request.prompt_len} + {request.output_len} tokens are more than the "
        f"{config.max_seq_len} of a slot: raise pages_per_slot={config.pages_per_slot}",
    )
    # The last output token is never computed, and sequences share the full pages of their prompt,
    # or need not run at once.
    pages = num_pages_for(total - 1, config.page_size)
    own = pages - request.prompt_len // config.page_size
    needed = pages + ((request.num_sequences - 1) * own if shares else 0)
    require(
        needed <= config.num_pages,
        f"request {number} can need {needed} pages of the {config.num_pages} that there are",
    )


def _check_sequences(number: int, request: Arrival, config: EngineConfig) -> None:
    samples, beams = request.num_samples, request.num_beams
    limit = min(config.num_slots, config.num_requests)
    require(
        request.num_sequences <= limit,
        f"request {number}: {request.num_sequences} sequences are more than the {limit} that can "
        "run",
    )
    if beams == 1:
        return
    require(
        samples == 1,
        f"request {number}: num_samples={samples} and num_beams={beams}: a search draws no samples",
    )
    # What a search keeps has rows beside those of its beams.
    limit = min(config.max_beams, config.num_requests // 2)
    require(
        beams <= limit,
        f"request {number}: num_beams={beams} must be up to {limit}, the least of max_beams and "
        "half of num_requests: raise them",
    )


def _check_reservations(reserved_lens: np.ndarray, config: EngineConfig) -> None:
    """Contiguous memory is given out in a power of two pages."""
    needed = contiguous.next_pow2(num_pages_for(jnp.asarray(reserved_lens), config.page_size))
    most = int(jnp.max(needed))
    require(
        most <= config.num_pages,
        f"sequence {int(jnp.argmax(needed))} needs a run of {most} pages, a power of two, of the "
        f"{config.num_pages} that there are: raise num_pages, or take paged",
    )


def tokens_of(trace: Trace, number: jax.Array, positions: jax.Array) -> jax.Array:
    """The tokens of sequence `number` at `positions`, each its own where `content` says nothing.

    Shapes follow `number` and `positions` by broadcasting; `i32`.
    """
    each = trace.tokens_each
    known = trace.content.at[number, positions // each].get(mode="fill", fill_value=-1)
    # Below zero in the first quarter of a million sequences, so equal to no content; and at one
    # position another for each conversation, as pages are compared.
    thread = trace.threads.at[number].get(mode="fill", fill_value=trace.num_rows)
    own = -2 - (thread * 8191 + positions)
    return jnp.where(known < 0, own, known * each + positions % each)
