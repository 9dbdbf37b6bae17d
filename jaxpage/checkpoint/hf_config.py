"""Reads the `config.json` of a Llama published for Hugging Face's transformers."""

import json
from pathlib import Path
from typing import Any

from jaxpage.checkpoint.errors import CheckpointError
from jaxpage.config import ModelConfig, RopeScaling

# Settings that change the computation, with the only value that this model implements.
_REQUIRED_VALUES: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


def read_json(path: Path) -> dict:
    """The JSON object in a file; a missing or damaged file raises `CheckpointError`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value


def read_hf_config(path: str | Path) -> ModelConfig:
    """The `ModelConfig` that a `config.json`, or the folder holding one, describes.

    A `generation_config.json` beside it, where there is one, names the end-of-text ids, as it
    does in transformers.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / "config.json"
    raw = read_json(path)
    generation = path.with_name("generation_config.json")
    if path.name == "config.json" and generation.is_file():
        eos = read_json(generation).get("eos_token_id")
        raw = raw if eos is None else raw | {"eos_token_id": eos}
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    return parse_hf_config(raw, name)


def parse_hf_config(raw: dict, name: str) -> ModelConfig:
    """The `ModelConfig` for the contents of a `config.json`; raises on what is not a Llama."""
    _check_supported(raw, name)
    num_heads = _integer(raw, "num_attention_heads", name)
    embed_dim = _integer(raw, "hidden_size", name)
    head_dim = raw.get("head_dim")
    if head_dim is None and embed_dim % max(num_heads, 1):
        raise CheckpointError(
            f"{name}: hidden_size={embed_dim} is not a multiple of "
            f"num_attention_heads={num_heads}; give head_dim"
        )
    rope = raw.get("rope_parameters") or {}
    theta = rope.get("rope_theta", raw.get("rope_theta", 10_000.0))
    return ModelConfig(
        name=name,
        num_layers=_integer(raw, "num_hidden_layers", name),
        embed_dim=embed_dim,
        mlp_dim=_integer(raw, "intermediate_size", name),
        num_heads=num_heads,
        num_kv_heads=_integer(raw, "num_key_value_heads", name, default=num_heads),
        head_dim=(
            embed_dim // max(num_heads, 1) if head_dim is None else _integer(raw, "head_dim", name)
        ),
        vocab_size=_integer(raw, "vocab_size", name),
        max_position=_integer(raw, "max_position_embeddings", name, default=2048),
        rope_theta=float(theta),
        rope_scaling=_rope_scaling(raw.get("rope_scaling") or rope, name),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        eos_ids=_eos_ids(raw.get("eos_token_id"), name),
    )


def _check_supported(raw: dict, name: str) -> None:
    model_type, architectures = raw.get("model_type"), raw.get("architectures")
    is_llama = model_type == "llama" or (
        model_type is None and architectures == ["LlamaForCausalLM"]
    )
    if not is_llama or (architectures or ["LlamaForCausalLM"]) != ["LlamaForCausalLM"]:
        raise CheckpointError(
            f"{name}: {model_type=}, {architectures=} is not supported; use a Llama "
            "(model_type 'llama', architectures ['LlamaForCausalLM'])"
        )
    for key, supported in _REQUIRED_VALUES.items():
        value = raw.get(key, supported)
        if value is not None and value != supported:
            raise CheckpointError(
                f"{name}: {key}={value!r} is not supported; use a model with {key}={supported!r}"
            )


def _integer(raw: dict, key: str, name: str, default: int | None = None) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool):
        raise CheckpointError(f"{name}: config.json must give {key} as an integer, got {value!r}")
    return value


def _rope_scaling(raw: dict, name: str) -> RopeScaling | None:
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise CheckpointError(
            f"{name}: rope scaling {kind!r} is not supported; use 'llama3', or none"
        )
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [key for key in keys if key not in raw]
    if missing:
        raise CheckpointError(f"{name}: rope scaling 'llama3' lacks {', '.join(missing)}")
    factor, low, high, original = (raw[key] for key in keys)
    return RopeScaling(float(factor), float(low), float(high), int(original))


def _eos_ids(value: Any, name: str) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise CheckpointError(
            f"{name}: eos_token_id={value!r} must be an integer or a list of integers"
        )
    return tuple(ids)
