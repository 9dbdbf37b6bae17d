"""How near does paged attention come to the card's bandwidth, and who is faster?

    python -m pallas_kernels.paged_attention.bench --out=results/bench

Question: what share of the bandwidth of a copy, measured on the same card, does each implementation
reach at each named shape; how does ours compare with cuDNN and JAX's own Pallas kernel; and what do
pages cost against the same kernel on contiguous KV (the paper's Fig 18a)? Needs an NVIDIA GPU.
Minutes: not known yet, as no card has run it.
Expected: paged at most 1.26 times as slow as contiguous, where the paper's kernel is 20-26 % slower
than a contiguous one of others. What would refute it: a larger `paged_over_contiguous`; that the
kernel is good, an `ours_over_best_peer` above 1, or a low `share_of_copy` where KV is long.

One JSON line for each shape and implementation, each checked against the reference before it is
timed; one that is missing, refuses the shape, fails or is wrong has a sentence in `status` and no
time. All are timed alike: several input sets, which together exceed the card's L2 cache, in turn
within one dispatch of `calls_per_dispatch` calls; `dispatch_s` is what a dispatch costs. Conversion
to a peer's layout is not timed. Reading alone is faster than copying: a share may pass 1. The last
line is the summary; its ratios are of times, below 1 where the first is faster.
"""

import importlib.util
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from pallas_kernels.common import timing
from pallas_kernels.paged_attention import layouts, reference
from pallas_kernels.paged_attention.api import IMPLEMENTATIONS, paged_attention
from pallas_kernels.paged_attention.config import Tile
from pallas_kernels.paged_attention.shapes import Shape, choose_shapes

FLAGS = flags.FLAGS
OURS = tuple(name for name in IMPLEMENTATIONS if name != "reference")  # that is the yardstick
PAGED, CONTIGUOUS = "mosaic_gpu", "mosaic_gpu_contiguous"
# Of a token's and head's own largest value. One rounding to bfloat16 is up to 0.4 %, and a peer may
# round each of its partial results; keys in the place of values are off by more than 100 %.
TOLERANCE = 0.02
MOST_SETS = 64  # more would take long to compile
COPY_BYTES = 2 * 2**30
CHECK_BYTES = 2**30  # of the keys that the reference reads at once

Arrays = Mapping[str, jax.Array]


class Case(NamedTuple):
    """An implementation; NotImplementedError says, in a sentence, what it cannot do."""

    attend: Callable[..., Any]  # of what `arguments` returns, to out [T, H, D]
    arguments: Callable[[Arrays], Arrays] = dict  # of those of `paged_attention`; not timed


class Settings(NamedTuple):
    seed: int = 0
    repeats: int = 20
    calls: int = 16  # in one dispatch, at least
    cache_bytes: int = 64 * 2**20


class Result(NamedTuple):
    """What came of a case: times only if `status` is "ok"."""

    status: str
    largest_error: float | None = None
    times: timing.Times | None = None


def cases(implementations: Sequence[str]) -> dict[str, Case]:
    """Ours as named, then the contiguous one if its kernel is among them, then all peers.

    Raises:
      ValueError: a name is not one of `OURS`.
    """
    for name in implementations:
        if name not in OURS:
            raise ValueError(f"--implementation={name} is unknown: choose of {', '.join(OURS)}")
    found = {n: Case(partial(paged_attention, implementation=n)) for n in implementations}
    if PAGED in found:
        found[CONTIGUOUS] = Case(found[PAGED].attend, as_contiguous)
    return found | PEERS


def as_contiguous(arrays: Arrays) -> Arrays:
    """One page a row, as long as the longest row rounded up to whole blocks of the kernel."""
    if "k_scales" in arrays:
        raise NotImplementedError("one page a row would have one scale for all of its tokens")
    table = arrays["page_indices"]
    num_rows, pages_per_row = table.shape

    def join(pages):
        _, num_kv_heads, page_size, head_dim = pages.shape
        tokens = pages_per_row * page_size
        rows = pages.at[table].get(mode="fill", fill_value=0)  # [B, M, K, S, D]
        rows = jnp.swapaxes(rows, 1, 2).reshape(num_rows, num_kv_heads, tokens, head_dim)
        return jnp.pad(rows, ((0, 0), (0, 0), (0, -tokens % Tile().block_tokens), (0, 0)))

    joined = {name: join(arrays[name]) for name in ("k_pages", "v_pages")}
    return {**arrays, **joined, "page_indices": jnp.arange(num_rows, dtype=jnp.int32)[:, None]}


