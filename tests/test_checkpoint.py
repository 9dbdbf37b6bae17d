"""Tiny safetensors and GGUF files -> our parameters; damage to them; the cache; shardings."""

import os
import shutil

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_checkpoints import (
    CONFIG,
    assert_params_are,
    gguf_tensors,
    hf_tensors,
    untied,
    write_gguf,
    write_hf,
)

from jaxpage.checkpoint import store
from jaxpage.checkpoint.errors import CheckpointError
from jaxpage.checkpoint.gguf_file import GgufFile, llama3_rope_factors, read_gguf_config
from jaxpage.checkpoint.load import load_model
from jaxpage.config import ModelConfig, RopeScaling


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPAGE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("config", [CONFIG, untied()], ids=["tied", "untied"])
def test_safetensors_land_in_our_parameters_exactly(tmp_path, config, num_shards):
    tensors = hf_tensors(config)
    folder = write_hf(tmp_path / "small", config, tensors, num_shards)
    loaded = load_model(str(folder), jnp.float32)
    assert loaded.config == config
    assert loaded.tokenizer is None
    assert_params_are(loaded.params, tensors, config)


@pytest.mark.parametrize("config", [CONFIG, untied()], ids=["tied", "untied"])
def test_a_gguf_lands_in_our_parameters_exactly_with_its_rows_unpermuted(tmp_path, config):
    tensors = hf_tensors(config)
    path = write_gguf(tmp_path / "small.gguf", config, gguf_tensors(tensors, config))
    loaded = load_model(str(path), jnp.float32)
    assert loaded.config == config
    assert_params_are(loaded.params, tensors, config)
    assert loaded.tokenizer is not None and loaded.tokenizer.encode("abcd") == [4, 8]


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F16", "BF16"])
def test_a_quantised_gguf_gives_what_the_gguf_library_dequantises(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    tensors = hf_tensors(CONFIG)
    rounded = {
        name: gguf.dequantize(gguf.quantize(value, kind), kind) if value.ndim == 2 else value
        for name, value in tensors.items()
    }
    path = tmp_path / "small.gguf"
    write_gguf(path, CONFIG, gguf_tensors(tensors, CONFIG), quantise=kind)
    assert_params_are(load_model(str(path), jnp.float32).params, rounded, CONFIG)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_values_are_rounded_from_the_stored_dtype_to_the_wanted_one(tmp_path, stored, dtype):
    tensors = {name: value.astype(stored) for name, value in hf_tensors(CONFIG).items()}
    folder = write_hf(tmp_path / "small", CONFIG, tensors)
    params = load_model(str(folder), dtype).params
    as_float32 = {name: value.astype(np.float32) for name, value in tensors.items()}
    assert_params_are(params, as_float32, CONFIG, dtype)


def test_other_dtypes_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="float16 is not supported; use float32 or bfloat16"):
        load_model("tiny", jnp.float16)
    tensors = hf_tensors(CONFIG) | {"model.norm.weight": np.ones(32, np.int32)}
    folder = write_hf(tmp_path / "small", CONFIG, tensors)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has dtype int32"):
        load_model(str(folder), jnp.float32)


def test_tensors_that_do_not_fit_are_all_named_with_their_shapes(tmp_path):
    tensors = hf_tensors(CONFIG)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = np.ones(31, np.float32)
    tensors["model.layers.2.mlp.up_proj.weight"] = np.ones((64, 32), np.float32)
    folder = write_hf(tmp_path / "small", CONFIG, tensors)
    with pytest.raises(CheckpointError) as error:
        load_model(str(folder), jnp.float32)
    message = str(error.value)
    assert "missing model.layers.1.mlp.up_proj.weight (64, 32)" in message
    assert "misshapen model.norm.weight: found (31,), expected (32,)" in message
    assert "unknown model.layers.2.mlp.up_proj.weight (64, 32)" in message
    assert not store.cache_folder().exists()


def test_a_gguf_tensor_that_does_not_fit_is_named(tmp_path):
    tensors = gguf_tensors(hf_tensors(CONFIG), CONFIG)
    tensors["blk.0.attn_q.bias"] = np.zeros(64, np.float32)
    path = write_gguf(tmp_path / "small.gguf", CONFIG, tensors)
    with pytest.raises(CheckpointError, match=r"unknown blk\.0\.attn_q\.bias \(64,\)"):
        load_model(str(path), jnp.float32)


def test_names_that_carry_no_weights_are_ignored(tmp_path):
    tensors = hf_tensors(CONFIG)
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(8, "f4") for i in (0, 1)}
    folder = write_hf(tmp_path / "small", CONFIG, tensors | extra)
    assert_params_are(load_model(str(folder), jnp.float32).params, tensors, CONFIG)


