"""What the scripts here share: flags, files, the model, and how a run ends."""

import functools
import gc
import json
import resource
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags, logging

from experiments import hosts
from experiments.prices import define_device_flag, prices_by_flags
from jaxpage.checkpoint.errors import CheckpointError
from jaxpage.checkpoint.load import LoadedModel, load_model
from jaxpage.checkpoint.store import cache_folder
from jaxpage.checkpoint.tokenizer import Tokenizer
from jaxpage.config import PREEMPTION_MODES, ConfigError, EngineConfig, require
from jaxpage.engine import processes
from jaxpage.engine.disk_tier import DiskConfig
from jaxpage.engine.host import Engine
from jaxpage.engine.request import Request, Result
from jaxpage.engine.run import Journal
from jaxpage.engine.sizing import engine_config
from jaxpage.engine.step import Setup
from jaxpage.model import sharding
from jaxpage.model.llama import AttentionFn
from jaxpage.model.placement import serving_params
from jaxpage.paging.allocator import ALLOCATORS, CACHED, Allocator
from jaxpage.scheduling.policies import POLICIES
from jaxpage.sim.workloads import bench_prompts
from pallas_kernels.paged_attention import (
    IMPLEMENTATIONS,
    paged_attention,
    resolve_implementation,
)

FLAGS = flags.FLAGS


def define_model_flags() -> None:
    """Flags that say which model runs, and how precisely."""
    flags.DEFINE_string(
        "model",
        "smollm2-135m",
        "The model to run: smollm2-135m (from the installed package), a folder with a Hugging Face "
        "Llama, a GGUF file, or random: and one of our models' names, for its shapes alone.",
    )
    flags.DEFINE_enum(
        "dtype",
        "float32",
        ["float32", "bfloat16"],
        "The precision to which weights, keys and values are rounded.",
    )


def define_engine_flags(num_slots: int = 32, prefix_cache: bool = True) -> None:
    """Flags for the capacities of an engine, and how it serves."""
    flags.DEFINE_integer(
        "num_slots", num_slots, "How many sequences can run at once.", lower_bound=1
    )
    flags.DEFINE_integer("page_size", 16, "How many tokens a page holds.", lower_bound=1)
    flags.DEFINE_enum(
        "policy", "fcfs", sorted(POLICIES), "Who goes first, and so who is preempted last."
    )
    flags.DEFINE_enum(
        "attention",
        "auto",
        ["auto", *IMPLEMENTATIONS],
        "Which implementation of attention to use; auto takes the best that works on this machine.",
    )
    flags.DEFINE_bool(
        "prefix_cache",
        prefix_cache,
        "Keep the pages of sequences that ended, for prompts that begin alike; with pages only.",
    )
    flags.DEFINE_enum(
        "eviction", "lru", list(CACHED), "Which page leaves the prefix cache when pages run short."
    )
    flags.DEFINE_enum(
        "preemption",
        "recompute",
        PREEMPTION_MODES,
        "What becomes of sequences when pages run out: recompute them, swap whole ones out to the "
        "host, move only as many pages as are needed, or recompute those for whom that takes less "
        "time; with pages only.",
    )
    define_device_flag()
    flags.DEFINE_integer(
        "host_bytes",
        None,
        "How much memory of the host pages may take, cached ones too; by default as much as the "
        "pool, and none under --preemption=recompute.",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "transfer_budget",
        0,
        "How many pages may move each way in one step, not of whole sequences; 0 sets no limit.",
        lower_bound=0,
    )
    flags.DEFINE_bool(
        "zero_freed",
        False,
        "Overwrite the bytes of pages that have become free with zeros; with pages only.",
    )
    flags.DEFINE_string(
        "disk_dir",
        None,
        "A folder in which pages of the prefix cache outlive the process; whoever can read it can "
        "read the prompts. By default none does.",
    )
    flags.DEFINE_integer(
        "disk_bytes",
        None,
        "How many bytes the pages in --disk_dir may take; the longest unused are removed for new "
        "ones. By default there is no limit.",
        lower_bound=1,
    )
    flags.DEFINE_bool(
        "batch_invariant",
        False,
        "Use one token bucket and fixed prompt chunks, so that outputs and their log probabilities "
        "are the same to the bit whoever shares the batch. This is slower.",
    )


def define_allocator_flag() -> None:
    """Whose tables hold the KV."""
    flags.DEFINE_enum(
        "allocator",
        "paged",
        sorted(ALLOCATORS),
        "How KV memory is given out: by pages, or reserved by one of the contiguous rules.",
    )


