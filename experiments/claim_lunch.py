"""Does latency double by lunch, and what cures it? The article's opening.

    python -m experiments.claim_lunch --out=FILE.jsonl

"Everything looks fine at 8 AM. By lunch, latency doubles", for memory is full of the cached
states of old conversations. ShareGPT's conversations, on the real model, open over a working day
from 8 to 18 h with its peak at noon (`ARRIVALS`, by lot), compressed so that an hour takes
`--hour_s` seconds; before each later turn its user thinks for half an hour on average. Three ways
to keep their KV:

- `none`: nothing is evicted. A conversation reserves the longest one's room when it opens, and
  keeps it until it is over; who finds none waits at the door.
- `whole`: pages, kept after a turn for the next; when they run short, the sequence unused for
  longest leaves for the host as a whole.
- `pages`: the same, but only as many pages leave as are needed.

The pool has room for as many conversations as are open on average over the day if all are answered
at once, so what is reserved fits in the morning and not at noon. Latency counts from the moment a
user asks, door included; it is divided by the tokens of the answer, and the mean is taken, as in
the paper. FILE gets a row an hour and regime. About eight minutes on two cores; a slow machine
needs a longer --hour_s (30: seventeen minutes), or its processor is what is short at noon.
Expected: under `none` the latency of the worst hour is more than twice that of 8 h, and under
`pages` it is not. Refuted if not. The median need not follow: under `none` who is in is answered
at once, and who is at the door waits for hours. With two cores the processor is busiest at noon
too, which none of the three can cure.
"""

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from experiments import common
from experiments.comparisons import Comparison
from experiments.talks import Talk, Talks, talk_of
from jaxpage.checkpoint.load import LoadedModel
from jaxpage.config import EngineConfig, require
from jaxpage.engine.request import Result
from jaxpage.engine.run import Journal
from jaxpage.model.placement import serving_params
from jaxpage.paging.allocator import CACHED, WHOLE_CACHED, Allocator
from jaxpage.sim.conversations import sharegpt_conversations

FLAGS = flags.FLAGS

FIRST_HOUR = 8
ARRIVALS = (2, 4, 5, 7, 10, 9, 6, 5, 4, 2)  # of each hour from 8 to 18 h, in relation
THINKS_H = 0.5  # before a later turn, on average
MAX_TOKENS = 512  # of a conversation
MAX_OUTPUT_TOKENS = 32
REGIMES = ("none", "whole", "pages")
WORDS = {"none": "nothing evicted", "whole": "whole sequences leave", "pages": "pages leave"}


class Day(NamedTuple):
    """Who talks when, and how many of them are open at once on average."""

    talks: list[Talk]
    mean_open: float


def define_flags() -> None:
    common.define_model_flags()
    common.define_engine_flags(num_slots=16)
    flags.adopt_module_key_flags(common)
    flags.DEFINE_integer("conversations", 54, "How many conversations a day has.", lower_bound=1)
    flags.DEFINE_float("hour_s", 12.0, "How many seconds an hour takes.", lower_bound=1e-3)
    flags.DEFINE_list("regimes", list(REGIMES), "What to compare.")
    flags.DEFINE_integer("seed", 0, "The seed of arrivals and thoughts.")
    flags.DEFINE_string("out", None, "The JSONL file to write the rows to.", required=True)


def main(_: list[str]) -> None:
    for name in ("prefix_cache", "preemption", "host_bytes", "kv_bytes", "num_pages"):
        is_set = name in FLAGS and FLAGS[name].present
        require(not is_set, f"--{name}: every regime says that itself, leave it out")
    for regime in FLAGS.regimes:
        require(regime in REGIMES, f"--regimes: {regime!r} is none of {', '.join(REGIMES)}")
    with common.open_for_writing(FLAGS.out) as out:
        model = common.load_flagged_model()
        day = make_day(model)
        at_once = max(round(day.mean_open), 1)
        params = serving_params(model.params, FLAGS.dtype)
        hours = {}
        for regime in FLAGS.regimes:
            engine = common.engine_for(
                model, params, config_of(model, day, at_once, regime), allocator_of(regime)
            )
            engine.compile()
            talks = Talks(day.talks, at_once if regime == "none" else None)
            served = common.serve_all(engine, talks.first(), steps_per_read=1, then=talks.then)
            hours[regime] = rows_of(talks, *served)
            for row in hours[regime]:
                out.write(json.dumps({"regime": regime, **without_nan(row)}) + "\n")
                print(sentence(regime, row), flush=True)
    common.print_last_line(
        {
            "conversations": len(day.talks),
            "mean_open": day.mean_open,
            "reserved_at_once": at_once,
            **{regime: without_nan(summary(rows)) for regime, rows in hours.items()},
            **common.provenance(),
        }
    )


def make_day(model: LoadedModel) -> Day:
    """The conversations of a day, as many an hour as `ARRIVALS` says, at random within it."""
    conversations = sharegpt_conversations(
        common.tokenizer_of(model), FLAGS.conversations, MAX_TOKENS, MAX_OUTPUT_TOKENS
    )
    rng = np.random.default_rng(FLAGS.seed)
    hours = rng.choice(len(ARRIVALS), len(conversations), p=np.array(ARRIVALS) / sum(ARRIVALS))
    opens_h = np.sort(hours + rng.random(len(conversations)))
    talks = [
        Talk(
            conversation,
            float(opens) * FLAGS.hour_s,
            (rng.exponential(THINKS_H, len(conversation.turns) - 1) * FLAGS.hour_s).tolist(),
        )
        for conversation, opens in zip(conversations, opens_h, strict=True)
    ]
    open_s = sum(sum(talk.thinks_s) for talk in talks)
    return Day(talks, open_s / (len(ARRIVALS) * FLAGS.hour_s))


