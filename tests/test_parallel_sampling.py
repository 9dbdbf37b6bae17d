"""Several samples of one prompt: computed once, kept once, scheduled together."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny_engine import CONFIG, PROMPTS, TINY, build, outputs, setup_of

from jaxpage.engine.host import SEED_STRIDE, Engine
from jaxpage.engine.request import Request, Result
from jaxpage.scheduling.state import PREEMPTED, RUNNING, WAITING

NEW_TOKENS = 9
every_memory = pytest.mark.parametrize("allocator", ["paged", "lru"])


def samples_of(result: Result) -> list[list[int]]:
    assert result.error is None
    return [result.output_ids, *(other.output_ids for other in result.more)]


def request_of(prompt, n: int, **changes) -> Request:
    return Request(
        "r", prompt, NEW_TOKENS, temperature=1.0, seed=5, n=n, ignore_eos=True, **changes
    )


def alone(prompt, n: int) -> list[list[int]]:
    """The same samples as `n` requests that share nothing."""
    engine = build(setup_of(replace(CONFIG, num_pages=48)))
    singles = [
        replace(request_of(prompt, 1), id=str(i), seed=(5 + i * SEED_STRIDE) % 2**32)
        for i in range(n)
    ]
    return [result.output_ids for result in engine.serve(singles)[0]]


@pytest.mark.in_ci("8-paged", "7-lru")
@every_memory
@pytest.mark.parametrize("prompt_len", [1, 3, 4, 7, 8, 18])
def test_samples_are_those_of_as_many_requests_and_the_prompt_is_computed_once(
    allocator, prompt_len
):
    prompt = tuple(range(1, prompt_len + 1))
    engine = build(setup_of(allocator=allocator))
    (result,), journal = engine.serve([request_of(prompt, n=3)])
    samples = samples_of(result)
    assert samples == alone(prompt, 3)
    assert len({tuple(sample) for sample in samples}) == 3
    # The prompt once, and of each sample all tokens but the last.
    computed = sum(record["num_tokens"] for record in journal.records)
    assert computed == prompt_len + 3 * (NEW_TOKENS - 1)
    copied = sum(record["num_copied"] for record in journal.records)
    assert copied == (2 if prompt_len % CONFIG.page_size else 0)  # the last owner writes in place
    table = engine.state.scheduler.table
    assert not np.any(np.asarray(engine.setup.allocator.violations(table)))
    assert int(table.num_free + table.num_cached) == CONFIG.num_pages


@every_memory
def test_samples_share_the_full_pages_of_their_prompt(allocator):
    engine = build(setup_of(allocator=allocator))
    prompt = PROMPTS[-1]  # 18 tokens: four full pages, and two tokens
    engine.submit(request_of(prompt, n=4), range(4))
    for _ in range(6):
        engine.advance(1)
        assert not np.any(
            np.asarray(engine.setup.allocator.violations(engine.state.scheduler.table))
        )
    table = engine.state.scheduler.table
    indices = np.asarray(table.page_indices)
    full = len(prompt) // CONFIG.page_size
    assert all(len(set(indices[:, column].tolist())) == 1 for column in range(full))
    assert len(set(indices[:, full].tolist())) == 4
    record = jax.tree.map(lambda column: int(column[0]), engine.state.log.records)
    assert record.held_pages == len(set(indices.reshape(-1).tolist()) - {CONFIG.num_pages})
    assert record.named_pages == record.held_pages + 3 * full


def check_together(engine: Engine, groups: list[range], num_steps: int) -> int:
    """Steps in which all of a request's unfinished sequences run, or none; counts preemptions."""
    for _ in range(num_steps):
        engine.advance(1)
        held = engine.state.scheduler.requests
        phases = np.asarray(held.phases)
        for rows in groups:
            met = set(phases[list(rows)].tolist()) & {RUNNING, WAITING, PREEMPTED}
            assert len(met) <= 1
        assert not np.any(
            np.asarray(engine.setup.allocator.violations(engine.state.scheduler.table))
        )
        if not bool(np.any(np.asarray(engine.state.scheduler.unfinished))):
            return int(np.asarray(held.num_preemptions).sum())
    pytest.fail("the requests never end")


