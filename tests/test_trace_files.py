"""Recorded traces read from files, and files that are wrong; random arrivals."""

import gzip

import numpy as np
import pytest

from jaxpage.config import ConfigError
from jaxpage.sim import arrivals, trace_files
from jaxpage.sim.trace import Arrival

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:50.9951690,3,1
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45.5,GPT-4,1087,230,1317,API log
"""
MOONCAKE = """{"timestamp": 100, "input_length": 513, "output_length": 6, "hash_ids": [0, 7]}
{"timestamp": 140, "input_length": 512, "output_length": 4, "hash_ids": [0], "more": 1}
"""
LENGTHS = "output_len,prompt_len\n7,5\n1,2\n"


@pytest.fixture
def read(tmp_path):
    def read(text: str, trace_format: str, name="trace"):
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
        return trace_files.read(path, trace_format)

    return read


@pytest.mark.parametrize("name", ["trace.csv", "trace.csv.gz"])
def test_azure(read, name):
    requests = [Arrival(0.0, 374, 44), Arrival(4.314579, 396, 109), Arrival(4.314579, 3, 1)]
    assert read(AZURE, "azure", name) == (requests, 1, True)
    zoned = AZURE.replace("900,", "900+00:00,").replace("690,", "690+00:00,")
    assert read(zoned, "azure", name) == (requests, 1, True)


def test_burstgpt(read):
    requests = [Arrival(0.0, 472, 18), Arrival(40.5, 1087, 230)]
    assert read(BURSTGPT, "burstgpt") == (requests, 1, True)


def test_mooncake(read):
    requests = [Arrival(0.0, 513, 6, (0, 1)), Arrival(0.04, 512, 4, (0,))]
    assert read(MOONCAKE, "mooncake") == (requests, 512, True)
    assert read(MOONCAKE.replace("7", str(2**63)), "mooncake") == (requests, 512, True)


def test_lengths_have_no_times(read):
    assert read(LENGTHS, "lengths") == ([Arrival(0.0, 5, 7), Arrival(0.0, 2, 1)], 1, False)


@pytest.mark.parametrize(
    ("trace_format", "text", "words"),
    [
        ("azure", "", r"line 1: expected a header with TIMESTAMP, .*, found \[\]"),
        ("azure", AZURE.replace("TIMESTAMP", "Time"), r"line 1: .* found \['Time'"),
        ("azure", AZURE.splitlines()[0] + "\n", "no requests in it"),
        ("azure", AZURE.replace("18:15:50", "18:15:40"), "line 3: .* before the line ahead"),
        ("azure", AZURE.replace("2023-11-16 18:15:50.99", "soon"), "line 3: .* is no time"),
        ("azure", AZURE.replace(",396,109", ",396"), "line 3: expected 3 fields"),
        ("azure", AZURE.replace(",396,109", ",396,109,4"), "line 3: expected 3 fields"),
        ("azure", AZURE.replace("109", "many"), "line 3: GeneratedTokens='many' is no number"),
        ("azure", AZURE.replace(",109", ",0"), "line 3: GeneratedTokens=0: .* that failed"),
        ("burstgpt", BURSTGPT.replace("\n5,", "\n-5,"), "line 2: Timestamp='-5' is negative"),
        ("burstgpt", BURSTGPT.replace("45.5", "nan"), "line 3: Timestamp='nan' is no time"),
        ("burstgpt", BURSTGPT.replace("45.5", "inf"), "line 3: Timestamp='inf' is no time"),
        ("mooncake", "", "no requests in it"),
        ("mooncake", MOONCAKE + "{", "line 3: not JSON"),
        ("mooncake", MOONCAKE + "[1]", "line 3: expected an object with timestamp"),
        ("mooncake", MOONCAKE.replace("[0, 7]", "[0]"), "line 1: hash_ids must be 2 numbers"),
        ("mooncake", MOONCAKE.replace("[0]", '["a"]'), "line 2: hash_ids must be 1 numbers"),
        ("mooncake", MOONCAKE.replace("[0]", "[-1]"), "line 2: hash_ids must be 1 numbers"),
        ("mooncake", MOONCAKE.replace("140", "null"), "line 2: timestamp=None is no time"),
        ("lengths", AZURE, "line 1: expected a header with prompt_len, output_len"),
        ("lengths", LENGTHS.replace("7", "-7"), "line 2: output_len='-7' is no number from 0"),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(read, trace_format, text, words):
    with pytest.raises(ConfigError, match=words):
        read(text, trace_format)


def test_formats_and_files_that_are_not_there(read, tmp_path):
    with pytest.raises(ConfigError, match="'csv' is none of azure, burstgpt, lengths, mooncake"):
        read(AZURE, "csv")
    with pytest.raises(ConfigError, match="nowhere: no such file"):
        trace_files.read(tmp_path / "nowhere", "azure")


@pytest.mark.parametrize(
    ("process", "cv"),
    [
        (lambda rng: arrivals.poisson(rng, 40_000, 3.0), 1.0),
        (lambda rng: arrivals.gamma(rng, 40_000, 3.0, cv=3.0), 3.0),
        # Gaps are 0 with probability 3/4, else exponential of mean 4/3 s: variance 7 times 1/9.
        (lambda rng: arrivals.bursty(rng, 40_000, 3.0, burst=4.0), 7**0.5),
    ],
)
def test_arrivals_have_the_rate_and_the_spread(process, cv):
    times_s = process(np.random.default_rng(0))
    gaps = np.diff(times_s)
    assert (gaps >= 0).all()
    # Five standard errors of a mean of so many gaps.
    assert np.mean(gaps) == pytest.approx(1 / 3, rel=5 * cv / 200)
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(cv, rel=0.1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda rng: arrivals.poisson(rng, 5, 0.0), "rate=0.0 must be a positive"),
        (lambda rng: arrivals.poisson(rng, 0, 1.0), "num=0 must be positive"),
        (lambda rng: arrivals.gamma(rng, 5, 1.0, cv=float("nan")), "cv=nan"),
        (lambda rng: arrivals.bursty(rng, 5, 1.0, burst=0.5), "burst=0.5 must be at least one"),
    ],
)
def test_wrong_rates_are_refused(call, words):
    with pytest.raises(ConfigError, match=words):
        call(np.random.default_rng(0))
