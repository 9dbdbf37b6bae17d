"""Requests that began in one engine, as an engine of other capacities can go on with them."""

from dataclasses import replace

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxpage.config import require
from jaxpage.engine.request import Request, group_of, refusal, reserved_len
from jaxpage.engine.run import Journal, Run
from jaxpage.engine.step import Setup
from jaxpage.scheduling.state import HELD, PREEMPTED, WAITING, Requests


def rows_again(setup: Setup, run: Run, held: Requests) -> tuple[Run, list[tuple[int, Requests]]]:
    """The run on an engine of `setup` that holds no request, and what its queue begins with.

    `held` is what the queues held when `run` was saved, rows counted over all replicas. What had
    begun is preempted: its tokens are known, and computed again before the next one is drawn. The
    journal begins anew, for it is of an engine.

    Raises:
      ConfigError: a request that had begun does not fit here.
    """
    num_rows = setup.engine.num_requests
    empty = Run.of(setup.num_replicas, num_rows)
    moved = replace(empty, results=run.results, waiting=run.waiting, clock=run.clock)
    moved.num_over, moved.journal = run.num_over, Journal()
    num_old_rows = len(held.phases) // len(run.step_times_s)
    again = []
    for name, old_rows in run.seats.items():  # in the order in which they were submitted
        request = run.results[name].request
        reason = refusal(setup, request)
        rows = moved.seat(request) if reason is None else None
        require(
            rows is not None,
            f"request {name!r} of the saved run cannot go on here: "
            + (reason or f"the queue's num_requests={num_rows} rows are too few: have more"),
        )
        assert rows is not None
        moved.done[name] = run.done[name]
        begun = bool(np.any((held.phases[old_rows] != WAITING) & (held.phases[old_rows] != HELD)))
        for old_row, row in zip(old_rows, rows, strict=True):
            if old_row not in run.active:  # a sample that is done
                del moved.active[row]
                continue
            moved.told[row] = run.told[old_row]
            old = jax.tree.map(lambda leaf, at=old_row: leaf[at], held)
            first_step = int(old.first_steps)
            if first_step != -1:
                # A step of a replica that is no more: under a number that no step here will have.
                replica = old_row // num_old_rows
                number = -2 - replica - len(run.step_times_s) * abs(first_step)
                old = old.replace(first_steps=np.int32(number))
                times_s = moved.step_times_s[row // num_rows]
                times_s[number] = run.time_of(replica, first_step)
            again.append((row, _row_again(setup, request, old, group_of(setup, rows, row), begun)))
    return moved, again


def _row_again(setup: Setup, request: Request, old: Requests, group: int, begun: bool) -> Requests:
    """A row of one queue as a row of the queue of `setup`."""
    prompt_len = len(request.prompt_ids)

    def resized(values: ArrayLike) -> np.ndarray:
        """As long as a row here: what falls off or comes to it lies behind the last token."""
        kept = np.asarray(values)[: setup.engine.max_seq_len]
        return np.pad(kept, (0, setup.engine.max_seq_len - len(kept)))

    is_kept = old.phases == HELD
    return old.replace(
        tokens=resized(old.tokens),
        logprobs=resized(old.logprobs),
        reserved_lens=np.int32(reserved_len(setup, prompt_len, int(old.final_lens))),
        groups=np.int32(group),
        phases=np.int32(HELD if is_kept else PREEMPTED if begun else WAITING),
    )
