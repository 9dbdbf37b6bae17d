"""Does the engine stay whole under a long, unkind load?

    python -m experiments.soak --out=FILE.jsonl

Serves `--requests` requests of a small random model in rounds of 1,000, in a pool far too small for
its slots: random arrivals, lengths, tenants, priorities and common beginnings, samples and beam
searches, some cancelled at a random moment, some that cannot be served. After every round it looks
whether all pages came back, whether every invariant of the page table holds, how much memory the
process has, and who waited longest. FILE gets a row a round. Some minutes on two cores. Expected:
no violation, no lost page, no request without a result, memory flat after the first rounds, and
nobody overtaken by more requests than the priorities allow.
"""

import dataclasses
import json
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from experiments import common
from jaxpage.config import require
from jaxpage.engine.host import Engine
from jaxpage.engine.request import Request, Result
from jaxpage.engine.run import Journal
from jaxpage.scheduling.policies import AHEAD

FLAGS = flags.FLAGS

ROUND = 1_000
PRIORITIES = (-1, 0, 0, 0, 1)
MOST_PROMPT, MOST_OUTPUT = 40, 24
# What cannot be served, as changes to what can.
MALFORMED = (
    {"prompt_ids": ()},
    {"prompt_ids": (-1,)},
    {"prompt_ids": (10**9,)},
    {"prompt_ids": (1,) * (MOST_PROMPT + MOST_OUTPUT)},
    {"max_new_tokens": 0},
    {"n": 10**6, "temperature": 1.0},
    {"num_beams": 10**6},
    {"num_beams": 2, "length_penalty": float("nan")},
    {"temperature": float("nan")},
    {"top_p": 0.0},
    {"repetition_penalty": -1.0},
    {"seed": -1},
    {"priority": 10**9},
)


def define_flags() -> None:
    common.define_model_flags()
    common.define_engine_flags(num_slots=8)
    flags.DEFINE_integer("requests", 20_000, "How many requests to serve.", lower_bound=1)
    flags.DEFINE_integer("num_pages", 40, "How many pages the pool has.", lower_bound=1)
    flags.DEFINE_float("rate", 200.0, "Requests that arrive in a second.", lower_bound=0.1)
    flags.DEFINE_integer("seed", 0, "The seed of the load.")
    flags.DEFINE_string("out", None, "The JSONL file to write a row a round to.", required=True)
    flags.adopt_module_key_flags(common)
    for name, value in (("model", "random:tiny"), ("page_size", 4), ("policy", "priority")):
        FLAGS.set_default(name, value)
    FLAGS.set_default("preemption", "fine")


def main(_: list[str]) -> None:
    with common.open_for_writing(FLAGS.out) as out:
        model = common.load_flagged_model()
        config = common.config_by_flags(
            model,
            max_seq_len=MOST_PROMPT + MOST_OUTPUT,
            num_requests=8 * FLAGS.num_slots,
            num_pages=FLAGS.num_pages,
            max_beams=2,
        )
        engine = common.build_engine(model, config)
        compile_s = engine.compile()
        dice = random.Random(FLAGS.seed)
        rows = []
        for start in range(0, FLAGS.requests, ROUND):
            names = [str(number) for number in range(start, min(start + ROUND, FLAGS.requests))]
            rows.append(serve_round(engine, load_of(names, model.config.vocab_size, dice), dice))
            out.write(json.dumps(rows[-1]) + "\n")
            out.flush()
            print(f"{start + len(names)} requests: {json.dumps(rows[-1])}")
    common.print_last_line(summary(rows) | {"compile_s": compile_s, **common.provenance()})


