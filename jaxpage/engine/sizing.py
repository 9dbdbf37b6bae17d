"""Capacities from what a user knows: a budget in bytes, the longest request, how many at once."""

from jax.typing import DTypeLike

from jaxpage.config import EngineConfig, ModelConfig, Prices, require
from jaxpage.paging.kv_pool import num_pages_in, page_bytes

# Steps that bring prompts. Of 512 tokens CPUs multiply at their full rate; 256 is for the prompt
# that joins when a sequence has ended, which would pay for 512 as well.
PREFILL_TOKENS = (256, 512)


def token_buckets(num_slots: int, max_seq_len: int) -> tuple[int, ...]:
    """Step sizes: four rows, a third, two thirds, or all generate; little prompt; much prompt.

    Four, for the last few requests and for people who ask one by one. Thirds are rounded up to
    fours, the height of a CPU product's tile. A bucket beyond what all slots could ever bring at
    once is left out.
    """
    most = num_slots * max_seq_len
    thirds = (min(-(-num_slots * n // 12) * 4, num_slots) for n in (1, 2))
    prompts = (min(size, most) for size in PREFILL_TOKENS)
    return tuple(
        sorted(
            {min(4, num_slots), *thirds, num_slots, *(size for size in prompts if size > num_slots)}
        )
    )


def engine_config(
    model: ModelConfig,
    *,
    max_seq_len: int,
    num_slots: int,
    num_requests: int,
    page_size: int,
    kv_dtype: DTypeLike,
    num_pages: int | None = None,
    kv_bytes: int | None = None,
    batch_invariant: bool = False,
    max_beams: int = 1,
    preemption: str = "recompute",
    host_bytes: int | None = None,
    transfer_budget: int = 0,
    prices: Prices | None = None,
    zero_freed: bool = False,
    record_page_map: bool = False,
    pool_factor: int = 1,
) -> EngineConfig:
    """The configuration for sequences of at most `max_seq_len` tokens.

    The pool has `num_pages` pages or what `kv_bytes` bytes hold; by default enough for every slot
    to be full, so that nothing is ever preempted. `pool_factor` multiplies it, for experiments.
    The host has pages for `host_bytes` bytes, for those who wait and for a prefix cache; by default
    as many as the pool if `preemption` needs any, and none if not. With `batch_invariant` every
    step is of one size: all slots, and as many prompt tokens.

    Raises:
      ConfigError: the budget holds no page, or a number is out of range.
    """
    require(page_size > 0, f"page_size={page_size} must be positive")
    require(num_slots > 0, f"num_slots={num_slots} must be positive")
    require(max_seq_len > 0, f"max_seq_len={max_seq_len} must be positive")
    pages_per_slot = -(-max_seq_len // page_size)
    if kv_bytes is not None:
        require(num_pages is None, "give num_pages or kv_bytes, not both")
        num_pages = _pages_in("kv_bytes", kv_bytes, model, page_size, kv_dtype)
    if num_pages is None:
        num_pages = num_slots * pages_per_slot
    host_pages = 0 if preemption == "recompute" else num_pages * pool_factor
    if host_bytes is not None:
        host_pages = _pages_in("host_bytes", host_bytes, model, page_size, kv_dtype)
    buckets = token_buckets(num_slots, pages_per_slot * page_size)
    return EngineConfig(
        num_slots=num_slots,
        num_pages=num_pages * pool_factor,
        page_size=page_size,
        pages_per_slot=pages_per_slot,
        num_requests=num_requests,
        token_buckets=(2 * num_slots,) if batch_invariant else buckets,
        headroom_pages=1,
        max_beams=max_beams,
        preemption=preemption,
        host_pages=host_pages,
        transfer_budget=transfer_budget,
        prices=prices,
        zero_freed=zero_freed,
        record_page_map=record_page_map,
        batch_invariant=batch_invariant,
    )


def _pages_in(
    name: str, num_bytes: int, model: ModelConfig, page_size: int, kv_dtype: DTypeLike
) -> int:
    """Pages that the budget `name` holds, at least one."""
    num_pages = num_pages_in(num_bytes, model, page_size, kv_dtype)
    require(
        num_pages > 0,
        f"{name}={num_bytes} is less than one page of {page_size} tokens "
        f"({page_bytes(model, page_size, kv_dtype)} bytes): raise it",
    )
    return num_pages
