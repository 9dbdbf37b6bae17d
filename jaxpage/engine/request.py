"""What a user asks of the engine, what comes back, and why something cannot be asked."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import jax.numpy as jnp

from jaxpage.config import EngineConfig
from jaxpage.engine.step import Setup
from jaxpage.paging.page_table import num_pages_for
from jaxpage.scheduling.state import PATIENCE

MOST_PRIORITY = 1000  # so that ranks stay far from the ends of 32 bits


@dataclass(frozen=True)
class Request:
    """What a user asks for. `temperature` 0 is greedy; see `scheduling.state.Sampling`."""

    id: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    n: int = 1  # samples of the one prompt, or how many of the beams to return
    num_beams: int = 1  # from 2 on beam search, in place of sampling
    length_penalty: float = 1.0  # the power of a beam's length that divides its log probability
    early_stopping: bool | Literal["never"] = False  # see `scheduling.state.PATIENCE`
    ignore_eos: bool = False
    tenant: str = ""  # only requests of the same share cached pages
    priority: int = 0  # higher goes first under the policy of that name
    arrival_s: float = 0.0  # after the start of serving

    @property
    def num_slots(self) -> int:
        """Sequences that run at once."""
        return max(self.n, self.num_beams, 1)

    @property
    def num_rows(self) -> int:
        """Rows of the queue: a beam search keeps as many sequences as it runs."""
        return 2 * self.num_beams if self.num_beams > 1 else max(self.n, 1)


@dataclass(frozen=True)
class Result:
    """What became of a request. Times are seconds after the start of serving.

    With `n > 1` this is its first sample, or its best beam, and `more` are the others.
    """

    request: Request
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    score: float | None = None  # of a beam
    finish_reason: str = "error"
    error: str | None = None
    num_preemptions: int = 0
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache
    first_token_s: float = float("nan")
    finish_s: float = float("nan")
    more: tuple["Result", ...] = ()

    @property
    def latency_s(self) -> float:
        """From arrival to the last token."""
        return self.finish_s - self.request.arrival_s

    @property
    def normalized_latency_s(self) -> float:
        """Latency by output token, s/token: the paper's metric (its section 6.1)."""
        return self.latency_s / max(len(self.output_ids), 1)


def refusal(setup: Setup, request: Request) -> str | None:
    """Why this request cannot be served, in a sentence with the remedy; None if it can."""
    config, model = setup.engine, setup.model
    prompt_len, new = len(request.prompt_ids), request.max_new_tokens
    final_len = prompt_len + new
    if prompt_len == 0:
        return "the prompt is empty: give at least one token"
    if new <= 0:
        return f"max_new_tokens={new} must be at least 1"
    for token in request.prompt_ids:
        if not 0 <= token < model.vocab_size:
            return f"prompt token {token} is outside the vocabulary [0, {model.vocab_size})"
    limit = min(config.max_seq_len, model.max_position)
    if final_len > limit:
        return (
            f"prompt of {prompt_len} tokens + max_new_tokens={new} is {final_len}, more than "
            f"a slot's {limit}: shorten one of them or raise pages_per_slot"
        )
    several = _refusal_of_several(config, request)
    if several is not None:
        return several
    if not -MOST_PRIORITY <= request.priority <= MOST_PRIORITY:
        return f"priority={request.priority} must be from {-MOST_PRIORITY} to {MOST_PRIORITY}"
    if not 0 <= request.seed < 2**32:
        return f"seed={request.seed} must be in [0, 2**32)"
    refused = {
        "temperature": not 0 <= request.temperature < float("inf"),
        "top_k": request.top_k < 0,
        "top_p": not 0 < request.top_p <= 1,
        "repetition_penalty": not request.repetition_penalty > 0,
    }
    for name, is_refused in refused.items():
        if is_refused:
            return f"{name}={getattr(request, name)} is out of range"
    needed = _pages_at_most(setup, prompt_len, final_len, request.num_slots)
    if needed > config.num_pages:
        return (
            f"the request needs {needed} pages at once and the pool has {config.num_pages}: "
            "raise the KV budget or shorten the request"
        )
    return None


def _refusal_of_several(config: EngineConfig, request: Request) -> str | None:
    """Why this request cannot have so many samples, or be searched with so many beams."""
    n, width = request.n, request.num_beams
    if request.early_stopping not in PATIENCE:
        known = ", ".join(map(repr, PATIENCE))
        return f"early_stopping={request.early_stopping!r} must be one of {known}"
    most = min(config.num_slots, config.num_requests)
    if width == 1:
        if not 1 <= n <= most:
            return f"n={n} must be from 1 to {most}, the slots and rows that there are"
        if n > 1 and request.temperature == 0:
            return f"n={n} with temperature=0 is the same sample {n} times: raise it"
        return None
    most = min(config.max_beams, config.num_requests // 2)
    if not 1 <= width <= most:
        return (
            f"num_beams={width} must be from 1 to {most}, the least of max_beams and half of "
            "the rows that there are: raise them or search with fewer beams"
        )
    if not 1 <= n <= width:
        return f"n={n} must be from 1 to num_beams={width}: that many can be returned"
    if not -float("inf") < request.length_penalty < float("inf"):
        return f"length_penalty={request.length_penalty} is out of range"
    chosen = (request.temperature, request.top_k, request.top_p, request.repetition_penalty)
    if chosen != (0.0, 0, 1.0, 1.0):
        return (
            f"num_beams={width} draws nothing: leave temperature, top_k, top_p and "
            "repetition_penalty alone, or use one beam"
        )
    return None


def _pages_at_most(setup: Setup, prompt_len: int, final_len: int, n: int) -> int:
    """Pages that must be had at once: all samples' together, but one's of the contiguous.

    Samples share the full pages of their prompt. Contiguous runs are whole buddies.
    """
    tokens = reserved_len(setup, prompt_len, final_len)
    pages = num_pages_for(tokens, setup.engine.page_size)
    if not setup.allocator.grows:
        return 1 << (pages - 1).bit_length()
    return pages + (n - 1) * (pages - prompt_len // setup.engine.page_size)


def reserved_len(setup: Setup, prompt_len: int, final_len: int) -> int:
    """Tokens whose memory the allocator's rule reserves for a request."""
    max_len = setup.engine.max_seq_len
    reserve = setup.allocator.reserve
    return int(reserve(jnp.int32(prompt_len), jnp.int32(final_len), max_len))


def group_of(setup: Setup, rows: Sequence[int], row: int) -> int:
    """The group of the sequence in `row`, one of its request's `rows`, by its replica's count.

    Where nothing can be shared each is a sequence of its own.
    """
    first = row if setup.allocator.share is None else rows[0]
    return first % setup.engine.num_requests