def run(main: Callable[[list[str]], None]) -> None:
    """Runs a script's `main`; what the user can mend ends it with one line and exit status 1."""

    # JAX traces into objects that stay, a million of them: looking through them again and again
    # for cycles would take a quarter of the time.
    gc.set_threshold(200_000, 50, 100)

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            sys.exit(f"error: unexpected argument {argv[1]!r}: every setting is a --flag=value")
        logging.set_verbosity(logging.WARNING)  # absl would show what jax tries on its way
        try:
            hosts.join_flagged()
            main(argv)
            hosts.part()
        except (ConfigError, CheckpointError, OSError) as error:
            hosts.leave("error: " + " ".join(str(error).split()))
        except jax.errors.JaxRuntimeError as error:
            if not processes.are_several():
                raise
            hosts.leave(hosts.explained(error))

    app.run(guarded)


def keep_compilations() -> None:
    """Lets XLA's compiled programs survive the process, beside the converted checkpoints."""
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def build_engine(model: LoadedModel, config: EngineConfig, allocator: str = "paged") -> Engine:
    """An engine on `model`, whose parameters it takes over; precision and policy by flag."""
    params = model.params
    if hosts.mesh_flagged() is None:
        params = serving_params(params, FLAGS.dtype)
    return engine_for(model, params, config, allocator)


def engine_for(
    model: LoadedModel,
    params: dict,
    config: EngineConfig,
    allocator: str | Allocator,
    disk: DiskConfig | None = None,
) -> Engine:
    """An engine on parameters that are already in serving form, to be shared by several.

    An allocator's name is read as `allocator_named` does.

    Its pages outlive it in the folder of `disk`, by default that of the flags.
    """
    setup = Setup(
        model=model.config,
        engine=config,
        allocator=allocator_named(allocator) if isinstance(allocator, str) else allocator,
        policy=POLICIES[FLAGS.policy],
        attention=attention_named(FLAGS.attention),
        mesh=hosts.mesh_flagged(),
    )
    return Engine(params, setup, jnp.dtype(FLAGS.dtype), disk or disk_flags())


def disk_flags() -> DiskConfig | None:
    """The folder for pages that the flags name; None without."""
    require(
        FLAGS.disk_dir is not None or FLAGS.disk_bytes is None,
        f"--disk_bytes={FLAGS.disk_bytes} limits the pages in --disk_dir: name that folder too",
    )
    return None if FLAGS.disk_dir is None else DiskConfig(FLAGS.disk_dir, FLAGS.disk_bytes)


def disk_summary(journal: Journal) -> dict[str, dict[str, float]]:
    """What became of the pages on disk, for a result row; nothing without `--disk_dir`."""
    return {"disk": journal.disk} if journal.disk else {}


def allocator_named(name: str) -> Allocator:
    """The allocator, which keeps prefixes if it can and `--prefix_cache` says so."""
    return CACHED[FLAGS.eviction] if name == "paged" and FLAGS.prefix_cache else ALLOCATORS[name]


@functools.cache  # programs are compiled for each object
def attention_named(name: str) -> AttentionFn:
    """The attention of `--attention`; one that cannot run here is an error at once."""
    if name == "auto":
        return paged_attention
    try:
        return functools.partial(paged_attention, implementation=resolve_implementation(name))
    except NotImplementedError as error:
        raise ConfigError(f"--attention={name}: {error}") from error


def attention_in_use(engine: Engine) -> str:
    """The implementation that the engine's mixed steps take."""
    model, pool = engine.setup.model, engine.state.pool
    q = jax.ShapeDtypeStruct((1, model.num_heads, model.head_dim), pool.keys.dtype)
    pages = jax.ShapeDtypeStruct(pool.keys.shape[-4:], pool.keys.dtype)
    index = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    named = None if FLAGS.attention == "auto" else FLAGS.attention
    return resolve_implementation(named, q, pages, index, cu_q_lens=index)


def load_flagged_model() -> LoadedModel:
    """The model of `--model` in `--dtype`, on the devices of `--mesh`."""
    keep_compilations()
    mesh = hosts.mesh_flagged()
    if mesh is None:
        return load_model(FLAGS.model, jnp.dtype(FLAGS.dtype))
    shardings = functools.partial(sharding.stored_shardings, mesh=mesh)
    model = load_model(FLAGS.model, jnp.dtype(FLAGS.dtype), shardings=shardings)
    config, params = sharding.divide(model.config, model.params, mesh)
    return replace(model, config=config, params=params)


def tokenizer_of(model: LoadedModel) -> Tokenizer:
    """The model's tokenizer; one without is an error at once."""
    if model.tokenizer is None:
        raise ConfigError(
            f"--model={FLAGS.model} has no tokenizer for prompts: take another, or give --workload "
            "where there is that flag"
        )
    return model.tokenizer


