"""The bench of paged attention, as far as it goes without a GPU: all but the times.

Shapes are tiny; the conversions are checked by calling what they are for, or ours, on their result.
"""

import importlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import timing
from pallas_kernels.paged_attention import bench, layouts, paged_attention
from pallas_kernels.paged_attention.config import Tile
from pallas_kernels.paged_attention.shapes import SHAPES, Shape, choose_shapes

ROOT = Path(__file__).parents[1]
SKEWED = Shape("skewed", 6, 2, 64, 16, 4, 100, is_skewed=True)
QUANTISED = Shape("quantised", 4, 2, 64, 16, 3, 70, pages="int8")
RAGGED = Shape("ragged", 4, 2, 64, 16, 3, 70, prompt_tokens=20)
SETTINGS = bench.Settings(repeats=2, calls=3, cache_bytes=1)
COPY_BYTES_PER_S = 100.0

run_reference, run_xla = (
    jax.jit(partial(paged_attention, implementation=name)) for name in ("reference", "xla")
)


def error_of(attend, case_arguments, shape: Shape) -> float:
    arrays = shape.make()
    out = attend(**case_arguments(arrays))
    assert out.shape == arrays["q"].shape and out.dtype == arrays["q"].dtype
    return bench.largest_error(out, bench.expected_out(arrays))


def row(shape: str, implementation: str, median_s: float | None) -> dict:
    status = "ok" if median_s else "cannot: made up"
    found = {"shape": shape, "implementation": implementation, "status": status}
    times = {"median_s": median_s, "share_of_copy": median_s and 0.5 / median_s}
    return found | times | {"device": "a card", "commit": "abc"}


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.in_ci("()-*")
@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        ((), ("needs an NVIDIA GPU", "JAX runs on cpu", "pip install 'jax[cuda12]'")),
        (("--shape=mqa,llama9",), ("--shape=llama9 is in no name", "mqa-decode-b64-c4096-p16")),
        (("--implementation=fast",), ("--implementation=fast", "xla, mosaic_gpu")),
    ],
    ids=str,
)
def test_what_cannot_be_timed_is_one_line_on_stderr(flags, messages):
    command = [sys.executable, "-m", "pallas_kernels.paged_attention.bench", *flags]
    # As a user calls it, with JAX to find out by itself what there is.
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and done.stdout == ""
    *others, line = done.stderr.splitlines()
    assert not any("Unable to initialize" in other for other in others), others
    assert line.startswith("error: ") and all(message in line for message in messages)


def test_a_platform_that_is_not_there_is_a_missing_gpu(monkeypatch):
    def devices():
        raise RuntimeError("Unknown backend\ncuda")

    monkeypatch.setattr(jax, "devices", devices)
    assert "JAX found none: Unknown backend cuda" in (timing.missing_gpu() or "")


# --- which shapes and implementations ------------------------------------------------------------


def test_shapes_are_chosen_by_name_by_part_and_once():
    assert choose_shapes(["all"]) == list(SHAPES.values())
    name = "mqa-decode-b64-c4096-p16"
    assert choose_shapes([name, "mqa"]) == [SHAPES[name]]
    assert [s.name for s in choose_shapes(["mha-", "mqa-"])] == [
        "mha-decode-b32-c2048-p16",
        name,
    ]


@pytest.mark.parametrize("names", [["llama9"], [""], [], ["mqa", ""]])
def test_a_shape_that_is_not_there_is_named_with_the_choices(names):
    with pytest.raises(ValueError, match=r"--shape=.* is in no name: choose of ") as e:
        choose_shapes(names)
    assert all(name in str(e.value) for name in SHAPES)


def test_peers_always_run_and_contiguous_runs_beside_its_kernel():
    assert list(bench.cases(["xla"])) == ["xla", *bench.PEERS]
    both = list(bench.cases(["mosaic_gpu", "xla"]))
    assert both == ["mosaic_gpu", "xla", "mosaic_gpu_contiguous", *bench.PEERS]
    with pytest.raises(ValueError, match="--implementation=reference is unknown: choose of xla"):
        bench.cases(["reference"])


# --- input sets and what is right ----------------------------------------------------------------


def test_input_sets_exceed_the_cache_twofold_or_are_as_many_as_compile():
    for shape in SHAPES.values():
        count = bench.num_sets(shape, bench.Settings().cache_bytes)
        is_enough = count * shape.least_bytes() >= 2 * bench.Settings().cache_bytes
        assert is_enough or count == bench.MOST_SETS
        assert count == 2 or (count - 1) * shape.least_bytes() < 2 * bench.Settings().cache_bytes


def test_expected_results_are_the_references_however_many_tokens_at_a_time(monkeypatch):
    arrays = RAGGED.make()
    want = jnp.asarray(run_reference(**arrays), jnp.float32)
    monkeypatch.setattr(bench, "CHECK_BYTES", 7 * 80 * 2 * 64 * 4)  # 22 tokens are 4 parts
    np.testing.assert_allclose(bench.expected_out(arrays), want, rtol=2**-8, atol=1e-6)