def as_cudnn(arrays: Arrays) -> Arrays:
    """Exactly B * M pages, which its checks ask for, in random order, and tokens before heads."""
    _check_decode(arrays)
    table = arrays["page_indices"]
    place = np.random.default_rng(0).permutation(table.size).astype(np.int32)
    source = table.reshape(-1)[np.argsort(place)]
    found = {n: arrays[n].at[source].get(mode="clip") for n in ("k_pages", "v_pages")}
    pages = {name: layouts.to_nhd(pages) for name, pages in found.items()}
    return {**arrays, **pages, "page_indices": jnp.asarray(place.reshape(table.shape))}


def attend_cudnn(q, k_pages, v_pages, lengths, page_indices):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    table = page_indices[:, None, :, None]
    out = cudnn.paged_attention(
        q[:, None], k_pages, v_pages, jnp.ones_like(lengths), lengths, table, table,
        scale=q.shape[-1] ** -0.5, mask_type=cudnn.MaskType.PADDING, qkv_layout="BTNH",
    )  # fmt: skip
    return out[:, 0]


def as_jax_pallas(arrays: Arrays) -> Arrays:
    """Heads before pages, entries in range, as wide as 16 splits of 2^n pages, and q scaled."""
    _check_decode(arrays)
    q, table = arrays["q"], arrays["page_indices"]
    width = max(16, 1 << (table.shape[1] - 1).bit_length())
    table = jnp.pad(table, ((0, 0), (0, width - table.shape[1])))
    pages = {name: layouts.to_head_major(arrays[name]) for name in ("k_pages", "v_pages")}
    return {
        **pages,
        "q": q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype),
        "block_tables": jnp.clip(table, 0, arrays["k_pages"].shape[0] - 1),
        "lengths": arrays["lengths"],
    }


