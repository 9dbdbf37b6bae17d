"""Lengths of requests, whole simulated runs, and the scripts of the paper's figures in short."""

import csv
import json
import re

import numpy as np
import pytest
from scripts import run_script
from test_experiments import assert_fails_with

from experiments import claim_kv_size
from experiments.paper_setups import SETUPS
from experiments.plots import PAPER_SHARES
from jaxpage.config import ConfigError, EngineConfig
from jaxpage.paging.allocator import ALLOCATORS
from jaxpage.scheduling.policies import POLICIES
from jaxpage.sim import cost_model, lengths, runs
from jaxpage.sim.device import DEVICES
from jaxpage.sim.lengths import Lengths
from jaxpage.sim.shapes import SHAPES
from jaxpage.sim.trace import Arrival

TURNS = """conv_index,turn_index,role,tokens
0,0,human,10
0,1,gpt,20
0,2,human,5
0,3,gpt,6
1,0,gpt,7
1,1,human,8
1,2,gpt,9
2,0,human,4
3,0,human,0
3,1,gpt,1
4,0,human,3
4,2,gpt,2
"""


def pairs(found: Lengths) -> list[tuple[int, int]]:
    return list(zip(found.prompts.tolist(), found.outputs.tolist(), strict=True))


def test_turns_are_paired_by_two_rules(tmp_path):
    path = tmp_path / "turns.csv"
    path.write_text(TURNS)
    turns = lengths.read_turns(path, "tokens")
    assert pairs(lengths.pairs_of(turns, "first")) == [(11, 20)]
    assert pairs(lengths.pairs_of(turns, "all", bos=0)) == [(10, 20), (5, 6), (8, 9)]
    with pytest.raises(ConfigError, match="'some' is none of first, all"):
        lengths.pairs_of(turns, "some")
    with pytest.raises(ConfigError, match="no human turn with an answer"):
        lengths.pairs_of(turns[:1], "all")
    with pytest.raises(ConfigError, match=r"line 1: expected a header with .* gpt2"):
        lengths.read_turns(path, "gpt2")
    path.write_text(TURNS.replace("gpt,20", "gpt,-20"))
    with pytest.raises(ConfigError, match="line 3: tokens='-20' is no number from 0 on"):
        lengths.read_turns(path, "tokens")


def test_lengths_by_file_leave_out_what_has_no_answer(tmp_path):
    path = tmp_path / "lengths.csv"
    path.write_text("a,b\n3,4\n5,0\n6,7\n")
    assert pairs(lengths.read_lengths(path, "a", "b", bos=1)) == [(4, 4), (7, 7)]
    path.write_text("a,b\n5,0\n")
    with pytest.raises(ConfigError, match="no request with an answer"):
        lengths.read_lengths(path, "a", "b")


def test_lengths_keep_their_proportions_and_have_the_means_asked_for():
    found = Lengths(np.array([1, 10, 100, 1000]), np.array([5, 5, 50, 500]))
    scaled = lengths.rescaled(found, mean_prompt=555.5, mean_output=280.0)
    assert pairs(scaled) == [(2, 10), (20, 10), (200, 100), (2000, 1000)]
    assert pairs(lengths.within(scaled, 300)) == [(2, 10), (20, 10), (200, 100)]
    assert pairs(lengths.rescaled(found, 1.0, 1.0))[0] == (1, 1)  # never none


def test_drawn_lengths_have_their_means():
    found = lengths.drawn(np.random.default_rng(0), 40_000, 161.31, 337.99)
    # Five standard errors: deviations are as large as the means.
    assert found.means == pytest.approx((161.31, 337.99), rel=5 / 200)


def test_the_arithmetic_of_the_article():
    row = claim_kv_size.sizes(SHAPES["llama-3.1-70b"], users=256, tokens=4096, used_tokens=300)
    assert (row["kv_bytes_per_token"], row["kv_bytes"]) == (327_680, 343_597_383_680)
    assert not row["fits_on_four_a100"]
    assert row["wasted_share"] == pytest.approx(0.927, abs=5e-4)
    # The first number of users whose KV is more than the weights.
    users = row["users_for_kv_over_weights"]
    assert (users - 1) * row["kv_bytes_per_user"] <= row["weight_bytes"]
    assert users * row["kv_bytes_per_user"] > row["weight_bytes"]
    for model in claim_kv_size.table_1():
        assert model["least_slots"] <= model["printed_slots"] <= model["most_slots"]