def test_the_error_is_relative_to_each_tokens_and_heads_largest_value():
    expected = jnp.asarray([[[1.0, -4.0], [0.01, 0.02]]])
    assert bench.largest_error(expected + 0.001, expected) == pytest.approx(0.05, rel=1e-3)
    assert np.isnan(bench.largest_error(expected.at[0, 0, 0].set(jnp.nan), expected))


def test_quantised_pages_are_read_with_their_scales():
    assert error_of(run_xla, dict, QUANTISED) < bench.TOLERANCE
    arrays = QUANTISED.make()
    other = arrays | {"v_scales": arrays["k_scales"]}
    error = bench.largest_error(run_xla(**other), bench.expected_out(arrays))
    assert error > bench.TOLERANCE
    for convert in (bench.as_contiguous, bench.as_cudnn, bench.as_jax_pallas):
        with pytest.raises(NotImplementedError, match="scale"):
            convert(arrays)


# --- conversions for peers -----------------------------------------------------------------------


@pytest.mark.in_ci("ragged")
@pytest.mark.parametrize("shape", [SKEWED, RAGGED], ids=lambda shape: shape.name)
def test_contiguous_rows_give_what_pages_give(shape):
    converted = bench.as_contiguous(shape.make())
    assert converted["page_indices"].shape == (shape.num_rows, 1)
    _, _, page_size, _ = converted["k_pages"].shape
    assert page_size % Tile().block_tokens == 0
    assert shape.context <= page_size < shape.context + Tile().block_tokens
    assert error_of(run_xla, bench.as_contiguous, shape) < bench.TOLERANCE


def test_cudnn_gets_its_layout_and_as_many_pages_as_its_table_has(monkeypatch):
    def back_to_ours(arrays):
        found = bench.as_cudnn(arrays)
        return {**found, **{n: layouts.from_nhd(found[n]) for n in ("k_pages", "v_pages")}}

    assert error_of(run_xla, back_to_ours, SKEWED) < bench.TOLERANCE
    cudnn = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    converted = bench.as_cudnn(SKEWED.make())
    table = np.sort(np.ravel(converted["page_indices"]))
    np.testing.assert_array_equal(table, np.arange(converted["k_pages"].shape[0]))
    out = jax.eval_shape(lambda arrays: bench.attend_cudnn(**arrays), converted)
    assert (out.shape, out.dtype) == (converted["q"].shape, jnp.bfloat16)


@pytest.mark.parametrize(
    "shape",
    # Head dim 256 is for Hopper, and the check of it asks the card.
    [s for s in SHAPES.values() if not (s.is_ragged or s.is_quantised) and s.head_dim <= 128],
    ids=lambda shape: shape.name,
)
def test_cudnn_would_take_every_named_decode_shape(shape, monkeypatch):
    cudnn = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    converted = jax.eval_shape(bench.as_cudnn, shape.arguments())
    out = jax.eval_shape(lambda arrays: bench.attend_cudnn(**arrays), converted)
    assert out.shape == shape.arguments()["q"].shape


def test_jax_pallas_gets_heads_first_and_a_table_that_it_can_split():
    converted = bench.as_jax_pallas(SKEWED.make())
    num_pages = SKEWED.num_pages
    assert converted["k_pages"].shape == (2, num_pages, 16, 64)
    table = np.asarray(converted["block_tables"])
    assert table.shape == (4, 16) and (table >= 0).all() and (table < num_pages).all()
    attend = partial(bench.attend_jax_pallas, interpret=True)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert error_of(attend, bench.as_jax_pallas, SKEWED) < bench.TOLERANCE


@pytest.mark.parametrize("convert", [bench.as_cudnn, bench.as_jax_pallas])
def test_peers_for_decode_say_so_of_a_ragged_step(convert):
    with pytest.raises(NotImplementedError, match="one query a row"):
        convert(RAGGED.make())


@pytest.mark.parametrize(
    ("installed", "sentence"),
    [
        ((), "not installed: flashinfer-python, jax-tvm-ffi"),
        (("flashinfer",), "not installed: jax-tvm-ffi"),
        (("flashinfer", "jax_tvm_ffi"), "one row's contiguous KV, no pages"),
    ],
)
def test_flashinfer_says_what_is_missing(installed, sentence, monkeypatch):
    monkeypatch.setattr(
        bench.importlib.util, "find_spec", lambda name: True if name in installed else None
    )
    with pytest.raises(NotImplementedError, match=sentence):
        bench.attend_flashinfer()


# --- many calls in one program -------------------------------------------------------------------


def test_calls_of_one_program_are_all_made_in_turn():
    inputs = [{"q": jnp.full((4, 4), float(i)), "w": jnp.eye(4)} for i in (1, 2)]
    run = timing.in_one_dispatch(lambda q, w: q @ w, inputs, 6, link="q")
    outs = run()
    assert [float(out[0, 0]) for out in outs] == [1.0, 2.0] * 3
    assert isinstance(run, partial)
    # None was merged with the equal one two calls before.
    assert run.func.as_text().count(" dot(") == 6


