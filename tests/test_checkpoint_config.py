"""config.json of Hugging Face -> ModelConfig, and what is refused."""

import json

import pytest

from jaxpage.checkpoint.errors import CheckpointError
from jaxpage.checkpoint.hf_config import parse_hf_config, read_hf_config
from jaxpage.config import ConfigError
from jaxpage.model.presets import PRESETS

LLAMA31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
DROP = object()


def changed(**changes) -> dict:
    raw = LLAMA31_8B | changes
    return {key: value for key, value in raw.items() if value is not DROP}


def test_the_published_config_of_llama_3_1_8b_is_its_preset():
    assert parse_hf_config(LLAMA31_8B, "llama-3.1-8b") == PRESETS["llama-3.1-8b"]


def test_the_newer_rope_parameters_key_says_the_same():
    rope = LLAMA31_8B["rope_scaling"] | {"rope_theta": 500000.0}
    raw = changed(rope_scaling=DROP, rope_theta=DROP, rope_parameters=rope)
    assert parse_hf_config(raw, "llama-3.1-8b") == PRESETS["llama-3.1-8b"]


@pytest.mark.parametrize("scaling", [None, {}, {"rope_type": "default"}, {"type": "default"}])
def test_no_rope_scaling_has_several_spellings(scaling):
    assert parse_hf_config(changed(rope_scaling=scaling), "m").rope_scaling is None


def test_defaults_fill_what_old_configs_leave_out():
    raw = changed(
        num_key_value_heads=DROP, rope_scaling=DROP, rope_theta=DROP, rms_norm_eps=DROP,
        tie_word_embeddings=DROP, max_position_embeddings=DROP, eos_token_id=2,
    )  # fmt: skip
    config = parse_hf_config(raw, "m")
    assert (config.num_kv_heads, config.head_dim, config.rope_theta) == (32, 128, 10_000.0)
    assert (config.norm_eps, config.max_position, config.eos_ids) == (1e-6, 2048, (2,))
    assert not config.tie_embeddings and config.rope_scaling is None


def test_head_dim_is_taken_from_the_file_where_it_is_given():
    assert parse_hf_config(changed(head_dim=64), "m").head_dim == 64


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "qwen2"}, "qwen2"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "SequenceClassification"),
        ({"model_type": DROP, "architectures": DROP}, "not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor"),
        ({"hidden_size": DROP}, "hidden_size as an integer, got None"),
        ({"vocab_size": "many"}, "got 'many'"),
        ({"hidden_size": 4100}, "hidden_size=4100"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id"),
    ],
)
def test_an_unsupported_setting_is_named(changes, says):
    with pytest.raises(CheckpointError, match=says):
        parse_hf_config(changed(**changes), "m")


def test_impossible_numbers_are_refused():
    with pytest.raises(ConfigError, match="num_kv_heads=5"):
        parse_hf_config(changed(num_key_value_heads=5), "m")
    with pytest.raises(ConfigError, match="num_heads=0"):
        parse_hf_config(changed(num_attention_heads=0), "m")


def test_a_config_is_read_by_file_or_folder_and_named_after_the_folder(tmp_path):
    folder = tmp_path / "my-llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA31_8B))
    assert read_hf_config(folder) == read_hf_config(str(folder / "config.json"))
    assert read_hf_config(folder).name == "my-llama"


def test_generation_config_overrules_the_end_of_text_ids(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA31_8B))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert read_hf_config(tmp_path).eos_ids == (7, 8)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"'])
def test_a_file_that_is_no_json_object_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_hf_config(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        read_hf_config(tmp_path)
