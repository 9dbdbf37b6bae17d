"""When do pages pay, and when not? The article's three cases to use them, and three to skip them.

    python -m experiments.claim_when --out=DIR

One A100-80GB, simulated with the engine's own scheduler: output tokens a second by pages (with the
prefix cache) over those by contiguous memory that reserves the longest sequence for everyone. As
many users as stated ask one request after the other. Use: many users, mixed lengths, a shared
prefix. Skip: one user, a very small model, equal lengths. Then the crossover: users are doubled,
and where the ratio passes 1.1 is found by bisection. DIR gets `when.jsonl`, a row a case and a row
a number of users. Three minutes on one core; --quick is one, of fewer users, for whom memory is
never short, and without the crossover. Expected: "use" well above 1, "skip" within a tenth of 1.
Refuted if not.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from absl import flags

from experiments import closed_load, common
from experiments.comparisons import Comparison
from jaxpage.config import require
from jaxpage.model.presets import PRESETS
from jaxpage.sim import cost_model
from jaxpage.sim import lengths as length_sets
from jaxpage.sim.device import DEVICES
from jaxpage.sim.lengths import Lengths
from jaxpage.sim.shapes import SHAPES, ModelShape, shape_of
from jaxpage.sim.trace import Arrival

FLAGS = flags.FLAGS

LLAMA_8B = SHAPES["llama-3.1-8b"]
ENOUGH = 1.1  # a ratio from which pages pay
MOST_USERS = 4096


@dataclass(frozen=True)
class Case:
    """A workload, and what the article says of it."""

    name: str
    is_use: bool
    shape: ModelShape
    users: int
    mean_prompt: float
    mean_output: float
    cv: float  # of lengths; 0 for equal ones
    max_tokens: int  # of a sequence, which contiguous memory reserves
    prefix_len: int = 0  # tokens with which all prompts begin


CASES = (
    Case("many users", True, LLAMA_8B, 512, 161, 338, 1.0, 4096),
    Case("mixed lengths", True, LLAMA_8B, 256, 500, 500, 2.0, 8192),
    Case("shared prefix", True, LLAMA_8B, 256, 100, 200, 1.0, 4096, prefix_len=2000),
    Case("one user", False, LLAMA_8B, 1, 161, 338, 1.0, 4096),
    Case("very small model", False, shape_of(PRESETS["smollm2-135m"]), 256, 161, 338, 1.0, 4096),
    Case("equal lengths", False, LLAMA_8B, 512, 256, 256, 0.0, 512),
)


def define_flags() -> None:
    flags.DEFINE_integer("requests", 2048, "How many are served in a case.", lower_bound=16)
    flags.DEFINE_integer("seed", 0, "The seed of lengths.")
    flags.DEFINE_bool("quick", False, "An eighth of the requests and of the users.")
    flags.DEFINE_string("out", None, "The folder to write to.", required=True)


def main(_: list[str]) -> None:
    out = common.make_folder(FLAGS.out)
    with (out / "when.jsonl").open("w") as file:
        ratios = {}
        for case in CASES:
            row = compare(case, max(case.users // (8 if FLAGS.quick else 1), 1))
            ratios[case.name] = row["ratio"]
            file.write(json.dumps(row) + "\n")
            print(sentence(case, row), flush=True)
        crossover = None
        if not FLAGS.quick:
            crossover, rows = find_crossover(CASES[0])
            file.writelines(json.dumps(row) + "\n" for row in rows)
            print(f"{CASES[0].name}: {ENOUGH} times as many tokens from {crossover} users on")
    common.print_last_line({"ratios": ratios, "crossover_users": crossover, **common.provenance()})


def compare(case: Case, users: int) -> dict:
    """Output tokens a second both ways."""
    num = max(FLAGS.requests // (8 if FLAGS.quick else 1), 16)
    # One user is served by one request after the other: a few say it all.
    requests = make_requests(case, min(num, 32 * users))
    cost = cost_model.create(case.shape, DEVICES["a100-80gb"])
    paged, contiguous = (
        closed_load.serve(cost, requests, users, case.max_tokens, is_paged=is_paged).tokens_per_s
        for is_paged in (True, False)
    )
    return {
        "case": case.name,
        "is_use": case.is_use,
        "users": users,
        "requests": len(requests),
        "paged_tokens_per_s": paged,
        "contiguous_tokens_per_s": contiguous,
        "ratio": paged / contiguous,
    }


def make_requests(case: Case, num: int) -> list[Arrival]:
    """With the prefix before each prompt, up to the longest there may be."""
    rng = np.random.default_rng(FLAGS.seed)
    if case.cv > 0:
        found = length_sets.drawn(rng, 8 * num, case.mean_prompt, case.mean_output, case.cv)
    else:
        equal = (np.full(num, round(mean)) for mean in (case.mean_prompt, case.mean_output))
        found = Lengths(*equal)
    found = length_sets.within(found, case.max_tokens - case.prefix_len).take(slice(num))
    return closed_load.requests_of(found, case.prefix_len)


def find_crossover(case: Case) -> tuple[int, list[dict]]:
    """The fewest users, to an eighth, from whom on pages pay; and what was tried."""
    rows = []

    def pays(users: int) -> bool:
        rows.append(compare(case, users))
        return rows[-1]["ratio"] >= ENOUGH

    low, high = 8, 16
    while not pays(high):
        low, high = high, 2 * high
        require(high <= MOST_USERS, f"pages do not pay for {case.name}, with {low} users either")
    while high - low > low // 8:
        middle = (low + high) // 2
        low, high = (low, middle) if pays(middle) else (middle, high)
    return high, rows


def sentence(case: Case, row: dict) -> str:
    """A row for people."""
    return (
        f"{'use' if case.is_use else 'skip':>4}, {case.name}: {row['ratio']:.2f} times as many "
        f"tokens ({row['paged_tokens_per_s']:,.0f} and {row['contiguous_tokens_per_s']:,.0f} /s)"
    )


def comparison(last: dict[str, Any]) -> list[Comparison]:
    """The article says when, and no number: here "use" is from `ENOUGH` on, "skip" about 1."""
    found = []
    for case in CASES:
        said = "use" if case.is_use else "skip"
        expected = (ENOUGH, math.inf) if case.is_use else (2 - ENOUGH, ENOUGH)
        what = f"{said}: {case.name}, tokens/s by pages over contiguous"
        found.append(Comparison(what, expected, last["ratios"][case.name], "x"))
    if last["crossover_users"] is not None:
        found.append(Comparison("users from whom on pages pay", None, last["crossover_users"]))
    return found


if __name__ == "__main__":
    define_flags()
    common.run(main)
