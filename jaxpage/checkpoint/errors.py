"""The error of this package, and the one way in which it imports optional libraries."""

import importlib
from types import ModuleType


class CheckpointError(ValueError):
    """A model that cannot be found, read or understood; the message shows the remedy."""


def optional_library(name: str, purpose: str) -> ModuleType:
    """Imports `name`, or says how to install it; `purpose` completes "... needed to"."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CheckpointError(
            f"the library {name!r} is needed to {purpose}: pip install 'jaxpage[demo]'"
        ) from error
