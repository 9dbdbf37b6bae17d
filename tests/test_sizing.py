"""Capacities from what a user knows: bytes to pages, slots to buckets."""

from typing import Any

import jax.numpy as jnp
import pytest

from jaxpage.config import ConfigError
from jaxpage.engine.sizing import PREFILL_TOKENS, engine_config, token_buckets
from jaxpage.model.presets import PRESETS

SMOL = PRESETS["smollm2-135m"]
WANTED: dict[str, Any] = {
    "max_seq_len": 100,
    "num_slots": 8,
    "num_requests": 32,
    "page_size": 16,
    "kv_dtype": jnp.bfloat16,
}
PAGE_BYTES = 16 * 23_040


@pytest.mark.parametrize(
    ("num_slots", "max_seq_len", "buckets"),
    [
        (64, 2048, (4, 24, 44, 64, 256, 512)),
        (32, 2048, (4, 12, 24, 32, 256, 512)),
        (8, 2048, (4, 8, 256, 512)),
        (1, 2048, (1, 256, 512)),
        (200, 2048, (4, 68, 136, 200, 256, 512)),
        (1000, 2048, (4, 336, 668, 1000)),  # all must be able to decode
        (8, 4, (4, 8, 32)),  # eight slots never bring more than 32 tokens
        (3, 1, (3,)),
        (1, 1, (1,)),
    ],
)
def test_buckets_are_four_rows_thirds_of_the_slots_and_prompts(num_slots, max_seq_len, buckets):
    assert PREFILL_TOKENS == (256, 512)
    assert token_buckets(num_slots, max_seq_len) == buckets


@pytest.mark.parametrize("num_slots", (1, 2, 3, 5, 7, 16, 129, 600))
@pytest.mark.parametrize("page_size", (1, 3, 16))
@pytest.mark.parametrize("max_seq_len", (1, 2, 100))
def test_any_slots_and_lengths_give_a_configuration_that_is_accepted(
    num_slots, page_size, max_seq_len
):
    how = {"num_slots": num_slots, "page_size": page_size, "max_seq_len": max_seq_len}
    config = engine_config(SMOL, **(WANTED | how))
    assert max_seq_len <= config.max_seq_len < max_seq_len + page_size
    assert num_slots <= config.token_budget <= max(num_slots * config.max_seq_len, num_slots)
    assert config.num_pages == num_slots * config.pages_per_slot


def test_by_default_every_slot_can_be_full():
    config = engine_config(SMOL, **WANTED)
    assert (config.pages_per_slot, config.num_pages) == (7, 56)
    assert (config.num_slots, config.num_requests, config.page_size) == (8, 32, 16)
    assert not config.batch_invariant and not config.record_page_map


@pytest.mark.parametrize(
    ("kv_bytes", "num_pages"),
    [(PAGE_BYTES, 1), (10 * PAGE_BYTES - 1, 9), (10 * PAGE_BYTES, 10)],
)
def test_a_budget_in_bytes_buys_whole_pages_of_all_layers(kv_bytes, num_pages):
    assert engine_config(SMOL, **WANTED, kv_bytes=kv_bytes).num_pages == num_pages


def test_half_the_bytes_a_value_are_twice_the_pages():
    budget: dict[str, Any] = {"kv_bytes": 8 * PAGE_BYTES}
    wide = engine_config(SMOL, **(WANTED | {"kv_dtype": jnp.float32}), **budget)
    assert (wide.num_pages, engine_config(SMOL, **WANTED, **budget).num_pages) == (4, 8)


def test_the_pool_factor_multiplies_the_pages_and_nothing_else():
    plain = engine_config(SMOL, **WANTED, num_pages=5)
    large = engine_config(SMOL, **WANTED, num_pages=5, pool_factor=10)
    assert (plain.num_pages, large.num_pages) == (5, 50)
    assert plain.token_buckets == large.token_buckets


def test_batch_invariance_has_one_bucket_for_all_slots_and_as_many_prompt_tokens():
    config = engine_config(SMOL, **WANTED, batch_invariant=True, record_page_map=True)
    assert config.token_buckets == (2 * WANTED["num_slots"],)
    assert config.batch_invariant and config.record_page_map


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_size": 0}, "page_size=0 must be positive"),
        ({"num_slots": -1}, "num_slots=-1 must be positive"),
        ({"max_seq_len": 0}, "max_seq_len=0 must be positive"),
        ({"num_pages": 0}, "num_pages=0 must be positive"),
        ({"num_pages": 4, "kv_bytes": 10**9}, "give num_pages or kv_bytes, not both"),
        (
            {"kv_bytes": PAGE_BYTES - 1},
            f"kv_bytes={PAGE_BYTES - 1} is less than one page of 16 tokens "
            f"({PAGE_BYTES} bytes): raise it",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_value_and_the_remedy(change, message):
    with pytest.raises(ConfigError) as caught:
        engine_config(SMOL, **(WANTED | change))
    assert str(caught.value) == message
