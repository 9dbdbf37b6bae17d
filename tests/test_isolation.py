"""Nobody reads what others left behind: freed pages are poisoned while the engine runs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from tiny_engine import CONFIG, PROMPTS, REQUESTS, build, setup_of

from jaxpage.engine.host import Engine
from jaxpage.engine.request import Request
from jaxpage.paging import page_table
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