def test_every_input_comes_up_equally_often():
    assert [timing.calls_per_dispatch(n, 16) for n in (1, 2, 3, 16, 17, 64)] == [
        16, 16, 18, 16, 17, 64,
    ]  # fmt: skip


def test_times_are_a_median_and_percentiles_a_call():
    calls = []
    times = timing.time_calls(lambda: calls.append(1), 4, 5)
    assert len(calls) == timing.WARM_UPS + 5
    assert 0 <= times.p10_s <= times.median_s <= times.p90_s
    assert timing.times_of(range(1, 12)) == (6.0, 2.0, 10.0)


def test_a_copy_counts_what_it_reads_and_what_it_writes(monkeypatch):
    fixed = timing.Times(0.5, 0.5, 0.5)
    monkeypatch.setattr(timing, "time_calls", lambda run, calls, repeats: fixed)
    assert timing.copy_bytes_per_s(1024, 1) == 2 * 1024 / 0.5


# --- rows ----------------------------------------------------------------------------------------


def test_each_case_gives_a_row_with_a_time_or_a_sentence():
    def swapped(k_pages, v_pages, **rest):
        return run_xla(k_pages=v_pages, v_pages=k_pages, **rest)

    chosen = bench.cases(["mosaic_gpu", "xla"]) | {
        "swapped": bench.Case(swapped),
        "nan": bench.Case(lambda q, **rest: q * jnp.asarray(jnp.nan, q.dtype)),
    }
    rows = list(bench.bench(SKEWED, chosen, SETTINGS, COPY_BYTES_PER_S))
    assert [r["implementation"] for r in rows] == list(chosen)
    status = {r["implementation"]: r["status"] for r in rows}
    assert status.pop("xla") == "ok"
    assert status["mosaic_gpu"].startswith("cannot: ") and "GPU" in status["mosaic_gpu"]
    assert status["cudnn"].startswith("failed: RuntimeError: cuDNN")
    assert status["jax_pallas"].startswith("failed: ValueError: Only interpret mode")
    assert status["flashinfer"].startswith("cannot: not installed")
    assert status["swapped"].startswith("wrong: ") and status["nan"].startswith("wrong: nan")
    for r in rows:
        assert r["least_bytes"] == SKEWED.least_bytes() and r["num_sets"] == 2
        assert r["calls_per_dispatch"] == 4 and r["seed"] == 0
        is_timed = r["status"] == "ok"
        for key in ("median_s", "p10_s", "p90_s", "bytes_per_s", "share_of_copy", "largest_error"):
            assert (r[key] is not None) == is_timed
        json.dumps(r, allow_nan=False)


def test_bytes_are_those_that_any_algorithm_must_move():
    times = timing.Times(0.25, 0.2, 0.3)
    for shape in SHAPES.values():
        settings = bench.Settings()
        made = bench.make_row(shape, "xla", bench.Result("ok", 0.0, times), settings, 1e9)
        assert made["least_bytes"] == shape.least_bytes()
        assert made["bytes_per_s"] == 4 * shape.least_bytes()
        assert made["share_of_copy"] == 4 * shape.least_bytes() / 1e9
        assert made["exceeds_cache"] == (shape.name != "llama3.1-70b-decode-b1-c64-p16")


def test_inputs_that_do_not_fit_are_the_status_of_every_case(monkeypatch):
    def fail(self, seed):
        raise MemoryError("out of\n memory")

    monkeypatch.setattr(Shape, "make", fail)
    rows = list(bench.bench(SKEWED, bench.PEERS, SETTINGS, COPY_BYTES_PER_S))
    assert [r["status"] for r in rows] == ["no input: MemoryError: out of memory"] * 3


# --- summary and picture -------------------------------------------------------------------------

ROWS = [
    row("a", "mosaic_gpu", 2.0),
    row("a", "xla", 8.0),
    row("a", "mosaic_gpu_contiguous", 1.6),
    row("a", "cudnn", 4.0),
    row("a", "jax_pallas", 5.0),
    row("b", "mosaic_gpu", None),
    row("b", "xla", 3.0),
    row("b", "cudnn", None),
    row("c", "flashinfer", None),
]


def test_the_summary_compares_the_fastest_and_says_none_where_a_time_is_missing():
    assert bench.summarise(ROWS) == {
        "a": {
            "ours": "mosaic_gpu",
            "best_peer": "cudnn",
            "ours_over_best_peer": 0.5,
            "paged_over_contiguous": 1.25,
        },
        "b": {
            "ours": "xla",
            "best_peer": None,
            "ours_over_best_peer": None,
            "paged_over_contiguous": None,
        },
        "c": {
            "ours": None,
            "best_peer": None,
            "ours_over_best_peer": None,
            "paged_over_contiguous": None,
        },
    }


def test_rows_and_picture_are_written(tmp_path):
    bench.write(ROWS, tmp_path)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == ROWS
    assert (tmp_path / "bench.png").stat().st_size > 1000


def test_without_matplotlib_the_rows_are_written_and_one_line_says_so(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    bench.write(ROWS, tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("no bench.png: ") and "pip install matplotlib" in line
    assert (tmp_path / "rows.jsonl").exists() and not (tmp_path / "bench.png").exists()
