"""Parameters on disk that are written piece by piece: an orbax checkpoint that grows.

Orbax writes a tree of arrays from memory, and a large model's do not fit there. So orbax is given a
tree of single numbers, for its names, and tensorstore then makes the arrays in their full shapes in
their places, to be filled a slice at a time. What comes of it is an orbax checkpoint as any other,
restored by orbax straight into shards. Pieces that are on disk stand in a list, so that who was
interrupted goes on after them.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from jaxpage.checkpoint.orbax_files import save_tree
from jaxpage.config import ModelConfig
from jaxpage.model.params import Params, ParamSpec, is_spec, param_specs

CHUNK_BYTES = 8 * 2**20  # about the size of a file
# A device of a mesh reads only its part of an axis, if it stands in chunks of its own.
PARTS_OF_AN_AXIS = 8
_APART = ("layers", "parts")  # axes along which pieces come one at a time
_WHOLE = ("embed", None)  # axes that no mesh divides, see `sharding.AXIS_RULES`
PARAMS, DONE = "params", "done.txt"  # the list of pieces, beside the parameters


class GrowingParams:
    """The parameters of a model in `folder / PARAMS`, of which some pieces may be there already.

    `leaves` is a tree like the parameters, of arrays on disk: what is assigned to a slice of one is
    written when the assignment is over. `done` are the pieces that were noted; if none was,
    everything begins anew.
    """

    def __init__(self, folder: Path, config: ModelConfig, dtype: np.dtype):
        self._folder, self._list = folder / PARAMS, folder / DONE
        text = self._list.read_text(encoding="utf-8") if self._list.is_file() else ""
        self.done = set(text.split("\n")[:-1])  # the last line may not be whole
        specs = param_specs(config)
        is_new = not self.done
        if is_new:
            for path in folder.glob(f"{PARAMS}*"):  # orbax leaves its own unfinished folders
                shutil.rmtree(path)
            numbers = jax.tree.map(lambda _: np.zeros(1, dtype), specs, is_leaf=is_spec)
            save_tree(self._folder, numbers)
        self.leaves: Params = jax.tree_util.tree_map_with_path(
            lambda path, spec: self._open(path, spec, dtype, is_new), specs, is_leaf=is_spec
        )

    def note(self, piece: str) -> None:
        """Notes that a piece is on disk, and will be found there even if the machine stops now."""
        with self._list.open("a", encoding="utf-8") as file:
            file.write(f"{piece}\n")
            file.flush()
            os.fsync(file.fileno())
        self.done.add(piece)

    def _open(
        self, path: Sequence[Any], spec: ParamSpec, dtype: np.dtype, is_new: bool
    ) -> ts.TensorStore:
        folder = self._folder / ".".join(key.key for key in path)
        chunks = chunk_shape(spec, dtype.itemsize)
        where = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{folder.resolve()}/"},
            "metadata": {
                "shape": list(spec.shape),
                "chunks": list(chunks),
                "dtype": "bfloat16" if dtype.name == "bfloat16" else dtype.newbyteorder("<").str,
                "compressor": None,  # restoring takes half the time
                "fill_value": None,
                "order": "C",
                "dimension_separator": ".",
            },
        }
        if is_new:
            shutil.rmtree(folder)  # orbax's single number
        return ts.open(where, create=is_new, open=not is_new).result()


def chunk_shape(spec: ParamSpec, itemsize: int) -> tuple[int, ...]:
    """The chunks in which a leaf is written: pieces come and devices read in whole ones."""
    limits = []
    for size, axis in zip(spec.shape, spec.axes, strict=True):
        parts = size if axis in _APART else 1 if axis in _WHOLE else PARTS_OF_AN_AXIS
        limits.append(size // parts if size % parts == 0 else size)
    chunks, left = [], CHUNK_BYTES // itemsize
    for limit in reversed(limits):
        chunks.append(max(min(limit, left), 1))
        left //= chunks[-1]
    return tuple(reversed(chunks))
