"""Frozen, hashable configuration: everything static that a compiled program depends on.

Letters, as everywhere: `B` slots, `T` tokens a step, `P` pages, `M` pages a slot, `S` tokens a
page, `L` layers, `H` query heads, `K` KV heads, `G = H / K`, `D` head dim, `E` model dim,
`F` MLP dim, `V` vocabulary, `R` requests held, `N = M * S` tokens a request can have.
"""

import math
from dataclasses import dataclass

import numpy as np
from jax.typing import DTypeLike


class ConfigError(ValueError):
    """A setting that cannot work; the message shows the value and the remedy."""


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency scaling of rotary embeddings (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama family: RMSNorm, RoPE, grouped-query attention, SwiGLU."""

    name: str
    num_layers: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self):
        for field in ("num_layers", "embed_dim", "mlp_dim", "num_heads", "num_kv_heads",
                      "head_dim", "vocab_size", "max_position"):  # fmt: skip
            value = getattr(self, field)
            require(value > 0, f"{self.name}: {field}={value} must be positive")
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"{self.name}: num_heads={self.num_heads} must be a multiple of "
            f"num_kv_heads={self.num_kv_heads}",
        )
        require(self.head_dim % 2 == 0, f"{self.name}: head_dim={self.head_dim} must be even")

    @property
    def group_size(self) -> int:
        """Query heads that share a KV head, `G`."""
        return self.num_heads // self.num_kv_heads

    def kv_bytes_per_token(self, dtype: DTypeLike) -> int:
        """Bytes of keys and values, over all layers, that one token occupies."""
        values = 2 * self.num_layers * self.num_kv_heads * self.head_dim
        return values * np.dtype(dtype).itemsize


PREEMPTION_MODES = ("recompute", "swap", "fine", "auto")


@dataclass(frozen=True)
class Prices:
    """What `preemption="auto"` weighs, in seconds: to compute again, and to move."""

    token_s: float  # computing a token in a full step, but for its attention
    pair_s: float  # attention of a token to one that it sees
    page_s: float  # moving a page one way

    def __post_init__(self):
        for field in ("token_s", "pair_s", "page_s"):
            value = getattr(self, field)
            require(
                math.isfinite(value) and value >= 0,
                f"prices: {field}={value} must be a number from 0 on",
            )


@dataclass(frozen=True)
class EngineConfig:
    """Capacities of a serving state. All contents are data; only these compile.

    `token_buckets` are the step sizes that get a compiled branch, ascending; the last is the
    step's token budget. `headroom_pages` is how many pages beyond those of its known tokens each
    running sequence must be able to take, as far as it can come to need them, when another is
    admitted: who is let in then is not preempted a few tokens later. `max_beams` is the greatest
    width of a beam search, 1 for none. `preemption` is a mode of `scheduling.preemption`; all but
    `recompute` need `host_pages`, to which cached pages go as well, and `auto` needs `prices`.
    At most `transfer_budget` pages move a step each way, 0 for as many as a step can need; whole
    sequences know no budget, nor do cached pages of which the host has what follows.
    With `static_batches` none is admitted while a sequence runs, as before continuous batching.
    With `zero_freed` a page's bytes are overwritten with zeros when it has become free.
    `log_steps` is how many step records the device holds before the host must read them.
    """

    num_slots: int
    num_pages: int
    page_size: int
    pages_per_slot: int
    num_requests: int
    token_buckets: tuple[int, ...]
    headroom_pages: int = 0
    max_beams: int = 1
    preemption: str = "recompute"
    host_pages: int = 0
    transfer_budget: int = 0
    prices: Prices | None = None
    static_batches: bool = False
    zero_freed: bool = False
    log_steps: int = 64
    record_page_map: bool = False
    batch_invariant: bool = False

    def __post_init__(self):
        for field in ("num_slots", "num_pages", "page_size", "pages_per_slot", "num_requests",
                      "log_steps"):  # fmt: skip
            value = getattr(self, field)
            require(value > 0, f"{field}={value} must be positive")
        require(
            self.headroom_pages >= 0,
            f"headroom_pages={self.headroom_pages} must not be negative: 0 keeps none",
        )
        require(
            1 <= self.max_beams <= self.num_slots,
            f"max_beams={self.max_beams} must be from 1 to num_slots={self.num_slots}",
        )
        require(
            self.preemption in PREEMPTION_MODES,
            f"preemption={self.preemption!r} must be one of {', '.join(PREEMPTION_MODES)}",
        )
        require(
            self.host_pages > 0 if self.preemption != "recompute" else self.host_pages >= 0,
            f"host_pages={self.host_pages} with preemption={self.preemption!r}: all modes but "
            "recompute need pages on the host",
        )
        require(
            (self.prices is not None) == (self.preemption == "auto"),
            f"prices={self.prices} with preemption={self.preemption!r}: auto needs them, and no "
            "other mode has a use for them",
        )
        require(
            self.transfer_budget >= 0,
            f"transfer_budget={self.transfer_budget} must not be negative: 0 sets no limit",
        )
        require(
            self.transfer_budget == 0 or (self.host_pages > 0 and self.preemption != "swap"),
            f"transfer_budget={self.transfer_budget} with preemption={self.preemption!r} and "
            f"host_pages={self.host_pages}: it needs pages on the host, and no whole sequences",
        )
        buckets = self.token_buckets
        require(
            len(buckets) > 0 and min(buckets) > 0 and list(buckets) == sorted(set(buckets)),
            f"token_buckets={buckets} must be positive, ascending and distinct",
        )
        require(
            max(buckets) >= self.num_slots,
            f"token_buckets={buckets}: the last must be at least num_slots={self.num_slots}, "
            "so that every running sequence can decode in one step",
        )
        require(
            not self.batch_invariant or len(buckets) == 1,
            f"batch_invariant needs one token bucket, got token_buckets={buckets}",
        )

    @property
    def max_seq_len(self) -> int:
        """Tokens that one sequence can have, `N = M * S`."""
        return self.pages_per_slot * self.page_size

    @property
    def most_new_pages(self) -> int:
        """Pages that one step can need."""
        # A row of n tokens starts at most ceil(n / S) pages, so all rows start budget / S and one
        # each; and a row copies one page at most.
        most = self.token_budget // self.page_size + 2 * self.num_slots
        return min(most, self.num_pages)

    @property
    def moves_pages(self) -> bool:
        """Whether sequences that make way lose single pages to the host."""
        return self.preemption in ("fine", "auto")

    @property
    def moves_at_most(self) -> int:
        """Pages that may come back from the host in one step, or leave for it to make way."""
        most = self.most_new_pages if self.moves_pages else self.host_pages
        return min(self.transfer_budget or most, self.host_pages)

    @property
    def token_budget(self) -> int:
        """Tokens that one step can compute."""
        return self.token_buckets[-1]
