"""The scripts as a user meets them: the contract of their files, and what bad input says."""

import json
import subprocess
from pathlib import Path

import pytest
from scripts import run_script


def write_jsonl(path: Path, *lines: dict) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def generate(tmp_path: Path, *lines: dict, flags: tuple[str, ...] = ()):
    prompts = write_jsonl(tmp_path / "in.jsonl", *lines)
    out = tmp_path / "out.jsonl"
    done = run_script(
        "generate", "--model=tiny", f"--prompts={prompts}", f"--out={out}", "--num_slots=2", *flags
    )
    return done, [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def assert_fails_with(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode != 0
    last_line = done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in last_line


def test_a_bad_request_is_refused_alone_and_the_others_are_answered(tmp_path):
    done, rows = generate(
        tmp_path,
        {"id": "good", "prompt_ids": [1, 2, 3], "max_new_tokens": 5},
        {"id": "empty", "prompt_ids": []},
        {"id": "outside", "prompt_ids": [1, 128]},
        {"id": "negative", "prompt_ids": [-1]},
        {"id": "zero", "prompt_ids": [1], "max_new_tokens": 0},
        {"id": "minus", "prompt_ids": [1], "max_new_tokens": -3},
        {"id": "long", "prompt_ids": [1] * 600},
        {"id": "text", "prompt": "no tokenizer for this one"},
        {"id": "kind", "prompt_ids": "123"},
        {"id": "twice", "prompt_ids": [1, 2], "n": 2},
        {"id": 7, "prompt_ids": [4], "max_new_tokens": 2, "seed": 3},
        flags=("--ignore_eos", "--max_new_tokens=4"),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1])["errors"] == 9
    by_id = {row["id"]: row for row in rows}
    assert [row["id"] for row in rows][:2] == ["good", "empty"]
    assert len(by_id["good"]["output_ids"]) == 5
    assert by_id["good"]["finish_reason"] == "length"
    assert len(by_id[7]["output_ids"]) == 2
    said = {
        "empty": "empty",
        "outside": "128",
        "negative": "-1",
        "zero": "max_new_tokens=0",
        "minus": "max_new_tokens=-3",
        "long": "600",
        "text": "tokenizer",
        "kind": "prompt_ids",
        "twice": "n=2 with temperature=0",
    }
    for request_id, word in said.items():
        assert by_id[request_id]["output_ids"] == []
        assert by_id[request_id]["finish_reason"] == "error"
        assert word in by_id[request_id]["error"]


def test_samples_of_a_prompt_stand_in_one_line(tmp_path):
    done, (several, alone) = generate(
        tmp_path,
        {"id": "several", "prompt_ids": [1, 2, 3], "n": 2, "seed": 5},
        {"id": "alone", "prompt_ids": [1, 2, 3], "seed": 5},
        flags=("--ignore_eos", "--max_new_tokens=8", "--temperature=1"),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1])["output_tokens"] == 24
    assert several["output_ids"] == alone["output_ids"]
    (other,) = several["more"]
    assert len(other["output_ids"]) == 8 and other["output_ids"] != several["output_ids"]
    assert "more" not in alone


@pytest.mark.slow
def test_the_best_beams_of_a_prompt_stand_in_one_line(tmp_path):
    done, (searched, wide) = generate(
        tmp_path,
        {"id": "searched", "prompt_ids": [1, 2, 3], "n": 2},
        {"id": "wide", "prompt_ids": [1, 2, 3], "num_beams": 3},
        flags=("--max_new_tokens=8", "--num_beams=2", "--length_penalty=0.5"),
    )
    assert done.returncode == 0, done.stderr
    (second,) = searched["more"]
    assert searched["score"] > second["score"]
    assert searched["output_ids"] != second["output_ids"]
    assert "num_beams=3" in wide["error"]


