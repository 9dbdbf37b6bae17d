"""Beam search on the real SmolLM2-135M, sequence for sequence against transformers'.

One fixture holds all sequences of 36 searches: four prompts, widths 2, 4 and 6, with and without
early stopping, and two length penalties. The other has 13 that never stop early, where commas and
full stops end a sequence: of 60, those that would find something else if they did. Scores have
passed through float32 in another order: they are equal to 1e-4, and no two that decide are nearer.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from test_golden import smollm2

from jaxpage.config import EngineConfig
from jaxpage.engine.host import Engine
from jaxpage.engine.request import Request
from jaxpage.engine.step import Setup
from jaxpage.paging.allocator import ALLOCATORS, CACHED
from jaxpage.scheduling.policies import POLICIES
from pallas_kernels.paged_attention import paged_attention

GOLDEN = Path(__file__).parent / "golden"
SEARCHES = json.loads((GOLDEN / "smollm2_135m_f32_beam.json").read_text())["items"]
NEVER = json.loads((GOLDEN / "smollm2_135m_f32_beam_never.json").read_text())["items"]
PAD = SEARCHES[0]["pad_token_id"]


def requests_of(searches: list[dict]) -> list[Request]:
    return [
        Request(
            str(number),
            tuple(item["prompt_ids"]),
            item["max_new_tokens"],
            n=item["num_beams"],
            num_beams=item["num_beams"],
            length_penalty=item["length_penalty"],
            early_stopping=item["early_stopping"],
        )
        for number, item in enumerate(searches)
    ]


REQUESTS = requests_of(SEARCHES)
LONGEST = max(len(r.prompt_ids) + r.max_new_tokens for r in REQUESTS)


def build(allocator: str, page_size: int, num_pages: int, eos_ids: Sequence[int] = (2,)) -> Engine:
    model, params = smollm2()
    model, num_slots = replace(model, eos_ids=tuple(eos_ids)), 24
    config = EngineConfig(
        num_slots=num_slots,
        num_pages=num_pages,
        page_size=page_size,
        pages_per_slot=-(-LONGEST // page_size),
        num_requests=48,
        token_buckets=(num_slots, 96),
        max_beams=6,
    )
    chosen = (ALLOCATORS | CACHED)[allocator]
    return Engine(
        params, Setup(model, config, chosen, POLICIES["fcfs"], paged_attention), jnp.float32
    )


def check(engine: Engine, requests: list[Request], searches: list[dict] = SEARCHES) -> None:
    for result in engine.serve(requests)[0]:
        item = searches[int(result.request.id)]
        assert result.error is None
        beams = [result, *result.more]
        longest = len(item["sequences"][0])
        padded = [beam.output_ids + [PAD] * (longest - len(beam.output_ids)) for beam in beams]
        assert padded == item["sequences"]
        assert [beam.score for beam in beams] == pytest.approx(item["scores"], abs=1e-4)
        for beam in beams:
            total = sum(beam.logprobs) / len(beam.output_ids) ** item["length_penalty"]
            assert beam.score == pytest.approx(total, abs=1e-4)
    table = engine.state.scheduler.table
    assert not np.any(np.asarray(engine.setup.allocator.violations(table)))
    assert int(table.num_free + table.num_cached) == engine.setup.engine.num_pages


@pytest.mark.slow
def test_beams_are_those_of_transformers():
    check(build("lru", page_size=16, num_pages=24 * 5), REQUESTS[:18:2])


@pytest.mark.slow
def test_beams_that_never_stop_early_are_those_of_transformers():
    (eos_ids,) = {tuple(item["eos_token_ids"]) for item in NEVER}
    engine = build("lru", page_size=16, num_pages=24 * 5, eos_ids=eos_ids)
    check(engine, requests_of(NEVER), NEVER)


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("allocator", ["paged", "lru"])
def test_all_beams_are_those_of_transformers_and_do_not_depend_on_pages(allocator, page_size):
    # Little more than six beams can come to need that share nothing.
    engine = build(allocator, page_size, num_pages=6 * -(-LONGEST // page_size) + 2)
    check(engine, REQUESTS)
    check(engine, REQUESTS[::-1])
