"""Conversions that stop anywhere are gone on with, and nothing half written is taken for whole."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tiny_checkpoints import (
    CONFIG,
    assert_params_are,
    gguf_tensors,
    hf_tensors,
    write_gguf,
    write_hf,
)

from jaxpage.checkpoint import foreign, growing, store
from jaxpage.checkpoint.errors import CheckpointError
from jaxpage.checkpoint.hf_files import SafetensorsFiles
from jaxpage.checkpoint.load import load_model
from jaxpage.model.params import is_spec, param_specs
from jaxpage.model.presets import PRESETS
from jaxpage.model.sharding import AXIS_RULES

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPAGE_CACHE", str(tmp_path / "cache"))


def rows_read(monkeypatch, stop_after: int | None = None) -> list[str]:
    """The names of tensors as rows of them are read; the last of `stop_after` fails."""
    names, rows = [], SafetensorsFiles.rows

    def counted(self, name, start, stop):
        if len(names) == stop_after:
            raise KeyboardInterrupt
        names.append(name)
        return rows(self, name, start, stop)

    monkeypatch.setattr(SafetensorsFiles, "rows", counted)
    return names


@pytest.mark.parametrize("stop_after", [0, 1, 7])
def test_an_interrupted_conversion_goes_on_where_it_was(tmp_path, monkeypatch, stop_after):
    tensors = hf_tensors(CONFIG)
    folder = write_hf(tmp_path / "small", CONFIG, tensors)
    with monkeypatch.context() as patch:
        before = rows_read(patch, stop_after)
        with pytest.raises(KeyboardInterrupt):
            load_model(str(folder), jnp.float32)
    (partial,) = store.cache_folder().iterdir()
    assert not store.is_model_folder(partial) and len(before) == stop_after
    with monkeypatch.context() as patch:
        after = rows_read(patch)
        assert_params_are(load_model(str(folder), jnp.float32).params, tensors, CONFIG)
    assert sorted(before + after) == sorted(tensors)
    (cached,) = store.cache_folder().iterdir()
    assert {path.name for path in cached.iterdir()} == {"jaxpage.json", "params"}


def test_a_conversion_interrupted_at_its_end_is_not_taken_for_whole(tmp_path, monkeypatch):
    tensors = hf_tensors(CONFIG)
    folder = write_hf(tmp_path / "small", CONFIG, tensors)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load_model(str(folder), jnp.float32)
    with monkeypatch.context() as patch:
        names = rows_read(patch)
        assert_params_are(load_model(str(folder), jnp.float32).params, tensors, CONFIG)
    assert names == []
    assert len(list(store.cache_folder().iterdir())) == 1


KILLED = """
import os, signal, sys
from jaxpage.checkpoint.hf_files import SafetensorsFiles
from jaxpage.checkpoint.load import load_model
left, rows = [int(sys.argv[2])], SafetensorsFiles.rows
def counted(self, name, start, stop):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return rows(self, name, start, stop)
SafetensorsFiles.rows = counted
load_model(sys.argv[1], "float32")
"""


def test_what_a_killed_process_wrote_is_kept_and_another_goes_on(tmp_path, monkeypatch):
    tensors = hf_tensors(CONFIG)
    folder = write_hf(tmp_path / "small", CONFIG, tensors)
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), "5"], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    names = rows_read(monkeypatch)
    assert_params_are(load_model(str(folder), jnp.float32).params, tensors, CONFIG)
    assert len(names) == len(tensors) - 5


FULL_DISK = """
import resource, sys
from jaxpage.checkpoint.errors import CheckpointError
from jaxpage.checkpoint.load import load_model
resource.setrlimit(resource.RLIMIT_FSIZE, (3500, 3500))  # less than one chunk of `out`
try:
    load_model(sys.argv[1], "float32")
except CheckpointError as error:
    print(error)
