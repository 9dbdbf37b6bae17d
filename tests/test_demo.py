"""The demo's claims, table and comparison: arithmetic exact, failures told and not hidden."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from experiments import claims, demo, demo_load
from jaxpage.engine.request import Result
from jaxpage.engine.sizing import engine_config
from jaxpage.model.presets import PRESETS


def summary(allocator: str, tokens_per_s: float, shares: tuple[float, ...], **more) -> dict:
    names = ("token_states", "reservation", "internal", "external")
    return {
        "allocator": allocator,
        "status": "ok",
        "output_tokens_per_s": tokens_per_s,
        "mean_batched_requests": 7.0 if allocator == "max" else 21.0,
        "normalized_latency_s_per_token": 0.25,
        "preemptions": 3,
        "wall_s": 100.0,
        "steps": 1000,
        "steps_short_of_memory": 800,
        "device": "cpu",
        **{f"{name}_share": share for name, share in zip(names, shares, strict=True)},
        **more,
    }


ROWS = {
    "paged": summary("paged", 150.0, (0.93, 0.02, 0.0, 0.05)),
    "max": summary("max", 100.0, (0.36, 0.12, 0.42, 0.1)),
}
FAILED = {"allocator": "max", "status": "failed: MemoryError: no room"}


def text_of(title: str, found: list[claims.Claim]) -> claims.Claim:
    (claim,) = [claim for claim in found if title in claim.claim]
    return claim


def test_a_70b_sequence_of_4096_tokens_has_327680_bytes_a_token():
    assert claims.kv_bytes(1) == 2 * 80 * 8 * 128 * 2 == 327_680
    assert claims.kv_bytes(4096) == 1_342_177_280  # 1.342 GB
    assert claims.kv_bytes(256 * 4096) == 320 * 2**30 == 343_597_383_680


def test_the_articles_336_gb_is_256_times_1_3125():
    assert claims.ARTICLE_USERS_GB / claims.NUM_USERS == 1.3125
    ours = text_of("256 such users", claims.memory_claims()).ours
    assert "343.6 GB" in ours and "320 GiB" in ours and "256 x 1.3125" in ours


def test_the_70b_weights_are_141_gb_and_106_long_sequences_outgrow_them():
    assert round(claims.weight_bytes() / 1e9) == 141
    batch = claims.batch_outgrowing_weights(4096)
    assert batch == 106
    assert claims.kv_bytes(batch * 4096) > claims.weight_bytes()
    assert claims.kv_bytes((batch - 1) * 4096) <= claims.weight_bytes()


def test_using_300_of_4096_tokens_wastes_93_percent():
    assert claims.wasted_share(4096, 300) == pytest.approx(0.92676, abs=1e-5)
    assert text_of("reserve 4096", claims.memory_claims()).ours == "92.7 %"


def test_throughput_is_the_honest_ratio_of_the_two_runs():
    assert claims.speedup(ROWS, "max") == 1.5
    assert claims.speedup(ROWS, "oracle") is None
    ours = text_of("throughput", claims.run_claims(ROWS)).ours
    assert "1.50x of max" in ours and "oracle" not in ours
    slower = ROWS | {"paged": summary("paged", 80.0, (0.93, 0.02, 0.0, 0.05))}
    assert "0.80x of max" in text_of("throughput", claims.run_claims(slower)).ours


def test_what_max_wastes_is_measured_of_what_it_reserves():
    ours = text_of("reserving the longest", claims.run_claims(ROWS)).ours
    assert "46.7 % of what it reserves is never used" in ours  # 0.42 / 0.9
    assert "64.0 % of the pool holds no token" in ours


def test_claims_about_a_failed_run_are_not_measured():
    found = claims.all_claims(ROWS | {"max": FAILED})
    for title in ("reserving the longest", "run at once", "throughput"):
        assert text_of(title, found).ours == claims.NOT_MEASURED
    assert text_of("on-demand", found).basis == claims.MEASURED


def test_a_run_with_hardly_anyone_waiting_says_nothing_about_full_memory():
    idle = summary("paged", 150.0, (0.09, 0.01, 0.0, 0.9), steps_short_of_memory=1)
    found = claims.run_claims(ROWS | {"paged": idle})
    for title in ("on-demand", "run at once"):
        claim = text_of(title, found)
        assert claim.basis == claims.NOT_MEASURED
        assert "waited for memory in only 1 of 1000 steps" in claim.ours
    assert text_of("reserving the longest", found).basis == claims.MEASURED


def test_claims_without_any_run_still_print():
    found = claims.all_claims({})
    text = claims.format_claims(found)
    assert text.count("not measured by this demo") == 8
    assert all(len(line) <= 100 for line in text.splitlines())


def test_the_default_budget_holds_16_requests_under_max_and_rounds_nothing_up():
    config = engine_config(
        PRESETS["smollm2-135m"], max_seq_len=768, num_slots=demo_load.NUM_SLOTS, num_requests=64,
        page_size=demo_load.PAGE_SIZE, kv_dtype="float32", kv_bytes=demo_load.KV_BYTES,
    )  # fmt: skip
    assert config.pages_per_slot == 64  # a power of two: the buddies round nothing up
    assert config.num_pages == 1024
    text = demo.budget_text(config, demo_load.KV_BYTES)
    assert "1024 pages of 12 tokens" in text and "16 requests of 768 tokens" in text
    assert "rounded up" not in text


def test_the_budget_says_when_buddies_round_up():
    config = engine_config(
        PRESETS["tiny"], max_seq_len=768, num_slots=8, num_requests=8, page_size=16,
        kv_dtype="float32", num_pages=128,
    )  # fmt: skip
    text = demo.budget_text(config, 1)
    assert "2 requests of 768 tokens" in text and "rounded up from 48 to 64 pages" in text


def test_a_table_aligns_numbers_right_and_names_left():
    text = demo.format_table([("a", "num", "last"), ("long", "1", "x")])
    assert text == "a     num  last\nlong    1  x"
    assert demo.format_table([("1.5", "b"), ("10.5", "c")]) == " 1.5  b\n10.5  c"


def test_a_failed_run_is_a_row_of_dashes_with_its_status():
    lines = demo.results_table([ROWS["paged"], FAILED]).splitlines()
    assert lines[0].split()[:2] == ["allocator", "tokens/s"]
    assert lines[1].startswith("paged") and " 150.0 " in lines[1] and lines[1].endswith("ok")
    assert lines[2].split()[:2] == ["max", "-"] and lines[2].endswith("MemoryError: no room")


def test_an_allocator_that_raises_leaves_a_status_and_no_old_summary(tmp_path, capsys):
    (tmp_path / "summary.json").write_text("{}")

    def make():
        raise MemoryError("no\nroom")

    assert demo.run_allocator(make, "max", [], tmp_path) == FAILED
    assert not (tmp_path / "summary.json").exists()
    assert "no room" in capsys.readouterr().out


def write_outputs(folder, outputs: dict[str, list[int]]) -> None:
    folder.mkdir()
    lines = (json.dumps({"id": name, "output_ids": ids}) for name, ids in outputs.items())
    (folder / "requests.jsonl").write_text("\n".join(lines) + "\n")


def test_requests_with_other_tokens_are_counted_by_allocator(tmp_path):
    write_outputs(tmp_path / "paged", {"a": [1, 2], "b": [3]})
    write_outputs(tmp_path / "oracle", {"b": [3], "a": [1, 2]})
    write_outputs(tmp_path / "max", {"a": [1, 9], "b": [3]})
    rows = {name: {"status": "ok"} for name in ("paged", "oracle", "max")}
    rows["pow2"] = FAILED
    differing = demo.differing_requests(rows, tmp_path)
    assert differing == {"paged": 0, "oracle": 0, "max": 1}
    assert "NOT the same" in demo.agreement_text(differing)
    assert "1 under max" in demo.agreement_text(differing)
    same = demo.agreement_text({"paged": 0, "max": 0})
    assert same == "tokens: the same for every request under all 2 allocators"
    assert "nothing to compare" in demo.agreement_text(demo.differing_requests({}, tmp_path))


class LetterTokenizer:
    """Token `i` is the `i`-th letter."""

    chat_template = "{{ messages }}"

    def chat(self, messages) -> str:
        return messages[0]["content"]

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids, skip_special: bool = True) -> str:
        return "".join(map(chr, ids))


class EchoEngine:
    """Gives the prompt back, two tokens at a look."""

    def serve(self, requests, *, steps_per_read, on_tokens):
        (request,) = requests
        ids = list(request.prompt_ids)
        for start in range(0, len(ids), steps_per_read):
            on_tokens(request.id, 0, ids[start : start + steps_per_read])
        return [Result(request, output_ids=ids, finish_reason="stop")], SimpleNamespace()


def test_answers_are_printed_as_their_tokens_come(capsys):
    engine: Any = EchoEngine()
    tokenizer: Any = LetterTokenizer()
    answers = demo.answer_questions(lambda: engine, tokenizer)
    printed = capsys.readouterr().out
    assert [row["question"] for row in answers] == list(demo.QUESTIONS)
    for row in answers:
        assert row["answer"] == row["question"] and row["finish_reason"] == "stop"
        assert f"> {row['question']}\n{row['answer']}\n" in printed


def test_a_model_without_chat_template_is_asked_nothing(capsys):
    assert demo.answer_questions(lambda: pytest.fail("no engine is needed"), None) == []
    assert "nothing asked" in capsys.readouterr().out