def test_table_1_of_the_paper():
    slots = {name: setup.kv_tokens for name, setup in SETUPS.items()}
    assert slots == {"opt-13b": 15_728, "opt-66b": 9_557, "opt-175b": 60_074}
    weights = {name: setup.shape.num_params * 2 / 1e9 for name, setup in SETUPS.items()}
    assert weights == pytest.approx({"opt-13b": 26, "opt-66b": 132, "opt-175b": 346}, rel=0.02)


def test_kv_gets_what_the_weights_leave():
    a100 = DEVICES["a100-80gb"]
    # 0.9 x 320 GB, less 141.1 GB of weights, at 327,680 bytes a token.
    found = runs.kv_tokens_in(SHAPES["llama-3.1-70b"], a100, 4)
    assert found == pytest.approx((288e9 - 141.1e9) / 327_680, rel=0.001)
    with pytest.raises(ConfigError, match=r"opt-175b has 350\.4 GB of weights, and 1 x a100-80gb"):
        runs.kv_tokens_in(SHAPES["opt-175b"], a100, 1)


CONFIG = EngineConfig(
    num_slots=4,
    num_pages=40,
    page_size=4,
    pages_per_slot=12,
    num_requests=8,
    token_buckets=(16,),
    log_steps=8,
)
COST = cost_model.create(SHAPES["opt-13b"], DEVICES["a100-40gb"], page_size=4)


def simulated(requests, **options) -> runs.Run:
    paged, fcfs = ALLOCATORS["paged"], POLICIES["fcfs"]
    return runs.run(requests, COST, CONFIG, paged, fcfs, **options)


def test_a_run_is_told_by_request_and_by_step():
    heard = []
    run = simulated(
        [Arrival(0.0, 9, 4), Arrival(0.5, 9, 6, num_samples=3), Arrival(2.0, 9, 1)],
        on_progress=heard.append,
    )
    timeline, steps = run.timeline, run.steps
    np.testing.assert_array_equal(timeline.output_lens, [4, 6, 1])
    assert (timeline.first_token_s > timeline.arrival_s).all()
    assert timeline.first_token_s[2] == timeline.finish_s[2]
    assert steps["end_s"][-1] == timeline.finish_s[2]
    assert len(steps["step"]) == len(steps["seconds"]) == 4 + 6 + 1
    # A token a sequence, and each prompt once.
    assert steps["num_sampled"].sum() == 4 + 3 * 6 + 1
    assert steps["num_tokens"].sum() == 27 + 3 + 3 * 5
    assert heard[0] == 0 and sorted(heard) == heard


def test_a_run_ends_soon_after_the_time_asked_for():
    requests = [Arrival(float(i), 9, 4) for i in range(10)]
    run = simulated(requests, until_s=4.5)
    known = ~np.isnan(run.timeline.finish_s)
    assert 5 <= known.sum() < 10
    assert run.steps["end_s"][-1] > 4.5


def test_pages_are_priced_as_they_are_simulated():
    with pytest.raises(ConfigError, match="pages of 16 tokens are priced, and of 4 simulated"):
        runs.run(
            [Arrival(0.0, 9, 4)],
            cost_model.create(SHAPES["opt-13b"], DEVICES["a100-40gb"]),
            CONFIG,
            ALLOCATORS["paged"],
            POLICIES["fcfs"],
        )


