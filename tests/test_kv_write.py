"""Writing KV into pages, and that XLA does it in place on GPUs as well."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kv_write import write_kv

ROOT = Path(__file__).parents[1]
P, K, S, D = 5, 2, 4, 8
# Compiled for a card that is not here: what a step's write takes beside its operands.
COMPILE = """
import json, os
os.environ["JAX_PLATFORMS"] = "cpu"
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from pallas_kernels.common import targets
from pallas_kernels.kv_write import write_kv

device = targets.device("h100")
def array(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

def write(k_pages, v_pages, keys, values, pages, offsets, cos, sin):
    low, high = jnp.split(keys.astype(jnp.float32), 2, axis=-1)
    keys = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return write_kv(k_pages, v_pages, keys, values, pages, offsets)

held, new = array((4096, 8, 16, 128), jnp.bfloat16), array((T, 8, 128), jnp.bfloat16)
index, angle = array((T,), jnp.int32), array((T, 1, 64), jnp.float32)
with jax.default_device(device):
    compiled = jax.jit(write, donate_argnums=(0, 1)).lower(
        held, held, new, new, index, index, angle, angle
    ).compile()
memory = compiled.memory_analysis()
text = compiled.as_text()
print(json.dumps({
    "temporary": memory.temp_size_in_bytes,
    "in_place": memory.alias_size_in_bytes,
    "kernels": text[text.index("ENTRY"):].count(" fusion("),
}))
"""


def problem(num_tokens, seed=0):
    rng = np.random.default_rng(seed)
    pages = [jnp.asarray(rng.normal(size=(P, K, S, D)), jnp.float32) for _ in range(2)]
    new = [jnp.asarray(rng.normal(size=(num_tokens, K, D)), jnp.float32) for _ in range(2)]
    slots = rng.permutation(P * S)[:num_tokens].astype(np.int32)
    return (*pages, *new, jnp.asarray(slots // S), jnp.asarray(slots % S))


@pytest.mark.parametrize("num_tokens", [1, 2, 13])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_each_token_goes_to_its_slot_and_nothing_else_changes(num_tokens, dtype):
    k_pages, v_pages, keys, values, pages, offsets = problem(num_tokens)
    held = [x.astype(dtype) for x in (k_pages, v_pages)]
    written = jax.jit(write_kv)(*held, keys, values, pages, offsets)
    for found, before, new in zip(written, held, (keys, values), strict=True):
        wanted = np.array(before)
        for token in range(num_tokens):
            wanted[pages[token], :, offsets[token]] = np.asarray(new.astype(dtype))[token]
        assert found.dtype == dtype
        np.testing.assert_array_equal(np.asarray(found), wanted)


@pytest.mark.parametrize("nowhere", [P, P + 7, -1, -P, np.iinfo(np.int32).min])
def test_a_page_outside_the_pool_is_written_nowhere(nowhere):
    k_pages, v_pages, keys, values, pages, offsets = problem(2)
    keys = keys.at[0].set(jnp.nan)
    written, _ = write_kv(k_pages, v_pages, keys, values, pages.at[0].set(nowhere), offsets)
    alone, _ = write_kv(k_pages, v_pages, keys[1:], values[1:], pages[1:], offsets[1:])
    np.testing.assert_array_equal(written, alone)
    assert not np.isnan(written).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": jnp.zeros((2, K, D + 1))}, r"values.shape=\(2, 2, 9\) must be \[T, K=2, D=8\]"),
        ({"offsets": jnp.zeros((3,), jnp.int32)}, r"offsets.shape=\(3,\)"),
        ({"pages": jnp.zeros((2,), jnp.float32)}, "pages.dtype=float32 must be int32"),
        ({"v_pages": jnp.zeros((P, K, S))}, r"v_pages.shape=\(5, 2, 4\)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_with_their_shapes(change, message):
    names = ("k_pages", "v_pages", "keys", "values", "pages", "offsets")
    with pytest.raises(ValueError, match=message):
        write_kv(**(dict(zip(names, problem(2), strict=True)) | change))


@pytest.mark.in_ci("512")
@pytest.mark.skipif("INSPECT_PYTHON" not in os.environ, reason="`make test` installs compilers")
@pytest.mark.parametrize("num_tokens", [1, 512])
def test_on_a_gpu_the_write_is_in_place_and_rotates_keys_on_the_way(num_tokens):
    program = COMPILE.replace("(T,", f"({num_tokens},")
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [os.environ["INSPECT_PYTHON"], "-c", program],
        cwd=ROOT, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    pool_bytes = 2 * 4096 * 8 * 16 * 128 * 2
    assert report["in_place"] == pool_bytes
    # A lone token is doubled; otherwise there is a scatter each for keys and values, and no more.
    assert report["temporary"] <= (0 if num_tokens > 1 else 64 * 1024)
    if num_tokens > 1:
        assert report["kernels"] == 2


def test_without_compilers_for_gpus_the_remedy_is_named():
    done = subprocess.run(
        [sys.executable, "-c", COMPILE.replace("(T,", "(2,")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0 and "pip install 'jaxpage[inspect]'" in done.stderr