def load_of(names: Sequence[str], vocab_size: int, dice: random.Random) -> list[Request]:
    """One request for each name, in the order of arrival; some cannot be served."""
    arrival_s, requests = 0.0, []
    for name in names:
        arrival_s += dice.expovariate(FLAGS.rate)
        beginning = [dice.randrange(4)] * dice.choice((0, 0, 8, 16))
        length = dice.randint(1, MOST_PROMPT - len(beginning))
        request = Request(
            id=name,
            prompt_ids=(*beginning, *(dice.randrange(vocab_size) for _ in range(length))),
            max_new_tokens=dice.randint(1, MOST_OUTPUT),
            tenant=dice.choice(("", "a", "b")),
            priority=dice.choice(PRIORITIES),
            ignore_eos=dice.random() < 0.5,
            seed=dice.randrange(2**32),
            arrival_s=arrival_s,
        )
        changes = dice.choice(
            (
                {},
                {"temperature": 1.0},
                {"temperature": 0.7, "n": 2, "top_k": 5},
                {"num_beams": 2, "n": dice.randint(1, 2)},
                dice.choice(MALFORMED) if dice.random() < 0.25 else {},
            )
        )
        requests.append(dataclasses.replace(request, **changes))
    return requests


def serve_round(engine: Engine, requests: list[Request], dice: random.Random) -> dict:
    """Serves a round, cancels one request in ten, and looks what is left of it."""
    ends = [(r.arrival_s + dice.expovariate(5.0), r.id) for r in requests if dice.random() < 0.1]
    ends.sort(reverse=True)
    start_s = time.perf_counter()

    def cancel_some(journal: Journal, num_over: int) -> None:
        while ends and ends[-1][0] <= time.perf_counter() - start_s:
            engine.cancel(ends.pop()[1])

    results, journal = engine.serve(requests, steps_per_read=8, on_progress=cancel_some)
    require(
        [result.request for result in results] == requests, "a request has no result, or another's"
    )
    config, table = engine.setup.engine, engine.state.scheduler.table
    reasons = [result.finish_reason for result in results]
    refused = [result for result in results if result.error is not None]
    waits_s = [r.first_token_s - r.request.arrival_s for r in results]
    return {
        "requests": len(results),
        "refused": len(refused),
        "cancelled": reasons.count("cancelled"),
        "steps": journal.num_steps,
        "preemptions": sum(record["num_preempted"] for record in journal.records),
        "wall_s": journal.wall_s,
        "violations": int(np.sum(np.asarray(engine.setup.allocator.violations(table)))),
        "lost_pages": config.num_pages - int(table.num_free + table.num_cached),
        "lost_host_pages": config.host_pages - int(table.tier.num_free + table.num_host_cached),
        "most_wait_s": float(np.nanmax(waits_s)),
        "median_wait_s": float(np.nanmedian(waits_s)),
        "most_overtaken": most_overtaken(results),
        "most_overtaken_allowed": AHEAD * (max(PRIORITIES) - min(PRIORITIES)) + config.num_slots,
        "rss_bytes": resident_bytes(),
    }


def resident_bytes() -> int:
    """Memory that this process has now; where the system does not tell, the most it ever had."""
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        return common.peak_rss_bytes()
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def most_overtaken(results: Sequence[Result]) -> int:
    """By how many that came after it a request was overtaken on the way to its first token."""
    times_s = np.array([result.first_token_s for result in results])
    is_earlier = times_s[None, :] < times_s[:, None]  # nobody is, of those without a token
    return int(np.max(np.sum(np.triu(is_earlier, 1), axis=1)))


def summary(rows: list[dict]) -> dict:
    """All rounds together; memory as what came on top after the first three."""
    total = ("requests", "refused", "cancelled", "steps", "preemptions", "wall_s")
    most = ("violations", "lost_pages", "lost_host_pages", "most_wait_s", "most_overtaken")
    settled = rows[min(3, len(rows) - 1)]["rss_bytes"]
    return {
        **{name: sum(row[name] for row in rows) for name in total},
        **{name: max(row[name] for row in rows) for name in most},
        "most_overtaken_allowed": rows[0]["most_overtaken_allowed"],
        "rss_bytes": rows[-1]["rss_bytes"],
        "rss_grown_bytes": rows[-1]["rss_bytes"] - settled,
    }


if __name__ == "__main__":
    define_flags()
    common.run(main)
