"""Rebuilds a tokenizer from the vocabulary and merges inside a GGUF."""

from typing import Any

from jaxpage.checkpoint.errors import CheckpointError, optional_library
from jaxpage.checkpoint.gguf_file import GgufFile
from jaxpage.checkpoint.tokenizer import Tokenizer

# Values of `tokenizer.ggml.token_type`.
_CONTROL = 3
_USER_DEFINED = 4

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_gguf_tokenizer(file: GgufFile, eos_ids: tuple[int, ...]) -> Tokenizer:
    """The tokenizer of a GGUF whose vocabulary is byte-level BPE.

    Raises:
      CheckpointError: for another kind of vocabulary, or an unknown way of splitting text.
    """
    library = optional_library("tokenizers", "rebuild the tokenizer of a GGUF")
    kind = file.need("tokenizer.ggml.model")
    if kind != "gpt2":
        raise CheckpointError(
            f"{file.path.name}: tokenizer.ggml.model={kind!r} is not supported (only 'gpt2', "
            "byte-level BPE); load the model's safetensors folder with its tokenizer.json"
        )
    split = file.field("tokenizer.ggml.pre", "none")
    tokens = file.need("tokenizer.ggml.tokens")
    types = file.field("tokenizer.ggml.token_type") or [1] * len(tokens)
    merges = [tuple(merge.split(" ", 1)) for merge in file.field("tokenizer.ggml.merges", ())]
    try:
        bpe = library.models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=split == "llama-bpe",
        )
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(
            f"{file.path.name}: the vocabulary and merges do not fit: {error}; convert it again"
        ) from error
    core = library.Tokenizer(bpe)
    core.pre_tokenizer = _pre_tokenizer(split, file.path.name)
    core.decoder = library.decoders.ByteLevel()

    def added(kind: int) -> list[Any]:
        special = kind == _CONTROL
        return [
            library.AddedToken(token, special=special, normalized=False)
            for token, token_type in zip(tokens, types, strict=True)
            if token_type == kind
        ]

    core.add_special_tokens(added(_CONTROL))
    core.add_tokens(added(_USER_DEFINED))
    special_texts = {}
    for key, name in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown")):
        token_id = file.field(f"tokenizer.ggml.{name}_token_id")
        if token_id is not None:
            special_texts[key] = tokens[token_id]
    return Tokenizer(core, eos_ids, file.field("tokenizer.chat_template"), special_texts)


def _pre_tokenizer(split: str, file_name: str) -> Any:
    """How text is cut into words before merging, by GGUF's name for it."""
    library = optional_library("tokenizers", "rebuild the tokenizer of a GGUF")
    parts = library.pre_tokenizers
    if split == "smollm":  # every digit alone, then GPT-2's words
        first, use_regex = parts.Digits(individual_digits=True), True
    elif split == "llama-bpe":
        pattern = library.Regex(_LLAMA3_SPLIT)
        first, use_regex = parts.Split(pattern, behavior="isolated", invert=False), False
    else:
        raise CheckpointError(
            f"{file_name}: tokenizer.ggml.pre={split!r} is not supported ('smollm' and "
            "'llama-bpe' are); load the model's safetensors folder with its tokenizer.json"
        )
    words = parts.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    return parts.Sequence([first, words])