def test_fig02_in_short(tmp_path):
    done = run_script("fig02_memory_waste", "--quick", "--turns=drawn", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["lengths"].startswith("drawn: log-normal")
    for name, paper in PAPER_SHARES.items():
        shares = last[name]
        assert list(shares) == ["token_states", "reservation", "internal", "external"]
        assert sum(shares.values()) == pytest.approx(100)
        assert shares["token_states"] == pytest.approx(paper[0], abs=8)
    # Seven reservations of 2,048 tokens in 15,728, whatever the lengths.
    assert last["max"]["external"] == pytest.approx(100 - 7 * 2048 / 157.28)
    rows = [json.loads(line) for line in (tmp_path / "fig02.jsonl").read_text().splitlines()]
    assert rows[0]["batched_requests"] == 7
    assert (tmp_path / "fig02.png").stat().st_size > 10_000


@pytest.mark.slow
def test_advise_says_whether_pages_pay_and_how_many_users_fit():
    flags = ("--model=llama-3.1-8b", "--prompt_len=200", "--output_len=100", "--page_sizes=16")
    done = run_script("advise", *flags, "--concurrency=1", "--spread=0")
    assert done.returncode == 0, done.stderr
    text, row = done.stdout.splitlines()[0], json.loads(done.stdout.splitlines()[-1])
    assert text.startswith("Pages do not pay here: 1.00 times as many")
    assert not row["pays"] and row["page_size"] == 16
    # 0.9 x 80 GB less 16 GB of weights, at 131,072 bytes a token; 300 tokens a user.
    assert row["users_paged"] == row["users_contiguous"] == row["kv_tokens"] // 300
    assert row["kv_tokens"] == pytest.approx(427_000, rel=0.01)


def test_advise_says_what_it_needs():
    done = run_script("advise", "--model=llama-3.1-8b")
    assert_fails_with(done, "--prompt_len and --output_len", "--workload")


def test_knee_in_short(tmp_path):
    flags = ("--quick", "--turns=drawn", f"--out={tmp_path}")
    done = run_script("knee", "--rates=8,1", *flags)
    assert done.returncode == 0, done.stderr
    light, heavy = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert (light["rate"], heavy["rate"]) == (1, 8)
    for latency in ("ttft_p50_s", "normalized_latency_mean_s", "batched"):
        assert 0 < light[latency] < heavy[latency] / 2
    assert len((tmp_path / "knee.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "knee.png").stat().st_size > 10_000
    for wrong in ("0,1", "fast", "1,inf", ""):
        assert_fails_with(run_script("knee", f"--rates={wrong}", *flags), f"--rates={wrong}: ")


@pytest.mark.slow
def test_fig18_in_short(tmp_path):
    done = run_script("fig18_ablation", "--quick", "--turns=drawn", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    for dataset in ("sharegpt", "alpaca"):
        assert last[dataset]["16"] < last[dataset]["256"]
    assert (tmp_path / "fig18.png").stat().st_size > 10_000
    wrong = run_script("fig18_ablation", "--turns=drawn", "--page_sizes=16,48", f"--out={tmp_path}")
    assert_fails_with(wrong, "--page_sizes=16,48", "must divide 2048")


@pytest.mark.slow
def test_claim_throughput_in_short(tmp_path):
    out = tmp_path / "rows.jsonl"
    few = ("--requests=2048", "--quick", "--num_slots=64", "--kv_tokens=16384", "--turns=drawn")
    done = run_script("claim_throughput", *few, f"--out={out}")
    assert done.returncode == 0, done.stderr
    over = json.loads(done.stdout.splitlines()[-1])["paged_over"]
    assert over["static"] > over["max"] > over["pow2"] > over["oracle"] > over["paged"] == 1
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["system"] for row in rows] == ["static", "max", "pow2", "oracle", "paged"]
    assert rows[1]["batched_requests"] == 4  # of 4,096 tokens each


@pytest.mark.slow
def test_fig13_in_short(tmp_path):
    done = run_script("fig13_batched_requests", "--quick", "--turns=drawn", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert list(last["sharegpt"]) == list(last["alpaca"]) == ["max", "pow2", "oracle", "paged"]
    batches = last["sharegpt"]
    assert 6.5 < batches["max"] <= 7 < batches["pow2"] < batches["oracle"]
    # At 30 a second memory is short under Max alone: the others batch what comes.
    others = [last["alpaca"][name] for name in ("pow2", "oracle", "paged")]
    assert 6.5 < last["alpaca"]["max"] <= 7 < min(others) < max(others) < 1.2 * min(others)
    assert (tmp_path / "fig13.png").stat().st_size > 10_000


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.csv"
    rows = "".join(f"2023-11-16 18:15:{second},30,9\n" for second in range(10, 40))
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    return path


def test_simulate_writes_requests_steps_and_a_summary(tmp_path, trace):
    out = tmp_path / "out"
    flags = (f"--trace={trace}", "--trace_format=azure", f"--out={out}", "--num_slots=8")
    done = run_script("simulate", "--model=llama-3.1-8b", "--slo_ttft_s=0.5", *flags)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last["requests"], last["goodput_per_s"]) == (30, last["requests_per_s"])
    assert json.loads((out / "summary.json").read_text()) == last
    rows = [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]
    assert [row["arrival_s"] for row in rows] == list(range(30))
    # Each is alone: what opens like none before finds nothing cached.
    assert all(row["cached_tokens"] == 0 for row in rows)
    with (out / "steps.csv").open() as file:
        steps = list(csv.DictReader(file))
    assert len(steps) == last["steps"] == 30 * 9
    busy_s = sum(float(step["seconds"]) for step in steps)
    assert busy_s == pytest.approx(last["busy_s"])


@pytest.mark.slow
def test_simulate_finds_the_highest_rate_within_a_limit(tmp_path, trace):
    out = tmp_path / "out"
    flags = (f"--trace={trace}", "--trace_format=azure", f"--out={out}", "--num_slots=8")
    done = run_script("simulate", "--model=llama-3.1-8b", "--limit_s=0.02", *flags)
    assert done.returncode == 0, done.stderr
    *lines, text = done.stdout.splitlines()
    last = json.loads(text)
    points = [tuple(float(word) for word in re.findall(r"[\d.]+", line)) for line in lines]
    within = [rate for rate, latency_s in points if latency_s <= 0.02]
    beyond = [rate for rate, latency_s in points if latency_s > 0.02]
    assert max(within) < min(beyond) < 1.031 * max(within)
    assert last["capacity_per_s"] == pytest.approx(max(within), rel=1e-3)
    # What is told is of that rate: where memory was, and when tokens came.
    assert 0.015 < last["normalized_latency_mean_s"] <= 0.02
    assert last["mean_batched_requests"] > 1
    assert json.loads((out / "summary.json").read_text()) == last


@pytest.mark.slow
def test_simulate_refuses_what_it_cannot_do(tmp_path, trace):
    base = (f"--trace={trace}", "--trace_format=azure", f"--out={tmp_path / 'out'}")
    assert_fails_with(run_script("simulate", *base, "--device=b200"), "'b200'", "a100-80gb")
    assert_fails_with(run_script("simulate", *base, "--requests=31"), "--requests=31", "has 30")
    assert_fails_with(run_script("simulate", *base, "--model=opt-175b"), "take more devices")
    assert_fails_with(run_script("simulate", *base, "--kv_tokens=4"), "--kv_tokens=4", "of 16")
    wrong = run_script("simulate", f"--trace={trace}", "--trace_format=mooncake", base[-1])
    assert_fails_with(wrong, "line 1: not JSON")


@pytest.mark.slow
def test_simulate_serves_conversations_and_prompts_that_begin_alike(tmp_path, trace):
    turns = tmp_path / "turns.csv"
    turns.write_text(
        "conv_index,turn_index,role,gpt2_tokens\n0,0,human,40\n0,1,gpt,8\n0,2,human,9\n0,3,gpt,7\n"
    )
    few = ("--num_slots=8", f"--out={tmp_path / 'out'}", "--model=llama-3.1-8b")
    base = (*few, f"--trace={turns}", "--trace_format=turns")
    done = run_script("simulate", *base, "--rate=1", "--think_s=5")
    assert done.returncode == 0, done.stderr
    # 47 of the 48 tokens of the first turn were computed: two full pages.
    assert json.loads(done.stdout.splitlines()[-1])["hit_tokens"] == 32
    base = (*few, f"--trace={trace}", "--trace_format=azure")
    done = run_script("simulate", *base, "--prefix_tree=1x64,1x16")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["hit_tokens"] == 29 * 80
