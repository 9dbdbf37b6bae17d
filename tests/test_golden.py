"""The real SmolLM2-135M, token for token against transformers' float32 greedy outputs.

The fixture's smallest margin between the two likeliest tokens is above 1e-3, far above float32
rounding, so every comparison is exact.
"""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpage.checkpoint.load import load_model
from jaxpage.config import PREEMPTION_MODES, EngineConfig, Prices
from jaxpage.engine.host import Engine
from jaxpage.engine.request import Request, Result
from jaxpage.engine.step import Setup
from jaxpage.model.placement import serving_params
from jaxpage.paging.allocator import ALLOCATORS, CACHED
from jaxpage.scheduling.policies import POLICIES
from pallas_kernels.paged_attention import paged_attention

GOLDEN = json.loads(
    (Path(__file__).parent / "golden" / "smollm2_135m_f32_greedy.json").read_text()
)["items"]
NEW_TOKENS = 64
LONGEST = max(len(item["prompt_ids"]) for item in GOLDEN) + NEW_TOKENS

REQUESTS = [
    Request(str(i), tuple(item["prompt_ids"]), NEW_TOKENS, ignore_eos=True)
    for i, item in enumerate(GOLDEN)
]
BRIEF = [replace(request, max_new_tokens=24) for request in REQUESTS]
EXPECTED = {str(i): item["output_ids"] for i, item in enumerate(GOLDEN)}
# With `auto` and pages of 8, sequences of fewer than 48 tokens are computed again, and longer move.
PRICES = Prices(token_s=0.01, pair_s=0.01, page_s=1.0)


@cache
def smollm2():
    """Configuration and parameters, loaded once for all tests."""
    model = load_model("smollm2-135m", jnp.float32)
    return model.config, serving_params(model.params, jnp.float32)