def config_of(model: LoadedModel, day: Day, at_once: int, regime: str) -> EngineConfig:
    """A pool of `at_once` longest conversations, and a host as large where pages go there."""
    longest = max(talk.conversation.num_tokens for talk in day.talks)
    pages = -(-longest // FLAGS.page_size)
    page_bytes = model.config.kv_bytes_per_token(FLAGS.dtype) * FLAGS.page_size
    return common.config_by_flags(
        model,
        max_seq_len=longest,
        num_requests=len(day.talks),
        num_pages=at_once * pages,
        preemption="recompute" if regime == "none" else "fine",
        host_bytes=None if regime == "none" else at_once * pages * page_bytes,
    )


def allocator_of(regime: str) -> Allocator:
    """All keep what a turn computed, for the next."""
    return (WHOLE_CACHED if regime == "whole" else CACHED)[FLAGS.eviction]


def rows_of(talks: Talks, results: Sequence[Result], journal: Journal) -> list[dict[str, float]]:
    """A row an hour: latency of those who asked in it, pages in its steps; the last is the night.

    What was lost counts in full pages, since no others are ever found again.
    """
    night, page_size = len(ARRIVALS), FLAGS.page_size

    def hour_of(time_s: float) -> int:
        return min(int(time_s / FLAGS.hour_s), night)

    def lost_tokens(result: Result) -> int:
        known = talks.num_known(result.request) // page_size * page_size
        return max(known - result.num_cached_tokens, 0)

    rows = []
    for hour in range(night + 1):
        asked = [r for r in results if hour_of(talks.asked_s[r.request.id]) == hour]
        steps = [
            record
            for record, time_s in zip(journal.records, journal.step_times_s, strict=True)
            if hour_of(time_s) == hour
        ]
        waits_s = [r.first_token_s - talks.asked_s[r.request.id] for r in asked]
        each_s = [(r.finish_s - talks.asked_s[r.request.id]) / len(r.output_ids) for r in asked]
        opened = {talk_of(r.request) for r in asked if r.request.id.endswith(" 0")}
        rows.append(
            {
                "hour": FIRST_HOUR + hour,
                "turns": len(asked),
                "opened": len(opened),
                "first_token_mean_s": mean(waits_s),
                "first_token_p50_s": quantile(waits_s, 0.5),
                "first_token_p95_s": quantile(waits_s, 0.95),
                "normalized_latency_s": mean(each_s),
                "lost_tokens": sum(map(lost_tokens, asked)),
                "held_pages": mean([s["held_pages"] for s in steps]),
                "cached_pages": mean([s["cached"] / page_size for s in steps]),
                "host_pages": mean([s["host_pages"] + s["host_cached"] for s in steps]),
                "moved_pages": float(sum(s["moved_out"] + s["moved_in"] for s in steps)),
            }
        )
    return rows


def quantile(values: Sequence[float], share: float) -> float:
    """Not a number if there are no values."""
    return float(np.quantile(values, share)) if values else float("nan")


def mean(values: Sequence[float]) -> float:
    """Not a number if there are no values."""
    return float(np.mean(values)) if values else float("nan")


def without_nan(row: dict[str, float]) -> dict[str, float | None]:
    """For JSON, which has no such number: an hour in which nobody asked has no latency."""
    return {name: None if np.isnan(value) else value for name, value in row.items()}


def summary(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The first hour, the worst of the day, and what the day cost."""
    morning, day = rows[0], [row for row in rows[:-1] if row["turns"] > 0] or rows[-1:]
    worst = max(day, key=lambda row: row["normalized_latency_s"])
    return {
        "worst_hour": worst["hour"],
        "worst_over_morning": worst["normalized_latency_s"] / morning["normalized_latency_s"],
        "morning_latency_s": morning["normalized_latency_s"],
        "worst_latency_s": worst["normalized_latency_s"],
        "first_token_p50_s": max(row["first_token_p50_s"] for row in day),
        "first_token_p95_s": max(row["first_token_p95_s"] for row in day),
        "lost_tokens": sum(row["lost_tokens"] for row in rows),
        "moved_pages": sum(row["moved_pages"] for row in rows),
    }


def comparison(last: dict[str, Any]) -> list[Comparison]:
    """The article says that latency doubles, of a memory from which nothing leaves."""
    return [
        Comparison(
            f"{words}: worst hour's latency over the first's",
            (2.0, math.inf) if regime == "none" else None,
            last[regime]["worst_over_morning"],
            "x",
        )
        for regime, words in WORDS.items()
        if last.get(regime, {}).get("worst_over_morning") is not None  # there were turns
    ]


def sentence(regime: str, row: dict[str, float]) -> str:
    """A row for people."""
    return (
        f"{regime:>5} {row['hour']:2.0f} h: {row['turns']:3.0f} turns, latency "
        f"{row['normalized_latency_s']:.3f} s a token, first one {row['first_token_p50_s']:.2f} s "
        f"(mean {row['first_token_mean_s']:.2f}, 95 % {row['first_token_p95_s']:.2f}), pages held "
        f"{row['held_pages']:.0f}, cached {row['cached_pages']:.0f}, on the host "
        f"{row['host_pages']:.0f}; {row['lost_tokens']:.0f} tokens computed again"
    )


if __name__ == "__main__":
    define_flags()
    common.run(main)
