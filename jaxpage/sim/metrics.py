"""What a run was worth: rates, latency, and where the KV memory was, from its step records.

Steps are columns, an array of a number a step for each field of `StepRecord`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxpage.config import EngineConfig
from jaxpage.scheduling.accounting import StepRecord

WASTE_CATEGORIES = ("token_states", "reservation", "internal", "external")

Steps = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Timeline:
    """When requests came, had their first token and were done; all `f64[n]`, seconds."""

    arrival_s: np.ndarray
    first_token_s: np.ndarray
    finish_s: np.ndarray
    output_lens: np.ndarray  # tokens; of several samples, of each

    @property
    def first_token_latency_s(self) -> np.ndarray:
        """TTFT: from arrival to the first output token."""
        return self.first_token_s - self.arrival_s

    @property
    def token_latency_s(self) -> np.ndarray:
        """TPOT: the mean time between output tokens after the first; 0 where there is one."""
        return (self.finish_s - self.first_token_s) / np.maximum(self.output_lens - 1, 1)

    @property
    def normalized_latency_s(self) -> np.ndarray:
        """Latency by output token: the paper's metric (its section 6.1)."""
        return (self.finish_s - self.arrival_s) / self.output_lens


def columns_of(records: Sequence[Mapping[str, int]]) -> Steps:
    """Steps from records, one a step."""
    names = records[0] if records else StepRecord._fields
    return {name: np.array([record[name] for record in records]) for name in names}


def steps_short_of_memory(steps: Steps, config: EngineConfig) -> np.ndarray:
    """Steps in which requests waited although a slot and token budget were left, `bool[n]`.

    They waited for memory. In the others they wait for the step before to be over, however much
    memory is free: while the prompts of a full queue are computed, say.
    """
    waits, has_slot = steps["num_waiting"] > 0, steps["num_running"] < config.num_slots
    return waits & has_slot & (steps["num_tokens"] < config.token_budget)


def waste_shares(steps: Steps) -> dict[str, float]:
    """Mean share of the pool in each of the paper's four categories, over the steps.

    Memory that is free for want of requests is in no category.
    """
    if len(steps["idle"]) == 0:
        return dict.fromkeys(WASTE_CATEGORIES, 0.0)
    pool = sum(steps[column][0] for column in (*WASTE_CATEGORIES, "cached", "idle"))
    return {name: float(np.mean(steps[name]) / pool) for name in WASTE_CATEGORIES}


def steps_of_note(steps: Steps, config: EngineConfig) -> Steps:
    """The steps short of memory, as in the paper, where load keeps it full; all if none is."""
    short = steps_short_of_memory(steps, config)
    return {name: column[short] for name, column in steps.items()} if short.any() else steps


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

    Batched requests and shares of memory are means over `steps_of_note`.
    """
    steps = columns_of(records)
    full = steps_of_note(steps, config)
    latencies = np.asarray(normalized_latencies_s, np.float64)
    return {
        "output_tokens_per_s": num_output_tokens / wall_s,
        "total_tokens_per_s": (num_prompt_tokens + num_output_tokens) / wall_s,
        "wall_s": wall_s,
        "steps": len(records),
        "steps_short_of_memory": int(np.sum(steps_short_of_memory(steps, config))),
        "mean_batched_requests": float(np.mean(full["num_running"])) if records else 0.0,
        "normalized_latency_s_per_token": float(np.mean(latencies)) if len(latencies) else 0.0,
        "preemptions": int(np.sum(steps["num_preempted"])),
        "output_tokens": num_output_tokens,
        "prompt_tokens": num_prompt_tokens,
        **{f"{name}_share": share for name, share in waste_shares(full).items()},
    }


def latency_summary(
    timeline: Timeline, slo_first_token_s: float = np.inf, slo_token_s: float = np.inf
) -> dict[str, float]:
    """Means and percentiles over requests, seconds; goodput is requests a second within both SLOs.

    Rates are of the time from the first arrival to the last finish.
    """
    columns = {
        "ttft": timeline.first_token_latency_s,
        "tpot": timeline.token_latency_s,
        "normalized_latency": timeline.normalized_latency_s,
        "latency": timeline.finish_s - timeline.arrival_s,
    }
    span_s = float(np.max(timeline.finish_s) - np.min(timeline.arrival_s))
    is_good = (columns["ttft"] <= slo_first_token_s) & (columns["tpot"] <= slo_token_s)
    rows = {}
    for name, seconds in columns.items():
        rows[f"{name}_mean_s"] = float(np.mean(seconds))
        for percent in (50, 90, 99):
            rows[f"{name}_p{percent}_s"] = float(np.percentile(seconds, percent))
    return rows | {
        "requests": len(timeline.arrival_s),
        "span_s": span_s,
        "requests_per_s": len(timeline.arrival_s) / span_s,
        "output_tokens_per_s": float(np.sum(timeline.output_lens)) / span_s,
        "goodput_per_s": float(np.sum(is_good)) / span_s,
    }
