"""A run that is saved while it serves, stops anywhere, and goes on in another engine."""

import json
import shutil
import time
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from test_sharding import engine_on
from tiny_engine import CONFIG, PROMPTS, TINY, build, outputs, params_of, setup_of

from jaxpage.config import ConfigError
from jaxpage.engine.request import Request, Result
from jaxpage.engine.run import Run
from jaxpage.engine.snapshots import SnapshotConfig

# Too few pages for all, some on the host, samples and a search: whatever a state can hold.
EVERYTHING = replace(
    CONFIG, num_pages=16, num_requests=6, host_pages=8, preemption="fine", max_beams=2, log_steps=3
)
SETUP = setup_of(EVERYTHING, allocator="lru")
REQUESTS = [
    Request("sampled", PROMPTS[2], 9, temperature=0.9, n=2, seed=5, tenant="a"),
    Request("searched", PROMPTS[1], 6, num_beams=2, n=2),
    *(Request(f"greedy {i}", ids, 12 + i, ignore_eos=True) for i, ids in enumerate(PROMPTS)),
    Request("refused", (), 4),
    Request("again", PROMPTS[5], 5, tenant="a"),
]


class Stopped(Exception):
    pass


def stop_after(engine, folder, num_looks, requests=REQUESTS, **options):
    """Serves and saves until the host has looked so often; the last snapshot's number of steps."""
    num_seen = 0

    def stop(journal, num_over):
        nonlocal num_seen
        num_seen += 1
        if num_seen == num_looks:
            raise Stopped
        while any(folder.glob("*tmp*")):  # else the next look saves nothing
            time.sleep(0.005)
        time.sleep(0.05)

    snapshots = SnapshotConfig(str(folder), every_s=None, every_steps=1, **options)
    with pytest.raises(Stopped):
        engine.serve(requests, snapshots=snapshots, on_progress=stop)
    return max(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def go_on(engine, folder, requests=REQUESTS, **options):
    snapshots = SnapshotConfig(str(folder), every_steps=10**6, resume=True)
    return engine.serve(requests, snapshots=snapshots, **options)


def facts(results):
    """What must be the same to the bit."""
    return [
        (
            result.request,
            result.output_ids,
            result.logprobs,
            result.score,
            result.finish_reason,
            result.error,
            result.num_preemptions,
            result.num_cached_tokens,
            facts(result.more),
        )
        for result in results
    ]


@pytest.fixture(scope="module")
def uninterrupted():
    results, journal = build(SETUP).serve(REQUESTS)
    assert max(record["host_pages"] for record in journal.records) > 0
    assert max(record["num_waiting"] for record in journal.records) > 0
    return results, journal


@pytest.mark.parametrize("num_looks", [2, 7, 12])
def test_a_run_that_goes_on_is_the_uninterrupted_one_to_the_bit(tmp_path, uninterrupted, num_looks):
    expected, whole = uninterrupted
    num_steps = stop_after(build(SETUP), tmp_path, num_looks)
    engine = build(SETUP)
    first_seen = []
    results, journal = go_on(
        engine, tmp_path, on_progress=lambda journal, _: first_seen.append(journal.num_steps)
    )
    assert facts(results) == facts(expected)
    assert journal.records == whole.records
    assert num_steps < first_seen[0] <= num_steps + EVERYTHING.log_steps  # no step twice
    assert num_steps > EVERYTHING.log_steps * (num_looks - 3)
    for result in results:
        if result.error is None:
            assert 0 < result.first_token_s <= result.finish_s <= journal.wall_s
    assert not np.any(SETUP.allocator.violations(engine.state.scheduler.table))


def test_a_run_goes_on_again_and_again(tmp_path, uninterrupted):
    expected, whole = uninterrupted
    steps = [stop_after(build(SETUP), tmp_path, 3)]
    while steps[-1] < whole.num_steps - 12:
        steps.append(stop_after(build(SETUP), tmp_path, 3, resume=True))
        assert steps[-1] > steps[-2]
    assert len(steps) > 3
    results, journal = go_on(build(SETUP), tmp_path)
    assert facts(results) == facts(expected)
    assert journal.records == whole.records


OTHERS = {
    "pages of another size": replace(EVERYTHING, page_size=8, num_pages=10, pages_per_slot=6),
    "fewer slots": replace(EVERYTHING, num_slots=2),
    "shorter rows": replace(EVERYTHING, pages_per_slot=9),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_an_engine_of_other_capacities_prints_the_same_tokens(tmp_path, uninterrupted, name):
    stop_after(build(SETUP), tmp_path, 6)
    engine = build(setup_of(OTHERS[name], allocator="lru"))
    results, journal = go_on(engine, tmp_path)
    assert outputs(results) == outputs(uninterrupted[0])
    assert [outputs(result.more) for result in results] == [
        outputs(result.more) for result in uninterrupted[0]
    ]
    for result in results:
        if result.error is None:
            assert 0 < result.first_token_s <= result.finish_s <= journal.wall_s
    assert not np.any(engine.setup.allocator.violations(engine.state.scheduler.table))


@pytest.mark.in_ci("data:2,model:1-None")
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("data:2,model:1", "data:2,model:2"),  # the same arrays, divided anew
        ("data:2,model:1", None),
        ("data:2,model:4", "data:4,model:2"),
        (None, "data:2,model:4"),
    ],
)
def test_a_run_goes_on_on_another_mesh(tmp_path, before, after):
    requests = [replace(request, num_beams=1) for request in REQUESTS if request.num_beams == 1]
    expected, _ = engine_on(None).serve(requests)
    config = replace(CONFIG, log_steps=3)
    num_steps = stop_after(engine_on(before, config), tmp_path, 4, requests)
    engine = engine_on(after, config)
    results, journal = go_on(engine, tmp_path, requests)
    assert outputs(results) == outputs(expected)
    if (before, after) == ("data:2,model:1", "data:2,model:2"):
        assert journal.num_steps > num_steps > 0  # the journal goes on as well


