"""What a run was worth: rates, latency, and where the KV memory was, from its step records."""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxpage.config import EngineConfig

WASTE_CATEGORIES = ("token_states", "reservation", "internal", "external")


def steps_short_of_memory(
    records: Sequence[Mapping[str, int]], config: EngineConfig
) -> list[Mapping[str, int]]:
    """The steps in which requests waited although a slot and token budget were left: for memory.

    In the others they wait for the step before to be over, however much memory is free: while the
    prompts of a full queue are computed, say.
    """
    return [
        record
        for record in records
        if record["num_waiting"] > 0
        and record["num_running"] < config.num_slots
        and record["num_tokens"] < config.token_budget
    ]


def waste_shares(records: Sequence[Mapping[str, int]]) -> dict[str, float]:
    """Mean share of the pool in each of the paper's four categories, over the steps.

    Memory that is free for want of requests is in no category.
    """
    if not records:
        return dict.fromkeys(WASTE_CATEGORIES, 0.0)
    columns = (*WASTE_CATEGORIES, "cached", "idle")
    pool = sum(records[0][column] for column in columns)
    return {
        name: float(np.mean([record[name] for record in records])) / pool
        for name in WASTE_CATEGORIES
    }


def summarise(
    records: Sequence[Mapping[str, int]],
    config: EngineConfig,
    *,
    wall_s: float,
    num_prompt_tokens: int,
    num_output_tokens: int,
    normalized_latencies_s: Sequence[float],
) -> dict[str, float]:
    """One row of results.

    Batched requests and shares of memory are means over `steps_short_of_memory`, as in the paper,
    where load keeps memory full; over all steps if there is none.
    """
    short = steps_short_of_memory(records, config)
    full = short or records
    latencies = np.asarray(normalized_latencies_s, np.float64)
    return {
        "output_tokens_per_s": num_output_tokens / wall_s,
        "total_tokens_per_s": (num_prompt_tokens + num_output_tokens) / wall_s,
        "wall_s": wall_s,
        "steps": len(records),
        "steps_short_of_memory": len(short),
        "mean_batched_requests": float(np.mean([record["num_running"] for record in full])),
        "normalized_latency_s_per_token": float(np.mean(latencies)) if len(latencies) else 0.0,
        "preemptions": sum(record["num_preempted"] for record in records),
        "output_tokens": num_output_tokens,
        "prompt_tokens": num_prompt_tokens,
        **{f"{name}_share": share for name, share in waste_shares(full).items()},
    }
