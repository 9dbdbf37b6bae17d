"""Tiles that were measured: how they are found, chosen and kept. The times here are made up."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.paged_attention import bench, gpu, kernel_sm80, kernel_sm90, tune, tuning, xla
from pallas_kernels.paged_attention.config import Tile
from pallas_kernels.paged_attention.shapes import SHAPES, Shape, choose_shapes

ROOT = Path(__file__).parents[1]
DECODE = choose_shapes(["llama3.1-70b-decode-b32-c2048-p16"])[0]
WIDE = Tile(block_tokens=128, stages=2, split_tokens=2048)
Q = jax.ShapeDtypeStruct((4, 64, 128), jnp.bfloat16)
PAGES = jax.ShapeDtypeStruct((9, 8, 16, 128), jnp.bfloat16)
MEASURED = {"ratio": 0.9, "device": "a card", "commit": "abc"}


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A GPU whose file of tiles is empty."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(gpu, "card", lambda: SimpleNamespace(device_kind="NVIDIA H100 80GB"))
    tuning.read_tiles.cache_clear()
    yield tuning.file_of("NVIDIA H100 80GB")
    tuning.read_tiles.cache_clear()


def seconds_of(by_tile):
    return lambda shape, tiles: [by_tile.get(tile, 1.0) for tile in tiles]


def test_no_tile_is_kept_that_no_card_has_measured():
    for file in tuning.FOLDER.glob("*.json"):
        for row in json.loads(file.read_text()):
            assert row["device"] and row["commit"] and 0 < row["ratio"] <= 1
            assert tuning.file_of(row["device"]) == file
        assert tuning.read_tiles(file)


def test_a_measured_tile_is_taken_on_its_card_for_its_kind_of_call_alone(card):
    kind = tuning.kind_of(kernel_sm90.__name__, Q, PAGES)
    assert kernel_sm90.tile_of(Q, PAGES) == kernel_sm90.heuristic_tile(Q, PAGES)
    tuning.write_rows(card, [tuning.row_of(kind, WIDE, MEASURED)])
    assert kernel_sm90.tile_of(Q, PAGES) == WIDE
    # Neither rows nor pages of the pool choose it, and with them no row's bits.
    assert kernel_sm90.tile_of(Q.update(shape=(1, 64, 128)), PAGES) == WIDE
    other = PAGES.update(shape=(9, 8, 32, 128))
    assert kernel_sm90.tile_of(Q, other) == kernel_sm90.heuristic_tile(Q, other)
    assert kernel_sm80.tile_of(Q, PAGES) == kernel_sm80.heuristic_tile(Q, PAGES)


def test_without_a_gpu_the_heuristic_decides(card, monkeypatch):
    kind = tuning.kind_of(kernel_sm90.__name__, Q, PAGES)
    tuning.write_rows(card, [tuning.row_of(kind, WIDE, MEASURED)])
    monkeypatch.setattr(gpu, "card", lambda: None)
    assert kernel_sm90.tile_of(Q, PAGES) != WIDE


def test_rows_of_other_kinds_stay_when_one_is_written_again(card):
    kinds = [tuning.kind_of(name, Q, PAGES) for name in ("a.kernel_sm80", "a.kernel_sm90")]
    tuning.write_rows(card, [tuning.row_of(kind, WIDE, MEASURED) for kind in kinds])
    tuning.write_rows(card, [tuning.row_of(kinds[0], Tile(), MEASURED)])
    assert tuning.read_tiles(card) == {kinds[0]: Tile(), kinds[1]: WIDE}


@pytest.mark.parametrize("text", ["{", "[{}]", '[{"kernel": "x"}]', "3"])
def test_a_damaged_file_is_named_with_the_remedy(card, text):
    card.write_text(text)
    with pytest.raises(ValueError, match=r"nvidia_h100_80gb\.json: .* or delete it"):
        kernel_sm90.tile_of(Q, PAGES)


def test_every_named_shape_of_a_kernel_has_one_kind():
    kinds = tune.kinds_of(kernel_sm90, list(SHAPES.values()))
    assert sum(map(len, kinds.values())) == len(SHAPES)
    kind = tuning.kind_of(kernel_sm90.__name__, *(DECODE.arguments()[n] for n in ("q", "k_pages")))
    assert {s.context for s in kinds[kind]} == {64, 512, 2_048, 4_096, 32_768}


def test_candidates_begin_with_the_heuristics_and_all_can_be_launched():
    for shape in SHAPES.values():
        arguments = shape.arguments()
        arrays = [arguments[name] for name in ("q", "k_pages", "page_indices")]
        tiles = tune.tiles_of(kernel_sm90, shape)
        assert tiles[0] == kernel_sm90.heuristic_tile(*arrays[:2]) and len(set(tiles)) == len(tiles)
        for tile in tiles:
            kernel_sm90.check(*arrays, is_ragged=shape.is_ragged, tile=tile)


def test_the_fastest_tile_wins_if_it_is_faster_by_more_than_noise():
    shapes = [DECODE]
    heuristic, second, third, *_ = tune.tiles_of(kernel_sm90, DECODE)
    *_, best = tune.tune(kernel_sm90, shapes, seconds_of({second: 0.7, third: 0.8}))
    assert best["is_best"] and best["tile"] == second._asdict()
    assert best["ratio"] == pytest.approx(0.7)
    *_, best = tune.tune(kernel_sm90, shapes, seconds_of({second: 0.99}))
    assert best["tile"] == heuristic._asdict() and best["ratio"] == 1.0


def test_a_tile_must_be_right_at_every_shape_of_its_kind():
    second = tune.tiles_of(kernel_sm90, DECODE)[1]
    long = SHAPES["llama3.1-70b-decode-b1-c32768-p16"]

    def measure(shape, tiles):
        of_second = "wrong: 3" if shape == long else 0.5
        return [of_second if tile == second else 1.0 for tile in tiles]

    rows = list(tune.tune(kernel_sm90, [DECODE, long], measure))
    assert [row["status"] for row in rows if row["tile"] == second._asdict()] == ["wrong: 3"]
    assert rows[-1]["ratio"] == 1.0 and rows[-1]["status"] == "ok"


def test_nothing_is_kept_where_the_heuristics_tile_fails():
    heuristic = tune.tiles_of(kernel_sm90, DECODE)[0]
    *_, best = tune.tune(kernel_sm90, [DECODE], seconds_of({heuristic: "failed: broken"}))
    assert best["status"] != "ok"


def test_without_a_gpu_the_tuner_says_so_and_fails():
    command = [sys.executable, "-m", "pallas_kernels.paged_attention.tune"]
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: this needs an NVIDIA GPU")


@pytest.mark.parametrize("pages", ["bfloat16", "int8"])
def test_a_tile_is_checked_before_it_is_timed(pages):
    shape = Shape("tiny", 4, 2, 64, 16, 3, 70, prompt_tokens=20, pages=pages)
    settings = bench.Settings(repeats=1, calls=1, cache_bytes=1)
    tiles = []

    def attend(q, *, tile, **arrays):
        tiles.append(tile)
        out, *residuals = xla.attend(q, **arrays)
        return (out if tile == Tile() else 1.1 * out, *residuals)

    kernel = SimpleNamespace(attend=attend)
    seconds, fault = tune.measure_here(kernel, settings, shape, [Tile(), WIDE])
    assert isinstance(seconds, float) and seconds > 0
    assert isinstance(fault, str) and fault.startswith("wrong: ")
    assert tiles == [Tile(), WIDE]
