"""What the host knows of the requests that it serves: who waits, who is where, what came of whom.

It can be written down as JSON and read again, so that a run goes on in another process.
"""

import bisect
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from jaxpage.config import ConfigError, require
from jaxpage.engine import processes
from jaxpage.engine.request import Request, Result

MOST_IDLE = 64  # steps on end; a pause between two moves of pages is far shorter


@dataclass
class Journal:
    """What serving left behind: one entry a step, and the costs of the host edge."""

    records: list[dict[str, int]] = field(default_factory=list)
    owners: list[np.ndarray] = field(default_factory=list)  # i32[P] a step, if recorded
    request_ids: dict[int, str] = field(default_factory=dict)  # row of the queue -> request
    step_times_s: list[float] = field(default_factory=list)  # when a step was over, interpolated
    disk: dict[str, float] = field(default_factory=dict)  # see `page_store.DiskCounts`
    num_host_reads: int = 0
    wall_s: float = 0.0

    @property
    def num_steps(self) -> int:
        return len(self.records)

    def mean(self, name: str) -> float:
        """Mean of a field of `StepRecord` over the steps."""
        return float(np.mean([record[name] for record in self.records])) if self.records else 0.0

    def to_arrays(self) -> dict[str, np.ndarray]:
        """What there is of each step, with the steps along the leading axis."""
        if not self.records:
            return {}
        columns = {
            name: np.array([record[name] for record in self.records], np.int32)
            for name in self.records[0]
        }
        owners = {"owners": np.stack(self.owners)} if self.owners else {}
        return {**columns, **owners, "step_times_s": np.array(self.step_times_s, np.float64)}

    def take_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        """The inverse of `to_arrays`."""
        columns = {name: np.asarray(column).tolist() for name, column in arrays.items()}
        self.owners = list(np.asarray(arrays["owners"])) if "owners" in columns else []
        columns.pop("owners", None)
        self.step_times_s = columns.pop("step_times_s", [])
        rows = zip(*columns.values(), strict=True)
        self.records = [dict(zip(columns, row, strict=True)) for row in rows]


class Clock:
    """Seconds since serving began; a run that goes on elsewhere does not count the time between.

    All processes of a run go by that of the first.
    """

    def __init__(self, elapsed_s: float = 0.0):
        self._start_s = time.perf_counter() - elapsed_s

    def now_s(self) -> float:
        return processes.of_first(time.perf_counter() - self._start_s)


