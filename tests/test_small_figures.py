"""Memory by batch (Fig 1), lengths (Fig 11) and the waste of reservations, in short."""

import json
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from scripts import run_script

from experiments import (
    claim_fragmentation,
    claim_kv_size,
    claim_lunch,
    claim_throughput,
    claim_when,
    fig01_memory_layout,
    fig02_memory_waste,
    fig11_lengths,
    fig12_single_sequence,
    fig13_batched_requests,
    fig15_sharing_savings,
    fig18_ablation,
    knee,
    paper_setups,
)
from experiments.paper_setups import MAX_TOKENS, SETUPS, Setup
from experiments.plots import LABELS
from jaxpage.config import ConfigError, EngineConfig
from jaxpage.paging.allocator import ALLOCATORS
from jaxpage.scheduling.policies import POLICIES
from jaxpage.sim import arrivals, metrics, runs
from jaxpage.sim import lengths as length_sets
from jaxpage.sim.lengths import Lengths
from jaxpage.sim.metrics import Timeline
from jaxpage.sim.shapes import SHAPES


def last_line(done) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def by_what(module, last: dict) -> dict[str, tuple]:
    return {row.what: (row.paper, row.ours) for row in module.comparison(last)}


def test_parameters_and_kv_of_a_card_are_those_that_the_paper_prints():
    memory = fig01_memory_layout.shares_of(SETUPS["opt-13b"])
    assert sum(memory[f"{part}_percent"] for part in ("parameters", "kv", "other")) == 100
    assert memory["parameters_percent"] == pytest.approx(65, abs=0.6)
    assert memory["kv_percent"] > 30
    assert memory["kv_bytes"] == 12 * 2**30


def steps_of(end_s: Sequence[float], **columns: Sequence[float]) -> runs.Run:
    """A run of which only steps are known."""
    nothing = np.zeros(0)
    timeline = Timeline(nothing, nothing, nothing, nothing)
    steps = {name: np.array(column) for name, column in columns.items()}
    return runs.Run(timeline, nothing, nothing, steps | {"end_s": np.array(end_s)})


def test_batch_memory_and_speed_are_of_the_second_half_until_the_last_arrival(monkeypatch):
    setup = SETUPS["opt-13b"]
    seen = []

    def run(self, allocator, requests, *, until_s):
        seen.append([request.arrival_s for request in requests])
        end = until_s  # the last arrival
        found = steps_of(
            [0.4 * end, 0.6 * end, end, 1.1 * end],
            seconds=[1.0, 2.0, 3.0, 4.0],
            num_running=[9, 2, 4, 9],
            num_sampled=[9, 2, 4, 9],
            held_pages=[99, 10, 20, 99],
            num_waiting=[0, 0, 1, 0],
        )
        return found, self.config(allocator)

    monkeypatch.setattr(Setup, "run", run)
    lengths = Lengths(np.array([5]), np.array([6]))
    slow, fast = (
        fig01_memory_layout.measure(setup, "paged", rate, lengths, num=8, seed=0)
        for rate in (1.0, 4.0)
    )
    assert slow["batched_requests"] == 3
    assert slow["output_tokens_per_s"] == 6 / 5
    assert slow["steps_with_a_queue"] == 0.5
    kv_bytes = 15 * 16 * 819_200
    assert slow["memory_bytes"] == setup.shape.num_params * 2 + kv_bytes
    np.testing.assert_allclose(seen[0], 4 * np.array(seen[1]))  # the same users, faster
    assert fast["rate"] == 4.0