"""


def test_a_place_that_takes_no_more_is_an_error_and_what_it_took_is_kept(tmp_path, monkeypatch):
    tensors = hf_tensors(CONFIG)
    folder = write_hf(tmp_path / "small", CONFIG, tensors)
    command = [sys.executable, "-c", FULL_DISK, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "cannot be written" in done.stdout and "JAXPAGE_CACHE" in done.stdout
    names = rows_read(monkeypatch)
    assert_params_are(load_model(str(folder), jnp.float32).params, tensors, CONFIG)
    assert 0 < len(names) < len(tensors)


def test_an_array_that_was_damaged_meanwhile_is_not_begun_anew(tmp_path, monkeypatch):
    folder = write_hf(tmp_path / "small", CONFIG, hf_tensors(CONFIG))
    with monkeypatch.context() as patch:
        rows_read(patch, stop_after=9)
        with pytest.raises(KeyboardInterrupt):
            load_model(str(folder), jnp.float32)
    (partial,) = store.cache_folder().iterdir()
    (partial / "params" / "embed" / ".zarray").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot be written.*embed"):
        load_model(str(folder), jnp.float32)


def test_processes_that_convert_the_same_at_once_all_have_it(tmp_path):
    tensors = hf_tensors(CONFIG)
    folder = write_hf(tmp_path / "small", CONFIG, tensors)
    command = [sys.executable, "-c", KILLED, str(folder), "1000"]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert_params_are(load_model(str(folder), jnp.float32).params, tensors, CONFIG)
    (cached,) = store.cache_folder().iterdir()
    assert {path.name for path in cached.iterdir()} <= {"jaxpage.json", "params", "lock"}


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_tensors_are_copied_in_blocks_of_rows(tmp_path, monkeypatch, form):
    monkeypatch.setattr(foreign, "BLOCK_BYTES", 600)
    tensors = hf_tensors(CONFIG)
    names = rows_read(monkeypatch)
    if form == "hf":
        path = write_hf(tmp_path / "small", CONFIG, tensors)
    else:
        path = write_gguf(tmp_path / "small.gguf", CONFIG, gguf_tensors(tensors, CONFIG))
    assert_params_are(load_model(str(path), jnp.float32).params, tensors, CONFIG)
    assert form == "gguf" or len(names) > 2 * len(tensors)


def test_a_flipped_bit_of_the_cache_is_found(tmp_path):
    folder = write_hf(tmp_path / "small", CONFIG, hf_tensors(CONFIG))
    load_model(str(folder), jnp.float32)
    (cached,) = store.cache_folder().iterdir()
    path = max((cached / "params").rglob("*"), key=lambda path: path.stat().st_size)
    values = bytearray(path.read_bytes())
    values[len(values) // 2] ^= 1
    path.write_bytes(values)
    with pytest.raises(CheckpointError, match=r"checksum \w{8} in place of.*Delete it and load"):
        load_model(str(folder), jnp.float32)


def test_pieces_and_what_devices_read_are_whole_chunks_of_bounded_size():
    specs = param_specs(PRESETS["llama-3.1-70b"])
    for spec in jax.tree.leaves(specs, is_leaf=is_spec):
        chunks = growing.chunk_shape(spec, itemsize=2)
        assert math.prod(chunks) * 2 <= growing.CHUNK_BYTES
        for size, chunk, axis in zip(spec.shape, chunks, spec.axes, strict=True):
            assert chunk == 1 or axis not in ("layers", "parts")
            if axis in AXIS_RULES:
                assert size // 8 % chunk == 0 or chunk <= size // 8


def test_the_script_tells_where_the_model_is_and_what_it_took(tmp_path):
    folder = write_hf(tmp_path / "small", CONFIG, hf_tensors(CONFIG))
    command = [sys.executable, "-m", "experiments.convert_checkpoint", f"--model={folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert store.is_model_folder(Path(row["folder"]))
    assert row["largest_tensor_bytes"] == 4 * CONFIG.mlp_dim * CONFIG.embed_dim
    done = subprocess.run([*command, "--synthetic_gb=3"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "one of them says what to convert" in done.stderr
