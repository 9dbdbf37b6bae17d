"""Beam search inside the step against a plain Python twin, over a table of log probabilities.

No model is needed: what may follow a token at a position is drawn beforehand.
"""

import functools
from collections import defaultdict
from dataclasses import replace
from typing import Literal

import beam_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_engine import CONFIG, PROMPTS, build, setup_of

from jaxpage.config import ConfigError, EngineConfig
from jaxpage.engine.request import Request
from jaxpage.paging.allocator import ALLOCATORS, CACHED
from jaxpage.scheduling import beams as beams_module
from jaxpage.scheduling import state as scheduler_state
from jaxpage.scheduling.beams import Candidates
from jaxpage.scheduling.policies import POLICIES
from jaxpage.scheduling.state import DONE, ERROR, HELD, PATIENCE, Beams, Sampling, waiting_request
from jaxpage.scheduling.step import Outcome, commit_step, plan_step

EOS_IDS = (7, 8)
VOCAB = 20
SHARED = {"paged": ALLOCATORS["paged"], "lru": CACHED["lru"]}
SMALL = EngineConfig(
    num_slots=6,
    num_pages=17,
    page_size=2,
    pages_per_slot=7,
    num_requests=24,
    token_buckets=(8,),
    max_beams=4,
)
ROOMY = replace(SMALL, num_pages=60)
LONGEST = SMALL.max_seq_len


@functools.cache
def compile_step(config: EngineConfig, allocator_name: str):
    """A step around an executor that reads the table: what follows the last token, where it is."""
    allocator = SHARED[allocator_name]
    count = beams_module.num_candidates(config.max_beams, EOS_IDS)

    @jax.jit
    def step(state, table, fails_at):
        planned, plan = plan_step(state, config, allocator, POLICIES["fcfs"])
        requests = planned.requests
        row = jnp.minimum(plan.requests, requests.phases.shape[0] - 1)
        position = requests.num_tokens[row]
        last = requests.tokens[row, jnp.maximum(position - 1, 0)]
        logprobs, tokens = jax.lax.top_k(table[position, last], count)
        failed = (requests.arrivals[row] == 0) & (position == fails_at)
        outcome = Outcome(tokens[:, 0], logprobs[:, 0], failed, Candidates(tokens, logprobs))
        after = commit_step(planned, plan, outcome, allocator, EOS_IDS)
        broken = [jnp.sum(allocator.violations(s.table)) for s in (planned, after)]
        return after, jnp.stack(broken), plan

    return step


def tables(seed: int, eos_bonus: float) -> np.ndarray:
    """Log probabilities `f32[N + 1, VOCAB, VOCAB]` by position, last token and next."""
    logits = np.random.default_rng(seed).normal(size=(LONGEST + 1, VOCAB, VOCAB)) * 2
    logits[..., list(EOS_IDS)] += eos_bonus
    return (logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))).astype(np.float32)


def rows_of(request: Request, rows: range, arrival: int):
    width = request.num_beams if request.num_beams > 1 else 0
    for i, row in enumerate(rows):
        held = i >= request.num_slots
        beams = Beams(
            widths=jnp.int32(width),
            scores=jnp.float32(-jnp.inf if held else 0.0),
            length_penalties=jnp.float32(request.length_penalty),
            patience=jnp.int32(PATIENCE[request.early_stopping]),
        )
        yield (
            row,
            waiting_request(
                request.prompt_ids,
                final_len=len(request.prompt_ids) + request.max_new_tokens,
                reserved_len=0,
                max_len=LONGEST,
                arrival=arrival,
                ignore_eos=False,
                group=rows[0],
                beams=beams,
                held=held,
                sampling=Sampling(
                    jnp.float32(0), jnp.int32(0), jnp.float32(1), jnp.float32(1), jnp.uint32(0)
                ),
            ),
        )


submit = jax.jit(scheduler_state.submit)