def test_a_tied_head_may_be_stored_if_it_equals_the_embedding(tmp_path):
    tensors = hf_tensors(CONFIG)
    head = tensors["model.embed_tokens.weight"].copy()
    folder = write_hf(tmp_path / "equal", CONFIG, tensors | {"lm_head.weight": head})
    assert_params_are(load_model(str(folder), jnp.float32).params, tensors, CONFIG)
    head[3, 4] += 1
    folder = write_hf(tmp_path / "other", CONFIG, tensors | {"lm_head.weight": head})
    with pytest.raises(CheckpointError, match="differs from the embedding"):
        load_model(str(folder), jnp.float32)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_a_truncated_safetensors_file_is_named(tmp_path, keep):
    folder = write_hf(tmp_path / "small", CONFIG, hf_tensors(CONFIG))
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load_model(str(folder), jnp.float32)


@pytest.mark.parametrize("keep", [0.0, 0.0001, 0.005, 0.02, 0.04, 0.1, 0.5, 0.9999])
def test_a_truncated_gguf_is_named(tmp_path, keep):
    path = tmp_path / "small.gguf"
    write_gguf(path, CONFIG, gguf_tensors(hf_tensors(CONFIG), CONFIG))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CheckpointError, match=r"small\.gguf cannot be read as GGUF"):
        load_model(str(path), jnp.float32)


def test_a_missing_shard_is_named(tmp_path):
    folder = write_hf(tmp_path / "small", CONFIG, hf_tensors(CONFIG), num_shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        load_model(str(folder), jnp.float32)


def test_a_llama_3_1_gguf_says_its_rope_scaling_by_factors(tmp_path):
    scaling = RopeScaling(32.0, 1.0, 4.0, 8192)
    config = ModelConfig(**{**CONFIG.__dict__, "rope_theta": 500_000.0, "head_dim": 64})
    factors = llama3_rope_factors(scaling, 500_000.0, 64).astype(np.float32)
    tensors = gguf_tensors(hf_tensors(config), config)
    path = tmp_path / "small.gguf"
    write_gguf(path, config, tensors | {"rope_freqs.weight": factors})
    assert load_model(str(path), jnp.float32).config.rope_scaling == scaling
    factors[20] *= 1.01
    write_gguf(path, config, tensors | {"rope_freqs.weight": factors})
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight \(32,\) is not"):
        read_gguf_config(GgufFile(path))


def test_llama_3_factors_are_one_at_the_top_and_the_factor_at_the_bottom():
    factors = llama3_rope_factors(RopeScaling(8.0, 1.0, 4.0, 8192), 500_000.0, 128)
    assert np.all(np.diff(factors) >= 0)
    assert factors[0] == 1.0 and factors[-1] == 8.0
    wavelength = 2 * np.pi * 500_000.0 ** (np.arange(64) / 64)
    middle = np.flatnonzero((wavelength > 8192 / 4) & (wavelength < 8192))
    smooth = (8192 / wavelength[middle] - 1) / 3
    np.testing.assert_allclose(1 / factors[middle], (1 - smooth) / 8 + smooth)


def test_a_second_load_reads_only_the_cache(tmp_path, monkeypatch):
    tensors = hf_tensors(CONFIG)
    folder = write_hf(tmp_path / "small", CONFIG, tensors)
    load_model(str(folder), jnp.float32)
    monkeypatch.setattr("jaxpage.checkpoint.load.convert", None)
    assert_params_are(load_model(str(folder), jnp.float32).params, tensors, CONFIG)


def test_a_changed_source_is_converted_again(tmp_path):
    tensors = hf_tensors(CONFIG)
    folder = write_hf(tmp_path / "small", CONFIG, tensors)
    load_model(str(folder), jnp.float32)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, folder / "model.safetensors")
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert_params_are(load_model(str(folder), jnp.float32).params, tensors, CONFIG)


@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_a_damaged_cache_says_that_it_should_be_deleted(tmp_path, keep):
    folder = write_hf(tmp_path / "small", CONFIG, hf_tensors(CONFIG))
    load_model(str(folder), jnp.float32)
    (cached,) = store.cache_folder().iterdir()
    path = max((cached / "params").rglob("*"), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(CheckpointError, match=f"{path.name}.*Delete it and load the model again"):
        load_model(str(folder), jnp.float32)
    shutil.rmtree(cached / "params")
    with pytest.raises(CheckpointError, match="Delete it and load the model again"):
        load_model(str(folder), jnp.float32)
