"""Records small simulated runs, of which every step's page table is kept: all owners of all pages.

    python -m experiments.recorded_pages --out=DIR

Three dozen requests in 96 pages, under pages with the prefix cache and under two rules of
reservation, by the engine's own scheduler, a step at a time. DIR gets `recordings.json`, from which
the report draws its page map: rows, lengths and page numbers after each step, a row's pages only in
the steps that change them. A minute on one core, most of it compilation. Expected: by pages the
same requests are done in less than half the time of Max. Refuted if not.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from experiments import common
from jaxpage.config import EngineConfig
from jaxpage.paging.allocator import ALLOCATORS, CACHED
from jaxpage.scheduling.policies import POLICIES
from jaxpage.sim import arrivals, clock, cost_model, simulate
from jaxpage.sim import trace as traces
from jaxpage.sim.device import DEVICES
from jaxpage.sim.shapes import SHAPES
from jaxpage.sim.simulate import Simulation
from jaxpage.sim.trace import Arrival

FLAGS = flags.FLAGS

FILE = "recordings.json"
PAGE_SIZE = 8
NUM_PAGES = 96
NUM_SLOTS = 24
PAGES_PER_SLOT = 16
# By the name that a reader chooses: pages with the prefix cache, and the two ends of reservation.
ALLOCATORS_SHOWN = {
    "paged": CACHED["lru"],
    "oracle": ALLOCATORS["oracle"],
    "max": ALLOCATORS["max"],
}
COUNTS = {
    "num_waiting": "waiting",
    "num_preempted": "preempted",
    "num_copied": "copied",
    "num_found": "found",
}


def define_flags() -> None:
    flags.DEFINE_string("out", None, "The folder to write to.", required=True)


def main(_: list[str]) -> None:
    out = common.make_folder(FLAGS.out)
    recordings = [record(name, requests()) for name in ALLOCATORS_SHOWN]
    (out / FILE).write_text(json.dumps(recordings, separators=(",", ":")) + "\n")
    finish_s = {each["name"]: each["steps"][-1]["end_s"] for each in recordings}
    for name, end_s in finish_s.items():
        print(f"{name:>6}: all requests done after {end_s:.2f} simulated seconds")
    common.print_last_line({"finish_s": finish_s, **common.provenance()})


class Row(NamedTuple):
    """A sequence in the page table."""

    sequence: int  # of the trace
    length: int  # tokens written
    pages: tuple[int, ...]  # in the order of its tokens


class Frame(NamedTuple):
    """The page table after a step."""

    rows: dict[int, Row]  # by slot
    cached: frozenset[int]  # pages that nobody holds, kept for prompts that begin alike


def requests() -> list[Arrival]:
    """Three dozen people: some with one system prompt, some who want three samples, some who go on.

    Those who go on ask again with all that was said to them, an answer later.
    """
    rng = np.random.default_rng(7)
    times_s = arrivals.poisson(rng, 36, rate=14.0)
    system = tuple(range(28))
    found: list[Arrival] = []
    for number, arrival_s in enumerate(times_s.tolist()):
        prompt_len, output_len = (int(rng.integers(*limits)) for limits in ((12, 44), (14, 56)))
        own = tuple(1000 * (number + 1) + i for i in range(prompt_len + output_len))
        before = found[number - 9] if number % 8 == 7 and number >= 9 else None
        if before is not None and before.num_samples == 1:
            prefix = tuple(before.content)
        else:
            prefix = system if number % 2 == 0 else ()
        room = PAGES_PER_SLOT * PAGE_SIZE - output_len
        content = (*prefix, *own)[: min(len(prefix) + prompt_len, room) + output_len]
        samples = 3 if number % 5 == 3 else 1
        # Three samples of known tokens would all be one: only their prompt is known.
        prompt_len = len(content) - output_len
        known = content if samples == 1 else content[:prompt_len]
        found.append(Arrival(arrival_s, prompt_len, output_len, known, samples))
    return found


def config_of(name: str) -> EngineConfig:
    """The engine that is recorded; what `headroom_pages` keeps would hide preemption."""
    return EngineConfig(
        num_slots=NUM_SLOTS,
        num_pages=NUM_PAGES,
        page_size=PAGE_SIZE,
        pages_per_slot=PAGES_PER_SLOT,
        num_requests=2 * NUM_SLOTS,
        token_buckets=(256,),
        log_steps=1,
    )


def record(
    name: str,
    asked: Sequence[Arrival],
    on_step: Callable[[Simulation], object] = lambda simulation: None,
) -> dict[str, Any]:
    """The recording of a run under one of `ALLOCATORS_SHOWN`; `on_step` sees every step's state."""
    config, allocator = config_of(name), ALLOCATORS_SHOWN[name]
    cost = cost_model.create(SHAPES["opt-13b"], DEVICES["a100-40gb"], page_size=PAGE_SIZE)
    trace = traces.create(asked, config, allocator)
    simulation = simulate.create(trace, config, allocator)
    steps: list[dict[str, Any]] = []
    before = Frame({}, frozenset())
    while int(simulation.num_done) < int(trace.count):
        simulation = simulate.simulate_steps(
            simulation,
            trace,
            cost,
            config=config,
            allocator=allocator,
            policy=POLICIES["fcfs"],
            singly=True,
        )
        on_step(simulation)
        frame = frame_of(simulation)
        steps.append(change(before, frame) | counts_of(simulation))
        before = frame
    sequences = zip(*(np.asarray(column).tolist() for column in _columns(trace)), strict=True)
    return {
        "name": name,
        "num_pages": NUM_PAGES,
        "page_size": PAGE_SIZE,
        "sequences": [list(row) for row in sequences][: int(trace.count)],
        "steps": steps,
    }