def attend_jax_pallas(k_pages, **arguments):
    with warnings.catch_warnings():  # it is deprecated, as we know
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import paged_attention as upstream
    # Its blocks are 8 pages, which for pages of 16 is 128 tokens; 512 do not fit a Hopper card.
    block_pages = max(1, 128 // k_pages.shape[2])
    return upstream.paged_attention(
        k_pages=k_pages, pages_per_compute_block=block_pages, **arguments
    )


def attend_flashinfer(**arguments):
    packages = {"flashinfer": "flashinfer-python", "jax_tvm_ffi": "jax-tvm-ffi"}
    missing = [p for module, p in packages.items() if importlib.util.find_spec(module) is None]
    reason = "its documented calls from JAX take one row's contiguous KV, no pages"
    raise NotImplementedError(f"not installed: {', '.join(missing)}" if missing else reason)


def _check_decode(arrays: Arrays) -> None:
    if "cu_q_lens" in arrays:
        raise NotImplementedError("takes one query a row, and this step is ragged")
    if "k_scales" in arrays:
        raise NotImplementedError("takes no scales of pages")


PEERS = {
    "cudnn": Case(attend_cudnn, as_cudnn),
    "jax_pallas": Case(attend_jax_pallas, as_jax_pallas),
    "flashinfer": Case(attend_flashinfer),
}


def num_sets(shape: Shape, cache_bytes: int) -> int:
    """Input sets that together are twice what a cache holds, 2 to `MOST_SETS`."""
    return min(max(2, -(-2 * cache_bytes // shape.least_bytes())), MOST_SETS)


def expected_out(arrays: Arrays) -> jax.Array:
    """The reference's result, f32 [T, H, D], some tokens at a time.

    A token of a prompt sees what a row that decodes would see if it ended there: so every token
    becomes such a row, and memory has a bound.
    """
    q, lengths, table = arrays["q"], arrays["lengths"], arrays["page_indices"]
    if "cu_q_lens" in arrays:
        row, position = reference.token_rows(arrays["cu_q_lens"], lengths, q.shape[0])
        lengths, table = position + 1, table[row]
    _, num_kv_heads, page_size, head_dim = arrays["k_pages"].shape
    token_bytes = table.shape[1] * page_size * num_kv_heads * head_dim * 4
    step = max(1, CHECK_BYTES // token_bytes)

    attend = jax.jit(partial(paged_attention, implementation="reference"))
    q, pages = q.astype(jnp.float32), (arrays["k_pages"], arrays["v_pages"])  # q's dtype is out's
    scales = {name: arrays.get(name) for name in ("k_scales", "v_scales")}
    parts = [slice(start, start + step) for start in range(0, q.shape[0], step)]
    return jnp.concatenate([attend(q[p], *pages, lengths[p], table[p], **scales) for p in parts])


def largest_error(out: jax.Array, expected: jax.Array) -> float:
    """Of any token and head, relative to its own largest value; NaN if `out` holds one."""
    error = jnp.abs(out.astype(jnp.float32) - expected).max(axis=-1)
    size = jnp.abs(expected).max(axis=-1)
    return float((error / jnp.maximum(size, jnp.finfo(jnp.float32).tiny)).max())


def bench(
    shape: Shape, chosen: Mapping[str, Case], settings: Settings, copy_bytes_per_s: float
) -> Iterator[dict[str, Any]]:
    """One row for each case, as soon as it is done; all get the same input sets."""
    sets, expected, failure = [], [], None
    try:
        for i in range(num_sets(shape, settings.cache_bytes)):
            sets.append(shape.make(settings.seed + i))
            expected.append(expected_out(sets[-1]))
    except Exception as error:  # as when memory is short
        failure = Result(f"no input: {type(error).__name__}: {timing.one_line(error)}")
    for name, case in chosen.items():
        result = failure or measure(case, sets, expected, settings)
        yield make_row(shape, name, result, settings, copy_bytes_per_s)


def measure(
    case: Case, sets: Sequence[Arrays], expected: Sequence[jax.Array], settings: Settings
) -> Result:
    """Checks a case on all input sets, then times it; whatever goes wrong is the status."""
    num_calls = timing.calls_per_dispatch(len(sets), settings.calls)
    try:
        inputs = [case.arguments(arrays) for arrays in sets]
        run = timing.in_one_dispatch(case.attend, inputs, num_calls, link="q")
        errors = [largest_error(o, expected[i % len(sets)]) for i, o in enumerate(run())]
        worst = float(np.max(errors))
        if not worst <= TOLERANCE:  # NaN included
            return Result(f"wrong: {worst:.3g} of a token's largest value, above {TOLERANCE}")
        return Result("ok", worst, timing.time_calls(run, num_calls, settings.repeats))
    except NotImplementedError as error:
        return Result(f"cannot: {timing.one_line(error)}")
    except Exception as error:  # of a compiler, a library or the device: of many classes
        return Result(f"failed: {type(error).__name__}: {timing.one_line(error)}")


def make_row(
    shape: Shape, name: str, result: Result, settings: Settings, copy_bytes_per_s: float
) -> dict[str, Any]:
    """The row of a result: the same keys whatever came of it, and None for what is not known."""
    sets, least_bytes = num_sets(shape, settings.cache_bytes), shape.least_bytes()
    times = result.times
    bytes_per_s = times and least_bytes / times.median_s
    return {
        "shape": shape.name,
        "implementation": name,
        "status": result.status,
        "largest_error": result.largest_error,
        **(times._asdict() if times else dict.fromkeys(timing.Times._fields)),
        "least_bytes": least_bytes,
        "bytes_per_s": bytes_per_s,
        "copy_bytes_per_s": copy_bytes_per_s,
        "share_of_copy": bytes_per_s and bytes_per_s / copy_bytes_per_s,
        "num_sets": sets,
        "exceeds_cache": sets * least_bytes > settings.cache_bytes,
        "calls_per_dispatch": timing.calls_per_dispatch(sets, settings.calls),
        "repeats": settings.repeats,
        "seed": settings.seed,
    }


def summarise(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """For each shape the fastest of ours and of the peers, and ratios of times."""
    times: dict[str, dict[str | None, float]] = {}
    for row in rows:
        found = times.setdefault(row["shape"], {})
        if row["median_s"] is not None:
            found[row["implementation"]] = row["median_s"]

    def ratio(found, above, below):
        return found[above] / found[below] if above in found and below in found else None

    summary = {}
    for shape, found in times.items():
        best, peer = (
            min((n for n in names if n in found), key=found.__getitem__, default=None)
            for names in (OURS, PEERS)
        )
        summary[shape] = {
            "ours": best,
            "best_peer": peer,
            "ours_over_best_peer": ratio(found, best, peer),
            "paged_over_contiguous": ratio(found, PAGED, CONTIGUOUS),
        }
    return summary


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The share of the copy's bandwidth that each implementation reaches, a line a shape."""
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    names = dict.fromkeys(row["implementation"] for row in rows)
    figure = Figure(figsize=(10, 1.5 + 0.35 * len(shapes)), layout="constrained")
    axes = figure.add_subplot()
    for name, marker in zip(names, "oPDs^vX*"[: len(names)], strict=True):
        timed = [r for r in rows if r["implementation"] == name and r["share_of_copy"] is not None]
        heights = [shapes.index(row["shape"]) for row in timed]
        label = name if timed else f"{name} (not timed)"
        axes.plot([r["share_of_copy"] for r in timed], heights, marker, label=label, alpha=0.8)
    axes.axvline(1.0, color="0.6", linewidth=1)
    axes.set_yticks(range(len(shapes)), shapes)
    axes.set(xlim=(0, None), ylim=(len(shapes) - 0.5, -0.5))
    axes.grid(axis="y", color="0.9")
    axes.set_xlabel("least bytes / median time, as a share of a measured copy's bandwidth")
    axes.set_title(f"Paged attention on {rows[0]['device']}, commit {rows[0]['commit']}")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def define_flags() -> None:
    defaults = Settings()
    flags.DEFINE_list("shape", ["all"], "Names of shapes, parts of names, or all.")
    flags.DEFINE_list("implementation", [PAGED, "xla"], f"Which of ours: {', '.join(OURS)}.")
    flags.DEFINE_integer("repeats", defaults.repeats, "Dispatches to time.", lower_bound=1)
    flags.DEFINE_integer("seed", defaults.seed, "Of the first input set.")
    text = "The input sets exceed it twofold; 64 MiB is above the L2 of an A100, H100 or H200."
    flags.DEFINE_integer("cache_bytes", defaults.cache_bytes, text, lower_bound=1)
    flags.DEFINE_string("out", None, "A folder for rows.jsonl and bench.png.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}: every setting is a --flag=value")
    logging.set_verbosity(logging.WARNING)  # absl would show what jax tries on its way
    try:
        shapes, chosen = choose_shapes(FLAGS.shape), cases(FLAGS.implementation)
        if missing := timing.missing_gpu():
            raise ValueError(missing)
        if FLAGS.out:
            Path(FLAGS.out).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    settings = Settings(FLAGS.seed, FLAGS.repeats, cache_bytes=FLAGS.cache_bytes)
    given = {name: FLAGS[name].value for name in FLAGS if FLAGS[name].present}
    origin = timing.provenance() | {"flags": given}
    copied = timing.copy_bytes_per_s(COPY_BYTES, settings.repeats)
    rows = []
    for shape in shapes:
        for row in bench(shape, chosen, settings, copied):
            rows.append(row | origin)
            print(json.dumps(rows[-1]), flush=True)
    if FLAGS.out:
        write(rows, Path(FLAGS.out))
    card = {"copy_bytes_per_s": copied, "dispatch_s": timing.dispatch_s(settings.repeats)}
    print(json.dumps(card | {"shapes": summarise(rows)} | origin))


def write(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """`rows.jsonl` and, where matplotlib is installed, `bench.png`."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        draw(rows, folder / "bench.png")
    except ModuleNotFoundError as error:
        print(f"no bench.png: {error} (pip install matplotlib)", file=sys.stderr)


if __name__ == "__main__":
    define_flags()
    app.run(main)