@pytest.mark.in_ci("")
@pytest.mark.parametrize("spelling", ["", "=true", "=never"])
def test_a_search_may_be_told_when_to_stop(tmp_path, spelling):
    done, (row,) = generate(
        tmp_path,
        {"id": "a", "prompt_ids": [1, 2, 3]},
        flags=("--max_new_tokens=4", "--num_beams=2", f"--early_stopping{spelling}"),
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.strip().splitlines()[-1])["flags"]["early_stopping"]
    assert said == ("never" if spelling == "=never" else True)
    assert len(row["output_ids"]) == 4


def test_a_search_cannot_perhaps_be_stopped(tmp_path):
    done, _ = generate(tmp_path, {"id": "a", "prompt_ids": [1]}, flags=("--early_stopping=maybe",))
    assert done.returncode != 0
    assert "--early_stopping=maybe: it must be true, false or never" in done.stderr


@pytest.mark.slow
def test_a_request_larger_than_the_pool_is_refused_alone(tmp_path):
    done, rows = generate(
        tmp_path,
        {"id": "small", "prompt_ids": [1, 2], "max_new_tokens": 3},
        {"id": "large", "prompt_ids": [1] * 60, "max_new_tokens": 30},
        flags=("--num_pages=4", "--ignore_eos"),
    )
    assert done.returncode == 0, done.stderr
    assert len(rows[0]["output_ids"]) == 3
    assert "pages" in rows[1]["error"]


@pytest.mark.slow
def test_outputs_do_not_depend_on_page_size_or_slots(tmp_path):
    lines = [{"id": str(i), "prompt_ids": list(range(1, 5 + 7 * i))} for i in range(4)]
    shared = ("--ignore_eos", "--max_new_tokens=12")
    _, rows = generate(tmp_path, *lines, flags=shared)
    _, others = generate(tmp_path, *lines, flags=(*shared, "--page_size=3", "--num_slots=3"))
    assert [row["output_ids"] for row in rows] == [row["output_ids"] for row in others]
    assert len(rows) == 4


def test_a_repeated_id_refuses_the_file(tmp_path):
    line = {"id": "a", "prompt_ids": [1]}
    done, _ = generate(tmp_path, line, line)
    assert_fails_with(done, ":2:", "'a'", "line 1")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{not json}\n", (":1:", "not JSON")),
        ("[1, 2]\n", (":1:", "object")),
        ('{"prompt_ids": [1]}\n', (":1:", '"id"')),
        ("\n", ("no prompts",)),
    ],
)
def test_a_file_that_is_no_list_of_prompts_is_refused_with_the_line(tmp_path, text, words):
    prompts = tmp_path / "in.jsonl"
    prompts.write_text(text)
    done = run_script(
        "generate", "--model=tiny", f"--prompts={prompts}", f"--out={tmp_path / 'out.jsonl'}"
    )
    assert_fails_with(done, *words)


def test_an_unknown_model_is_named(tmp_path):
    prompts = write_jsonl(tmp_path / "in.jsonl", {"id": "a", "prompt_ids": [1]})
    out = tmp_path / "out.jsonl"
    done = run_script("generate", "--model=gpt-5", f"--prompts={prompts}", f"--out={out}")
    assert_fails_with(done, "gpt-5")


def test_a_wrong_dtype_lists_the_right_ones(tmp_path):
    done, _ = generate(tmp_path, {"id": "a", "prompt_ids": [1]}, flags=("--dtype=int4",))
    assert done.returncode != 0
    assert "float32" in done.stderr and "bfloat16" in done.stderr


def test_an_output_that_cannot_be_written_fails_before_the_work(tmp_path):
    prompts = write_jsonl(tmp_path / "in.jsonl", {"id": "a", "prompt_ids": [1]})
    done = run_script(
        "generate", "--model=tiny", f"--prompts={prompts}", f"--out={tmp_path / 'no' / 'out'}"
    )
    assert_fails_with(done, "cannot write", "No such file")


