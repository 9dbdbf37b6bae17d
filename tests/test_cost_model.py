"""The cost model: rooflines, sums over rows, and what a step of a real model must cost at least."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpage.config import ConfigError
from jaxpage.model.presets import PRESETS
from jaxpage.sim import cost_model, kernels
from jaxpage.sim.cost_model import Load, Overhead, load_of, step_seconds
from jaxpage.sim.device import DEVICES, find_device
from jaxpage.sim.efficiencies import A100_MEASURED
from jaxpage.sim.kernels import KINDS, Efficiency, Work, kernel_seconds
from jaxpage.sim.shapes import SHAPES, shape_of

PERFECT = Efficiency(compute=1.0, memory=1.0, launch_s=0.0, item_s=0.0, sharpness=99.0)
A100 = DEVICES["a100-80gb"]


def seconds(efficiency: Efficiency, flops: float, num_bytes: float, items: float = 0.0) -> float:
    work = Work(*(jnp.float32(x) for x in (flops, num_bytes, items)))
    return float(kernel_seconds(efficiency, jnp.float32(1e12), jnp.float32(1e9), work))


def loads(counts: list[int], lengths: list[int], moved: int = 0) -> Load:
    counts_, lengths_ = (jnp.asarray(x, jnp.int32) for x in (counts, lengths))
    return load_of(counts_, lengths_, counts_ > 0, jnp.int32(moved), jnp.int32(0))


def cost_of(name: str = "opt-13b", **settings_) -> cost_model.CostModel:
    return cost_model.create(SHAPES[name], A100, **settings_)


@given(
    st.floats(1e3, 1e15), st.floats(1e3, 1e12), st.floats(0.01, 50), st.floats(0, 1e-4),
    st.integers(0, 100),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_a_kernel_takes_longer_than_its_slower_half_and_not_longer_than_both(
    flops, num_bytes, sharpness, launch_s, items
):
    efficiency = Efficiency(0.5, 0.8, launch_s, 1e-6, sharpness)
    compute, memory = flops / 0.5e12, num_bytes / 0.8e9
    found = seconds(efficiency, flops, num_bytes, items) - launch_s - 1e-6 * items
    slack = 1e-5 * (compute + memory + launch_s + 1e-6 * items)
    assert max(compute, memory) - slack <= found <= compute + memory + slack


def test_a_kernel_with_nothing_to_do_takes_no_time():
    assert seconds(A100_MEASURED["decode"], 0, 0, 0) == 0.0


def test_a_kernel_that_only_moves_has_finite_gradients():
    def loss(logs):
        efficiency = Efficiency(*jnp.exp(logs))
        work = Work(jnp.float32(0), jnp.float32(1e6), jnp.float32(0))
        return kernel_seconds(efficiency, jnp.float32(1e12), jnp.float32(1e9), work)

    gradients = jax.grad(loss)(jnp.log(jnp.asarray([0.7, 0.7, 5e-6, 1e-7, 1.0])))
    assert bool(jnp.all(jnp.isfinite(gradients)))
    np.testing.assert_allclose(float(gradients[1]), -1e-3 / 0.7, rtol=1e-5)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 900)), min_size=1, max_size=8))
@settings(deadline=None, max_examples=40)
def test_a_load_is_the_sum_over_tokens(rows):
    counts = [count for count, _ in rows]
    lengths = [count + before for count, before in rows]
    load = loads(counts, lengths)
    long = [(c, n) for c, n in zip(counts, lengths, strict=True) if c > 1]
    assert float(load.tokens) == sum(counts)
    assert float(load.samples) == sum(count > 0 for count in counts)
    assert float(load.decodes) == counts.count(1)
    assert float(load.decode_context) == sum(
        n for c, n in zip(counts, lengths, strict=True) if c == 1
    )
    assert float(load.prefill_tokens) == sum(c for c, _ in long)
    assert float(load.prefill_context) == sum(n for _, n in long)
    # Each token sees those before it, and itself.
    assert float(load.prefill_pairs) == sum(sum(range(n - c + 1, n + 1)) for c, n in long)
    assert float(load.prefill_tiles) == sum(-(-c // 128) for c, _ in long)


def test_an_empty_step_takes_no_time_and_any_other_has_the_overhead():
    cost = cost_of(overhead=Overhead(step_s=1.0, row_s=10.0))
    assert float(step_seconds(cost, loads([0, 0], [0, 7]))) == 0.0
    assert 11.0 < float(step_seconds(cost, loads([0, 1], [0, 7]))) < 11.1
    assert 31.0 < float(step_seconds(cost, loads([9, 1, 1], [9, 9, 7]))) < 31.1


def perfect_cost(name: str, num_devices: int = 1) -> cost_model.CostModel:
    efficiencies = dict.fromkeys(KINDS, PERFECT)
    return cost_of(name, num_devices=num_devices, efficiencies=efficiencies)


@pytest.mark.parametrize("name", ["opt-13b", "llama-3.1-70b"])
def test_at_perfect_efficiency_one_token_takes_the_reading_of_all_weights(name):
    cost, shape = perfect_cost(name), SHAPES[name]
    least = (2 * shape.num_params - 2 * shape.vocab_size * shape.embed_dim) / A100.bytes_per_s
    assert least < float(step_seconds(cost, loads([1], [1]))) < 1.01 * least


def test_at_perfect_efficiency_a_long_prompt_takes_its_operations():
    cost, shape, n = perfect_cost("opt-13b"), SHAPES["opt-13b"], 2048
    E, F, L = shape.embed_dim, shape.mlp_dim, shape.num_layers
    products = 2 * n * L * (4 * E * E + 2 * E * F) / A100.flops_per_s
    attention = 4 * L * E * n * (n + 1) / 2 / A100.flops_per_s
    found = float(step_seconds(cost, loads([n], [n])))
    assert products + attention < found < 1.1 * (products + attention)


def test_more_context_costs_the_reading_of_its_keys_and_values():
    cost, shape = perfect_cost("llama-3.1-70b"), SHAPES["llama-3.1-70b"]
    near, far = (float(step_seconds(cost, loads([1] * 8, [n] * 8))) for n in (5000, 6000))
    more = 8 * 1000 * shape.kv_bytes_per_token / A100.bytes_per_s
    assert shape.kv_bytes_per_token == 327_680  # the article's 1.3 GB at 4096 tokens
    np.testing.assert_allclose(far - near, more, rtol=1e-3)


def test_devices_share_the_weights_and_pay_for_sums():
    alone, four = (float(step_seconds(cost_of("llama-3.1-70b", num_devices=n), loads([1], [9])))
                   for n in (1, 4))  # fmt: skip
    silent = A100_MEASURED | {"all_reduce": PERFECT}
    sums = cost_of("llama-3.1-70b", num_devices=4, efficiencies=silent)
    assert alone / 4 < float(step_seconds(sums, loads([1], [9]))) < four < alone / 2


def test_pages_that_move_cost_their_bytes_and_their_copies():
    cost = cost_of(page_size=16)
    with_moves, without = (float(step_seconds(cost, loads([1], [50], moved=n))) for n in (10, 0))
    page_bytes = 16 * SHAPES["opt-13b"].kv_bytes_per_token
    assert page_bytes == 16 * 819_200  # 800 KB a token (Kwon et al. 2023, section 3)
    expected = 10 * (page_bytes / (0.8 * A100.host_bytes_per_s) + 1e-5)
    np.testing.assert_allclose(with_moves - without, expected, rtol=1e-3)


def test_steps_are_priced_under_vmap_and_jit():
    cost = cost_of()
    rates = jax.jit(jax.vmap(lambda n: step_seconds(cost, load_of(
        jnp.ones((4,), jnp.int32), n + jnp.zeros((4,), jnp.int32), jnp.ones((4,), jnp.bool_),
        jnp.int32(0), jnp.int32(0)))))(jnp.asarray([10, 1000], jnp.int32))  # fmt: skip
    assert float(rates[0]) < float(rates[1])


def test_a_runnable_models_shape_is_its_config():
    assert shape_of(PRESETS["llama-3.1-70b"]) == SHAPES["llama-3.1-70b"]


@pytest.mark.parametrize(
    "name,billions",
    [
        ("opt-13b", 13),
        ("opt-66b", 66),
        ("opt-175b", 175),
        ("llama-13b", 13),
        ("llama-2-70b", 69),
        ("llama-3.1-8b", 8),
        ("llama-3.1-70b", 70.6),
    ],
)
def test_shapes_have_as_many_weights_as_their_names_say(name, billions):
    assert SHAPES[name].num_params / 1e9 == pytest.approx(billions, rel=0.02)


def test_heads_that_cannot_be_dealt_out_are_refused():
    with pytest.raises(ConfigError, match="num_devices=3 must divide the 40 heads"):
        cost_of(num_devices=3)


def test_a_device_may_come_from_a_file(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(A100.__dict__ | {"name": "mine"}))
    assert find_device(str(file)) == replace(A100, name="mine")


@pytest.mark.parametrize(
    "text,message",
    [
        ("{", "not JSON"),
        ('{"name": "mine"}', "expected one object with the fields"),
        (json.dumps(A100.__dict__ | {"bytes_per_s": 0}), "bytes_per_s=0 must be a positive"),
    ],
)
def test_a_device_file_that_cannot_be_is_refused(tmp_path, text, message):
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        find_device(str(file))


def test_an_unknown_device_is_refused_with_those_that_are_known():
    with pytest.raises(ConfigError, match=r"device 'tpu': neither a file nor one of a100-40gb"):
        find_device("tpu")


def test_all_kinds_have_an_efficiency():
    assert set(A100_MEASURED) == set(KINDS)
    assert KINDS.index("all_reduce") == kernels.ALL_REDUCE
