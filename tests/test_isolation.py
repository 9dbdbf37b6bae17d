"""Nobody reads what others left behind: freed pages are poisoned while the engine runs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_engine import CONFIG, PROMPTS, REQUESTS, build, outputs, setup_of

from jaxpage.config import ConfigError
from jaxpage.engine.host import Engine
from jaxpage.engine.request import Request
from jaxpage.paging import page_table
from jaxpage.paging.prefix_cache import PrefixCache
from jaxpage.scheduling.state import DONE


def keep_only(engine: Engine, is_kept) -> None:
    """NaN in every page that is not kept, keys and values, in all layers."""
    is_kept = is_kept[None, :, None, None, None]
    pool = jax.tree.map(lambda x: jnp.where(is_kept, x, jnp.nan), engine.state.pool)
    engine.state = jax.device_put(engine.state.replace(pool=pool))


def owned_pages(engine: Engine):
    """Pages that a row names, or the prefix cache, `bool[P]`."""
    table = engine.state.scheduler.table
    owners = page_table.page_owners(table.page_indices, table.num_pages)
    return (owners < table.page_indices.shape[0]) | table.is_cached


def run(engine: Engine, requests, is_poisoned: bool) -> tuple[list, int]:
    """Tokens and log-probabilities after as many steps as it takes; and preemptions."""
    for row, request in enumerate(requests):
        engine.submit(request, (row,))
    if is_poisoned:
        keep_only(engine, jnp.zeros((engine.setup.engine.num_pages,), bool))
    for _ in range(200):
        engine.advance(1)
        if is_poisoned:
            keep_only(engine, owned_pages(engine))
        held = engine.state.scheduler.requests
        if all(held.phases[row] == DONE for row in range(len(requests))):
            break
    found = held.tokens.tolist(), held.logprobs.tolist(), held.finish_reasons.tolist()
    return list(found), int(held.num_preemptions.sum())


@pytest.mark.in_ci("lru-10")
@pytest.mark.parametrize(
    ("allocator", "num_pages"),
    [("paged", 24), ("paged", 10), ("lru", 24), ("lru", 10), ("oracle", 32), ("max", 32)],
)
def test_what_a_freed_page_holds_changes_nothing(allocator, num_pages):
    config = replace(CONFIG, num_pages=num_pages, headroom_pages=0)
    results = []
    for is_poisoned in (False, True):
        engine = build(setup_of(config, allocator=allocator))
        found, num_preempted = run(engine, REQUESTS, is_poisoned)
        results.append(found)
        assert (num_preempted > 0) == (num_pages == 10)
    assert results[0] == results[1]


def stale_pages(engine: Engine) -> tuple[int, int]:
    """Words that are not zeros in free pages, and in pages after the end of their row."""
    table, size = engine.state.scheduler.table, CONFIG.page_size
    owned = table.table if isinstance(table, PrefixCache) else table
    assert isinstance(owned, page_table.PageTable)
    is_free = np.asarray((owned.ref_counts == 0) & ~table.is_cached)
    last = jax.tree.map(
        lambda x: np.abs(x).max(axis=(0, 2, 4)), (engine.state.pool, engine.state.host_pool)
    )
    by_place = [np.concatenate([a, b]) for a, b in zip(*map(jax.tree.leaves, last), strict=True)]
    holds = np.maximum(*by_place)[table.tier.places.tolist()] > 0  # [P + H, S]
    rows = zip(table.lengths.tolist(), table.page_indices.tolist(), strict=True)
    tails = [holds[pages[(n - 1) // size], n % size :] for n, pages in rows if n % size]
    return int(holds[is_free].sum()), int(sum(tail.sum() for tail in tails))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("allocator", "host"),
    [
        ("paged", {"host_pages": 12, "preemption": "swap"}),
        ("lru", {"host_pages": 5, "preemption": "fine"}),
    ],
)
def test_freed_pages_hold_zeros_and_what_is_taken_again_too(allocator, host):
    config = replace(CONFIG, num_pages=10, headroom_pages=0, zero_freed=True, **host)
    # Prompts of 5 and 6 tokens: the two samples of each share a last page, and copy it.
    pairs = [
        replace(REQUESTS[0], id=f"pair {n}", prompt_ids=PROMPTS[-1][:n], n=2, temperature=1.0)
        for n in (5, 6)
    ]
    requests = [*REQUESTS[:3], *pairs, *REQUESTS[3:]]
    engine = build(setup_of(config, allocator=allocator))

    def look(journal, _) -> None:
        free, tails = stale_pages(engine)
        assert free == 0
        # A copied page is copied whole, with what its first owner wrote since.
        assert tails == 0 or sum(record["num_copied"] for record in journal.records) > 0

    results, journal = engine.serve(requests, steps_per_read=1, on_progress=look)
    happened = {name: sum(r[name] for r in journal.records) for name in journal.records[0]}
    assert min(happened[name] for name in ("num_copied", "num_preempted", "moved_out")) > 0
    expected, _ = build(setup_of(allocator=allocator)).serve(requests)
    assert outputs(results) == outputs(expected)
    assert [outputs(r.more) for r in results] == [outputs(r.more) for r in expected]


def test_only_pages_are_wiped_one_by_one():
    config = replace(CONFIG, num_pages=32, zero_freed=True)
    with pytest.raises(ConfigError, match=r"zero_freed with allocator=oracle.*take paged"):
        build(setup_of(config, allocator="oracle"))


@pytest.mark.slow
@pytest.mark.parametrize("prompt_len", [7, 8, 9])  # a last page with room, none, and almost all
def test_sequences_that_share_a_prompts_pages_go_on_as_if_each_had_its_own(prompt_len):
    prompt = PROMPTS[-1][:prompt_len]
    pair = [Request(str(i), prompt, 9, temperature=1.0, seed=i, ignore_eos=True) for i in (1, 2)]

    def run(is_shared: bool):
        engine = build(setup_of(replace(CONFIG, token_buckets=(4, 32))))
        for row, request in enumerate(pair):
            engine.submit(request, (row,))
        engine.advance(1)  # both prompts, and a token each
        scheduler = engine.state.scheduler
        assert isinstance(scheduler.table, page_table.PageTable)
        assert scheduler.table.lengths.tolist()[:2] == [prompt_len] * 2
        if is_shared:
            table = page_table.release(scheduler.table, jnp.arange(4) == 1)
            table = page_table.fork(table, jnp.int32(0), jnp.int32(1))
            engine.state = engine.state.replace(scheduler=scheduler.replace(table=table))
            keep_only(engine, owned_pages(engine))
        engine.advance(8)
        state = engine.state
        assert isinstance(state.scheduler.table, page_table.PageTable)
        assert page_table.violations(state.scheduler.table).tolist() == [0] * 5
        copied = int(state.log.records.num_copied[: int(state.log.count)].sum())
        assert copied == (1 if is_shared and prompt_len % CONFIG.page_size else 0)
        return state.scheduler.requests.tokens[:2, : prompt_len + 9].tolist()

    shared = run(True)
    assert shared == run(False) and shared[0] != shared[1]


def test_a_fault_in_cached_pages_ends_one_request_and_not_all_that_begin_alike():
    engine = build(setup_of(allocator="lru"))
    ask = Request("asked again", PROMPTS[-1], 5, ignore_eos=True)
    (expected,), _ = engine.serve([ask])
    keep_only(engine, jnp.zeros((CONFIG.num_pages,), bool))
    engine.serve([replace(ask, tenant="another")])
    (failed,), _ = engine.serve([ask])
    assert failed.finish_reason == "error" and failed.num_cached_tokens == len(ask.prompt_ids) - 1
    again = [ask, ask, replace(ask, tenant="another")]  # who loses nothing by it
    results = [result for request in again for result in engine.serve([request])[0]]
    assert outputs(results) == [expected.output_ids] * 3
    most = len(ask.prompt_ids) - 1
    assert [result.num_cached_tokens for result in results] == [0, most, most]


def test_tenants_share_no_page_and_print_the_same():
    prompt = PROMPTS[-1]
    asked = [
        Request(str(i), prompt, 5, ignore_eos=True, tenant=tenant)
        for i, tenant in enumerate(("a", "b", "a", "b", ""))
    ]
    engine = build(setup_of(allocator="lru"))
    found, tokens = [], set()
    for request in asked:
        (result,), _ = engine.serve([request])
        found.append(result.num_cached_tokens)
        tokens.add(tuple(result.output_ids))
    assert found == [0, 0, len(prompt) - 1, len(prompt) - 1, 0]
    assert len(tokens) == 1