def serve_all(
    engine: Engine, requests: Sequence[Request], **options: Any
) -> tuple[list[Result], Journal]:
    """`Engine.serve`, of which no request may be refused; `options` are its own."""
    results, journal = engine.serve(requests, **options)
    refused = [result.error for result in results if result.error is not None]
    require(not refused, f"{len(refused)} of {len(results)} requests were refused: {refused[:1]}")
    return results, journal


def bench_requests(model: LoadedModel, num_requests: int, max_new_tokens: int) -> list[Request]:
    """The bench's workload: the first ShareGPT prompts, all with outputs of the same length."""
    items = bench_prompts(tokenizer_of(model), num_requests, max_new_tokens)
    return [Request(i.id, i.prompt_ids, i.max_new_tokens, ignore_eos=True) for i in items]


def define_workload_flag(default: str) -> None:
    """A file of requests, in place of those that `default` describes."""
    flags.DEFINE_string(
        "workload",
        None,
        'A JSONL file of requests, each {"prompt_ids", "max_new_tokens"}; needed where the model '
        f"has no tokenizer, and by default {default}.",
    )


def workload_flagged() -> list[Request] | None:
    """The requests of `--workload`, which all ignore EOS; None without the flag."""
    path = FLAGS.workload
    if path is None:
        return None
    requests = []
    for number, line in read_jsonl(path):
        for name, kind in (("prompt_ids", list), ("max_new_tokens", int)):
            require(
                isinstance(line.get(name), kind),
                f'{path}:{number}: "{name}" must be a {kind.__name__}, got {line.get(name)!r:.80}',
            )
        prompt_ids = tuple(line["prompt_ids"])
        requests.append(Request(str(number), prompt_ids, line["max_new_tokens"], ignore_eos=True))
    require(bool(requests), f"{path}: no requests in it")
    return requests


def config_for(model: LoadedModel, requests: Sequence[Request], **capacities: Any) -> EngineConfig:
    """A configuration that holds all of `requests`; the rest as in `config_by_flags`."""
    longest = max(len(r.prompt_ids) + r.max_new_tokens for r in requests)
    return config_by_flags(model, max_seq_len=longest, num_requests=len(requests), **capacities)


def config_by_flags(model: LoadedModel, **capacities: Any) -> EngineConfig:
    """`engine_config` of `capacities`, and by flag whatever they do not name."""
    names = ("num_slots", "page_size", "batch_invariant", "preemption", "host_bytes")
    names += ("transfer_budget", "zero_freed")
    by_flag = {name: getattr(FLAGS, name) for name in names} | {"kv_dtype": FLAGS.dtype}
    known = by_flag | capacities
    if known["preemption"] == "auto":
        known["prices"] = prices_by_flags(model.config, FLAGS.dtype, known["page_size"])
    return engine_config(model.config, **known)


def read_jsonl(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects of a JSONL file; empty lines are passed over."""
    require(Path(path).is_file(), f"{path}: no such file")
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(
                    f"{path}:{number}: not JSON ({error.msg}): mend the line"
                ) from error
            require(isinstance(value, dict), f"{path}:{number}: expected a JSON object per line")
            yield number, value


def open_for_writing(path: str):
    """Opens `path` at once, so that an unwritable one fails before the work and not after.

    Of several processes only the first writes.
    """
    if not processes.is_first():
        return hosts.nowhere()
    try:
        return open(path, "w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def make_folder(path: str) -> Path:
    """The folder `path`, made if it is not there; of several processes the first has it alone."""
    folder = Path(path if processes.is_first() else hosts.folder_of_none())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {path}: {error.strerror}") from error
    return folder


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object a line."""
    with open_for_writing(str(path)) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def print_last_line(row: dict[str, Any]) -> None:
    """Prints a result as the last line of stdout, one JSON object."""
    print(json.dumps(row), flush=True)


def seed_of(base_seed: int, request_id: str) -> int:
    """A request's own seed: the same wherever it stands in a file."""
    return zlib.crc32(f"{base_seed}:{request_id}".encode())


def peak_rss_bytes() -> int:
    """The most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def provenance() -> dict[str, Any]:
    """Where a result came from: commit, device, jax, and the flags that were given."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": commit or None,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "flags": {name: FLAGS[name].value for name in FLAGS if FLAGS[name].present},
    }


class CompilationCounter:
    """Counts the programs that XLA compiles, or loads from its cache, from its creation on."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        self.count += event == "/jax/core/compile/backend_compile_duration"
