"""Reads a GGUF file: its configuration, its vocabulary, its dequantised tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxpage.checkpoint.errors import CheckpointError, optional_library
from jaxpage.config import ModelConfig, RopeScaling

# What the GGUF writer assumes of a Llama 3.x when it writes `rope_freqs.weight`.
_LLAMA3_LOW_FREQ_FACTOR = 1.0
_LLAMA3_HIGH_FREQ_FACTOR = 4.0
_LLAMA3_ORIGINAL_MAX_POSITION = 8192

_ROPE_FACTORS = "rope_freqs.weight"


class GgufFile:
    """An open GGUF; a `TensorSource` whose tensors are dequantised as they are read.

    A file that is damaged or ends too early raises `CheckpointError` on opening.
    """

    def __init__(self, path: Path):
        self.path = path
        self._gguf = optional_library("gguf", f"read {path.name}")
        try:
            self._reader = self._gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
            raise CheckpointError(
                f"{path} cannot be read as GGUF: {error}. The file is damaged or ends too early "
                f"({path.stat().st_size if path.is_file() else 0} bytes): fetch it again"
            ) from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.shapes: Mapping[str, tuple[int, ...]] = {  # GGUF writes dimensions in reverse
            name: tuple(int(dim) for dim in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        """One tensor, dequantised."""
        return self.rows(name, 0, self.shapes[name][0])

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of one tensor, dequantised."""
        tensor = self._tensors[name]
        try:
            values = self._gguf.dequantize(tensor.data[start:stop], tensor.tensor_type)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path.name}: {name} is stored as {tensor.tensor_type.name}, which the "
                "gguf library cannot dequantise; use a file with Q4_1, Q8_0, F16 or the like"
            ) from error
        return values.reshape(stop - start, *self.shapes[name][1:])

    def field(self, key: str, default: Any = None) -> Any:
        """A metadata value; None or `default` where the file does not have it."""
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def need(self, key: str) -> Any:
        """A metadata value that the file must have."""
        value = self.field(key)
        if value is None:
            raise CheckpointError(f"{self.path.name} lacks the metadata {key!r}; convert it again")
        return value


def read_gguf_config(file: GgufFile) -> ModelConfig:
    """The `ModelConfig` that a Llama's GGUF metadata describes."""
    name = file.path.stem
    architecture = file.need("general.architecture")
    if architecture != "llama":
        raise CheckpointError(
            f"{name}: general.architecture={architecture!r} is not supported; use a 'llama'"
        )
    num_heads = file.need("llama.attention.head_count")
    embed_dim = file.need("llama.embedding_length")
    if isinstance(num_heads, list) or file.field("llama.expert_count", 0):
        raise CheckpointError(f"{name}: heads that vary by layer and experts are not supported")
    head_dim = file.field("llama.attention.key_length", embed_dim // max(num_heads, 1))
    _check_rotary(file, name, head_dim)
    theta = float(file.field("llama.rope.freq_base", 10_000.0))
    vocab_size = file.field("llama.vocab_size") or len(file.need("tokenizer.ggml.tokens"))
    return ModelConfig(
        name=name,
        num_layers=file.need("llama.block_count"),
        embed_dim=embed_dim,
        mlp_dim=file.need("llama.feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=file.field("llama.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        vocab_size=vocab_size,
        max_position=file.need("llama.context_length"),
        rope_theta=theta,
        rope_scaling=_rope_scaling(file, theta, head_dim),
        norm_eps=_shortest(file.need("llama.attention.layer_norm_rms_epsilon")),
        tie_embeddings="output.weight" not in file.shapes,
        eos_ids=_eos_ids(file),
    )


def _check_rotary(file: GgufFile, name: str, head_dim: int) -> None:
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if file.field(key, head_dim) != head_dim:
            raise CheckpointError(f"{name}: {key}={file.field(key)} must be {head_dim=}")
    kind = file.field("llama.rope.scaling.type", "none")
    if kind not in ("none", "llama3"):
        raise CheckpointError(
            f"{name}: rope scaling {kind!r} is not supported; use 'none' or Llama 3.1's "
            f"{_ROPE_FACTORS}"
        )


def llama3_rope_factors(scaling: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
    """By how much Llama 3.1 divides each rotary frequency, `f64[D/2]`."""
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = scaling.original_max_position * frequencies / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / scaling.factor + smooth)


def _rope_scaling(file: GgufFile, theta: float, head_dim: int) -> RopeScaling | None:
    if _ROPE_FACTORS not in file.shapes:
        return None
    found = file.read(_ROPE_FACTORS).astype(np.float64).ravel()
    if found.size == head_dim // 2 and np.all(found == 1.0):
        return None
    original = file.field(
        "llama.rope.scaling.original_context_length", _LLAMA3_ORIGINAL_MAX_POSITION
    )
    scaling = RopeScaling(
        factor=_shortest(found.max()),
        low_freq_factor=_LLAMA3_LOW_FREQ_FACTOR,
        high_freq_factor=_LLAMA3_HIGH_FREQ_FACTOR,
        original_max_position=original,
    )
    expected = llama3_rope_factors(scaling, theta, head_dim)
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-4):
        raise CheckpointError(
            f"{file.path.name}: {_ROPE_FACTORS} {found.shape} is not Llama 3.1's scaling with "
            f"{scaling}; convert the original model again, or load its safetensors"
        )
    return scaling


def _shortest(value: float) -> float:
    """The shortest decimal that rounds to the same float32: 1e-5 for 9.99999974e-06."""
    return float(str(np.float32(value)))


def _eos_ids(file: GgufFile) -> tuple[int, ...]:
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = (file.field(f"tokenizer.ggml.{key}") for key in keys)
    return tuple(dict.fromkeys(i for i in ids if i is not None))
