"""What does one system prompt cost N users, with sharing and without?

    python -m experiments.claim_sharing --users=16 --prefix_tokens=1500

Real text on the real model. First one user after another, each pair in a tenant of its own, so that
the first finds nothing cached (cold) and the second all of the system prompt (warm): times to
the first token. Then all users at once: the bytes of KV that they hold, and what they would hold
if each had a copy. Then a new engine, whose pool is empty, on the folder that the first one left
(`--disk_dir`, by default one that is removed at the end): the first user of each pair there finds
the system prompt on disk. Those files are still in the machine's memory, so a disk's own time is
not in it; what reads, proves and puts back is. The last line of stdout is a JSON object. About a
minute on two cores. Expected: a warm first token comes at least 5 times sooner at 1,500 tokens,
one from disk 4 times, and N users hold the system prompt's full pages once. Refuted if not.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
from absl import flags

from experiments import common
from jaxpage.checkpoint.load import LoadedModel
from jaxpage.config import EngineConfig, require
from jaxpage.engine.disk_tier import DiskConfig
from jaxpage.engine.host import Engine
from jaxpage.engine.request import Request
from jaxpage.model.params import Params
from jaxpage.model.placement import serving_params
from jaxpage.paging.kv_pool import page_bytes
from jaxpage.sim.workloads import serving_workload

FLAGS = flags.FLAGS

QUESTION_TOKENS = 32
NEW_TOKENS = 8


def define_flags() -> None:
    common.define_model_flags()
    common.define_engine_flags()
    flags.adopt_module_key_flags(common)
    flags.DEFINE_integer("users", 16, "How many users share the prompt.", lower_bound=3)
    flags.DEFINE_integer(
        "prefix_tokens", 1500, "How many tokens the system prompt has.", lower_bound=1
    )
    flags.DEFINE_integer("pairs", 5, "How many cold and warm users to time.", lower_bound=1)


def main(_: list[str]) -> None:
    require(FLAGS.prefix_cache, "--noprefix_cache: nothing is shared without a prefix cache")
    require(
        FLAGS.users <= FLAGS.num_slots,
        f"--users={FLAGS.users} must be at most --num_slots={FLAGS.num_slots}: all run at once",
    )
    model = common.load_flagged_model()
    prefix, questions = read_prompts(model)
    config = common.config_by_flags(
        model,
        max_seq_len=len(prefix) + QUESTION_TOKENS + NEW_TOKENS,
        num_requests=FLAGS.num_slots,
    )
    params = serving_params(model.params, FLAGS.dtype)
    with disk_folder() as folder:
        engine = compiled_engine(model, params, config, folder)
        cold_s, warm_s = time_first_tokens(engine, prefix, questions[:2])
        sharing = count_bytes(engine, model, prefix, questions)
        restarted = compiled_engine(model, params, config, folder)
        (restarted_s,) = time_first_tokens(restarted, prefix, questions[2:3])
    row = {
        "prefix_tokens": len(prefix),
        "cold_first_token_s": float(np.median(cold_s)),
        "warm_first_token_s": float(np.median(warm_s)),
        "cold_over_warm": float(np.median(np.divide(cold_s, warm_s))),
        "cold_over_warm_at_least": float(np.min(np.divide(cold_s, warm_s))),
        "restarted_first_token_s": float(np.median(restarted_s)),
        "cold_over_restarted": float(np.median(np.divide(cold_s, restarted_s))),
        "cold_over_restarted_at_least": float(np.min(np.divide(cold_s, restarted_s))),
        **sharing,
    }
    print(
        f"first token of a cold prompt {row['cold_first_token_s']:.2f} s, of a warm one "
        f"{row['warm_first_token_s']:.3f} s, of one whose prefix is on disk "
        f"{row['restarted_first_token_s']:.3f} s; {FLAGS.users} users hold "
        f"{row['bytes_with_sharing'] / 2**20:.0f} MiB in place of "
        f"{row['bytes_without_sharing'] / 2**20:.0f}"
    )
    common.print_last_line(row | common.provenance())


@contextlib.contextmanager
def disk_folder() -> Iterator[str]:
    """`--disk_dir`, in which nothing may be yet, or a folder that is removed in the end."""
    if FLAGS.disk_dir is not None:
        folder = common.make_folder(FLAGS.disk_dir)
        require(
            not any(folder.iterdir()),
            f"--disk_dir={FLAGS.disk_dir} is not empty, and a prompt that is found there would not "
            "be cold: name an empty folder",
        )
        yield FLAGS.disk_dir
    else:
        with tempfile.TemporaryDirectory(prefix="jaxpage-") as folder:
            yield folder


def compiled_engine(
    model: LoadedModel, params: Params, config: EngineConfig, folder: str
) -> Engine:
    disk = DiskConfig(folder, FLAGS.disk_bytes)
    engine = common.engine_for(model, params, config, "paged", disk)
    engine.compile()
    return engine


def read_prompts(model: LoadedModel) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The system prompt, of recorded prompts one after the other, and a question for each user."""
    items = serving_workload(common.tokenizer_of(model), 200, 512, 1).items
    text = [token for item in items for token in item.prompt_ids]
    require(
        len(text) >= FLAGS.prefix_tokens,
        f"--prefix_tokens={FLAGS.prefix_tokens}: the recorded prompts have only {len(text)} tokens",
    )
    # All are equally long, so that times to the first token can be compared.
    ids = [item.prompt_ids for item in reversed(items)]
    questions = [prompt[:QUESTION_TOKENS] for prompt in ids if len(prompt) >= QUESTION_TOKENS]
    chosen = [questions[user % len(questions)] for user in range(FLAGS.users)]
    return tuple(text[: FLAGS.prefix_tokens]), chosen


def time_first_tokens(
    engine: Engine, prefix: tuple[int, ...], questions: Sequence[tuple[int, ...]]
) -> list[list[float]]:
    """Seconds to the first token, of users one after the other; for each user by tenant."""
    times: list[list[float]] = [[] for _ in questions]
    for pair in range(FLAGS.pairs):
        for user, question in enumerate(questions):
            request = Request(
                str(user),
                prefix + question,
                NEW_TOKENS,
                ignore_eos=True,
                tenant=f"pair {pair}",
            )
            (result,), _ = common.serve_all(engine, [request], steps_per_read=1)
            times[user].append(result.first_token_s)
    return times


def count_bytes(
    engine: Engine,
    model: LoadedModel,
    prefix: tuple[int, ...],
    questions: Sequence[tuple[int, ...]],
) -> dict[str, int]:
    """Bytes that all users hold at once, at the step at which it is most."""
    requests = [
        Request(str(user), prefix + question, NEW_TOKENS, ignore_eos=True, tenant="all")
        for user, question in enumerate(questions)
    ]
    _, journal = common.serve_all(engine, requests)
    fullest = max(journal.records, key=lambda record: record["named_pages"])
    bytes_a_page = page_bytes(model.config, FLAGS.page_size, FLAGS.dtype)
    return {
        "users": len(requests),
        "bytes_with_sharing": fullest["held_pages"] * bytes_a_page,
        "bytes_without_sharing": fullest["named_pages"] * bytes_a_page,
        "shared_pages": (fullest["named_pages"] - fullest["held_pages"]) // (len(requests) - 1),
        "full_pages_of_the_prefix": len(prefix) // FLAGS.page_size,
    }


if __name__ == "__main__":
    define_flags()
    common.run(main)