def test_what_cannot_go_on_is_refused_with_the_remedy(tmp_path):
    folder = tmp_path / "saves"
    stop_after(build(SETUP), folder, 6)
    cases = [
        (build(SETUP), REQUESTS, False, "holds a saved run: go on with it by --resume"),
        (
            build(setup_of(EVERYTHING, replace(TINY, rope_theta=77.0), "lru")),
            REQUESTS,
            True,
            r"of another model, with rope_theta 10000.0 \(here 77.0\)",
        ),
        (
            build(SETUP, params_of(TINY, jnp.bfloat16), jnp.bfloat16),
            REQUESTS,
            True,
            r"kv_dtype float32 \(here bfloat16\)",
        ),
        (
            build(SETUP),
            [replace(REQUESTS[0], seed=6), *REQUESTS[1:]],
            True,
            "request 'sampled' is not the one of that id in the saved run",
        ),
        (
            build(setup_of(replace(EVERYTHING, num_requests=2, max_beams=1), allocator="lru")),
            REQUESTS,
            True,
            "cannot go on here",
        ),
    ]
    for engine, requests, resume, message in cases:
        with pytest.raises(ConfigError, match=message):
            engine.serve(requests, snapshots=SnapshotConfig(str(folder), resume=resume))


def test_a_folder_is_one_process_s_and_a_damaged_snapshot_is_named(tmp_path):
    stop_after(build(SETUP), tmp_path, 6)
    numbers = sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdecimal())
    assert len(numbers) == 2
    for path in (tmp_path / str(numbers[-1]) / "arrays").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigError, match=rf"delete {tmp_path}/{numbers[-1]} to go on"):
        go_on(build(SETUP), tmp_path)
    shutil.rmtree(tmp_path / str(numbers[-1]))

    def try_too(journal, num_over):
        with pytest.raises(ConfigError, match="in use by another process"):
            go_on(build(SETUP), tmp_path)
        raise Stopped

    with pytest.raises(Stopped):
        go_on(build(SETUP), tmp_path, on_progress=try_too)


def test_without_a_saved_run_resume_begins_one(tmp_path, uninterrupted):
    results, _ = go_on(build(SETUP), tmp_path / "new")
    assert facts(results) == facts(uninterrupted[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"every_s": None}, "give one of them"),
        ({"every_s": 0.0}, "every_s=0.0 must be more than 0"),
        ({"keep": 0}, "keep=0 must be more than 0"),
        ({"every_steps": -1}, "every_steps=-1 must be more than 0"),
    ],
)
def test_intervals_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        SnapshotConfig("anywhere", **change)


def test_what_is_being_written_stays_as_it_was_while_the_run_goes_on():
    run = Run.of(1, 2)
    for request in (Request("one", (1, 2), 3, n=2), Request("later", (3,), 1)):
        run.receive(request, None)
    rows = run.seat(run.waiting.popleft())
    assert rows is not None
    known = run.to_json(np.full(2, -1))
    before = json.dumps(known)
    for row in rows:
        run.end(row, 0, Result(run.active[row][0], output_ids=[1]))
    run.seat(run.waiting.popleft())
    assert json.dumps(known) == before


def test_what_the_host_knows_is_the_same_after_json(uninterrupted):
    run = Run.of(2, 4)
    for request in REQUESTS:
        run.receive(request, "the prompt is empty" if not request.prompt_ids else None)
    while (rows := run.seat(run.waiting[0])) is not None:
        run.waiting.popleft()
    assert rows is None
    run.end(0, 0, replace(uninterrupted[0][0], more=()))
    run.journal.records = uninterrupted[1].records[:3]
    run.journal.step_times_s = uninterrupted[1].step_times_s[:3]
    run.journal.owners = [np.arange(4, dtype=np.int32)] * 3
    again = Run.from_json(
        json.loads(json.dumps(run.to_json(np.full(8, -1)))), run.journal.to_arrays()
    )
    for name in ("free_rows", "results", "waiting", "seats", "active", "done", "told", "num_over"):
        assert repr(getattr(again, name)) == repr(getattr(run, name)), name
    assert again.journal.records == run.journal.records
    assert again.journal.step_times_s == run.journal.step_times_s
    np.testing.assert_array_equal(again.journal.owners, run.journal.owners)
    assert again.clock.now_s() == pytest.approx(run.clock.now_s(), abs=5.0)
