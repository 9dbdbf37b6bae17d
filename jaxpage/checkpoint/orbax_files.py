"""What we ask of orbax: to write a tree of arrays, and to restore one straight into shards."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import logging as absl_logging


def save_tree(folder: Path, tree: Any) -> None:
    """Writes a tree of arrays into `folder`, which must not exist, one file a chunk."""
    import orbax.checkpoint as ocp

    with quiet():
        # Uncompressed: restoring takes half the time.
        handler = ocp.PyTreeCheckpointHandler(use_compression=False, use_ocdbt=False)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(folder.resolve(), args=ocp.args.PyTreeSave(tree))


def restore_tree(folder: Path, abstract: Any) -> Any:
    """The tree in `folder`, each leaf where the `ShapeDtypeStruct` in its place says."""
    import orbax.checkpoint as ocp

    with quiet(), ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder.resolve(), abstract)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps orbax's progress notes and its libraries' warnings from the user."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        absl_logging.set_verbosity(verbosity)
