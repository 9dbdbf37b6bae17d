"""The impure edge: feeds requests to the compiled loop, and reads what it has to say.

Everything with a clock, a queue of Python objects or a callback is here; nothing here decides
what runs. Between two calls of the loop the host reads the log and the phases of the requests,
and nothing else unless a request has ended or somebody listens to its tokens.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxpage.config import ConfigError
from jaxpage.engine import loop, step
from jaxpage.engine.step import Setup
from jaxpage.model.params import Params
from jaxpage.paging.page_table import num_pages_for
from jaxpage.scheduling.accounting import StepRecord
from jaxpage.scheduling.state import DONE, FINISH_REASONS, Requests, Sampling, waiting_request

TokenFn = Callable[[str, int, list[int]], None]  # (request id, which sample, its new tokens)
SEED_STRIDE = 0x9E3779B9  # between a request's samples: near 2**32 over the golden ratio


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
    n: int = 1  # samples of the one prompt
    ignore_eos: bool = False
    tenant: str = ""  # only requests of the same share cached pages
    arrival_s: float = 0.0  # after the start of serving


@dataclass(frozen=True)
class Result:
    """What became of a request. Times are seconds after the start of serving.

    With `n > 1` this is its first sample, and `more` are the others.
    """

    request: Request
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
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


@dataclass
class Journal:
    """What serving left behind: one entry a step, and the costs of the host edge."""

    records: list[dict[str, int]] = field(default_factory=list)
    owners: list[np.ndarray] = field(default_factory=list)  # i32[P] a step, if recorded
    request_ids: dict[int, str] = field(default_factory=dict)  # row of the queue -> request
    step_times_s: list[float] = field(default_factory=list)  # when a step was over, interpolated
    num_host_reads: int = 0
    wall_s: float = 0.0

    @property
    def num_steps(self) -> int:
        return len(self.records)

    def mean(self, name: str) -> float:
        """Mean of a field of `StepRecord` over the steps."""
        return float(np.mean([record[name] for record in self.records])) if self.records else 0.0


class Engine:
    """A compiled engine with its state. One `serve` at a time; state stays between calls."""

    def __init__(self, params: Params, setup: Setup, kv_dtype: DTypeLike):
        self.setup = setup
        self.params = params
        # Committed to its device like the parameters: else the second call would compile again.
        device = next(iter(jax.tree.leaves(params)[0].devices()))
        self.state = jax.device_put(step.create(setup, kv_dtype), device)
        self._num_submitted = 0
        self._salts: dict[str, int] = {}  # by tenant; a number each, so that none can collide

    def compile(self) -> float:
        """Compiles all that serving needs and returns the seconds that it took."""
        start_s = time.perf_counter()
        request = Request("", (0,), 1)
        self.refusal(request)
        self.submit(request, (0,))
        self.state = loop.forget(self.state, jnp.int32(0))
        self.advance(0)
        jax.block_until_ready(self.state)
        return time.perf_counter() - start_s

    def submit(self, request: Request, rows: Sequence[int]) -> None:
        """Puts a request that `refusal` has nothing against in `n` free `rows`, ascending."""
        for sample, row in enumerate(rows):
            # Where nothing can be shared each sample is a sequence of its own.
            group = row if self.setup.allocator.share is None else rows[0]
            request_row = self._request_row(request, sample, group)
            self.state = loop.submit(self.state, jnp.int32(row), request_row)
        self._num_submitted += 1

    def advance(self, max_steps: int) -> None:
        """Runs up to `max_steps` steps, at most `log_steps`; returns before they are done."""
        steps = jnp.int32(max_steps)
        self.state = loop.serve_steps(self.params, self.state, steps, setup=self.setup)

    def refusal(self, request: Request) -> str | None:
        """Why this request cannot be served, in a sentence with the remedy; None if it can."""
        config, model = self.setup.engine, self.setup.model
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
        most = min(config.num_slots, config.num_requests)
        if not 1 <= request.n <= most:
            return f"n={request.n} must be from 1 to {most}, the slots and rows that there are"
        if request.n > 1 and request.temperature == 0:
            return (
                f"n={request.n} with temperature=0 is the same sample {request.n} times: raise it"
            )
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
        needed = self._pages_at_most(prompt_len, final_len, request.n)
        if needed > config.num_pages:
            return (
                f"the request needs {needed} pages at once and the pool has {config.num_pages}: "
                "raise the KV budget or shorten the request"
            )
        return None

    def serve(
        self,
        requests: Iterable[Request],
        *,
        steps_per_read: int | None = None,
        on_tokens: TokenFn | None = None,
        on_progress: Callable[[Journal, int], None] | None = None,
    ) -> tuple[list[Result], Journal]:
        """Serves all requests, in the order of their arrival, and returns results in that given.

        Args:
          requests: refused ones (`refusal`) get a result with the reason, the rest are served.
          steps_per_read: steps between two looks of the host; `log_steps` is the most and default.
          on_tokens: is told of new tokens of each request after each look.
          on_progress: is given the journal and the number of results so far after each look.
        """
        requests = list(requests)
        results: dict[str, Result] = {}
        for request in requests:
            if request.id in results:
                raise ConfigError(f"request id {request.id!r} occurs twice: ids must be distinct")
            refusal = self.refusal(request)
            results[request.id] = Result(request, error=refusal)
        accepted = (r for r in requests if results[r.id].error is None)
        run = _Run(
            waiting=deque(sorted(accepted, key=lambda r: r.arrival_s)),
            free_rows=list(range(self.setup.engine.num_requests - 1, -1, -1)),
        )
        steps = steps_per_read or self.setup.engine.log_steps
        start_s = time.perf_counter()
        while run.waiting or run.active:
            self._feed(run, time.perf_counter() - start_s)
            if not run.active:
                time.sleep(max(run.waiting[0].arrival_s - (time.perf_counter() - start_s), 0.0))
                continue
            before_s = time.perf_counter() - start_s
            self.advance(steps)
            self._read_log(run.journal, before_s, start_s)
            self._read_requests(run, results, on_tokens)
            if on_progress is not None:
                running = {request.id for request, _ in run.active.values()}
                on_progress(run.journal, len(requests) - len(run.waiting) - len(running))
        run.journal.wall_s = time.perf_counter() - start_s
        return [results[request.id] for request in requests], run.journal

    def _pages_at_most(self, prompt_len: int, final_len: int, n: int) -> int:
        """Pages that must be had at once: all samples' together, but one's of the contiguous.

        Samples share the full pages of their prompt. Contiguous runs are whole buddies.
        """
        tokens = self._reserved_len(prompt_len, final_len)
        pages = num_pages_for(tokens, self.setup.engine.page_size)
        if not self.setup.allocator.grows:
            return 1 << (pages - 1).bit_length()
        return pages + (n - 1) * (pages - prompt_len // self.setup.engine.page_size)

    def _reserved_len(self, prompt_len: int, final_len: int) -> int:
        """Tokens whose memory the allocator's rule reserves for a request."""
        max_len = self.setup.engine.max_seq_len
        reserve = self.setup.allocator.reserve
        return int(reserve(jnp.int32(prompt_len), jnp.int32(final_len), max_len))

    def _feed(self, run: "_Run", now_s: float) -> None:
        """Submits the requests that have arrived, as far as the queue has rows."""
        while run.waiting and run.waiting[0].arrival_s <= now_s:
            if run.waiting[0].n > len(run.free_rows):
                return
            request = run.waiting.popleft()
            rows = sorted(run.free_rows.pop() for _ in range(request.n))
            self.submit(request, rows)
            run.done[request.id] = []
            for sample, row in enumerate(rows):
                run.active[row] = request, sample
                run.told[row] = len(request.prompt_ids)
                run.journal.request_ids[row] = request.id

    def _request_row(self, request: Request, sample: int, group: int) -> Requests:
        prompt_len = len(request.prompt_ids)
        final_len = prompt_len + request.max_new_tokens
        return waiting_request(
            request.prompt_ids,
            final_len=final_len,
            reserved_len=self._reserved_len(prompt_len, final_len),
            max_len=self.setup.engine.max_seq_len,
            arrival=self._num_submitted,
            ignore_eos=request.ignore_eos,
            group=group,
            salt=self._salts.setdefault(request.tenant, len(self._salts)),
            sampling=Sampling(
                temperature=jnp.float32(request.temperature),
                top_k=jnp.int32(request.top_k),
                top_p=jnp.float32(request.top_p),
                repetition_penalty=jnp.float32(request.repetition_penalty),
                seed=jnp.uint32((request.seed + sample * SEED_STRIDE) % 2**32),
            ),
        )

    def _read_log(self, journal: Journal, before_s: float, start_s: float) -> None:
        log = self.state.log
        count = int(log.count)  # waits for the device
        after_s = time.perf_counter() - start_s
        columns = {name: np.array(getattr(log.records, name)) for name in StepRecord._fields}
        for i in range(count):
            journal.records.append({name: int(column[i]) for name, column in columns.items()})
            journal.step_times_s.append(before_s + (after_s - before_s) * (i + 1) / count)
        if self.setup.engine.record_page_map:
            journal.owners.extend(np.array(log.owners[:count]))
        journal.num_host_reads += 1

    def _read_requests(
        self, run: "_Run", results: dict[str, Result], on_tokens: TokenFn | None
    ) -> None:
        """Collects the requests that ended and frees their rows; tells listeners of new tokens."""
        held = self.state.scheduler.requests
        phases = np.array(held.phases)
        ended = [row for row in run.active if phases[row] == DONE]
        if not ended and on_tokens is None:
            return
        known = jax.tree.map(np.array, held)
        for row, (request, sample) in run.active.items():
            new = known.tokens[row, run.told[row] : known.num_tokens[row]].tolist()
            run.told[row] = int(known.num_tokens[row])
            if on_tokens is not None and new:
                on_tokens(request.id, sample, new)
        for row in ended:
            request, sample = run.active.pop(row)
            done = run.done[request.id]
            done.append((sample, _result(request, row, known, run.journal)))
            if len(done) == request.n:
                first, *more = (result for _, result in sorted(done, key=lambda pair: pair[0]))
                results[request.id] = replace(first, more=tuple(more))
            self.state = loop.forget(self.state, jnp.int32(row))
            run.free_rows.append(row)