@pytest.mark.slow
@pytest.mark.parametrize(("num_samples", "static_batches"), [(1, False), (1, True), (12, False)])
def test_max_does_the_same_with_one_slot_more_than_it_can_fill(num_samples, static_batches):
    rng, setup = np.random.default_rng(0), SETUPS["opt-13b"]
    drawn = length_sets.within(length_sets.drawn(rng, 96 // num_samples, 160, 340), MAX_TOKENS)
    times_s = arrivals.poisson(rng, len(drawn.prompts), 5.0)
    requests = length_sets.requests_of(drawn, times_s, num_samples=num_samples)
    few, config = setup.run("max", requests, num_slots=64, static_batches=static_batches)
    assert config.num_slots == max(7, num_samples) + 1
    more = replace(config, num_slots=64)
    many = runs.run(requests, setup.cost(), more, ALLOCATORS["max"], POLICIES["fcfs"])
    for name, times in vars(few.timeline).items():
        np.testing.assert_array_equal(times, vars(many.timeline)[name])
    for name, column in few.steps.items():
        np.testing.assert_array_equal(column, many.steps[name])
    short = metrics.steps_short_of_memory(few.steps, config)
    assert short.any()
    np.testing.assert_array_equal(short, metrics.steps_short_of_memory(many.steps, more))


@pytest.mark.slow
def test_fig01_in_short(tmp_path):
    done = run_script("fig01_memory_layout", "--quick", "--turns=drawn", f"--out={tmp_path}")
    last = last_line(done)
    rows = [json.loads(line) for line in (tmp_path / "fig01.jsonl").read_text().splitlines()]
    # At a rate that both sustain they batch about the same, and Max takes more memory for it.
    reserved, paged = (row for row in rows if row["rate"] == 0.5)
    assert reserved["batched_requests"] == pytest.approx(paged["batched_requests"], rel=0.01)
    assert reserved["memory_bytes"] > 1.1 * paged["memory_bytes"]
    assert last["full"]["max"]["batched_requests"] == 7
    assert (tmp_path / "fig01.png").stat().st_size > 10_000
    found = by_what(fig01_memory_layout, last)
    assert found["parameters, share of memory"] == (65.0, last["memory"]["parameters_percent"])
    assert found["paged over Max, batch"][1] > 2


def test_fig11_shows_both_pairing_rules_beside_the_printed_means(tmp_path):
    turns, alpaca = tmp_path / "turns.csv", tmp_path / "alpaca.csv"
    lines = ["conv_index,turn_index,role,tokens", "0,0,human,99", "0,1,gpt,200"]
    lines += ["0,2,human,9", "0,3,gpt,100", "1,0,human,4000", "1,1,gpt,100"]
    turns.write_text("\n".join(lines))
    alpaca.write_text("gpt2_instruction_input,gpt2_output\n19,58\n9,30\n")
    files = (f"--turns={turns}", "--token_column=tokens", f"--alpaca={alpaca}")
    last = last_line(run_script("fig11_lengths", *files, f"--out={tmp_path}"))
    assert by_what(fig11_lengths, last) == {
        # With BOS; what is longer than 2,048 tokens is left out.
        "sharegpt first: mean prompt, as recorded": (161.31, 100),
        "sharegpt first: mean output, as recorded": (337.99, 200),
        "sharegpt all: mean prompt, as recorded": (161.31, 55),
        "sharegpt all: mean output, as recorded": (337.99, 150),
        "alpaca: mean prompt, as recorded": (19.31, 15),
        "alpaca: mean output, as recorded": (58.45, 44),
    }
    assert last["cases"]["sharegpt first"]["used"]["prompt_tokens"]["mean"] == 161
    assert last["lengths"]["sharegpt all"].startswith("turns.csv, tokens and BOS, all pairs")
    assert (tmp_path / "fig11.png").stat().st_size > 10_000


def test_lengths_that_are_drawn_about_the_printed_means_are_not_held_against_them():
    lengths = Lengths(np.array([3, 4]), np.array([5, 6]))
    row = fig11_lengths.row_of(fig11_lengths.Case("", None, lengths, "drawn"))
    assert row["recorded"] is None and row["used"]["output_tokens"]["mean"] == 5.5
    assert fig11_lengths.comparison({"cases": {"alpaca": row}}) == []


@pytest.mark.slow
def test_claim_fragmentation_in_short(tmp_path):
    last = last_line(run_script("claim_fragmentation", "--quick", f"--out={tmp_path}"))
    reserved, paged = last["rows"]
    # An eighth of 448,288 tokens, in reservations of 4,096.
    assert reserved["batched_requests"] == 13
    assert reserved["external"] == pytest.approx(100 - 100 * 13 * 4096 / reserved["kv_tokens"])
    assert 80 < reserved["never_used_percent"] < 100 * (1 - 300 / 4096)
    assert 0 < paged["last_pages_percent"] < paged["page_a_sequence_percent"]
    assert paged["token_states"] > 90
    assert (tmp_path / "fragmentation.png").stat().st_size > 10_000
    found = by_what(claim_fragmentation, last)
    assert found["wasted, by arithmetic"] == (93.0, pytest.approx(92.68, abs=0.01))
    assert found["paged, pages of 16: rest of last pages"][1] == paged["last_pages_percent"]


def test_equal_lengths_are_the_articles():
    lengths = claim_fragmentation.lengths_of("equal", 3)
    np.testing.assert_array_equal(lengths.prompts + lengths.outputs, [300] * 3)


FEW = EngineConfig(
    num_slots=4,
    num_pages=10,
    page_size=4,
    pages_per_slot=4,
    num_requests=8,
    token_buckets=(16,),
)


def test_waste_is_told_of_the_pool_and_of_what_is_reserved():
    tokens = {"token_states": 8, "reservation": 4, "internal": 12, "external": 16}
    columns = {name: [0, value] for name, value in tokens.items()}
    columns |= {"cached": [0, 0], "idle": [40, 0], "num_tokens": [9, 3]}
    run = steps_of([1.0, 2.0], num_running=[1, 2], num_waiting=[0, 5], **columns)
    row = claim_fragmentation.waste_of(run, FEW)
    assert (row["token_states"], row["external"], row["batched_requests"]) == (20, 40, 2)
    assert row["never_used_percent"] == 50  # of the 24 tokens that are reserved
    assert row["last_pages_percent"] == 40
    assert row["page_a_sequence_percent"] == 20
    run.steps["num_waiting"][1] = 0
    with pytest.raises(ConfigError, match="never short of memory: raise --num_slots=4"):
        claim_fragmentation.waste_of(run, FEW)


# Last lines of scripts, in short, and a row that each is to give.
WASTE = {"token_states": 20.0, "reservation": 13, "internal": 58, "external": 9}
BATCHES = {
    name: {"max": 7.0, "pow2": 9.0, "oracle": 13.0, "paged": 20.0}
    for name in ("sharegpt", "alpaca")
}
LASTS = [
    (
        fig02_memory_waste,
        {name: WASTE for name in LABELS} | {"others": {}},
        ("Max: holds tokens", 20.4, 20.0),
        4 + 4 + 3 + 1,  # of Oracle three are printed, of vLLM one
    ),
    (
        fig02_memory_waste,
        {name: WASTE for name in LABELS}
        | {"others": {"all pairs, rescaled": {name: {"token_states": 21.0} for name in LABELS}}},
        ("Max: holds tokens (all pairs, rescaled)", 20.4, 21.0),
        4 + 4 + 3 + 1 + 4,  # and one of each allocator
    ),
    (
        fig12_single_sequence,
        {"paged_over": {"opt-13b sharegpt": {"max": 3.5}, "opt-13b alpaca": {"max": 11.0}}},
        ("opt-13b sharegpt: paged over Max", (2.7, 8.0), 3.5),
        2,
    ),
    (
        fig13_batched_requests,
        BATCHES | {"others": {"sharegpt": {}, "alpaca": {}}, "with_one_host": None},
        ("alpaca, Oracle: requests batched", 72.75, 13.0),
        8,
    ),
    (
        fig13_batched_requests,
        BATCHES
        | {"others": {"sharegpt": {}, "alpaca": {"as counted": dict.fromkeys(LABELS, 9.0)}}}
        | {"with_one_host": None},
        ("alpaca, Oracle: requests batched (as counted)", 72.75, 9.0),
        12,
    ),
    (
        fig13_batched_requests,
        BATCHES
        | {"others": {"sharegpt": {}, "alpaca": {}}}
        | {"with_one_host": {"batched": dict.fromkeys(BATCHES, dict.fromkeys(LABELS, 8.0))}},
        ("alpaca, Oracle: requests batched (one host)", 72.75, 8.0),
        14,
    ),
    (
        fig18_ablation,
        {name: {"16": 0.05, "8": 0.06, "256": 0.1} for name in ("sharegpt", "alpaca")},
        ("sharegpt: page size of the least latency", (16.0, 128.0), 16),
        4,
    ),
    (
        knee,
        {"rows": [{"rate": 1.0, "ttft_p50_s": 0.03, "normalized_latency_mean_s": 0.02}]},
        ("at 1 requests/s: latency by output token", None, 0.02),
        2,
    ),
    (
        fig15_sharing_savings,
        {
            "rows": [
                {"workload": "alpaca", "method": "beam", "sequences": 4, "saved_percent": 57.8},
                {"workload": "sharegpt", "method": "beam", "sequences": 4, "saved_percent": 60.2},
            ]
        },
        ("alpaca, 4 beams: pages saved", 53.13, 57.8),
        2,
    ),
    (
        claim_lunch,
        {name: {"worst_over_morning": 15.8} for name in ("none", "pages")},
        ("nothing evicted: worst hour's latency over the first's", (2.0, np.inf), 15.8),
        2,
    ),
    (
        claim_throughput,
        {"paged_over": {"static": 9.0, "max": 1.5, "paged": 1.0}},
        ("paged over Max", (2.0, 4.0), 1.5),
        2,
    ),
    (
        claim_when,
        {"ratios": {case.name: 1.0 for case in claim_when.CASES}, "crossover_users": 128},
        ("users from whom on pages pay", None, 128),
        7,
    ),
]


@pytest.mark.parametrize(("module", "last", "row", "count"), LASTS)
def test_comparisons_are_made_of_the_last_line(module, last, row, count):
    found = by_what(module, json.loads(json.dumps(last)))
    assert found[row[0]] == row[1:]
    assert len(found) == count


def test_sizes_are_held_against_the_article_only_if_they_are_its_own():
    row = claim_kv_size.sizes(SHAPES["llama-3.1-70b"], users=256, tokens=4096, used_tokens=300)
    last = row | {"table_1": claim_kv_size.table_1(), "flags": {}}
    assert by_what(claim_kv_size, last)["KV of 256 users"] == (336.0, pytest.approx(343.6, abs=0.1))
    table_alone = by_what(claim_kv_size, last | {"flags": {"users": 2}})
    assert list(table_alone)[:2] == ["opt-13b: parameters", "opt-13b: slots for KV"]


def test_lengths_are_taken_by_the_other_rules_too(monkeypatch):
    """Two pairing rules, with means as printed and as counted, but what the flags say already."""
    pairs = {"first": Lengths(np.array([10, 30]), np.array([5, 7])), "all": _lengths(3)}

    def recorded(dataset: str, rule: str | None = None):
        return (pairs[rule or "first"], "a file") if dataset != "drawn" else (None, "drawn")

    flags = SimpleNamespace(pairs="first", rescale=True, seed=0)
    monkeypatch.setattr(paper_setups, "FLAGS", flags)
    monkeypatch.setattr(paper_setups, "recorded_lengths", recorded)
    others = dict(paper_setups.other_lengths("sharegpt"))
    assert list(others) == [
        "first pairs, as counted",
        "all pairs, rescaled",
        "all pairs, as counted",
    ]
    np.testing.assert_array_equal(others["first pairs, as counted"].prompts, [10, 30])
    means = others["all pairs, rescaled"].means
    np.testing.assert_allclose(means, paper_setups.PRINTED_MEANS["sharegpt"], atol=0.5)
    assert others["all pairs, as counted"].means == pairs["all"].means
    flags.rescale = False
    assert list(dict(paper_setups.other_lengths("alpaca"))) == ["rescaled"]
    assert list(paper_setups.other_lengths("drawn")) == []


def _lengths(num: int) -> Lengths:
    return Lengths(np.arange(1, num + 1), np.arange(num, 0, -1))


def test_one_host_explains_both_batches_of_pages(monkeypatch):
    """What is needed lies on a line: 8 ms a step and 0.2 ms a row, at the batches printed."""
    asked = []

    def measure(allocator, requests, overhead):
        asked.append((allocator, requests, overhead))
        return fig13_batched_requests.Found(9.0, 0.05, 0.0)

    monkeypatch.setattr(fig13_batched_requests, "measure", measure)
    needed: dict[str, float | None] = {
        dataset: 0.008 + 0.0002 * of["paged"]
        for dataset, of in fig13_batched_requests.PAPER.items()
    }
    requests: dict = {"sharegpt": ["S"], "alpaca": ["A"]}
    host = fig13_batched_requests.host_for_both(needed, requests)
    assert host is not None
    assert [host["step_s"], host["row_s"]] == pytest.approx([0.008, 0.0002])
    assert host["batched"]["alpaca"] == dict.fromkeys(LABELS, 9.0)
    assert {(name, *of) for name, of, _ in asked} == {
        (name, of) for name in LABELS for of in ("S", "A")
    }
    assert {overhead for *_, overhead in asked} == {(host["step_s"], host["row_s"])}
    # Not known of one, or less than nothing a step, or a row.
    for wrong in ({"alpaca": None}, {"alpaca": 0.001}, {"sharegpt": 0.0001}):
        assert fig13_batched_requests.host_for_both(needed | wrong, requests) is None