@dataclass
class Run:
    """The host's side of one `serve`. Rows are of the queue, counted over all replicas."""

    free_rows: list[list[int]]  # by replica
    step_times_s: list[dict[int, float]]  # by replica, and step: when it was over
    results: dict[str, Result] = field(default_factory=dict)  # by request; empty until it is over
    waiting: deque[Request] = field(default_factory=deque)  # in the order of arrival
    seats: dict[str, list[int]] = field(default_factory=dict)  # rows, by request, until it is over
    active: dict[int, tuple[Request, int]] = field(default_factory=dict)  # and sample, by row
    done: dict[str, list[tuple[int, Result]]] = field(default_factory=dict)  # samples, by request
    told: dict[int, int] = field(default_factory=dict)  # tokens already read, by row
    num_idle: list[int] = field(default_factory=list)  # steps without work up to now, by replica
    num_over: int = 0  # results that are final
    journal: Journal = field(default_factory=Journal)
    clock: Clock = field(default_factory=Clock)

    @classmethod
    def of(cls, num_replicas: int, num_rows: int) -> "Run":
        """A run of no requests, on replicas with queues of `num_rows`."""
        starts = range(0, num_replicas * num_rows, num_rows)
        return cls(
            free_rows=[list(range(start + num_rows - 1, start - 1, -1)) for start in starts],
            step_times_s=[{} for _ in starts],
            num_idle=[0 for _ in starts],
        )

    def note_idle(self, replica: int, is_idle: np.ndarray) -> None:
        """Counts steps in which nothing was computed and no page moved, `is_idle: bool[n]`.

        Raises:
          AssertionError: there were so many on end that nothing will ever be done.
        """
        busy = np.flatnonzero(~is_idle)
        before = self.num_idle[replica] + len(is_idle)
        self.num_idle[replica] = before if len(busy) == 0 else len(is_idle) - 1 - int(busy[-1])
        if self.num_idle[replica] > MOST_IDLE:
            left = ", ".join(sorted({request.id for request, _ in self.active.values()}))
            raise AssertionError(
                f"nothing was done in {self.num_idle[replica]} steps, nor ever will be: a fault of "
                f"the scheduler; not finished: {left}"
            )

    def receive(self, request: Request, refusal: str | None) -> None:
        """Puts a request among the waiting, after those that arrive with it, if none refuses it."""
        if request.id in self.results:
            raise ConfigError(f"request id {request.id!r} occurs twice: ids must be distinct")
        self.results[request.id] = Result(request, error=refusal)
        self.num_over += refusal is not None
        if refusal is None:
            bisect.insort(self.waiting, request, key=lambda r: r.arrival_s)

    def withdraw(self, request_id: str) -> bool:
        """Ends a request that waits; whether it did."""
        request = self.results[request_id].request
        if request not in self.waiting:
            return False
        self.waiting.remove(request)
        now_s = self.clock.now_s()
        self.results[request_id] = Result(request, finish_reason="cancelled", finish_s=now_s)
        self.num_over += 1
        return True

    def seat(self, request: Request) -> list[int] | None:
        """Rows for all sequences of a request, ascending, in the emptiest queue; None if full."""
        free_rows = max(self.free_rows, key=len)
        if request.num_rows > len(free_rows):
            return None
        rows = sorted(free_rows.pop() for _ in range(request.num_rows))
        self.seats[request.id], self.done[request.id] = rows, []
        # The result of a beam search is in its second half: before it stand the beams.
        first = -request.num_beams if request.num_beams > 1 else 0
        for sample, row in enumerate(rows, first):
            self.active[row] = request, sample
            self.told[row] = len(request.prompt_ids)
            self.journal.request_ids[row] = request.id
        return rows

    def end(self, row: int, replica: int, result: Result) -> Result | None:
        """Takes the result of a row; the request's, whose rows are then free, if it was the last.

        Until then none of them may be another's: the number of the first is that of the group.
        """
        request, sample = self.active.pop(row)
        del self.told[row]
        done = self.done[request.id]
        done.append((sample, result))
        if len(done) < request.num_rows:
            return None
        del self.done[request.id]
        self.free_rows[replica] += reversed(self.seats.pop(request.id))
        done.sort(key=lambda pair: pair[0])
        first, *more = (result for sample, result in done if 0 <= sample < request.n)
        self.results[request.id] = replace(first, more=tuple(more))
        self.num_over += 1
        return self.results[request.id]

    def time_of(self, replica: int, step: int) -> float:
        """When a step of a replica was over; not a number for the step -1."""
        return float("nan") if step == -1 else self.step_times_s[replica][step]

    def to_json(self, first_steps: np.ndarray) -> dict[str, Any]:
        """All of it but what `Journal.to_arrays` has; what comes after does not change it.

        Of the times of steps only those of `first_steps`, by row: what ends later has a later step.
        """
        num_rows = len(first_steps) // len(self.step_times_s)
        times_s: list[dict[int, float]] = [{} for _ in self.step_times_s]
        for row in self.active:
            replica, step = row // num_rows, int(first_steps[row])
            times_s[replica][step] = self.time_of(replica, step)
        return {
            "free_rows": [list(rows) for rows in self.free_rows],
            "requests": [asdict(result.request) for result in self.results.values()],
            "results": [_result_out(result) for result in self.results.values()],
            "waiting": [request.id for request in self.waiting],
            "seats": {name: list(rows) for name, rows in self.seats.items()},
            "active": [[row, request.id, sample] for row, (request, sample) in self.active.items()],
            "done": {
                name: [[sample, _result_out(result)] for sample, result in done]
                for name, done in self.done.items()
            },
            "told": list(self.told.items()),
            "step_times_s": [list(times_s.items()) for times_s in times_s],
            "num_over": self.num_over,
            "elapsed_s": self.clock.now_s(),
            "request_ids": list(self.journal.request_ids.items()),
            "num_host_reads": self.journal.num_host_reads,
        }

    @classmethod
    def from_json(cls, known: dict[str, Any], arrays: dict[str, np.ndarray]) -> "Run":
        """The inverse of `to_json` and `Journal.to_arrays`."""
        requests = {row["id"]: _request_in(row) for row in known["requests"]}
        results = zip(requests.values(), known["results"], strict=True)
        journal = Journal(
            request_ids={row: name for row, name in known["request_ids"]},
            num_host_reads=known["num_host_reads"],
        )
        journal.take_arrays(arrays)
        return cls(
            free_rows=known["free_rows"],
            step_times_s=[dict(times_s) for times_s in known["step_times_s"]],
            num_idle=[0 for _ in known["step_times_s"]],
            results={request.id: _result_in(request, row) for request, row in results},
            waiting=deque(requests[name] for name in known["waiting"]),
            seats=known["seats"],
            active={row: (requests[name], sample) for row, name, sample in known["active"]},
            done={
                name: [(sample, _result_in(requests[name], row)) for sample, row in done]
                for name, done in known["done"].items()
            },
            told={row: told for row, told in known["told"]},
            num_over=known["num_over"],
            journal=journal,
            clock=Clock(known["elapsed_s"]),
        )

    def unknown(self, requests: Iterable[Request]) -> list[Request]:
        """Those of `requests` that this run, gone on with, has not been given yet."""
        given = dict(self.results)
        new = []
        for request in requests:
            before = given.pop(request.id, None)
            if before is None:
                new.append(request)
                continue
            require(
                before.request == request,
                f"request {request.id!r} is not the one of that id in the saved run: give the "
                "same requests, or other ids",
            )
        return new


def _result_out(result: Result) -> dict[str, Any]:
    own = {name: value for name, value in vars(result).items() if name not in ("request", "more")}
    return own | {"more": [_result_out(other) for other in result.more]}


def _result_in(request: Request, row: dict[str, Any]) -> Result:
    more = tuple(_result_in(request, other) for other in row["more"])
    return replace(Result(request, **row), more=more)


def _request_in(row: dict[str, Any]) -> Request:
    return replace(Request(**row), prompt_ids=tuple(row["prompt_ids"]))