def run(requests: list[Request], table, allocator="paged", config=SMALL, fails_at=-1):
    """Serves all at once to the end; returns the state, rows by request, and preemptions."""
    step = compile_step(config, allocator)
    state = scheduler_state.create(config, SHARED[allocator])
    rows, row, preempted = [], 0, 0
    for arrival, request in enumerate(requests):
        rows.append(range(row, row + request.num_rows))
        row = rows[-1].stop
        for number, entry in rows_of(request, rows[-1], arrival):
            state = submit(state, np.int32(number), entry)
    for _ in range(400):
        state, broken, plan = step(state, table, np.int32(fails_at))
        assert broken.tolist() == [0, 0]
        preempted += int(plan.num_preempted)
        running = set(np.asarray(state.slots).tolist())
        for held in rows:
            assert len(running & set(held)) in (0, len(held) // 2, len(held))
        if not bool(jnp.any(state.unfinished)):
            table_after = state.table
            assert int(table_after.num_free + table_after.num_cached) == config.num_pages
            return state, rows, preempted
    pytest.fail("the requests never end")


def search_plainly(request: Request, table, **changed):
    def logprobs(tokens):
        return [float(x) for x in table[len(tokens), tokens[-1]]]

    asked = {
        "width": request.num_beams,
        "max_new_tokens": request.max_new_tokens,
        "length_penalty": request.length_penalty,
        # One beam is no search: it ends with its first stop token, whatever is asked.
        "early_stopping": request.early_stopping if request.num_beams > 1 else True,
    }
    return beam_oracle.search(request.prompt_ids, logprobs, eos_ids=EOS_IDS, **(asked | changed))


def check(state, rows: range, request: Request, table) -> None:
    wanted, _ = search_plainly(request, table)
    held = jax.tree.map(np.asarray, state.requests)
    results = rows[request.num_beams :] if request.num_beams > 1 else rows
    for row, hypothesis in zip(results, wanted, strict=True):
        output = slice(len(request.prompt_ids), held.num_tokens[row])
        assert held.phases[row] == DONE
        assert held.tokens[row, output].tolist() == hypothesis.output
        assert held.tokens[row, : output.start].tolist() == list(request.prompt_ids)
        assert np.sum(held.logprobs[row, output]) == pytest.approx(hypothesis.total, abs=1e-4)
        if request.num_beams > 1:
            assert held.beams.scores[row] == pytest.approx(hypothesis.score, abs=1e-4)


def search_of(prompt, width, new, penalty=1.0, early: bool | Literal["never"] = False) -> Request:
    return Request(
        "r",
        tuple(prompt),
        new,
        n=width,
        num_beams=width,
        length_penalty=penalty,
        early_stopping=early,
    )


searches = st.builds(
    search_of,
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6),
    st.integers(1, 4),
    st.integers(1, 8),
    st.sampled_from([0.0, 0.6, 1.0, 2.0, -1.0]),
    st.sampled_from(list(PATIENCE)),
)
WORKLOADS = st.lists(searches, min_size=1, max_size=3)


@given(
    WORKLOADS,
    st.integers(0, 10**6),
    st.sampled_from([-2.0, 0.0, 1.5]),  # searches that go to their end, and shorter ones
    st.sampled_from(sorted(SHARED)),
)
@settings(deadline=None, max_examples=60)
def test_searches_give_what_plain_python_gives(requests, seed, eos_bonus, allocator):
    table = tables(seed, eos_bonus)
    state, rows, _ = run(requests, table, allocator)
    for request, held in zip(requests, rows, strict=True):
        check(state, held, request, table)


def length_at_end(request: Request, table) -> int:
    """Output tokens of the beams when the search is over: alone and with room a step is a token."""
    state, (rows,), _ = run([request], table, config=ROOMY)
    best = rows[request.num_beams]
    return int(state.requests.final_steps[best] - state.requests.first_steps[best]) + 1


@given(
    searches.filter(lambda request: request.num_beams > 1),
    st.integers(0, 10**6),
    st.sampled_from([-1.0, 0.0, 1.5]),
)
@settings(deadline=None, max_examples=60)
@pytest.mark.slow
def test_a_search_is_over_at_the_length_at_which_plain_python_ends_it(request, seed, eos_bonus):
    table = tables(seed, eos_bonus)
    assert length_at_end(request, table) == search_plainly(request, table)[1]


@given(searches, st.integers(0, 10**6), st.sampled_from([-1.0, 0.0, 1.5]))
@settings(deadline=None, max_examples=200)
def test_never_stopping_early_gives_up_nothing(request, seed, eos_bonus):
    """The bound of the plain twin, and so of the step, is one: nothing better would have come."""
    table = tables(seed, eos_bonus)
    found, length = search_plainly(request, table, early_stopping="never")
    at_the_end, most = search_plainly(request, table, early_stopping=None)
    assert found == at_the_end and length <= most


@pytest.mark.parametrize(("penalty", "lengths"), [(1.0, [3, 4, 7]), (-1.0, [3, 4, 4])])
def test_the_exhaustive_search_waits_longest_and_only_if_length_is_rewarded(penalty, lengths):
    table = tables(seed=1, eos_bonus=2.0)
    for patience, length in zip((True, False, "never"), lengths, strict=True):
        assert length_at_end(search_of([1], 2, 8, penalty, patience), table) == length


