"""Logits of tiny Llamas, of grouped heads, tied or not, with Llama 3.1's rotary scaling or none.

They are held against those of transformers' `LlamaForCausalLM`: recorded ones always, and where
transformers and torch are installed also those of models that transformers itself initialises and
saves. `python tests/test_transformers.py FILE`, with both installed, records them again.
"""

import itertools
import json
import sys
import tempfile
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoints import CONFIG, hf_rope, hf_tensors, write_hf

from jaxpage.checkpoint.load import load_model
from jaxpage.config import EngineConfig, ModelConfig, RopeScaling
from jaxpage.model import llama
from jaxpage.model.llama import Batch
from jaxpage.paging import kv_pool
from pallas_kernels.paged_attention import paged_attention

GOLDEN = Path(__file__).parent / "golden" / "llama_logits.json"
LENGTH, PAGE = 96, 16
RECORDED = (0, 31, 63, 95)  # positions
SCALINGS = {"plain": None, "llama3": RopeScaling(8.0, 1.0, 4.0, 32)}
CASES = {
    f"{'tied' if tied else 'untied'}, {name}": replace(
        CONFIG, tie_embeddings=tied, rope_scaling=scaling
    )
    for tied, (name, scaling) in itertools.product((True, False), SCALINGS.items())
}
TOKENS = np.random.default_rng(1).integers(0, CONFIG.vocab_size, LENGTH).astype(np.int32)


def our_logits(folder: Path) -> np.ndarray:
    """Logits after each of `TOKENS`, `f32[n, V]`, over pages in no order."""
    model = load_model(str(folder), jnp.float32)
    num_pages = LENGTH // PAGE
    config = EngineConfig(
        num_slots=1, num_pages=num_pages, page_size=PAGE, pages_per_slot=num_pages, num_requests=1,
        token_buckets=(LENGTH,),
    )  # fmt: skip
    pages = np.random.default_rng(2).permutation(num_pages).astype(np.int32)
    positions = np.arange(LENGTH, dtype=np.int32)
    batch = Batch(
        tokens=jnp.asarray(TOKENS),
        positions=jnp.asarray(positions),
        pages=jnp.asarray(pages[positions // PAGE]),
        offsets=jnp.asarray(positions % PAGE),
        cu_q_lens=jnp.array([0, LENGTH], jnp.int32),
        lengths=jnp.array([LENGTH], jnp.int32),
        page_indices=jnp.asarray(pages[None]),
    )
    pool = kv_pool.create(model.config, config, jnp.float32)
    states, _ = llama.forward(model.params, pool, batch, model.config, paged_attention)
    return np.asarray(llama.logits(model.params, states))


def theirs_of(model) -> np.ndarray:
    """The same by a model of transformers."""
    torch = import_module("torch")
    with torch.no_grad():
        return model(torch.tensor(TOKENS[None].astype(np.int64))).logits[0].numpy()


def tensors_of(config: ModelConfig) -> dict[str, np.ndarray]:
    """Weights of the size that models have: of standard normal ones attention is one-hot."""
    return {
        name: value if value.ndim == 1 else np.float32(0.2) * value
        for name, value in hf_tensors(config).items()
    }


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Up to 64 roundings of float32, relative to the largest logit; a dozen are seen."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=64 * 2**-24 * np.abs(theirs).max())


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_that_transformers_gave(tmp_path, monkeypatch, name):
    monkeypatch.setenv("JAXPAGE_CACHE", str(tmp_path / "cache"))
    folder = write_hf(tmp_path / "hf", CASES[name], tensors_of(CASES[name]), num_shards=3)
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))["logits"][name]
    assert_same(our_logits(folder)[list(RECORDED)], np.asarray(golden, np.float32))


def test_recorded_logits_hang_on_the_head_and_on_the_scaling():
    logits = json.loads(GOLDEN.read_text(encoding="utf-8"))["logits"]
    for one, other in itertools.combinations(logits.values(), 2):
        assert np.abs(np.subtract(one, other)).max() > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_a_model_that_transformers_saved_gives_its_logits(tmp_path, monkeypatch, name):
    transformers, torch = map(pytest.importorskip, ("transformers", "torch"))
    monkeypatch.setenv("JAXPAGE_CACHE", str(tmp_path / "cache"))
    config = CASES[name]
    rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_scaling is not None:
        rope |= hf_rope(config.rope_scaling)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.embed_dim,
            intermediate_size=config.mlp_dim, num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim, max_position_embeddings=config.max_position,
            rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tie_embeddings,
            rope_parameters=rope, initializer_range=0.2, eos_token_id=2,
        )
    ).float().eval()  # fmt: skip
    model.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    assert_same(our_logits(tmp_path / "hf"), theirs_of(model))


def record(path: Path) -> None:
    torch, transformers = map(import_module, ("torch", "transformers"))
    logits = {}
    for name, config in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            hf = write_hf(Path(folder) / "hf", config, tensors_of(config))
            model = transformers.LlamaForCausalLM.from_pretrained(
                hf, dtype=torch.float32, attn_implementation="eager"
            ).eval()
            logits[name] = theirs_of(model)[list(RECORDED)].tolist()
    meta = {
        "torch": torch.__version__, "transformers": transformers.__version__,
        "dtype": "float32", "attn": "eager", "positions": RECORDED,
        "note": "next-token logits of LlamaForCausalLM for the weights and tokens of this test",
    }  # fmt: skip
    path.write_text(json.dumps({"meta": meta, "logits": logits}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record(Path(sys.argv[1]))
