"""Do pages pay here? How many users fit, and which page size to take.

    python -m experiments.advise --model=llama-3.1-70b --device=a100-80gb --num_devices=4 \\
        --prompt_len=1000 --output_len=300 --concurrency=256 --shared_prefix=500

The article's "when to use, when to skip" as a tool: the workload is simulated with the engine's own
scheduler by pages of several sizes and by contiguous memory that reserves the longest sequence for
everyone. Lengths are log-normal about the means given, or those of --workload, a CSV file with
`prompt_len` and `output_len`. One paragraph and one JSON line. A minute or two on one core. What it
says is as right as the cost model (README.md says how far), and what a host adds to a step is in it
only by --overhead_s.
"""

from pathlib import Path

import numpy as np
from absl import flags

from experiments import closed_load, common, host_overhead
from experiments.closed_load import Served
from jaxpage.config import require
from jaxpage.sim import cost_model, runs, trace_files
from jaxpage.sim import lengths as length_sets
from jaxpage.sim.device import DEVICES, find_device
from jaxpage.sim.lengths import Lengths
from jaxpage.sim.shapes import SHAPES
from jaxpage.sim.trace import Arrival

FLAGS = flags.FLAGS

PAYS = 1.1  # times as many tokens as contiguous memory gives
AS_GOOD = 0.99  # of the best page size; of several as good the largest has the shortest tables


def define_flags() -> None:
    flags.DEFINE_enum("model", None, sorted(SHAPES), "What is to be served.", required=True)
    flags.DEFINE_string(
        "device", "a100-80gb", f"One of {', '.join(DEVICES)}, or a JSON file of measure_device."
    )
    flags.DEFINE_integer("num_devices", 1, "Over how many the model is spread.", lower_bound=1)
    flags.DEFINE_integer("prompt_len", None, "Mean tokens of a prompt's own part.", lower_bound=1)
    flags.DEFINE_integer("output_len", None, "Mean tokens of an answer.", lower_bound=1)
    flags.DEFINE_float("spread", 1.0, "Deviation of lengths over their mean.", lower_bound=0.0)
    flags.DEFINE_string("workload", None, "Lengths by file, in place of means.")
    flags.DEFINE_integer("concurrency", 64, "How many users ask at once.", lower_bound=1)
    flags.DEFINE_integer("shared_prefix", 0, "Tokens with which all prompts open.", lower_bound=0)
    flags.DEFINE_integer(
        "max_tokens",
        None,
        "Tokens that a sequence may have, which contiguous memory reserves; by default the longest "
        "of the workload.",
        lower_bound=1,
    )
    flags.DEFINE_list("page_sizes", ["8", "16", "32", "64"], "Of which the best is named.")
    host_overhead.define_flags()
    flags.adopt_module_key_flags(host_overhead)
    flags.DEFINE_integer("seed", 0, "The seed of lengths.")


def main(_: list[str]) -> None:
    lengths = lengths_by_flags()
    requests = closed_load.requests_of(lengths, FLAGS.shared_prefix)
    longest = max(request.prompt_len + request.output_len for request in requests)
    max_tokens = FLAGS.max_tokens or longest
    require(max_tokens >= longest, f"--max_tokens={max_tokens}: the longest has {longest}")
    sizes = page_sizes_by_flag()
    paged = {size: served(requests, max_tokens, size, is_paged=True) for size in sizes}
    contiguous = served(requests, max_tokens, 16, is_paged=False)
    advice = advise(paged, contiguous) | fitting(lengths, max_tokens)
    print(paragraph(advice, max_tokens))
    common.print_last_line(advice | common.provenance())


