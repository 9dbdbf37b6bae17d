"""The claims of the article on KV caches, each beside our own number.

The memory claims follow from the model's shape; the others take the rows that `experiments.serve`
measured, by allocator. What nobody measured says so: no number here is invented.

The article:
https://dev.to/tech_nuggets/kv-cache-and-pagedattention-what-they-do-and-why-they-matter-jce
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxpage.config import ModelConfig
from jaxpage.model.params import num_parameters
from jaxpage.model.presets import PRESETS
from jaxpage.sim.metrics import WASTE_CATEGORIES

Row = Mapping[str, Any]  # a run's summary

ARITHMETIC, MEASURED, NOT_MEASURED = "arithmetic", "measured", "not measured by this demo"

SEQ_LEN = 4096  # tokens, the article's example
NUM_USERS = 256
USED_TOKENS = 300  # of the SEQ_LEN reserved
A100_BYTES, NUM_A100 = 80 * 10**9, 4
WEIGHT_BYTES_PER_PARAMETER = 2  # bfloat16
ARTICLE_USERS_GB = 336
MIN_SHORT_SHARE = 0.1  # of the steps; below, memory was not what kept requests waiting
PAPER_BATCHED = {"paged": 30.42, "oracle": 13.62, "pow2": 9.81, "max": 7.00}  # its Fig 13a


@dataclass(frozen=True)
class Claim:
    """One claim: what the article says, what we find, and on what that rests."""

    claim: str
    article: str
    ours: str
    basis: str


def all_claims(rows: Mapping[str, Row]) -> list[Claim]:
    """The article's claims beside the runs in `rows`, by allocator; failed runs are left out."""
    return [*memory_claims(), *run_claims(rows), *unmeasured_claims()]


def kv_bytes(num_tokens: int, model: ModelConfig = PRESETS["llama-3.1-70b"]) -> int:
    """Bytes of keys and values of `num_tokens` tokens in bfloat16."""
    return num_tokens * model.kv_bytes_per_token("bfloat16")


def weight_bytes(model: ModelConfig = PRESETS["llama-3.1-70b"]) -> int:
    """Bytes of the parameters in bfloat16."""
    return WEIGHT_BYTES_PER_PARAMETER * num_parameters(model)


def batch_outgrowing_weights(seq_len: int) -> int:
    """The fewest sequences of `seq_len` tokens whose KV is more than the weights."""
    return weight_bytes() // kv_bytes(seq_len) + 1


def wasted_share(reserved: int, used: int) -> float:
    """The share of a reservation that is never used."""
    return 1 - used / reserved


def memory_claims() -> list[Claim]:
    """What follows from the shape of Llama 3.1 70B alone."""
    one, all_users = kv_bytes(SEQ_LEN), kv_bytes(NUM_USERS * SEQ_LEN)
    a100s = NUM_A100 * A100_BYTES
    model = PRESETS["llama-3.1-70b"]
    return [
        Claim(
            f"KV of one sequence of {SEQ_LEN} tokens, Llama 3.1 70B",
            "about 1.3 GB",
            f"{_gb(one, 3)} (2 x {model.num_layers} layers x {model.num_kv_heads} KV heads x "
            f"{model.head_dim} x 2 bytes = {kv_bytes(1):,} bytes a token)",
            ARITHMETIC,
        ),
        Claim(
            f"KV of {NUM_USERS} such users",
            f"{ARTICLE_USERS_GB} GB",
            f"{_gb(all_users, 1)}, or {all_users / 2**30:.0f} GiB. {ARTICLE_USERS_GB} GB is "
            f"{NUM_USERS} x {ARTICLE_USERS_GB / NUM_USERS:.4f}, a rounding between "
            f"{one / 2**30:.2f} GiB and {one / 1e9:.3f} GB",
            ARITHMETIC,
        ),
        Claim(
            "that is more than four A100 hold",
            "yes",
            f"yes: {_gb(all_users, 1)} > {_gb(a100s, 0)}, of which the weights take "
            f"{_gb(weight_bytes(), 0)}; what is left holds "
            f"{(a100s - weight_bytes()) // one} such users",
            ARITHMETIC,
        ),
        Claim(
            "the KV cache often needs more memory than the weights",
            "often",
            f"from {batch_outgrowing_weights(SEQ_LEN)} sequences of {SEQ_LEN} tokens on "
            f"({_gb(weight_bytes(), 0)} of weights)",
            ARITHMETIC,
        ),
        Claim(
            f"reserve {SEQ_LEN} tokens, use {USED_TOKENS}: wasted",
            "93 %",
            f"{100 * wasted_share(SEQ_LEN, USED_TOKENS):.1f} %",
            ARITHMETIC,
        ),
    ]


def run_claims(rows: Mapping[str, Row]) -> list[Claim]:
    """What the runs just made say; a run that failed makes its claims unmeasured."""
    done = {name: row for name, row in rows.items() if "output_tokens_per_s" in row}
    return [_reserving(done), _on_demand(done), _batched(done), _throughput(done)]


def unmeasured_claims() -> list[Claim]:
    """Claims that these runs cannot speak about."""
    return [
        Claim(claim, article, NOT_MEASURED, NOT_MEASURED)
        for claim, article in (
            ("users with the same prompt share its pages", '"massive" savings'),
            ("pages are moved to the CPU instead of whole sequences", "no stall"),
            ("fine at 8 AM, latency doubled by lunch", "2x latency"),
            ("when to use it and when to skip it", "six kinds of workload"),
        )
    ]


