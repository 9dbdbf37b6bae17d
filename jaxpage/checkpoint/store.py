"""Models as we keep them: an orbax checkpoint, a `jaxpage.json` and the tokenizer, in a folder."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import logging as absl_logging

from jaxpage.checkpoint.errors import CheckpointError
from jaxpage.checkpoint.hf_config import read_json
from jaxpage.checkpoint.tokenizer import Tokenizer
from jaxpage.config import ModelConfig, RopeScaling
from jaxpage.model.params import Params, is_spec, param_specs

_FORMAT_VERSION = 1  # raised when the parameter tree or the folder's layout changes
_MANIFEST = "jaxpage.json"
_PARAMS = "params"


def is_model_folder(folder: Path) -> bool:
    """True for a folder that `save_model` wrote."""
    return (folder / _MANIFEST).is_file()


def save_model(
    folder: Path, config: ModelConfig, params: Params, tokenizer: Tokenizer | None
) -> None:
    """Writes a model into `folder`, which must not exist; all of it or nothing.

    Everything is written beside it and renamed at the end. If another process has written the
    same folder meanwhile, that one stays.
    """
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        _save_params(partial / _PARAMS, params)
        if tokenizer is not None:
            tokenizer.save(partial)
        manifest = {
            "version": _FORMAT_VERSION,
            "config": dataclasses.asdict(config),
            "file_bytes": _file_bytes(partial),
        }
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        partial.rename(folder)
    except OSError as error:
        if not is_model_folder(folder):
            raise CheckpointError(
                f"{folder} cannot be written: {error}. Choose another place (for the cache: "
                "JAXPAGE_CACHE), or free this one"
            ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _save_params(folder: Path, params: Params) -> None:
    import orbax.checkpoint as ocp

    with _quiet():
        # Uncompressed: restoring takes half the time.
        handler = ocp.PyTreeCheckpointHandler(use_compression=False)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(folder.resolve(), args=ocp.args.PyTreeSave(params))


def read_config(folder: Path) -> ModelConfig:
    """The configuration in a folder that `save_model` wrote, all of whose files must be whole."""
    manifest = read_json(folder / _MANIFEST)
    if manifest.get("version") != _FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {manifest.get('version')}, this program reads "
            f"{_FORMAT_VERSION}; convert the model again"
        )
    found_bytes = _file_bytes(folder)
    damaged = [
        f"{name} ({found_bytes.get(name, 0)} of {num_bytes} bytes)"
        for name, num_bytes in manifest["file_bytes"].items()
        if found_bytes.get(name) != num_bytes
    ]
    if damaged:
        raise CheckpointError(
            f"{folder} is damaged: {', '.join(damaged[:4])}. Delete it and load the model again"
        )
    config = dict(manifest["config"])
    scaling = config["rope_scaling"]
    config["rope_scaling"] = None if scaling is None else RopeScaling(**scaling)
    config["eos_ids"] = tuple(config["eos_ids"])
    return ModelConfig(**config)


def _file_bytes(folder: Path) -> dict[str, int]:
    """Sizes of all files in a folder, by their path in it."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read_params(folder: Path, config: ModelConfig, dtype: np.dtype, shardings: Params) -> Params:
    """Restores parameters straight into `shardings`, a tree like theirs."""
    import orbax.checkpoint as ocp

    abstract = jax.tree.map(
        lambda spec, sharding: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=sharding),
        param_specs(config),
        shardings,
        is_leaf=is_spec,
    )
    try:
        with _quiet(), ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore((folder / _PARAMS).resolve(), abstract)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} cannot be restored: {error}. Delete it and load the model again"
        ) from error


def cache_folder() -> Path:
    """Where conversions are kept: `$JAXPAGE_CACHE`, else `jaxpage` in the user's cache."""
    chosen = os.environ.get("JAXPAGE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "jaxpage"


def cached_conversion(
    sources: Sequence[Path],
    name: str,
    dtype: np.dtype,
    convert: Callable[[], tuple[ModelConfig, Params, Tokenizer | None]],
) -> Path:
    """The cached folder of a conversion to `dtype`, converting if there is none.

    A conversion is found again by the paths, sizes and times of the files it was made from.
    """
    identity = [_FORMAT_VERSION, dtype.name]
    for path in sources:
        stat = path.stat()
        identity.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    folder = cache_folder() / f"{name}-{dtype.name}-{digest}"
    if not is_model_folder(folder):
        save_model(folder, *convert())
    return folder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps orbax's progress notes and its libraries' warnings from the user."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        absl_logging.set_verbosity(verbosity)