def _columns(trace: traces.Trace) -> tuple:
    """Of sequences: their request's first, samples, prompt, final and reserved tokens."""
    return (
        trace.leaders,
        trace.num_samples,
        trace.prompt_lens,
        trace.prompt_lens + trace.output_lens,
        trace.reserved_lens,
    )


def frame_of(simulation: Simulation) -> Frame:
    """The page table as it is."""
    scheduler = simulation.scheduler
    table = scheduler.table
    indices, numbers = np.asarray(table.page_indices), np.asarray(simulation.numbers)
    lengths, held = np.asarray(table.lengths), np.asarray(table.held_pages)
    rows = {
        int(slot): Row(
            int(numbers[scheduler.slots[slot]]),
            int(lengths[slot]),
            tuple(indices[slot, : held[slot]].tolist()),
        )
        for slot in np.flatnonzero(np.asarray(scheduler.running))
    }
    return Frame(rows, frozenset(np.flatnonzero(np.asarray(table.is_cached)).tolist()))


def change(before: Frame, after: Frame) -> dict[str, Any]:
    """A step of a recording: all rows, but pages and cached pages only where they changed."""
    pages = {
        str(slot): list(row.pages)
        for slot, row in after.rows.items()
        if slot not in before.rows or before.rows[slot].pages != row.pages
    }
    gained, lost = after.cached - before.cached, before.cached - after.cached
    step: dict[str, Any] = {
        "rows": [[slot, row.sequence, row.length] for slot, row in after.rows.items()]
    }
    changes = {"pages": pages, "cached": sorted(gained), "uncached": sorted(lost)}
    return step | {name: value for name, value in changes.items() if value}


def counts_of(simulation: Simulation) -> dict[str, Any]:
    """When the step was over, and what it did, as far as it did anything."""
    step = simulation.log.steps
    known = {short: int(getattr(step.record, name)[0]) for name, short in COUNTS.items()}
    end_s = round(float(clock.to_seconds(step.end)[0]), 4)
    return {"end_s": end_s} | {name: count for name, count in known.items() if count}


def frames_of(recording: dict[str, Any]) -> Iterator[Frame]:
    """The page tables that a recording keeps, as the page that draws them reads it."""
    pages: dict[int, tuple[int, ...]] = {}
    cached: set[int] = set()
    for step in recording["steps"]:
        pages |= {int(slot): tuple(row) for slot, row in step.get("pages", {}).items()}
        cached = (cached | set(step.get("cached", ()))) - set(step.get("uncached", ()))
        rows = {slot: Row(sequence, length, pages[slot]) for slot, sequence, length in step["rows"]}
        yield Frame(rows, frozenset(cached))


def owners_of(frame: Frame, num_pages: int) -> list[list[int]]:
    """The sequences that hold each page, in their order."""
    owners: list[list[int]] = [[] for _ in range(num_pages)]
    for row in frame.rows.values():
        for page in row.pages:
            owners[page].append(row.sequence)
    return [sorted(sequences) for sequences in owners]


if __name__ == "__main__":
    define_flags()
    common.run(main)
