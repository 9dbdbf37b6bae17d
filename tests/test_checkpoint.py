"""Tiny safetensors and GGUF files -> our parameters; damage to them; the cache; shardings."""

import json
import os
import shutil
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxpage.checkpoint import store
from jaxpage.checkpoint.errors import CheckpointError
from jaxpage.checkpoint.gguf_file import GgufFile, llama3_rope_factors, read_gguf_config
from jaxpage.checkpoint.load import load_model
from jaxpage.config import ModelConfig, RopeScaling

CONFIG = ModelConfig(
    name="small", num_layers=2, embed_dim=32, mlp_dim=64, num_heads=4, num_kv_heads=2,
    head_dim=16, vocab_size=48, max_position=128, rope_theta=10_000.0, norm_eps=1e-5,
    tie_embeddings=True, eos_ids=(2,),
)  # fmt: skip
GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "model.layers": "blk",
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPAGE_CACHE", str(tmp_path / "cache"))


def hf_tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    """Random weights by the names and shapes that transformers gives them."""
    E, F, D = config.embed_dim, config.mlp_dim, config.head_dim
    H, K = config.num_heads, config.num_kv_heads
    shapes = {"model.embed_tokens": (config.vocab_size, E), "model.norm": (E,)}
    for layer in range(config.num_layers):
        for name, shape in {
            "input_layernorm": (E,), "self_attn.q_proj": (H * D, E),
            "self_attn.k_proj": (K * D, E), "self_attn.v_proj": (K * D, E),
            "self_attn.o_proj": (E, H * D), "post_attention_layernorm": (E,),
            "mlp.gate_proj": (F, E), "mlp.up_proj": (F, E), "mlp.down_proj": (E, F),
        }.items():  # fmt: skip
            shapes[f"model.layers.{layer}.{name}"] = shape
    if not config.tie_embeddings:
        shapes["lm_head"] = (config.vocab_size, E)
    rng = np.random.default_rng(0)
    return {
        f"{name}.weight": rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def assert_params_are(
    params, tensors: dict[str, np.ndarray], config: ModelConfig, dtype=np.float32
):
    """Every leaf, spelled out head by head, equals the foreign tensors rounded to `dtype`."""
    D, G = config.head_dim, config.group_size
    params = jax.tree.map(np.asarray, params)

    def check(ours, theirs):
        assert ours.dtype == dtype
        np.testing.assert_array_equal(ours, theirs.astype(dtype))

    check(params["embed"], tensors["model.embed_tokens.weight"])
    check(params["final_norm"], tensors["model.norm.weight"])
    assert ("head" in params) == (not config.tie_embeddings)
    if "head" in params:
        check(params["head"], tensors["lm_head.weight"])
    for layer in range(config.num_layers):
        ours = {name: leaf[layer] for name, leaf in params["layers"].items()}
        theirs = {
            name.removeprefix(f"model.layers.{layer}.").removesuffix(".weight"): value
            for name, value in tensors.items()
        }
        check(ours["attn_norm"], theirs["input_layernorm"])
        check(ours["mlp_norm"], theirs["post_attention_layernorm"])
        check(ours["gate_up"][0], theirs["mlp.gate_proj"])
        check(ours["gate_up"][1], theirs["mlp.up_proj"])
        check(ours["down"], theirs["mlp.down_proj"])
        for head in range(config.num_heads):
            rows = slice(head * D, (head + 1) * D)
            check(ours["qkv"][head // G, head % G], theirs["self_attn.q_proj"][rows])
            check(ours["out"][:, head // G, head % G], theirs["self_attn.o_proj"][:, rows])
        for kv_head in range(config.num_kv_heads):
            rows = slice(kv_head * D, (kv_head + 1) * D)
            check(ours["qkv"][kv_head, G], theirs["self_attn.k_proj"][rows])
            check(ours["qkv"][kv_head, G + 1], theirs["self_attn.v_proj"][rows])


def write_hf(folder, config: ModelConfig, tensors: dict, num_shards: int = 1):
    folder.mkdir()
    raw = {
        "model_type": "llama", "hidden_size": config.embed_dim, "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "num_hidden_layers": config.num_layers,
        "vocab_size": config.vocab_size, "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps, "tie_word_embeddings": config.tie_embeddings,
        "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(raw))
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = sorted(tensors)
    weight_map = {}
    for shard in range(num_shards):
        file_name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::num_shards]}
        save_file(part, folder / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def gguf_tensors(tensors: dict, config: ModelConfig) -> dict[str, np.ndarray]:
    """The same weights by llama.cpp's names, query and key rows permuted as its converter does."""
    result = {}
    for name, value in tensors.items():
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
        num_heads = heads.get(name.split(".")[-2])
        if num_heads:
            shape = (num_heads, 2, value.shape[0] // num_heads // 2, *value.shape[1:])
            value = value.reshape(shape).swapaxes(1, 2).reshape(value.shape)
        for theirs, ours in GGUF_NAMES.items():
            name = name.replace(theirs, ours)
        result[name] = value
    return result


def write_gguf(path, config: ModelConfig, tensors: dict, pre: str = "smollm", quantise=None):
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "ab", "abc"]
    tokens += [chr(ord("a") + i) for i in range(config.vocab_size - len(tokens))]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.embed_dim)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (config.vocab_size - 3))
    writer.add_token_merges(["a b", "ab c"])
    writer.add_eos_token_id(2)
    for name, value in tensors.items():
        if quantise is not None and value.ndim == 2:
            data = gguf.quantize(value, quantise)
            writer.add_tensor(name, data, raw_dtype=quantise)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def untied(config: ModelConfig = CONFIG) -> ModelConfig:
    return ModelConfig(**{**config.__dict__, "tie_embeddings": False})


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


def test_an_interrupted_conversion_leaves_nothing_behind(tmp_path, monkeypatch):
    tensors = hf_tensors(CONFIG)
    folder = write_hf(tmp_path / "small", CONFIG, tensors)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load_model(str(folder), jnp.float32)
    assert list(store.cache_folder().iterdir()) == []
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