@dataclass
class _Run:
    """The host's side of one `serve`."""

    waiting: deque[Request]
    free_rows: list[int]
    active: dict[int, tuple[Request, int]] = field(default_factory=dict)  # and sample, by row
    done: dict[str, list[tuple[int, Result]]] = field(default_factory=dict)  # samples, by request
    told: dict[int, int] = field(default_factory=dict)  # tokens already read, by row
    journal: Journal = field(default_factory=Journal)


def _result(request: Request, row: int, known: Requests, journal: Journal) -> Result:
    reason = FINISH_REASONS[known.finish_reasons[row]]
    output = slice(len(request.prompt_ids), int(known.num_tokens[row]))
    # The journal starts at this run's first step, which need not be the state's.
    origin = journal.records[0]["step"]

    def time_of(steps: jax.Array) -> float:
        index = int(steps[row])
        return journal.step_times_s[index - origin] if index >= 0 else float("nan")

    return Result(
        request=request,
        output_ids=known.tokens[row, output].tolist(),
        logprobs=known.logprobs[row, output].tolist(),
        finish_reason=reason,
        error="the model gave logits that are not finite" if reason == "error" else None,
        num_preemptions=int(known.num_preemptions[row]),
        num_cached_tokens=int(known.cached_lens[row]),
        first_token_s=time_of(known.first_steps),
        finish_s=time_of(known.final_steps),
    )