def speedup(rows: Mapping[str, Row], baseline: str) -> float | None:
    """Output tokens a second of `paged` over `baseline`; None if one of them did not run."""
    return _ratio(rows, "output_tokens_per_s", baseline)


def format_claims(claims: Sequence[Claim], width: int = 96) -> str:
    """The claims as text, numbered: what is claimed, the article's number and ours."""
    lines = []
    for number, claim in enumerate(claims, start=1):
        lines.append(f"{number:>2}. {claim.claim}")
        lines.append(f"      article  {claim.article}")
        tag = "" if claim.basis == NOT_MEASURED else f" [{claim.basis}]"
        lines += textwrap.wrap(
            claim.ours + tag,
            width,
            initial_indent=" " * 6 + "here     ",
            subsequent_indent=" " * 15,
        )
    return "\n".join(lines)


def _reserving(rows: Mapping[str, Row]) -> Claim:
    title, article = "reserving the longest possible sequence wastes memory", "93 % in its example"
    unfilled = _unfilled(rows, "max")
    if unfilled is not None:
        return Claim(title, article, unfilled, NOT_MEASURED)
    tokens, later, never, other = _shares(rows["max"])
    reserved = tokens + later + never
    ours = (
        f"max: {_percent(never / reserved)} of what it reserves is never used and "
        f"{_percent(later / reserved)} not yet; with what no reservation covers "
        f"({_percent(other)} of the pool), {_percent(1 - tokens)} of the pool holds no token"
    )
    return Claim(title, article, ours, MEASURED)


def _on_demand(rows: Mapping[str, Row]) -> Claim:
    title, article = "on-demand pages do not waste memory on unused capacity", "no waste"
    unfilled = _unfilled(rows, "paged")
    if unfilled is not None:
        return Claim(title, article, unfilled, NOT_MEASURED)
    row = rows["paged"]
    tokens, later, never, other = _shares(row)
    ours = (
        f"paged: {_percent(1 - tokens)} of the pool holds no token while requests wait for memory "
        f"({_percent(later + never)} the unfilled ends of last pages, {_percent(other)} free), at "
        f"the price of {row['preemptions']} preemptions"
    )
    return Claim(title, article, ours, MEASURED)


def _batched(rows: Mapping[str, Row]) -> Claim:
    title = "more requests run at once in the same memory"
    paper = PAPER_BATCHED["paged"] / PAPER_BATCHED["max"]
    article = f"no number; the paper's Fig 13 has {paper:.1f}x of max"
    unfilled = _unfilled(rows, "paged") or _unfilled(rows, "max")
    if unfilled is not None:
        return Claim(title, article, unfilled, NOT_MEASURED)
    ratio = _ratio(rows, "mean_batched_requests", "max")
    counts = ", ".join(f"{row['mean_batched_requests']:.1f} {name}" for name, row in rows.items())
    return Claim(title, article, f"{ratio:.2f}x of max ({counts})", MEASURED)


def _throughput(rows: Mapping[str, Row]) -> Claim:
    title, article = "throughput against contiguous allocation", "2x to 4x"
    ratios = {name: speedup(rows, name) for name in ("max", "pow2", "oracle")}
    said = [f"{ratio:.2f}x of {name}" for name, ratio in ratios.items() if ratio is not None]
    if not said:
        return Claim(title, article, NOT_MEASURED, NOT_MEASURED)
    ours = "paged gives " + ", ".join(said)
    if ratios["max"] is not None:
        paged, most = rows["paged"], rows["max"]
        ours += (
            f". It takes {paged['steps']:,} steps of {_mean_step_ms(paged):.0f} ms where max takes "
            f"{most['steps']:,} of {_mean_step_ms(most):.0f} ms"
        )
        if "cpu" in paged["device"].lower() and _mean_step_ms(paged) > _mean_step_ms(most):
            ours += (
                ": on a CPU a step takes longer the more requests share it, which on a GPU it "
                "hardly does, so less is gained here"
            )
    return Claim(title, article, ours, MEASURED)


def _unfilled(rows: Mapping[str, Row], allocator: str) -> str | None:
    """Why a run says nothing about full memory; None if it does."""
    if allocator not in rows:
        return NOT_MEASURED
    short, steps = rows[allocator]["steps_short_of_memory"], rows[allocator]["steps"]
    if short >= MIN_SHORT_SHARE * steps:
        return None
    return (
        f"not measured: under {allocator} requests waited for memory in only {short} of {steps} "
        "steps, so it was not scarce; serve more of them"
    )


def _ratio(rows: Mapping[str, Row], column: str, baseline: str) -> float | None:
    ours, theirs = rows.get("paged", {}).get(column), rows.get(baseline, {}).get(column)
    return ours / theirs if ours is not None and theirs else None


def _shares(row: Row) -> tuple[float, ...]:
    return tuple(row[f"{name}_share"] for name in WASTE_CATEGORIES)


def _mean_step_ms(row: Row) -> float:
    return 1e3 * row["wall_s"] / row["steps"]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _gb(num_bytes: int, digits: int) -> str:
    return f"{num_bytes / 1e9:.{digits}f} GB"
