"""What a run was worth: rates, latency, and where the KV memory was, from its step records."""

from collections.abc import Mapping, Sequence

import numpy as np

WASTE_CATEGORIES = ("token_states", "reservation", "internal", "external")


def waste_shares(records: Sequence[Mapping[str, int]]) -> dict[str, float]:
    """Mean share of the pool in each of the paper's four categories, over the steps.

    Only steps with requests waiting count, as in the paper, where load keeps the system full; if
    there is none, all steps do, and memory that is free for want of requests is in no category.
    """
    counted = [record for record in records if record["num_waiting"] > 0] or list(records)
    if not counted:
        return dict.fromkeys(WASTE_CATEGORIES, 0.0)
    columns = (*WASTE_CATEGORIES, "idle")
    pool = sum(counted[0][column] for column in columns)
    return {
        name: float(np.mean([record[name] for record in counted])) / pool
        for name in WASTE_CATEGORIES
    }


def summarise(
    records: Sequence[Mapping[str, int]],
    *,
    wall_s: float,
    num_prompt_tokens: int,
    num_output_tokens: int,
    normalized_latencies_s: Sequence[float],
) -> dict[str, float]:
    """One row of results. Batched requests are a mean over steps with requests waiting."""
    full = [record for record in records if record["num_waiting"] > 0] or list(records)
    latencies = np.asarray(normalized_latencies_s, np.float64)
    return {
        "output_tokens_per_s": num_output_tokens / wall_s,
        "total_tokens_per_s": (num_prompt_tokens + num_output_tokens) / wall_s,
        "wall_s": wall_s,
        "steps": len(records),
        "waiting_steps": sum(record["num_waiting"] > 0 for record in records),
        "mean_batched_requests": float(np.mean([record["num_running"] for record in full])),
        "normalized_latency_s_per_token": float(np.mean(latencies)) if len(latencies) else 0.0,
        "preemptions": sum(record["num_preempted"] for record in records),
        "output_tokens": num_output_tokens,
        "prompt_tokens": num_prompt_tokens,
        **{f"{name}_share": share for name, share in waste_shares(records).items()},
    }