def build(
    page_size: int,
    num_pages: int,
    allocator: str = "paged",  # or an eviction policy, for pages with a prefix cache
    batch_invariant: bool = False,
    policy: str = "fcfs",
    preemption: str = "recompute",
) -> Engine:
    model, params = smollm2()
    config = EngineConfig(
        num_slots=8,
        num_pages=num_pages,
        page_size=page_size,
        pages_per_slot=-(-LONGEST // page_size),
        num_requests=8,
        token_buckets=(32,) if batch_invariant else (8, 96),
        batch_invariant=batch_invariant,
        preemption=preemption,
        prices=PRICES if preemption == "auto" else None,
        host_pages=0 if preemption == "recompute" else 8 * pool_of(LONGEST, page_size),
    )
    setup = Setup(
        model, config, (ALLOCATORS | CACHED)[allocator], POLICIES[policy], paged_attention
    )
    return Engine(params, setup, jnp.float32)


def check(results: list[Result]) -> None:
    for result in results:
        assert result.error is None
        assert result.finish_reason == "length"
        assert result.output_ids == EXPECTED[result.request.id][: result.request.max_new_tokens]


def check_nothing_is_held(engine: Engine) -> None:
    table = engine.state.scheduler.table
    assert not np.any(np.asarray(engine.setup.allocator.violations(table)))
    assert int(table.num_free + table.num_cached) == engine.setup.engine.num_pages


def pool_of(tokens: int, page_size: int) -> int:
    return -(-tokens // page_size)


@pytest.mark.slow
def test_outputs_are_the_references_singly_together_and_in_any_order():
    engine = build(page_size=16, num_pages=pool_of(8 * LONGEST, 16))
    check(engine.serve(REQUESTS)[0])
    check(engine.serve(BRIEF[::-1])[0])
    for request in BRIEF[::3]:
        check(engine.serve([request])[0])
    check_nothing_is_held(engine)


@pytest.mark.slow
@pytest.mark.parametrize("page_size, preemption", [(1, "recompute"), (8, "fine"), (64, "swap")])
def test_a_pool_so_small_that_it_preempts_changes_no_token(page_size, preemption):
    engine = build(page_size, num_pages=pool_of(LONGEST, page_size) * 3 // 2, preemption=preemption)
    results, journal = engine.serve(REQUESTS)
    check(results)
    check_nothing_is_held(engine)
    assert sum(result.num_preemptions for result in results) > 0
    assert sum(record["num_preempted"] for record in journal.records) > 0
    computes_again = sum(record["num_recomputed"] for record in journal.records) > 0
    assert computes_again == (preemption == "recompute")


def check_with_prefix_cache(
    eviction: str,
    page_size: int,
    policy: str = "fcfs",
    preemption: str = "recompute",
    asked: list[Request] = REQUESTS,
    num_rounds: int = 3,
) -> int:
    """Rounds in a pool that preempts and evicts; returns the tokens found in the cache."""
    longest = pool_of(LONGEST, page_size)
    engine = build(page_size, longest * 3 // 2, eviction, policy=policy, preemption=preemption)
    num_found, num_preempted = 0, 0
    rounds = (asked, asked[::-1], [r for r in asked for _ in range(2)])
    for requests in rounds[:num_rounds]:
        named = [replace(request, id=str(i)) for i, request in enumerate(requests)]
        results, journal = engine.serve(named)
        check([replace(result, request=r) for result, r in zip(results, requests, strict=True)])
        num_found += sum(record["num_found"] for record in journal.records)
        num_preempted += sum(record["num_preempted"] for record in journal.records)
        check_nothing_is_held(engine)
    assert num_preempted > 0
    return num_found


def test_a_prefix_cache_in_a_small_pool_changes_no_token():
    assert check_with_prefix_cache("lru", 4, preemption="fine", asked=BRIEF, num_rounds=2) > 0


@pytest.fixture
def forgets_programs():
    """A process that keeps some thirty compiled engines cannot compile another."""
    yield
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.usefixtures("forgets_programs")
@pytest.mark.parametrize("preemption", PREEMPTION_MODES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("page_size", [1, 4, 8, 16, 64])
@pytest.mark.parametrize("eviction", CACHED)
def test_no_combination_with_a_prefix_cache_changes_a_token(
    eviction, page_size, policy, preemption
):
    found = check_with_prefix_cache(eviction, page_size, policy, preemption)
    assert found > 0 or page_size == 64


@pytest.mark.slow
def test_all_full_pages_of_a_prompt_asked_again_are_found():
    engine = build(16, pool_of(8 * LONGEST, 16), "lru")
    check(engine.serve(BRIEF)[0])
    again, journal = engine.serve(BRIEF)
    check(again)
    for result in again:
        most = len(result.request.prompt_ids) - 1
        assert most // 16 * 16 <= result.num_cached_tokens <= most
    assert sum(record["num_found"] for record in journal.records) > 0


@pytest.mark.slow
@pytest.mark.parametrize("allocator", ["max", "pow2", "oracle"])
def test_every_contiguous_allocator_gives_the_same_tokens(allocator):
    engine = build(16, num_pages=24, allocator=allocator)
    results, journal = engine.serve(BRIEF)
    check(results)
    check_nothing_is_held(engine)
    assert max(record["num_running"] for record in journal.records) < len(REQUESTS)


@pytest.mark.slow
def test_with_batch_invariance_log_probabilities_are_equal_to_the_bit_in_any_company():
    """Alone, together, in another order, from a prefix cache, and in a pool that preempts."""
    roomy = build(16, num_pages=pool_of(8 * LONGEST, 16), batch_invariant=True)
    together = {r.request.id: r for r in roomy.serve(BRIEF)[0]}
    check(list(together.values()))
    reversed_order = roomy.serve(BRIEF[::-1])[0]
    alone = [roomy.serve([request])[0][0] for request in BRIEF[::3]]
    tight = build(8, pool_of(LONGEST, 8), "lru", batch_invariant=True, preemption="fine")
    preempted = [result for _ in range(2) for result in tight.serve(BRIEF)[0]]
    assert sum(result.num_preemptions for result in preempted) > 0
    assert sum(result.num_cached_tokens for result in preempted) > 0
    for result in (*reversed_order, *alone, *preempted):
        expected = together[result.request.id]
        assert result.output_ids == expected.output_ids
        assert result.logprobs == expected.logprobs


@pytest.mark.slow
def test_sampled_tokens_do_not_depend_on_the_company_or_the_order():
    warm = [
        replace(request, temperature=0.9, top_k=50, top_p=0.95, seed=7 + i, max_new_tokens=24)
        for i, request in enumerate(REQUESTS)
    ]
    engine = build(16, num_pages=pool_of(8 * LONGEST, 16), batch_invariant=True)
    together = {r.request.id: r.output_ids for r in engine.serve(warm)[0]}
    for result in (*engine.serve(warm[::-1])[0], *engine.serve(warm[2:3])[0]):
        assert result.output_ids == together[result.request.id]
    other_seed = engine.serve([replace(warm[2], seed=1234)])[0][0]
    assert other_seed.output_ids != together[warm[2].id]


def test_an_answer_ends_at_its_eos_token_unless_that_is_ignored():
    engine = build(16, num_pages=pool_of(8 * LONGEST, 16))
    (eos_id,) = smollm2()[0].eos_ids
    honoured = [replace(request, ignore_eos=False) for request in REQUESTS]
    num_stopped = 0
    for result in engine.serve(honoured)[0]:
        expected = EXPECTED[result.request.id]
        if eos_id in expected:
            expected = expected[: expected.index(eos_id) + 1]
            assert result.finish_reason == "stop"
            num_stopped += 1
        assert result.output_ids == expected
    assert num_stopped > 0