def lengths_by_flags() -> Lengths:
    """Enough requests for every user to ask four, at most 4,096.

    A file's are taken in order, and from the start again when they run out.
    """
    num = min(max(4 * FLAGS.concurrency, 64), 4096)
    means = (FLAGS.prompt_len, FLAGS.output_len)
    if FLAGS.workload is not None:
        require(means == (None, None), "--workload has lengths: leave out the means")
        found = trace_files.read(Path(FLAGS.workload), "lengths").requests
        columns = ([each.prompt_len for each in found], [each.output_len for each in found])
        return Lengths(*map(np.array, columns)).take(np.arange(num) % len(found))
    require(None not in means, "say --prompt_len and --output_len, or a file by --workload")
    if FLAGS.spread == 0:
        return Lengths(*(np.full(num, mean) for mean in means))
    return length_sets.drawn(np.random.default_rng(FLAGS.seed), num, *means, FLAGS.spread)


def page_sizes_by_flag() -> list[int]:
    sizes = [int(size) if size.isdigit() else 0 for size in FLAGS.page_sizes]
    require(len(sizes) > 0 and min(sizes) > 0, f"--page_sizes={FLAGS.page_sizes}: no page sizes")
    return sizes


def served(requests: list[Arrival], max_tokens: int, page_size: int, *, is_paged: bool) -> Served:
    cost = cost_model.create(
        SHAPES[FLAGS.model],
        find_device(FLAGS.device),
        num_devices=FLAGS.num_devices,
        page_size=page_size,
        overhead=host_overhead.by_flags(),
    )
    return closed_load.serve(cost, requests, FLAGS.concurrency, max_tokens, is_paged=is_paged)


def advise(paged: dict[int, Served], contiguous: Served) -> dict:
    """The page size to take, and what it gives over contiguous memory."""
    most = max(each.tokens_per_s for each in paged.values())
    size = max(size for size, each in paged.items() if each.tokens_per_s >= AS_GOOD * most)
    ratio = paged[size].tokens_per_s / contiguous.tokens_per_s
    return {
        "pays": ratio >= PAYS,
        "ratio": ratio,
        "page_size": size,
        "paged_tokens_per_s": paged[size].tokens_per_s,
        "contiguous_tokens_per_s": contiguous.tokens_per_s,
        "paged_batch": paged[size].batched,
        "contiguous_batch": contiguous.batched,
        "preemptions": paged[size].preemptions,
        "tokens_per_s_by_page_size": {s: each.tokens_per_s for s, each in paged.items()},
    }


def fitting(lengths: Lengths, max_tokens: int) -> dict:
    """Users whose KV finds room at once: by pages at their mean final length, or reserved."""
    room = runs.kv_tokens_in(SHAPES[FLAGS.model], find_device(FLAGS.device), FLAGS.num_devices)
    own = sum(lengths.means)
    return {
        "kv_tokens": room,
        "users_paged": int((room - FLAGS.shared_prefix) // own),
        "users_contiguous": room // max_tokens,
        "table_bytes_per_user": 4 * -(-max_tokens // 16),
    }


def paragraph(advice: dict, max_tokens: int) -> str:
    """The advice, for people."""
    verdict = "Pages pay here" if advice["pays"] else "Pages do not pay here"
    return (
        f"{verdict}: {advice['ratio']:.2f} times as many output tokens a second "
        f"({advice['paged_tokens_per_s']:,.0f} and {advice['contiguous_tokens_per_s']:,.0f}) as "
        f"contiguous memory that reserves {max_tokens} tokens for everyone, with "
        f"{advice['paged_batch']:.0f} sequences at once and not {advice['contiguous_batch']:.0f}. "
        f"Of the KV of {advice['kv_tokens']:,} tokens that finds room, "
        f"{advice['users_paged']} users fit by pages when all are at their end, and "
        f"{advice['users_contiguous']} by reservation. Take pages of {advice['page_size']} tokens; "
        f"they cost a table of {advice['table_bytes_per_user']} bytes a user at pages of 16, and "
        "what attention loses by them, which the cost model does not know (README.md)."
    )


if __name__ == "__main__":
    define_flags()
    common.run(main)