def test_a_missing_prompt_file_is_named(tmp_path):
    missing = tmp_path / "none.jsonl"
    done = run_script(
        "generate", "--model=tiny", f"--prompts={missing}", f"--out={tmp_path / 'out.jsonl'}"
    )
    assert_fails_with(done, "none.jsonl", "no such file")


def test_a_budget_below_one_page_is_refused(tmp_path):
    done = run_script("serve", "--kv_bytes=1000", "--requests=2", f"--out={tmp_path}")
    assert_fails_with(done, "kv_bytes=1000", "raise it")


@pytest.mark.slow
def test_attention_is_chosen_by_flag_and_refused_where_it_cannot_run(tmp_path):
    line = {"id": "a", "prompt_ids": [1, 2, 3], "max_new_tokens": 4}
    outputs = []
    for name in ("auto", "reference"):
        out = tmp_path / f"{name}.jsonl"
        prompts = write_jsonl(tmp_path / "in.jsonl", line)
        done = run_script(
            "generate", "--model=tiny", f"--prompts={prompts}", f"--out={out}", "--num_slots=2",
            f"--attention={name}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        outputs.append(json.loads(out.read_text())["output_ids"])
    assert outputs[0] == outputs[1] and len(outputs[0]) == 4
    done = run_script(
        "generate", "--model=tiny", f"--prompts={tmp_path / 'in.jsonl'}",
        f"--out={tmp_path / 'o.jsonl'}", "--attention=mosaic_gpu",
    )  # fmt: skip
    assert_fails_with(done, "--attention=mosaic_gpu", 'use implementation="xla"')


def test_the_bench_prints_its_contract_and_compiles_nothing_while_serving(tmp_path):
    workload = write_jsonl(
        tmp_path / "w.jsonl",
        {"prompt_ids": [1, 2, 3], "max_new_tokens": 6},
        {"prompt_ids": [4, 5], "max_new_tokens": 9},
    )
    done = run_script(
        "bench_engine", "--model=random:tiny", f"--workload={workload}", "--num_slots=2"
    )
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.strip().splitlines()[-1])
    assert row["output_tokens"] == 15
    assert row["recompiles"] == 0
    assert row["attention"] == "xla"
    for name in ("output_tokens_per_s", "total_tokens_per_s", "compile_s", "steps",
                 "peak_rss_bytes", "host_transfers_per_step"):  # fmt: skip
        assert row[name] > 0


@pytest.mark.slow
def test_a_workload_of_sharegpt_is_cut_as_asked_and_can_be_read(tmp_path):
    out = tmp_path / "w.jsonl"
    done = run_script(
        "make_workload", "--requests=5", "--max_prompt_tokens=9", "--max_output_tokens=7",
        f"--out={out}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 5
    assert all(0 < len(line["prompt_ids"]) <= 9 for line in lines)
    assert all(0 < line["max_new_tokens"] <= 7 for line in lines)
    assert json.loads(done.stdout)["requests"] == 5
    done = run_script("bench_step", "--model=tiny", f"--workload={out}", "--num_slots=6")
    assert_fails_with(done, "5 requests for --num_slots=6")
    done = run_script("make_workload", "--model=random:nobody", f"--out={out}")
    assert_fails_with(done, "random:nobody", "llama-3.1-8b")


def test_help_explains_every_flag_in_sentences():
    names = [
        "generate",
        "serve",
        "bench_engine",
        "bench_prefix",
        "bench_saving",
        "bench_scheduler",
        "calibrate",
        "claim_eviction",
        "claim_lunch",
        "claim_sharing",
        "convert_checkpoint",
        "demo",
        "fig15_sharing_savings",
        "make_workload",
        "measure_device",
        "plan_memory",
        "soak",
    ]
    for name in names:
        text = run_script(name, "--help").stdout
        assert f"python -m experiments.{name}" in text
        ours = text.split("absl.app:")[0]
        assert ours.count("--") > 2
        for flag in ("--policy", "--out"):
            if flag in ours:
                assert ours.split(flag)[1].split("--")[0].count(".") > 0
