"""The model's pieces against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpage.model import llama
from jaxpage.model.params import INPUT_AXES, init_params
from jaxpage.model.placement import cpu_has_bfloat16, serving_params
from jaxpage.model.presets import PRESETS


def hf_llama31_frequencies(theta, dim, factor, low, high, original):
    """The published recipe of Llama 3.1, frequency by frequency."""
    frequencies = []
    for i in range(0, dim, 2):
        frequency = 1.0 / theta ** (i / dim)
        wavelength = 2 * np.pi / frequency
        if wavelength < original / high:
            frequencies.append(frequency)
        elif wavelength > original / low:
            frequencies.append(frequency / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            frequencies.append((1 - smooth) * frequency / factor + smooth * frequency)
    return np.array(frequencies)


@pytest.mark.parametrize("name", ["smollm2-135m", "llama-3.1-70b"])
def test_rotary_angles_follow_the_published_frequencies(name):
    config = PRESETS[name]
    scaling = config.rope_scaling
    arguments = (
        (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor,
         scaling.original_max_position)
        if scaling
        else (1.0, 1.0, 4.0, 8192)
    )  # fmt: skip
    expected = hf_llama31_frequencies(config.rope_theta, config.head_dim, *arguments)
    cos, sin = llama.rope_angles(jnp.arange(4, dtype=jnp.int32), config)
    angles = np.arange(4)[:, None] * expected[None]
    np.testing.assert_allclose(cos, np.cos(angles), atol=2e-6)
    np.testing.assert_allclose(sin, np.sin(angles), atol=2e-6)


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    config = PRESETS["tiny"]
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, config.head_dim), jnp.float32)

    def score(q_position, k_position):
        rotated = [
            llama.apply_rope(x, llama.rope_angles(jnp.array([p], jnp.int32), config))
            for x, p in ((q, q_position), (k, k_position))
        ]
        return float(jnp.sum(rotated[0] * rotated[1])), float(jnp.linalg.norm(rotated[0]))

    near, length = score(7, 3)
    far, _ = score(107, 103)
    assert near == pytest.approx(far, abs=1e-4)
    assert length == pytest.approx(float(jnp.linalg.norm(q)), rel=1e-6)
    assert near != pytest.approx(score(8, 3)[0], abs=1e-4)


def test_rms_norm_is_its_definition():
    x = jax.random.normal(jax.random.key(1), (3, 8), jnp.float32)
    weight = jnp.arange(8, dtype=jnp.float32)
    expected = np.asarray(x) / np.sqrt(np.mean(np.asarray(x) ** 2, -1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(
        llama.rms_norm(x, weight, 1e-5), expected * np.asarray(weight), rtol=1e-6
    )


@pytest.mark.parametrize("name", ["qkv", "out", "gate_up", "down"])
def test_weights_apart_give_the_products_of_the_stack(name):
    config = PRESETS["tiny"]
    params = init_params(config, jax.random.key(2), jnp.float32)
    stacked = params["layers"][name]
    num_in = INPUT_AXES[name]
    x = jax.random.normal(jax.random.key(3), (5, *stacked.shape[-num_in:]), jnp.float32)
    apart = serving_params(params, jnp.float32)["layers"][name]
    assert apart.is_transposed
    for index in range(config.num_layers):
        expected = jnp.tensordot(
            x, stacked[index], (tuple(range(1, 1 + num_in)), tuple(range(-num_in, 0)))
        )
        for weights in (stacked, apart):
            found = llama.project_layer(x, weights, jnp.int32(index))
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_hardware_is_read_from_the_processor_flags(tmp_path):
    path = tmp_path / "cpuinfo"
    assert not cpu_has_bfloat16(path)
    path.write_text("processor\t: 0\nflags\t\t: fpu avx2 fma\n")
    assert not cpu_has_bfloat16(path)
    path.write_text("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16\n")
    assert cpu_has_bfloat16(path)
