"""The impure edge: feeds requests to the compiled loop, and reads what it has to say.

Everything with a clock, a queue of Python objects or a callback is here; nothing here decides
what runs. Between two calls of the loop the host reads the log and the phases of the requests,
and nothing else unless a request has ended or somebody listens to its tokens.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxpage.config import require
from jaxpage.engine import loop, moving, processes
from jaxpage.engine.disk_tier import DiskConfig, DiskTier, Owner
from jaxpage.engine.request import Request, Result, group_of, refusal, reserved_len
from jaxpage.engine.run import Journal, Run
from jaxpage.engine.snapshots import SnapshotConfig, Snapshots
from jaxpage.engine.step import EngineState, Setup
from jaxpage.model.params import Params
from jaxpage.paging import kv_pool
from jaxpage.scheduling.state import (
    DONE,
    FINISH_REASONS,
    PATIENCE,
    Beams,
    Requests,
    Sampling,
    waiting_request,
)

TokenFn = Callable[[str, int, list[int]], None]  # (request id, which sample, its new tokens)
ThenFn = Callable[[Result], Request | None]  # what a user asks on reading a result
SEED_STRIDE = 0x9E3779B9  # between a request's samples: near 2**32 over the golden ratio


class Engine:
    """A compiled engine with its state. One `serve` at a time; state stays between calls.

    On a mesh it is as many replicas as the mesh has, and `params` are where `param_shardings` says.
    Rows of the queue then count over all replicas, one after the other. Of several processes each
    has an engine on the same mesh, and asks of it what all others ask, in the same order.
    """

    def __init__(
        self,
        params: Params,
        setup: Setup,
        kv_dtype: DTypeLike,
        disk: DiskConfig | None = None,
    ):
        self.setup = setup
        self.params = params
        self.state: EngineState = _first_state(params, setup, kv_dtype, disk)
        self._num_submitted = 0
        self._salts: dict[str, int] = {}  # by tenant; a number each, so that none can collide
        self._num_salts = 0  # that were ever given out
        self._cancelled: set[str] = set()  # asked for since the last look
        self._disk = DiskTier(disk, setup, params, kv_dtype) if disk is not None else None

    def compile(self) -> float:
        """Compiles all that serving needs and returns the seconds that it took."""
        start_s = time.perf_counter()
        request = Request("", (0,), 1)
        self.refusal(request)
        self.submit(request, (0,))
        self.state = loop.cancel(self.state, jnp.int32(0), setup=self.setup)
        self.state = loop.forget(self.state, jnp.int32(0), mesh=self.setup.mesh)
        self.advance(0)
        if self._disk is not None:
            self.state = self._disk.compile(self.state)
        processes.compile_all()
        requests, log = self.state.scheduler.requests, self.state.log
        for read in ((log.count, log.records), requests.phases, requests):
            processes.on_host(read, self.setup.mesh)
        jax.block_until_ready(self.state)
        return time.perf_counter() - start_s

    def submit(self, request: Request, rows: Sequence[int]) -> None:
        """Puts a request that `refusal` has nothing against in its free `rows`, ascending.

        They are all of one replica.
        """
        if self._disk is not None:
            prompt = np.array(request.prompt_ids, np.int32)
            self.state = self._disk.restore(self.state, prompt, self._owner(request))
        for sample, row in enumerate(rows):
            request_row = self._request_row(request, sample, group_of(self.setup, rows, row))
            self._put(row, request_row)
        self._num_submitted += 1

    def _put(self, row: int, request: Requests) -> None:
        mesh = self.setup.mesh
        self.state = loop.submit(self.state, jnp.int32(row), request, mesh=mesh)

    def advance(self, max_steps: int) -> None:
        """Runs up to `max_steps` steps, at most `log_steps`; returns before they are done."""
        steps = jnp.int32(max_steps)
        self.state = loop.serve_steps(self.params, self.state, steps, setup=self.setup)

    def refusal(self, request: Request) -> str | None:
        """Why this request cannot be served, in a sentence with the remedy; None if it can."""
        return refusal(self.setup, request)

    def cancel(self, request_id: str) -> None:
        """Asks that a request that is being served ends now; for the callbacks of `serve`.

        Its result has what there is of it by then, and `finish_reason` "cancelled"; a request that
        is over, or that nobody knows, stays as it is.
        """
        self._cancelled.add(request_id)

    def serve(
        self,
        requests: Iterable[Request],
        *,
        steps_per_read: int | None = None,
        on_tokens: TokenFn | None = None,
        on_progress: Callable[[Journal, int], None] | None = None,
        then: ThenFn | None = None,
        snapshots: SnapshotConfig | None = None,
    ) -> tuple[list[Result], Journal]:
        """Serves all requests, in the order of their arrival, and returns results in that given.

        What `then` asked comes after them, in the order in which it asked.

        At its end it waits for the disk tier, if there is one; `wall_s` does not count that.

        Args:
          requests: refused ones (`refusal`) get a result with the reason, the rest are served.
          steps_per_read: steps between two looks of the host; `log_steps` is the most and default.
          on_tokens: is told of new tokens of each request after each look.
          on_progress: is given the journal and the number of results so far after each look.
          then: is given the result of each request that was served, and may return another one,
            as the next turn of a conversation; that one is refused, served or queued as any other.
          snapshots: where and how often all of this is saved, and whether a saved run goes on
            first: its requests are then those that it knows, and of `requests` those it does not.
        """
        requests = list(requests)
        processes.require_alike("requests or flags", self.setup.engine, requests, snapshots)
        saved = Snapshots(snapshots, self.setup) if snapshots is not None else None
        with saved or contextlib.nullcontext():
            run = self._begin(saved)
            for request in run.unknown(requests):
                run.receive(request, self.refusal(request))
            steps = steps_per_read or self.setup.engine.log_steps
            while run.waiting or run.active:
                self._withdraw(run)
                self._feed(run)
                if not run.active and not run.waiting:
                    break
                if not run.active:
                    time.sleep(max(run.waiting[0].arrival_s - run.clock.now_s(), 0.0))
                    continue
                before_s = run.clock.now_s()
                self.advance(steps)
                self._read_log(run, before_s)
                for result in self._read_requests(run, on_tokens):
                    request = then(result) if then is not None else None
                    if request is not None:
                        run.receive(request, self.refusal(request))
                if self._disk is not None:
                    self._disk.visit(self.state)
                if on_progress is not None:
                    on_progress(run.journal, run.num_over)
                if saved is not None and saved.is_due(run):
                    saved.save(self.state, run, self.known())
            run.journal.wall_s = run.clock.now_s()
        if self._disk is not None:
            self._disk.flush(self.state)
            run.journal.disk = self._disk.take_counts()
        return list(run.results.values()), run.journal

    def _begin(self, saved: Snapshots | None) -> Run:
        """A run of no requests, or the saved one, with the state in which it was."""
        run = Run.of(self.setup.num_replicas, self.setup.engine.num_requests)
        found = saved.restore(self.state) if saved is not None else None
        if found is not None:
            self._num_submitted, self._salts = found.engine["num_submitted"], found.engine["salts"]
            self._num_salts = max(self._salts.values(), default=-1) + 1
            run = found.run
            if isinstance(found.held, EngineState):
                self.state = found.held
            else:
                run, rows = moving.rows_again(self.setup, run, found.held)
                for row, request in rows:
                    self._put(row, request)
        if saved is not None:
            saved.begin(run)
        return run

    def known(self) -> dict[str, Any]:
        """What the engine itself knows of all that it was asked."""
        return {"num_submitted": self._num_submitted, "salts": dict(self._salts)}

    def _withdraw(self, run: Run) -> None:
        """Ends those whose end was asked for: at once if they wait, else for the next look."""
        for request_id in sorted(self._cancelled & run.results.keys()):
            if run.withdraw(request_id):
                continue
            for row in run.seats.get(request_id, ()):
                self.state = loop.cancel(self.state, jnp.int32(row), setup=self.setup)
        self._cancelled.clear()

    def _feed(self, run: Run) -> None:
        """Submits the requests that have arrived, each to the emptiest queue, while they fit."""
        now_s = run.clock.now_s()
        while run.waiting and run.waiting[0].arrival_s <= now_s:
            rows = run.seat(run.waiting[0])
            if rows is None:
                return
            self.submit(run.waiting.popleft(), rows)

    def _request_row(self, request: Request, sample: int, group: int) -> Requests:
        prompt_len = len(request.prompt_ids)
        final_len = prompt_len + request.max_new_tokens
        return waiting_request(
            request.prompt_ids,
            final_len=final_len,
            reserved_len=reserved_len(self.setup, prompt_len, final_len),
            max_len=self.setup.engine.max_seq_len,
            arrival=self._num_submitted,
            ignore_eos=request.ignore_eos,
            group=group,
            held=sample >= request.num_slots,
            beams=Beams(
                widths=jnp.int32(request.num_beams if request.num_beams > 1 else 0),
                scores=jnp.float32(0.0 if sample < request.num_slots else -jnp.inf),
                length_penalties=jnp.float32(request.length_penalty),
                patience=jnp.int32(PATIENCE[request.early_stopping]),
            ),
            salt=self._owner(request).salt,
            priority=request.priority,
            sampling=Sampling(
                temperature=jnp.float32(request.temperature),
                top_k=jnp.int32(request.top_k),
                top_p=jnp.float32(request.top_p),
                repetition_penalty=jnp.float32(request.repetition_penalty),
                seed=jnp.uint32((request.seed + sample * SEED_STRIDE) % 2**32),
            ),
        )

    def _owner(self, request: Request) -> Owner:
        if request.tenant not in self._salts:
            self._renew_salt(request.tenant)
        return Owner(request.tenant, self._salts[request.tenant])

    def _renew_salt(self, tenant: str) -> None:
        """From here on requests of the tenant find nothing of before, but what is on disk."""
        self._salts[tenant] = self._num_salts
        self._num_salts += 1

    def _read_log(self, run: Run, before_s: float) -> None:
        log, journal = self.state.log, run.journal
        # Waits for the device.
        counts, records = processes.on_host((log.count, log.records), self.setup.mesh)
        after_s = run.clock.now_s()
        columns = records._asdict()
        for replica, at in enumerate(np.ndindex(counts.shape)):
            count = int(counts[at])
            for i in range(count):
                record = {name: int(column[at][i]) for name, column in columns.items()}
                journal.records.append(record)
                journal.step_times_s.append(before_s + (after_s - before_s) * (i + 1) / count)
                run.step_times_s[replica][record["step"]] = journal.step_times_s[-1]
            moved = columns["moved_out"][at] + columns["moved_in"][at]
            run.note_idle(replica, (columns["num_tokens"][at] + moved)[:count] == 0)
            if self.setup.engine.record_page_map:
                journal.owners.extend(processes.on_host(log.owners, self.setup.mesh)[at][:count])
        journal.num_host_reads += 1

    def _by_row(self, held: Any) -> Any:
        """What the queues hold, by their rows counted over all replicas."""
        values = processes.on_host(held, self.setup.mesh)
        if self.setup.mesh is None:
            return values
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), values)

    def _read_requests(self, run: Run, on_tokens: TokenFn | None) -> list[Result]:
        """Results of the requests that ended, whose rows it frees; tells listeners of tokens."""
        held = self.state.scheduler.requests
        phases = self._by_row(held.phases)
        ended = [row for row in run.active if phases[row] == DONE]
        if not ended and on_tokens is None:
            return []
        over = []
        known = self._by_row(held)
        for row, (request, sample) in run.active.items():
            # Until a beam search is over, nobody knows its tokens.
            if request.num_beams > 1 and (phases[row] != DONE or not 0 <= sample < request.n):
                continue
            new = known.tokens[row, run.told[row] : known.num_tokens[row]].tolist()
            run.told[row] = int(known.num_tokens[row])
            if on_tokens is not None and new:
                on_tokens(request.id, sample, new)
        for row in ended:
            request, _ = run.active[row]
            replica = row // self.setup.engine.num_requests
            result = _result(request, row, known, run, replica)
            if result.finish_reason == "error":
                # The fault may be in pages that others would find.
                self._renew_salt(request.tenant)
            if self._disk is not None and result.error is None:
                tokens = known.tokens[row, : known.num_tokens[row] - 1]  # the last has no KV
                self._disk.remember(tokens, self._owner(request))
            self.state = loop.forget(self.state, jnp.int32(row), mesh=self.setup.mesh)
            result = run.end(row, replica, result)
            if result is not None:
                over.append(result)
        return over


def _first_state(
    params: Params, setup: Setup, kv_dtype: DTypeLike, disk: DiskConfig | None
) -> EngineState:
    """A state with no requests, on the devices of the mesh, or on that of the parameters."""
    if setup.mesh is not None:
        require(
            setup.engine.host_pages == 0 and disk is None,
            f"host_pages={setup.engine.host_pages}, disk={disk}: on a mesh pages stay on their "
            "devices; take preemption=recompute and no folder",
        )
        require(
            not setup.engine.record_page_map or setup.num_replicas == 1,
            f"record_page_map on {setup.num_replicas} replicas: a page map is of one pool; "
            "take data:1",
        )
        return loop.create_replicas(setup=setup, dtype=jnp.dtype(kv_dtype))
    # Committed to its device like the parameters: else the second call would compile again.
    device = next(iter(jax.tree.leaves(params)[0].devices()))
    fields = loop.create_on_device(setup=setup, dtype=jnp.dtype(kv_dtype))
    host_pool = kv_pool.create_on_host(setup.model, setup.engine, kv_dtype, device)
    return EngineState(**jax.device_put(fields, device), host_pool=host_pool)


def _result(request: Request, row: int, known: Requests, run: Run, replica: int) -> Result:
    reason = FINISH_REASONS[known.finish_reasons[row]]
    output = slice(len(request.prompt_ids), int(known.num_tokens[row]))
    return Result(
        request=request,
        output_ids=known.tokens[row, output].tolist(),
        logprobs=known.logprobs[row, output].tolist(),
        score=float(known.beams.scores[row]) if request.num_beams > 1 else None,
        finish_reason=reason,
        error="the model gave logits that are not finite" if reason == "error" else None,
        num_preemptions=int(known.num_preemptions[row]),
        num_cached_tokens=int(known.cached_lens[row]),
        first_token_s=run.time_of(replica, int(known.first_steps[row])),
        # A step ends all but who was cancelled.
        finish_s=run.clock.now_s()
        if reason == "cancelled"
        else run.time_of(replica, int(known.final_steps[row])),
    )
