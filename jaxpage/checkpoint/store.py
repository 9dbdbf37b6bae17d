"""Models as we keep them: an orbax checkpoint, a `jaxpage.json` and the tokenizer, in a folder."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from jaxpage.checkpoint.errors import CheckpointError
from jaxpage.checkpoint.growing import DONE, PARAMS, GrowingParams
from jaxpage.checkpoint.hf_config import read_json
from jaxpage.checkpoint.orbax_files import restore_tree
from jaxpage.checkpoint.tokenizer import Tokenizer
from jaxpage.config import ModelConfig, RopeScaling
from jaxpage.model.params import Params, is_spec, param_specs

_FORMAT_VERSION = 2  # raised when the parameter tree or the folder's layout changes
_MANIFEST = "jaxpage.json"
_LOCK = "lock"
_WHILE_GROWING = (_LOCK, DONE)


def is_model_folder(folder: Path) -> bool:
    """True for a folder that `write_model` made."""
    return (folder / _MANIFEST).is_file()


def save_model(
    folder: Path, config: ModelConfig, params: Params, tokenizer: Tokenizer | None
) -> None:
    """Writes a model that is in memory, see `write_model`."""

    def fill(growing: GrowingParams) -> None:
        def write(leaf, on_disk):
            on_disk[...] = np.asarray(leaf)

        jax.tree.map(write, params, growing.leaves)

    dtype = np.dtype(jax.tree.leaves(params)[0].dtype)
    write_model(folder, config, dtype, tokenizer, fill)


def write_model(
    folder: Path,
    config: ModelConfig,
    dtype: np.dtype,
    tokenizer: Tokenizer | None,
    fill: Callable[[GrowingParams], None],
) -> None:
    """Writes a model into `folder`, which must not exist, by way of `fill`.

    It grows beside `folder`, and is renamed at the end. What is interrupted is gone on with by the
    next who writes the same, one at a time. If somebody else has done it meanwhile, that stays.
    """
    try:
        if folder.is_dir() and not is_model_folder(folder) and any(folder.iterdir()):
            raise FileExistsError(f"{folder} holds something else")
        with _growing(folder) as partial:
            if is_model_folder(folder):
                shutil.rmtree(partial, ignore_errors=True)
                return
            growing = GrowingParams(partial, config, dtype)
            fill(growing)
            if tokenizer is not None:
                tokenizer.save(partial)
            manifest = {
                "version": _FORMAT_VERSION,
                "config": dataclasses.asdict(config),
                "files": _checksums(partial),
            }
            (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            partial.rename(folder)
            for name in _WHILE_GROWING:
                (folder / name).unlink(missing_ok=True)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:  # which tensorstore raises, of a full disk too
        raise CheckpointError(
            f"{folder} cannot be written: {error}. Choose another place (for the cache: "
            "JAXPAGE_CACHE), free this one, or delete its .partial folder to begin anew"
        ) from error


@contextlib.contextmanager
def _growing(folder: Path) -> Iterator[Path]:
    """The folder that becomes `folder`, for one process at a time."""
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed, or the process dies
        yield partial


def read_config(folder: Path) -> ModelConfig:
    """The configuration in a folder that `write_model` made; looks whether all files are whole."""
    manifest = read_json(folder / _MANIFEST)
    if manifest.get("version") != _FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {manifest.get('version')}, this program reads "
            f"{_FORMAT_VERSION}; convert the model again"
        )
    _check_files(folder, manifest["files"])
    config = dict(manifest["config"])
    scaling = config["rope_scaling"]
    config["rope_scaling"] = None if scaling is None else RopeScaling(**scaling)
    config["eos_ids"] = tuple(config["eos_ids"])
    return ModelConfig(**config)


def _check_files(folder: Path, written: dict[str, list[int]]) -> None:
    """Looks whether all files are as they were written, to the bit."""
    found = _checksums(folder)
    damaged = []
    for name, (num_bytes, checksum) in written.items():
        there = found.get(name, [0, 0])
        if there[0] != num_bytes:
            damaged.append(f"{name} ({there[0]} of {num_bytes} bytes)")
        elif there[1] != checksum:
            damaged.append(f"{name} (checksum {there[1]:08x} in place of {checksum:08x})")
    if damaged:
        raise CheckpointError(
            f"{folder} is damaged: {', '.join(damaged[:4])}. Delete it and load the model again"
        )


def _checksums(folder: Path) -> dict[str, list[int]]:
    """Bytes and CRC-32 of all files of a model in a folder, by their path in it."""
    others = {folder / name for name in (_MANIFEST, *_WHILE_GROWING)}
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path not in others]
    with ThreadPoolExecutor() as pool:
        sums = pool.map(_checksum, paths)
        names = (path.relative_to(folder).as_posix() for path in paths)
        return dict(zip(names, sums, strict=True))


def _checksum(path: Path) -> list[int]:
    num_bytes = checksum = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            num_bytes, checksum = num_bytes + len(block), zlib.crc32(block, checksum)
    return [num_bytes, checksum]


def read_params(folder: Path, config: ModelConfig, dtype: np.dtype, shardings: Params) -> Params:
    """Restores parameters straight into `shardings`, a tree like theirs."""
    abstract = jax.tree.map(
        lambda spec, sharding: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=sharding),
        param_specs(config),
        shardings,
        is_leaf=is_spec,
    )
    try:
        return restore_tree(folder / PARAMS, abstract)
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
    write: Callable[[Path], None],
) -> Path:
    """The cached folder of a conversion to `dtype`, which `write` makes if there is none.

    A conversion is found again by the paths, sizes and times of the files it was made from.
    """
    identity = [_FORMAT_VERSION, dtype.name]
    for path in sources:
        stat = path.stat()
        identity.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    folder = cache_folder() / f"{name}-{dtype.name}-{digest}"
    if not is_model_folder(folder):
        if jax.distributed.is_initialized() and jax.process_count() > 1:
            raise CheckpointError(
                f"{name} has not been converted to {dtype.name} yet, which one process does alone: "
                "run `python -m experiments.convert_checkpoint` on each host first"
            )
        write(folder)
    return folder
