"""Tiny checkpoints in the formats of others, and what must come of them."""

import json

import gguf
import jax
import numpy as np
from safetensors.numpy import save_file

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


def hf_rope(scaling: RopeScaling) -> dict:
    """Llama 3.1's rotary scaling as a `config.json` says it."""
    return {
        "rope_type": "llama3", "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position,
    }  # fmt: skip


def write_hf(folder, config: ModelConfig, tensors: dict, num_shards: int = 1):
    folder.mkdir()
    raw = {
        "model_type": "llama", "hidden_size": config.embed_dim, "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "num_hidden_layers": config.num_layers,
        "vocab_size": config.vocab_size, "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps, "tie_word_embeddings": config.tie_embeddings,
        "eos_token_id": 2, "rope_theta": config.rope_theta,
    }  # fmt: skip
    if config.rope_scaling is not None:
        raw["rope_scaling"] = hf_rope(config.rope_scaling)
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
