"""Configurations refuse what cannot work, with the value and the remedy; presets are the models."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import pytest

from jaxpage.config import ConfigError, EngineConfig, ModelConfig
from jaxpage.model.params import num_parameters
from jaxpage.model.presets import PRESETS

ENGINE = EngineConfig(
    num_slots=4, num_pages=16, page_size=2, pages_per_slot=6, num_requests=8, token_buckets=(4, 8)
)
CAPACITIES = ("num_slots", "num_pages", "page_size", "pages_per_slot", "num_requests", "log_steps")
SIZES = ("num_layers", "embed_dim", "mlp_dim", "num_heads", "num_kv_heads", "head_dim",
         "vocab_size", "max_position")  # fmt: skip


def engine(**changes) -> EngineConfig:
    return dataclasses.replace(ENGINE, **changes)


def refusal(make: Callable, *args, **how) -> str:
    with pytest.raises(ConfigError) as caught:
        make(*args, **how)
    return str(caught.value)


@pytest.mark.parametrize("field", CAPACITIES)
@pytest.mark.parametrize("value", (0, -3))
def test_a_capacity_that_is_not_positive_is_refused_by_name_and_value(field, value):
    message = refusal(engine, **{field: value})
    assert message == f"{field}={value} must be positive"


@pytest.mark.parametrize("buckets", ((), (0, 8), (8, 4), (4, 4, 8), (-1, 8)))
def test_buckets_that_do_not_ascend_are_refused(buckets):
    message = refusal(engine, token_buckets=buckets)
    assert message == f"token_buckets={buckets} must be positive, ascending and distinct"


def test_a_budget_that_cannot_serve_all_slots_is_refused_with_the_least_that_can():
    message = refusal(engine, token_buckets=(2, 3))
    assert "token_buckets=(2, 3)" in message
    assert "at least num_slots=4" in message
    assert engine(token_buckets=(2, 4)).token_budget == 4


def test_batch_invariance_with_two_buckets_is_refused_with_the_remedy():
    message = refusal(engine, batch_invariant=True)
    assert message == "batch_invariant needs one token bucket, got token_buckets=(4, 8)"
    assert engine(token_buckets=(8,), batch_invariant=True).token_budget == 8


def test_the_longest_sequence_and_the_budget_follow_from_the_capacities():
    config = engine()
    assert (config.max_seq_len, config.token_budget) == (12, 8)


@pytest.mark.parametrize("config", [engine(), PRESETS["llama-3.1-8b"]])
def test_a_configuration_is_frozen_and_a_key(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(config)[0].name, 4)
    assert {config: "found"}[dataclasses.replace(config)] == "found"


@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("value", (0, -1))
def test_a_size_of_a_model_that_is_not_positive_is_refused_by_name_and_value(field, value):
    message = refusal(dataclasses.replace, PRESETS["tiny"], **{field: value})
    assert message == f"tiny: {field}={value} must be positive"


def test_query_heads_that_do_not_divide_among_kv_heads_are_refused():
    message = refusal(dataclasses.replace, PRESETS["tiny"], num_heads=7)
    assert message == "tiny: num_heads=7 must be a multiple of num_kv_heads=2"


def test_an_odd_head_dim_is_refused():
    message = refusal(dataclasses.replace, PRESETS["tiny"], head_dim=7)
    assert message == "tiny: head_dim=7 must be even"


def test_a_refusal_is_a_value_error_so_that_callers_need_not_know_us():
    assert issubclass(ConfigError, ValueError)


# --- the models ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("smollm2-135m", 134_515_008),  # embeddings tied
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
    ],
)
def test_a_preset_has_the_parameters_of_the_published_model(name, parameters):
    assert num_parameters(PRESETS[name]) == parameters


@pytest.mark.parametrize(
    ("name", "dtype", "bytes_per_token"),
    [
        ("llama-3.1-70b", jnp.bfloat16, 327_680),  # 2 x 80 layers x 8 heads x 128 x 2 bytes
        ("llama-3.1-70b", jnp.float32, 655_360),
        ("llama-3.1-8b", jnp.bfloat16, 131_072),
        ("smollm2-135m", jnp.bfloat16, 23_040),
        ("smollm2-135m", jnp.float8_e4m3fn, 11_520),
    ],
)
def test_a_token_occupies_the_kv_bytes_of_all_layers(name, dtype, bytes_per_token):
    assert PRESETS[name].kv_bytes_per_token(dtype) == bytes_per_token


def test_the_paper_s_opt_13b_fits_its_table_1():
    opt = ModelConfig(
        name="opt-13b", num_layers=40, embed_dim=5120, mlp_dim=20_480, num_heads=40,
        num_kv_heads=40, head_dim=128, vocab_size=50_272, max_position=2048,
    )  # fmt: skip
    assert opt.kv_bytes_per_token(jnp.float16) == 819_200
    assert 12 * 2**30 // opt.kv_bytes_per_token(jnp.float16) == 15_728  # "15.7K" slots


@pytest.mark.parametrize("name", PRESETS)
def test_the_heads_of_a_preset_span_its_embedding_in_whole_groups(name):
    config = PRESETS[name]
    assert config.name == name
    assert config.group_size * config.num_kv_heads == config.num_heads
    assert all(0 <= eos < config.vocab_size for eos in config.eos_ids)
    assert config.num_heads * config.head_dim == config.embed_dim or name == "tiny"