@pytest.mark.slow
@pytest.mark.parametrize(
    ("allocator", "mode"), [("paged", "recompute"), ("lru", "fine"), ("paged", "swap")]
)
def test_preempted_searches_give_what_they_would_have_given(allocator, mode):
    requests = [search_of(range(1, 5), 2, 9), search_of([3, 2, 1], 4, 8), search_of([5], 1, 12)]
    table = tables(seed=3, eos_bonus=-20.0)
    host_pages = 0 if mode == "recompute" else 40
    tight = replace(SMALL, num_pages=18, preemption=mode, host_pages=host_pages)
    roomy = replace(tight, num_pages=60)
    for config, wanted in ((tight, True), (roomy, False)):
        state, rows, preempted = run(requests, table, allocator, config=config)
        assert (preempted > 0) == wanted
        for request, held in zip(requests, rows, strict=True):
            check(state, held, request, table)


def test_a_beam_whose_logits_fail_ends_its_search_and_no_other():
    requests = [search_of([1, 2], 3, 6), search_of([4], 2, 6)]
    table = tables(seed=5, eos_bonus=-20.0)
    state, rows, _ = run(requests, table, fails_at=4)
    reasons = np.asarray(state.requests.finish_reasons)
    assert all(reasons[row] == ERROR for row in rows[0][3:])
    check(state, rows[1], requests[1], table)


def test_beams_share_all_but_what_differs():
    """The paper's Fig 9: the prompt is held once, and beams of one parent share its pages."""
    table = tables(seed=1, eos_bonus=-20.0)
    request = search_of(range(6), 4, 6)
    step = compile_step(SMALL, "paged")
    state = scheduler_state.create(SMALL, SHARED["paged"])
    for number, entry in rows_of(request, range(8), 0):
        state = submit(state, np.int32(number), entry)
    for _ in range(5):
        state, _, _ = step(state, table, np.int32(-1))
        indices = np.asarray(state.table.page_indices)[:4]
        tokens = np.asarray(state.requests.tokens)[np.asarray(state.slots)[:4]]
        lengths = np.asarray(state.table.lengths)[:4]
        assert len(set(lengths.tolist())) == 1
        for column in range(lengths[0] // 2):
            histories = {tuple(row[: 2 * column + 2].tolist()) for row in tokens}
            # Rows of one history may hold different pages; of different histories they must.
            assert len(set(indices[:, column].tolist())) >= len(histories)
        assert all(len(set(indices[:, column].tolist())) == 1 for column in range(3))
        held = np.asarray(state.requests.phases)[4:8]
        assert held.tolist() == [HELD] * 4


@functools.cache
def roomy_with_beams():
    return build(setup_of(replace(CONFIG, max_beams=3, num_pages=60)))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["recompute", "fine"])
def test_a_search_on_the_model_is_the_same_under_pressure(mode):
    request = Request("s", tuple(range(40, 52)), 9, n=3, num_beams=3, ignore_eos=True)
    others = [Request(str(i), PROMPTS[i], 4 * i, ignore_eos=True) for i in (5, 2, 4)]
    (expected,), _ = roomy_with_beams().serve([request])
    assert len({tuple(beam.output_ids) for beam in (expected, *expected.more)}) == 3
    host_pages = 0 if mode == "recompute" else 20
    tight = replace(CONFIG, max_beams=3, num_pages=13, preemption=mode, host_pages=host_pages)
    engine = build(setup_of(tight, allocator="lru"))
    told: dict[tuple[str, int], list[int]] = defaultdict(list)

    def listen(request_id, sample, tokens):
        told[request_id, sample] += tokens

    results, _ = engine.serve([others[0], request, *others[1:]], on_tokens=listen)
    (found,) = [result for result in results if result.request.id == "s"]
    beams = [found, *found.more]
    assert [b.output_ids for b in beams] == [b.output_ids for b in (expected, *expected.more)]
    assert [told["s", i] for i in range(3)] == [b.output_ids for b in beams]
    assert sum(result.num_preemptions for result in results) > 0


def test_searches_that_cannot_be_are_refused():
    engine = build(setup_of(replace(CONFIG, max_beams=3)))
    request = Request("s", PROMPTS[1], 4, num_beams=3)
    assert engine.refusal(request) is None
    refused = {
        "num_beams=4": replace(request, num_beams=4),
        "num_beams=0": replace(request, num_beams=0),
        "n=4": replace(request, n=4),
        "temperature": replace(request, temperature=0.5),
        "length_penalty=nan": replace(request, length_penalty=float("nan")),
    }
    for word, bad in refused.items():
        assert word in (engine.refusal(bad) or "")
    for num_beams in (1, 3):
        maybe = replace(request, num_beams=num_beams, early_stopping="maybe")
        words = "early_stopping='maybe' must be one of True, False, 'never'"
        assert engine.refusal(maybe) == words
    with pytest.raises(ConfigError, match="allocator=max"):
        build(setup_of(replace(CONFIG, max_beams=3), allocator="max"))
    with pytest.raises(ConfigError, match="max_beams=9"):
        replace(CONFIG, max_beams=9)
