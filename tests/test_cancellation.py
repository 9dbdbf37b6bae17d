"""Requests that end because nobody waits for them, wherever they are."""

import jax
import numpy as np
import pytest
from test_snapshots import SETUP
from tiny_engine import PROMPTS, build

from jaxpage.engine.request import Request

REQUESTS = [
    Request("sampled", PROMPTS[2], 12, temperature=0.9, n=2, seed=5),
    Request("searched", PROMPTS[1], 8, num_beams=2, n=2),
    *(Request(str(i), ids, 12, ignore_eos=True) for i, ids in enumerate(PROMPTS)),
]


def serve(setup, cancels, requests=REQUESTS):
    """Serves step by step; `cancels` says who ends after how many looks."""
    engine = build(setup)
    looks = 0

    def on_progress(journal, num_over):
        nonlocal looks
        looks += 1
        for request_id in cancels.get(looks, ()):
            engine.cancel(request_id)

    results, journal = engine.serve(requests, steps_per_read=1, on_progress=on_progress)
    table = engine.state.scheduler.table
    assert not np.any(setup.allocator.violations(table))
    on_host = journal.records[-1]["host_cached"]
    assert table.num_free + table.num_cached == setup.engine.num_pages, on_host
    assert not np.any(np.asarray(engine.state.scheduler.running))
    phases = np.asarray(engine.state.scheduler.requests.phases)
    assert not np.any(phases)  # all rows are free
    return {result.request.id: result for result in results}, journal


@pytest.fixture(scope="module")
def undisturbed():
    return serve(SETUP, {})[0]


@pytest.mark.parametrize("look", [1, 4, 9, 16])
def test_who_is_cancelled_has_what_there_is_and_the_others_all(undisturbed, look):
    gone = ["sampled", "searched", "1", "4"]
    found, journal = serve(SETUP, {look: [*gone, "nobody"]})
    num_cancelled = 0
    for name, result in found.items():
        whole = undisturbed[name]
        if result.finish_reason != "cancelled":
            assert (result.output_ids, result.more == whole.more) == (whole.output_ids, True) or (
                [result.output_ids, *(r.output_ids for r in result.more)]
                == [whole.output_ids, *(r.output_ids for r in whole.more)]
            )
            continue
        num_cancelled += 1
        assert name in gone and result.error is None
        assert 0 < result.finish_s <= journal.wall_s
        assert len(result.output_ids) < len(whole.output_ids)
        if result.request.num_beams == 1:
            for part, all_ in zip((result, *result.more), (whole, *whole.more), strict=False):
                assert part.output_ids == all_.output_ids[: len(part.output_ids)]
    assert num_cancelled > 0
    assert journal.num_steps < 200


def test_all_can_be_cancelled_and_what_came_before_stays_cached():
    found, _ = serve(SETUP, {3: [request.id for request in REQUESTS]})
    assert {result.finish_reason for result in found.values()} == {"cancelled"}


def test_a_request_that_is_over_or_comes_later_is_none_to_cancel(undisturbed):
    late = Request("late", PROMPTS[0], 4, ignore_eos=True, arrival_s=0.2)
    found, _ = serve(SETUP, {1: ["late"], 2: ["late"]}, [REQUESTS[2], late])
    assert found["late"].finish_reason == "cancelled" and found["late"].output_ids == []
    assert found["0"].output_ids == undisturbed["0"].output_ids


def test_cancelling_compiles_nothing_while_serving():
    engine = build(SETUP)
    engine.compile()
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    engine.serve(REQUESTS[:3], on_progress=lambda *_: engine.cancel("sampled"), steps_per_read=1)
    assert not compiled
