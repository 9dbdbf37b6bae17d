"""Text to token ids and back: a thin wrapper over the `tokenizers` library."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jaxpage.checkpoint.errors import CheckpointError, optional_library
from jaxpage.checkpoint.hf_config import read_json

Message = Mapping[str, str]  # {"role": ..., "content": ...}

_REPLACEMENT = "\ufffd"  # what decoding puts for bytes that are not (yet) UTF-8


class Tokenizer:
    """A vocabulary, its special tokens and, where the model has one, its chat template.

    `core` is a `tokenizers.Tokenizer`; `special_texts` are what a template may name
    (`bos_token`, `eos_token`); `eos_ids` end a generation.
    """

    def __init__(
        self,
        core: Any,
        eos_ids: Sequence[int] = (),
        chat_template: str | None = None,
        special_texts: Mapping[str, str] | None = None,
    ):
        self._core = core
        self.eos_ids = tuple(eos_ids)
        self.chat_template = chat_template
        self.special_texts = dict(special_texts or {})

    @property
    def vocab_size(self) -> int:
        """Token ids that the tokenizer knows, special ones included."""
        return self._core.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens spelled out in the text are parsed, none are added."""
        return self._core.encode(text, add_special_tokens=False).ids

    def count(self, texts: Sequence[str]) -> list[int]:
        """How many tokens `encode` makes of each, on all cores."""
        encodings = self._core.encode_batch_fast(list(texts), add_special_tokens=False)
        return [len(encoding.ids) for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self._core.decode(list(ids), skip_special_tokens=skip_special)

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt text of a conversation, by the model's own template."""
        if self.chat_template is None:
            raise CheckpointError(
                "this model has no chat template; give the prompt as text, or add a "
                "chat_template.jinja to its folder"
            )
        variables = {
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
            **self.special_texts,
        }
        return _render(self.chat_template, variables)

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which `read_tokenizer` reads."""
        self._core.save(str(folder / "tokenizer.json"))
        config = {**self.special_texts, "chat_template": self.chat_template}
        text = json.dumps(config, indent=1, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


class StreamDecoder:
    """Turns token ids into text as they come, never handing out half a character.

    The texts that `feed` returns, and at the end that of `flush`, join to the text of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._ids: list[int] = []  # the last ids handed out, as context, then those held back
        self._num_context = 0

    def feed(self, ids: Sequence[int]) -> str:
        """The text that these ids complete; "" while a character is unfinished."""
        self._ids.extend(ids)
        text = self._new_text()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._ids = self._ids[self._num_context :]
        self._num_context = len(self._ids)
        return text

    def flush(self) -> str:
        """The text of whatever is still held back."""
        text = self._new_text()
        self._ids, self._num_context = [], 0
        return text

    def _new_text(self) -> str:
        context = self._decode(self._ids[: self._num_context])
        return self._decode(self._ids)[len(context) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, self._skip_special)


def read_tokenizer(folder: Path, eos_ids: Sequence[int] = ()) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder; None where it has no `tokenizer.json`."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    library = optional_library("tokenizers", f"read {path}")
    try:
        core = library.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{path} cannot be read: {error}; fetch it again") from error
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    special_texts = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            special_texts[key] = value
    return Tokenizer(core, eos_ids, _find_template(folder, config), special_texts)


def _find_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {item["name"]: item["template"] for item in template}.get("default")
    return template


def _render(source: str, variables: Mapping[str, Any]) -> str:
    """A template's text, in the environment that transformers gives chat templates."""
    jinja2 = optional_library("jinja2", "apply a chat template")
    sandbox = optional_library("jinja2.sandbox", "apply a chat template")

    def raise_exception(message: str):
        raise CheckpointError(f"the chat template refuses these messages: {message}")

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    try:
        return environment.from_string(source).render(variables)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(f"the chat template is not valid jinja: {error}") from error
    except (jinja2.TemplateError, TypeError) as error:
        raise CheckpointError(
            f"the chat template cannot be applied: {error}; each message needs a role and a content"
        ) from error
