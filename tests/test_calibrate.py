"""Calibration: it finds what rows were made with, whatever a few of them say; files are checked."""

import csv
import json

import numpy as np
import pytest
from scripts import run_script

from jaxpage.config import ConfigError
from jaxpage.sim import calibrate, kernels, profiles
from jaxpage.sim.device import DEVICES, find_device
from jaxpage.sim.efficiencies import read_efficiencies
from jaxpage.sim.kernels import DECODE, LINEAR, PREFILL, Efficiency, Work
from jaxpage.sim.profiles import COLUMNS, Rows
from jaxpage.sim.shapes import SHAPES

A100 = DEVICES["a100-80gb"]
TRUTH = Efficiency(compute=0.6, memory=0.8, launch_s=8e-6, item_s=2e-6, sharpness=2.0)


def made_rows(noise: float = 0.02, outliers: float = 0.0, n: int = 2000) -> Rows:
    """Products of many sizes, as `TRUTH` takes them."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 4096, n)
    work = kernels.product(tokens, 4096.0, 2.0 ** rng.integers(8, 15, n))
    work = Work(*map(np.asarray, work[:2]), items=rng.integers(0, 30, n).astype(np.float32))
    rows = Rows(
        np.full(n, LINEAR, np.int32), work, np.ones(n, np.float32), tokens.astype(np.int32),
        np.full(n, "made"),
    )  # fmt: skip
    seconds = calibrate.predict(TRUTH, rows, A100) * np.exp(noise * rng.standard_normal(n))
    seconds = np.where(rng.random(n) < outliers, 20 * seconds, seconds)
    return rows._replace(seconds=seconds.astype(np.float32))


def test_the_parameters_that_made_the_rows_are_found():
    fit = calibrate.fit(made_rows(), A100)
    for name, value in fit.efficiency._asdict().items():
        assert float(value) == pytest.approx(getattr(TRUTH, name), rel=0.15), name
    assert fit.held_out.median < 0.02  # the noise's median is 1.35 %
    assert fit.held_out.median < fit.held_out_nnls.median


def test_outliers_do_not_pull_the_fit():
    fit = calibrate.fit(made_rows(outliers=0.08), A100)
    for name in ("compute", "memory"):
        assert float(getattr(fit.efficiency, name)) == pytest.approx(getattr(TRUTH, name), rel=0.1)


def test_held_out_rows_are_not_fitted():
    rows = made_rows()
    _, held_out = calibrate.split(rows, seed=0)
    slow = rows._replace(seconds=rows.seconds.copy())
    chosen = np.isin(rows.work.flops * rows.seconds, held_out.work.flops * held_out.seconds)
    slow.seconds[chosen] *= 3
    first, second = (calibrate.fit(each, A100) for each in (rows, slow))
    assert first.efficiency == second.efficiency
    assert second.held_out.median == pytest.approx(2 / 3, abs=0.02)


def test_errors_are_relative_and_by_region():
    rows = made_rows(n=4)._replace(
        seconds=np.asarray([1, 2, 4, 8], np.float32), tokens=np.asarray([1, 64, 65, 600])
    )
    found = calibrate.errors_by_region(np.asarray([1.1, 2, 5, 4], np.float32), rows)
    assert [errors.num_rows for errors in found.values()] == [2, 1, 1]
    assert [errors.median for errors in found.values()] == pytest.approx([0.05, 0.25, 0.5])
    assert list(found) == ["1 to 64 tokens", "65 to 512 tokens", "more than 512 tokens"]


def test_too_few_rows_are_refused():
    with pytest.raises(ConfigError, match="1 rows are too few"):
        calibrate.split(made_rows(n=1), seed=0)


def write_csv(path, columns, *records) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(records)


def test_our_own_rows_are_read_back(tmp_path):
    path = tmp_path / "rows.csv"
    write_csv(
        path, COLUMNS,
        ("mine", "a group", "linear", 8, 1e9, 2e6, 0, 1e-3),
        ("other", "a group", "linear", 8, 1e9, 2e6, 0, 1e-3),
        ("mine", "another", "decode", 3, 1e6, 2e7, 3, 2e-3),
        ("mine", "too fast for the clock", "decode", 3, 1e6, 2e7, 3, 0),
    )  # fmt: skip
    rows = profiles.read_measured(path, "mine")
    assert rows.kinds.tolist() == [LINEAR, DECODE]
    assert rows.groups.tolist() == ["a group", "another"]
    np.testing.assert_allclose(rows.seconds, [1e-3, 2e-3])
    np.testing.assert_allclose(rows.work.items, [0, 3])


@pytest.mark.parametrize(
    "record,message",
    [
        (("mine", "g", "linear", 8, -1, 2e6, 0, 1e-3), r":2: flops='-1' is not a number from 0"),
        (("mine", "g", "linear", 8, "x", 2e6, 0, 1e-3), r":2: flops='x' is not a number"),
        (("mine", "g", "fft", 8, 1, 2e6, 0, 1e-3), r":2: kind 'fft' is none of linear"),
        (("mine", "g", "linear", 8, 1, 2e6, 0, 0), "no row with a positive time"),
        (("other", "g", "linear", 8, 1, 2e6, 0, 1), "no record with"),
    ],
)
def test_bad_rows_are_refused_with_their_line(tmp_path, record, message):
    path = tmp_path / "rows.csv"
    write_csv(path, COLUMNS, record)
    with pytest.raises(ConfigError, match=message):
        profiles.read_measured(path, "mine")


def test_a_file_without_the_columns_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    write_csv(path, COLUMNS[:-1])
    with pytest.raises(ConfigError, match=r"line 1: expected a header with .*seconds"):
        profiles.read_measured(path, "mine")


def test_vidurs_products_have_the_sizes_of_the_model(tmp_path):
    path = tmp_path / "mlp.csv"
    times = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj", "input_layernorm",
             "attn_rope", "mlp_act", "add")  # fmt: skip
    write_csv(
        path,
        ("device", "model", "num_tokens", "tp", "n_head", "n_kv_head", "n_embd",
         "n_expanded_embd", "use_gated_mlp", *(f"{name}_median_ms" for name in times)),
        ("a100", "m", 64, 2, 64, 8, 8192, 28672, "True", 1, 2, 3, 4, 5, 6, 7, ""),
    )  # fmt: skip
    rows = profiles.read_vidur_linear(path, "a100")
    flops = dict(zip(rows.groups.tolist(), np.asarray(rows.work.flops).tolist(), strict=True))
    assert flops["m tp2 attn_pre_proj"] == 2 * 64 * 8192 * (64 + 16) * 128 / 2
    assert flops["m tp2 mlp_up_proj"] == 2 * 64 * 8192 * 28672
    assert flops["m tp2 mlp_down_proj"] == 2 * 64 * 8192 * 14336
    assert "m tp2 add" not in flops  # was not measured
    np.testing.assert_allclose(rows.seconds.sum(), 28e-3, rtol=1e-6)


def test_vidurs_attention_reads_what_the_cache_holds(tmp_path):
    path = tmp_path / "attention.csv"
    write_csv(
        path,
        ("is_prefill", "batch_size", "prefill_chunk_size", "kv_cache_size",
         "attn_prefill_median_ms", "attn_decode_median_ms"),
        ("False", 4, 0, 99, "", 1),
        ("True", 1, 256, 100, 2, ""),
    )  # fmt: skip
    rows = profiles.read_vidur_attention(path, SHAPES["llama-2-70b"], 2)
    assert rows.kinds.tolist() == [DECODE, PREFILL]
    heads, kv_heads, D = 32, 4, 128
    decode_bytes = 2 * (2 * kv_heads * D * 4 * 100 + 2 * heads * D * 4)
    pairs = sum(range(101, 357))
    np.testing.assert_allclose(np.asarray(rows.work.bytes)[0], decode_bytes)
    np.testing.assert_allclose(np.asarray(rows.work.flops)[1], 4 * heads * D * pairs)
    assert np.asarray(rows.work.items).tolist() == [4, 2]


def test_sums_over_hosts_are_left_out(tmp_path):
    path = tmp_path / "network.csv"
    columns = ("node_type", "collective", "num_workers", "devices_per_node", "size_bytes",
               "median_over_ranks_ms")  # fmt: skip
    write_csv(
        path, columns,
        ("dgx", "all_reduce", 4, 4, 1024, 0.05),
        ("dgx", "all_reduce", 4, 2, 1024, 0.5),
        ("dgx", "send_recv", 4, 4, 1024, 0.5),
        ("pcie", "all_reduce", 4, 4, 1024, 0.5),
    )  # fmt: skip
    rows = profiles.read_vidur_collectives(path, "dgx")
    np.testing.assert_allclose(rows.seconds, [5e-5])
    np.testing.assert_allclose(np.asarray(rows.work.bytes), [2 * 3 / 4 * 1024])


def test_the_script_writes_what_the_cost_model_reads(tmp_path):
    rows, out = tmp_path / "rows.csv", tmp_path / "fit.json"
    made = made_rows(n=300)
    write_csv(
        rows, COLUMNS,
        *(("mine", "made", "linear", *row) for row in zip(made.tokens, *map(np.asarray, made.work),
                                                         made.seconds, strict=True)),
    )  # fmt: skip
    done = run_script(
        "calibrate", "--device=a100-80gb", f"--rows=measured:mine:{rows}", f"--out={out}",
        f"--check=measured:mine:{rows}", "--check_device=h100", "--report=made",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    efficiencies = read_efficiencies(out)
    assert list(efficiencies) == ["linear"]
    assert efficiencies["linear"].compute == pytest.approx(0.6, rel=0.15)
    assert printed["held_out"]["made"]["median"] < 0.03
    assert printed["check"]["all"]["median"] > printed["held_out"]["all"]["median"]


def test_a_file_without_efficiencies_is_refused(tmp_path):
    path = tmp_path / "fit.json"
    path.write_text('{"kinds": {"linear": {"compute": 1}}}')
    with pytest.raises(ConfigError, match="not a file of efficiencies"):
        read_efficiencies(path)


@pytest.mark.slow
def test_this_machine_can_be_measured_and_then_calibrated(tmp_path):
    done = run_script(
        "measure_device", "--model=tiny", f"--out={tmp_path}", "--tokens=1,8,16,32",
        "--batches=1,2", "--contexts=16,32", "--repeats=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    device = find_device(str(tmp_path / "device.json"))
    rows = profiles.read_measured(tmp_path / "rows.csv", device.name)
    assert len(rows.kinds) == printed["rows"]
    assert {kernels.KINDS[kind] for kind in rows.kinds} == set(kernels.KINDS) - {"all_reduce"}
    assert device.flops_per_s == pytest.approx(
        (rows.work.flops / rows.seconds)[rows.kinds == LINEAR].max(), rel=1e-3
    )


HOST_COLUMNS = ("model_name", "tensor_parallel_degree", "batch_size", *profiles.HOST_COLUMNS)


def write_host(path, *records) -> None:
    write_csv(path, HOST_COLUMNS, *records)


def test_a_hosts_time_is_by_step_and_by_row(tmp_path):
    """2 ms and 0.05 ms a row, in five parts; another model's rows are not taken."""
    path = tmp_path / "host.csv"
    parts = np.array([0.1, 0.2, 0.3, 0.3, 0.1])
    write_host(
        path,
        *(("a/b", 2, rows, *((2 + 0.05 * rows) * parts)) for rows in (8, 16, 64, 128)),
        ("a/b", 1, 8, 9, 9, 9, 9, 9),
        ("a/c", 2, 8, 9, 9, 9, 9, 9),
    )
    num_rows, seconds = profiles.read_vidur_host(path, "a/b", 2)
    assert num_rows.tolist() == [8, 16, 64, 128]
    host, errors = calibrate.fit_host(num_rows, seconds)
    assert list(host) == pytest.approx([2e-3, 5e-5])
    assert errors.num_rows == 4 and errors.p90 < 1e-6
    # Each is predicted by the others: one that is off is so in full.
    off = calibrate.fit_host(num_rows, seconds * [1, 1, 1, 2])[1]
    assert off.p90 > 0.3


def test_too_little_of_a_host_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="2 steps of a host are too few"):
        calibrate.fit_host(np.ones(2), np.ones(2))
    write_host(tmp_path / "host.csv", ("a/b", 2, 8, 1, 1, 1, 1, 1))
    with pytest.raises(ConfigError, match="no record with"):
        profiles.read_vidur_host(tmp_path / "host.csv", "a/b", 4)
