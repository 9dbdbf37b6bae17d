"""What does the prefix cache save where people talk on, and what does its index cost a step?

    python -m experiments.bench_prefix --out=FILE.jsonl

First ShareGPT's conversations on the real model, all at once, each next turn as soon as its answer
is there: with a prefix cache, and without one. A later prompt holds all that was said before, so
with the cache only its end is new. Rounds with and without alternate, and the speed-up is that of
the medians. Then the scheduler alone, at pools of `--pool_pages` pages that earlier sequences have
filled, so that whoever takes a page evicts one: microseconds a step with the index, and of the bare
page table. FILE gets a row a round and a pool. About six minutes on two cores.
Expected: at least half of the prompt tokens are hits, outputs come sooner, and the index costs a
step no more than twice as much at a million pages as at ten thousand. Refuted if not.
"""

import json
from collections.abc import Iterator, Sequence

import numpy as np
from absl import flags

from experiments import bench_scheduler, common
from experiments.talks import Talk, Talks
from jaxpage.checkpoint.load import LoadedModel
from jaxpage.config import EngineConfig, require
from jaxpage.engine.host import Engine
from jaxpage.engine.request import Result
from jaxpage.engine.run import Journal
from jaxpage.model.placement import serving_params
from jaxpage.paging.allocator import ALLOCATORS, CACHED
from jaxpage.sim.conversations import Conversation, sharegpt_conversations

FLAGS = flags.FLAGS

MAX_TOKENS = 1024  # of a conversation
MAX_OUTPUT_TOKENS = 64
INDEX_SLOTS = 32


def define_flags() -> None:
    common.define_model_flags()
    common.define_engine_flags(num_slots=16)
    flags.adopt_module_key_flags(common)
    flags.DEFINE_integer("conversations", 24, "How many conversations to have.", lower_bound=1)
    flags.DEFINE_integer("rounds", 3, "How often to have them, each way.", lower_bound=1)
    flags.DEFINE_list(
        "pool_pages", ["1000", "10000", "100000", "1000000"], "The pools for the index, in pages."
    )
    flags.DEFINE_string("out", None, "The JSONL file to write the rows to.", required=True)


def main(_: list[str]) -> None:
    require(FLAGS.prefix_cache, "--prefix_cache=false: both ways are measured, leave it out")
    pools = [pool_of(text) for text in FLAGS.pool_pages]
    with common.open_for_writing(FLAGS.out) as out:
        talks, costs = [], []
        for row in talk_rounds(common.load_flagged_model()):
            talks.append(row)
            out.write(json.dumps(row) + "\n")
        summary = compare(talks)
        print(
            f"{summary['hit_share']:.0%} of prompt tokens found; {summary['speed_up']:.2f} times "
            f"as fast, a later turn's first token {summary['later_first_token_ratio']:.2f} times",
            flush=True,
        )
        for num_pages in pools:
            costs.append(index_cost(num_pages))
            out.write(json.dumps(costs[-1]) + "\n")
            print(json.dumps(costs[-1]), flush=True)
    common.print_last_line({**summary, "index": costs, **common.provenance()})


def pool_of(text: str) -> int:
    """One of `--pool_pages`, which must hold the sequences that run while it is measured."""
    least = INDEX_SLOTS * bench_scheduler.PAGES_A_SLOT_HOLDS
    require(
        text.isdecimal() and int(text) >= least,
        f"--pool_pages: {text!r} must be a number of pages from {least} on",
    )
    return int(text)


def talk_rounds(model: LoadedModel) -> Iterator[dict]:
    """A row a round: all conversations on a new engine without a prefix cache, and with one.

    Without goes first, so that flags which need a cache are refused at once.
    """
    conversations = sharegpt_conversations(
        common.tokenizer_of(model), FLAGS.conversations, MAX_TOKENS, MAX_OUTPUT_TOKENS
    )
    config = common.config_by_flags(
        model,
        max_seq_len=MAX_TOKENS,
        num_requests=FLAGS.conversations,
    )
    params = serving_params(model.params, FLAGS.dtype)
    for number in range(FLAGS.rounds):
        for has_cache in (False, True):
            allocator = CACHED[FLAGS.eviction] if has_cache else ALLOCATORS["paged"]
            engine = common.engine_for(model, params, config, allocator)
            engine.compile()
            yield {"round": number, "has_cache": has_cache, **talk(engine, conversations)}


def talk(engine: Engine, conversations: Sequence[Conversation]) -> dict:
    """Has all conversations at once, and says what it took."""
    talks = Talks([Talk(conversation) for conversation in conversations])
    return row_of(*common.serve_all(engine, talks.first(), steps_per_read=1, then=talks.then))


def row_of(results: Sequence[Result], journal: Journal) -> dict:
    """Counts in tokens; times in seconds, those to the first token after the request arrived."""
    later = [result for result in results if not result.request.id.endswith(" 0")]
    waits_s = [result.first_token_s - result.request.arrival_s for result in later]
    return {
        "requests": len(results),
        "prompt_tokens": sum(len(result.request.prompt_ids) for result in results),
        "hit_tokens": sum(result.num_cached_tokens for result in results),
        "output_tokens": sum(len(result.output_ids) for result in results),
        "computed_tokens": sum(record["num_tokens"] for record in journal.records),
        "steps": journal.num_steps,
        "later_first_token_p50_s": float(np.percentile(waits_s, 50)),
        "later_first_token_p99_s": float(np.percentile(waits_s, 99)),
        "wall_s": journal.wall_s,
    }


def compare(rows: Sequence[dict]) -> dict:
    """With the cache and without it, by the medians over the rounds."""

    def median(name: str, has_cache: bool) -> float:
        return float(np.median([row[name] for row in rows if row["has_cache"] == has_cache]))

    with_cache = next(row for row in rows if row["has_cache"])
    return {
        "requests": with_cache["requests"],
        "prompt_tokens": with_cache["prompt_tokens"],
        "hit_share": median("hit_tokens", True) / median("prompt_tokens", True),
        "computed_ratio": median("computed_tokens", False) / median("computed_tokens", True),
        "speed_up": median("wall_s", False) / median("wall_s", True),
        "later_first_token_p50_s": median("later_first_token_p50_s", True),
        "later_first_token_p50_bare_s": median("later_first_token_p50_s", False),
        "later_first_token_ratio": (
            median("later_first_token_p50_s", False) / median("later_first_token_p50_s", True)
        ),
    }


def index_cost(num_pages: int) -> dict:
    """Microseconds a step of the scheduler at a pool that is full, and of the bare page table."""
    config = EngineConfig(
        num_slots=INDEX_SLOTS,
        num_pages=num_pages,
        page_size=bench_scheduler.PAGE_SIZE,
        pages_per_slot=bench_scheduler.PAGES_PER_SLOT,
        num_requests=2 * INDEX_SLOTS,
        token_buckets=(512,),
    )
    options = {"policy": FLAGS.policy, "steps_at_once": 64}
    cached = bench_scheduler.measure(config, CACHED[FLAGS.eviction], is_full=True, **options)
    bare = bench_scheduler.measure(config, ALLOCATORS["paged"], **options)
    assert cached["violations"] == bare["violations"] == 0
    return {
        "pool_pages": num_pages,
        "step_us": cached["step_us"],
        "bare_step_us": bare["step_us"],
        "steps_before": cached["steps"],
    }


if __name__ == "__main__":
    define_flags()
    common.run(main)