@pytest.mark.in_ci("paged-fcfs-recompute")
@pytest.mark.parametrize(
    ("allocator", "policy", "mode"),
    [
        ("paged", "fcfs", "recompute"),
        ("lru", "shortest_first", "recompute"),
        ("lru", "decode_first", "fine"),
        ("paged", "shortest_first", "fine"),
        ("lru", "fcfs", "swap"),
    ],
)
def test_samples_are_admitted_and_preempted_together_and_that_changes_no_token(
    allocator, policy, mode
):
    config = replace(CONFIG, num_slots=5, num_pages=13, num_requests=8, token_buckets=(5, 16))
    host_pages = 0 if mode == "recompute" else 30
    tight = replace(config, preemption=mode, host_pages=host_pages)
    requests = [
        replace(request_of(PROMPTS[i], n), id=str(i), seed=i, max_new_tokens=NEW_TOKENS + i)
        for i, n in ((3, 2), (1, 1), (2, 3), (4, 2))
    ]
    engine = build(setup_of(tight, allocator=allocator, policy=policy))
    groups, row = [], 0
    for request in requests:
        assert engine.refusal(request) is None
        groups.append(range(row, row + request.n))
        engine.submit(request, groups[-1])
        row += request.n
    assert check_together(engine, groups, num_steps=200) > 0
    tokens = np.asarray(engine.state.scheduler.requests.tokens)

    roomy = build(setup_of(replace(config, num_pages=80)))
    for request, rows in zip(requests, groups, strict=True):
        (result,), _ = roomy.serve([request])
        start = len(request.prompt_ids)
        got = [tokens[row, start : start + request.max_new_tokens].tolist() for row in rows]
        assert got == samples_of(result)


def test_a_prompt_that_ends_within_a_full_page_is_computed_again_by_all_who_come_back():
    """That page holds the first one's output too: as a page of the index it goes to nobody else."""
    first = replace(request_of(PROMPTS[-1], 1), id="first", max_new_tokens=20)
    samples = replace(request_of(PROMPTS[0], 2), id="samples", max_new_tokens=14)
    search = replace(samples, id="search", temperature=0.0, num_beams=2)
    assert len(samples.prompt_ids) < CONFIG.page_size
    config = replace(CONFIG, max_beams=2)
    roomy = build(setup_of(config, allocator="lru"))
    tight = build(setup_of(replace(config, num_pages=11), allocator="lru"))
    for several in (samples, search):
        expected = [samples_of(result) for result in roomy.serve([first, several])[0]]
        results, _ = tight.serve([first, several])
        assert [samples_of(result) for result in results] == expected
        assert [result.num_preemptions for result in results] == [0, 1]
        requests = tight.state.scheduler.requests
        assert int(np.max(requests.computed_lens[1:3])) > CONFIG.page_size
        ends = np.asarray(requests.final_steps[1:3])
        assert abs(ends[0] - ends[1]) <= 1  # neither has waited for the other's end


@pytest.mark.slow
def test_where_nothing_can_be_shared_samples_are_sequences_of_their_own():
    engine = build(setup_of(replace(CONFIG, num_pages=64), allocator="max"))
    (result,), journal = engine.serve([request_of(PROMPTS[2], n=3)])
    assert samples_of(result) == alone(PROMPTS[2], 3)
    computed = sum(record["num_tokens"] for record in journal.records)
    assert computed == 3 * (len(PROMPTS[2]) + NEW_TOKENS - 1)


def test_more_samples_than_slots_or_pages_or_greedy_ones_are_refused():
    engine = build()
    assert "n=5" in (engine.refusal(request_of(PROMPTS[0], n=5)) or "")
    assert "n=0" in (engine.refusal(request_of(PROMPTS[0], n=0)) or "")
    greedy = replace(request_of(PROMPTS[0], n=2), temperature=0.0)
    assert "temperature=0" in (engine.refusal(greedy) or "")
    small = build(setup_of(replace(CONFIG, num_pages=7)))
    long = request_of(tuple(range(1, 9)), n=3, **{})  # 2 full pages, and 3 of each sample's own
    assert small.refusal(replace(long, n=1)) is None
    assert "needs 11 pages" in (small.refusal(long) or "")


def test_a_row_of_a_request_that_goes_on_is_nobody_elses():
    # A sample ends, and its request's other one goes on in a lower slot than the newcomer's.
    sampled = Request("sampled", tuple(range(1, 6)), 20, temperature=1.5, n=2, seed=3)
    setup = setup_of(replace(CONFIG, num_slots=3, num_requests=4, num_pages=40))
    whole, _ = build(setup).serve([replace(sampled, ignore_eos=True)])
    first, second = whole[0].output_ids, whole[0].more[0].output_ids
    eos_id = first[2]
    assert eos_id not in second
    others = [
        Request("ends soon", tuple(range(60, 66)), 8, ignore_eos=True),
        Request("takes the slot", tuple(range(40, 46)), 30, ignore_eos=True),
        Request("newcomer", tuple(range(30, 35)), 12, ignore_eos=True),
    ]
    engine = build(replace(setup, model=replace(TINY, eos_ids=(eos_id,))))
    alone = [engine.serve([request])[0][0].output_ids for request in others]
    results, _ = engine.serve([sampled, *others], steps_per_read=1)
    assert (len(results[0].output_ids), results[0].more[0].output_ids) == (3, second)
    assert outputs(results[1:]) == alone
