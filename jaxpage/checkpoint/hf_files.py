"""Reads the weights of a Hugging Face folder: one `.safetensors` file, or shards and an index."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxpage.checkpoint.errors import CheckpointError, optional_library
from jaxpage.checkpoint.hf_config import read_json

_INDEX = "model.safetensors.index.json"


def safetensors_files(folder: Path) -> list[Path]:
    """The weight files of a folder, by its index where there is one; [] if there are none."""
    index = folder / _INDEX
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    names = sorted(set(_weight_map(index).values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks shards that {_INDEX} lists: {', '.join(missing)}; fetch them"
        )
    return [folder / name for name in names]


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} holds no weight_map; fetch it again")
    return weight_map


class SafetensorsFiles:
    """Safetensors files as one `TensorSource`.

    A file that is damaged or ends too early, or a tensor in two files, raises `CheckpointError`.
    """

    def __init__(self, paths: list[Path]):
        self._library = optional_library("safetensors", "read .safetensors files")
        self._files: dict[str, Path] = {}  # by tensor
        shapes = {}
        for path in paths:
            with self._open(path) as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    if name in shapes:
                        raise CheckpointError(
                            f"tensor {name} is in {path.name} and in another file; keep one"
                        )
                    shapes[name] = tuple(file.get_slice(name).get_shape())
                    self._files[name] = path
        self.shapes: Mapping[str, tuple[int, ...]] = shapes

    def _open(self, path: Path) -> Any:
        try:
            return self._library.safe_open(path, framework="numpy")
        except (OSError, self._library.SafetensorError) as error:
            raise CheckpointError(
                f"{path} cannot be read as safetensors: {error}. The file is damaged or "
                f"ends too early: fetch it again"
            ) from error

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of one tensor, in its stored dtype."""
        # Opened each time: what has been read of an open file stays in this process's memory.
        with self._open(self._files[name]) as file:
            return self._rows(file, name, start, stop)

    def _rows(self, file: Any, name: str, start: int, stop: int) -> np.ndarray:
        try:
            return file.get_slice(name)[start:stop]
        except (TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(
                f"tensor {name} cannot be read: {error}; use float32, float16 or bfloat16"
            ) from error
