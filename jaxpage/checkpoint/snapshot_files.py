"""Numbered snapshots in a folder, of which the last few stay: what we ask of orbax for that.

A snapshot is a tree of arrays that lie on devices, one of arrays of the host, and a JSON object.
It is copied when it is saved, written by threads, and there under its number only as a whole.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpage.checkpoint.orbax_files import quiet

_ARRAYS, _STEPS, _HOST = "arrays", "steps", "host"


class SnapshotFiles:
    """The snapshots in `folder`, which exists; the last `keep` stay.

    An array without elements is not kept. What goes wrong is an `OSError` or a `ValueError`; of
    what threads wrote, on the next call.
    """

    def __init__(self, folder: Path, keep: int):
        import orbax.checkpoint as ocp

        def trees() -> ocp.PyTreeCheckpointHandler:
            return ocp.PyTreeCheckpointHandler(use_compression=False)

        self._args, self._restore_args = ocp.args, ocp.RestoreArgs
        self._array_args = ocp.checkpoint_utils.construct_restore_args
        with quiet():
            self._manager = ocp.CheckpointManager(
                folder,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
                ),
                item_handlers={
                    _ARRAYS: trees(),
                    _STEPS: trees(),
                    _HOST: ocp.JsonCheckpointHandler(),
                },
            )

    @property
    def last(self) -> int | None:
        """The number of the last snapshot."""
        return self._manager.latest_step()

    @property
    def is_writing(self) -> bool:
        return self._manager.is_saving_in_progress()

    def save(
        self, number: int, arrays: dict[str, jax.Array], steps: dict[str, np.ndarray], host: Any
    ) -> None:
        """Begins to write a snapshot; when it returns, `arrays` may be donated."""
        args = self._args
        items = {_ARRAYS: args.PyTreeSave(_with_elements(arrays)), _HOST: args.JsonSave(host)}
        if steps:
            items[_STEPS] = args.PyTreeSave(steps)
        with quiet():
            self._manager.save(number, args=args.Composite(**items))

    def read_host(self, number: int) -> tuple[Any, dict[str, np.ndarray]]:
        """The JSON object of a snapshot, and its arrays of the host."""
        args = self._args
        with quiet():
            items = {_HOST: args.JsonRestore()}
            if _STEPS in self._manager.item_metadata(number):
                items[_STEPS] = args.PyTreeRestore()
            read = self._manager.restore(number, args=args.Composite(**items))
        return read[_HOST], read.get(_STEPS) or {}

    def read_arrays(
        self, number: int, abstract: dict[str, jax.ShapeDtypeStruct]
    ) -> dict[str, jax.Array]:
        """Those arrays that are named, each where the `ShapeDtypeStruct` of its name says."""
        abstract = _with_elements(abstract)
        return self._read(number, abstract, self._array_args(abstract))

    def read_on_host(self, number: int, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Those arrays that are named, whole and on the host."""
        return self._read(
            number,
            {name: 0 for name in names},
            {name: self._restore_args(restore_type=np.ndarray) for name in names},
        )

    def _read(self, number: int, items: dict, how: dict) -> dict[str, Any]:
        request = self._args.PyTreeRestore(items, restore_args=how, partial_restore=True)
        with quiet():
            return self._manager.restore(number, args=self._args.Composite(**{_ARRAYS: request}))[
                _ARRAYS
            ]

    def close(self) -> None:
        """Waits for what is being written."""
        with quiet():
            self._manager.close()


def _with_elements[T: (jax.Array, jax.ShapeDtypeStruct)](arrays: dict[str, T]) -> dict[str, T]:
    return {name: array for name, array in arrays.items() if array.size > 0}
