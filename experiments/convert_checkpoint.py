"""How much memory and time does it take to convert a checkpoint that does not fit in memory?

    python -m experiments.convert_checkpoint --model=FOLDER --dtype=bfloat16
    python -m experiments.convert_checkpoint --synthetic_gb=4

Converts a Hugging Face folder or a GGUF file into the cache, a few rows at a time, as the first run
with it would do, and prints where it is, the seconds, and the most memory that the process took
beyond what it had before, beside its largest tensor. --synthetic_gb makes random shards of about
that size in a folder that goes afterwards, with the embedding of Llama 3.1 8B as largest tensor.
About a minute for 4 GB. Expected: less than twice the largest tensor, whatever the size of the
whole; refuted if not. What is interrupted is gone on with when the same command runs again.
"""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl import flags

from experiments import common
from jaxpage.checkpoint.errors import optional_library
from jaxpage.checkpoint.hf_files import SafetensorsFiles, safetensors_files
from jaxpage.checkpoint.load import converted
from jaxpage.config import ModelConfig, require
from jaxpage.model.params import num_parameters
from jaxpage.model.presets import PRESETS

FLAGS = flags.FLAGS

STATUS, RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux has them
BYTES = 2  # of a synthetic weight


def define_flags() -> None:
    common.define_model_flags()
    flags.DEFINE_integer(
        "synthetic_gb", 0, "Make a checkpoint of this many GB and convert that.", lower_bound=0
    )


def main(_: list[str]) -> None:
    require(
        FLAGS.synthetic_gb == 0 or not FLAGS["model"].present,
        "--model and --synthetic_gb: one of them says what to convert",
    )
    if FLAGS.synthetic_gb == 0:
        common.print_last_line({**measure(FLAGS.model, FLAGS.dtype), **common.provenance()})
        return
    with tempfile.TemporaryDirectory(prefix="jaxpage-checkpoint-") as folder:
        model = Path(folder) / "synthetic"
        write_synthetic(model, FLAGS.synthetic_gb)
        os.environ["JAXPAGE_CACHE"] = str(Path(folder) / "cache")
        common.print_last_line({**measure(str(model), "bfloat16"), **common.provenance()})


def measure(model: str, dtype: str) -> dict:
    """Converts, unless it is there already, and tells what that took."""
    RESET_PEAK.write_text("5")
    before = memory_bytes("VmRSS")
    start_s = time.perf_counter()
    folder = converted(model, jnp.dtype(dtype))
    seconds = time.perf_counter() - start_s
    peak = memory_bytes("VmHWM") - before
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    row = {"folder": str(folder), "bytes": num_bytes, "seconds": seconds, "peak_bytes": peak}
    if Path(model).is_dir() and (weights := safetensors_files(Path(model))):
        sizes = map(np.prod, SafetensorsFiles(weights).shapes.values())
        largest = int(max(sizes)) * jnp.dtype(dtype).itemsize
        row |= {"largest_tensor_bytes": largest, "peak_over_largest": peak / largest}
    print(
        f"{num_bytes / 1e9:.2f} GB in {seconds:.1f} s, {num_bytes / seconds / 1e6:.0f} MB/s, "
        f"{peak / 1e6:.0f} MB of memory"
    )
    return row


def memory_bytes(name: str) -> int:
    """Of this process's memory what is resident (`VmRSS`), or the most since a reset (`VmHWM`)."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} does not tell {name}")


def write_synthetic(folder: Path, num_gb: int) -> None:
    """A Llama of about `num_gb` GB in bfloat16, in shards, with layers as those of Llama 3.1 8B."""
    library = optional_library("safetensors.numpy", "write .safetensors files")
    large = replace(PRESETS["llama-3.1-8b"], rope_scaling=None)
    one, two = (BYTES * num_parameters(replace(large, num_layers=n)) for n in (1, 2))
    of_layer, outside = two - one, 2 * one - two
    num_layers = round((num_gb * 1e9 - outside) / of_layer)
    require(num_layers > 0, f"--synthetic_gb={num_gb}: take {-(-(outside + of_layer) // 10**9)}")
    config = replace(large, num_layers=num_layers)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(_hf_config(config)))
    rng, weight_map = np.random.default_rng(0), {}
    for number, shapes in enumerate(_shards(config)):
        tensors = {name: _weights(rng, shape) for name, shape in shapes.items()}
        library.save_file(tensors, folder / f"model-{number:05d}.safetensors")
        weight_map |= dict.fromkeys(shapes, f"model-{number:05d}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def _weights(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.random(shape, np.float32).astype(ml_dtypes.bfloat16)


def _shards(config: ModelConfig) -> Iterator[dict[str, tuple[int, ...]]]:
    """Shapes by name: the embedding, the head, and each layer, a shard each."""
    E, F, D = config.embed_dim, config.mlp_dim, config.head_dim
    H, K = config.num_heads, config.num_kv_heads
    yield {"model.embed_tokens.weight": (config.vocab_size, E), "model.norm.weight": (E,)}
    yield {"lm_head.weight": (config.vocab_size, E)}
    of_layer = {
        "input_layernorm": (E,), "post_attention_layernorm": (E,),
        "self_attn.q_proj": (H * D, E), "self_attn.k_proj": (K * D, E),
        "self_attn.v_proj": (K * D, E), "self_attn.o_proj": (E, H * D),
        "mlp.gate_proj": (F, E), "mlp.up_proj": (F, E), "mlp.down_proj": (E, F),
    }  # fmt: skip
    for layer in range(config.num_layers):
        yield {f"model.layers.{layer}.{name}.weight": s for name, s in of_layer.items()}


def _hf_config(config: ModelConfig) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "num_hidden_layers": config.num_layers, "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim,
        "vocab_size": config.vocab_size, "max_position_embeddings": config.max_position,
        "rope_theta": config.rope_theta, "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": False, "eos_token_id": list(config.eos_ids),
    }  # fmt: skip


if __name__ == "__main__":
    define_flags()
    common.run(main)
