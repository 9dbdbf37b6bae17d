"""Measured kernels, as rows that the cost model is calibrated on: from files of several formats.

Ours, which `experiments.measure_device` writes, has the columns of `COLUMNS`. The others are those
of Vidur (Agrawal et al. 2024, MLSys): linear and elementwise operations by number of tokens,
attention by batch, collectives by bytes, and what an engine's host takes by rows of a step. Files
may be compressed (`.gz`).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxpage.config import ConfigError, require
from jaxpage.sim import kernels
from jaxpage.sim.csv_files import read_rows
from jaxpage.sim.kernels import (
    ACTIVATION,
    ADD,
    ALL_REDUCE,
    DECODE,
    KINDS,
    LINEAR,
    NORM,
    PREFILL,
    ROPE,
    Work,
)
from jaxpage.sim.shapes import ModelShape

# Of a host between two steps: it schedules, prepares inputs, samples, reads outputs, and tells the
# processes of its devices.
HOST_COLUMNS = (
    "schedule_median", "prepare_inputs_e2e_median", "sampler_e2e_median",
    "process_model_outputs_median", "ray_comm_time_mean",
)  # fmt: skip
COLUMNS = ("device", "group", "kind", "tokens", "flops", "bytes", "items", "seconds")


class Rows(NamedTuple):
    """Measured kernels; `n` of them."""

    kinds: np.ndarray  # i32[n], of `KINDS`
    work: Work  # f32[n] each
    seconds: np.ndarray  # f32[n]
    tokens: np.ndarray  # i32[n], tokens computed
    groups: np.ndarray  # str[n], what a row is of: model, degree of parallelism, operation

    def take(self, chosen: np.ndarray) -> "Rows":
        """The rows `chosen: bool[n]`, or by number."""
        work = Work(*(np.asarray(column)[chosen] for column in self.work))
        rest = (self.seconds[chosen], self.tokens[chosen], self.groups[chosen])
        return Rows(self.kinds[chosen], work, *rest)


def joined(parts: Sequence[Rows], source: str) -> Rows:
    """All rows of the parts but those that took no time: less than their clock could tell.

    Raises:
      ConfigError: none is left.
    """
    columns = [
        np.concatenate(column)
        for column in zip(*((part.kinds, *part.work, *part[2:]) for part in parts), strict=True)
    ]
    rows = Rows(columns[0], Work(*columns[1:4]), *columns[4:])
    rows = rows.take(rows.seconds > 0)
    require(len(rows.kinds) > 0, f"{source}: no row with a positive time")
    return rows


def _rows(kind: int, work: Work, seconds: np.ndarray, tokens: np.ndarray, groups: list[str]):
    kinds = np.full(len(seconds), kind, np.int32)
    floats = Work(*(np.broadcast_to(np.asarray(x, np.float32), kinds.shape) for x in work))
    return Rows(
        kinds, floats, seconds.astype(np.float32), tokens.astype(np.int32), np.array(groups)
    )


class Table:
    """A CSV file by column; `where` of its records are kept."""

    def __init__(self, path: Path, columns: Sequence[str], **where: str):
        self.path = path
        records = [
            (line, record)
            for line, record in read_rows(path, columns)
            if all(record[name] == value for name, value in where.items())
        ]
        require(len(records) > 0, f"{path}: no record with {where}" if where else f"{path}: empty")
        self.lines = [line for line, _ in records]
        self.records = [record for _, record in records]

    def text(self, name: str) -> list[str]:
        return [record[name] for record in self.records]

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers that are not negative, `f64[n]`; 0 where nothing stands."""
        values = []
        for line, text in zip(self.lines, self.text(name), strict=True):
            try:
                value = float(text or 0)
            except (TypeError, ValueError):
                value = math.nan
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{self.path}:{line}: {name}={text!r} is not a number from 0 on")
            values.append(value)
        return np.asarray(values)


def read_measured(path: Path, device: str) -> Rows:
    """The rows of a file of ours that are of the device."""
    table = Table(path, COLUMNS, device=device)
    for line, kind in zip(table.lines, table.text("kind"), strict=True):
        require(kind in KINDS, f"{path}:{line}: kind {kind!r} is none of {', '.join(KINDS)}")
    kinds = np.asarray([KINDS.index(kind) for kind in table.text("kind")], np.int32)
    work = Work(*(table.numbers(name) for name in ("flops", "bytes", "items")))
    rows = _rows(0, work, table.numbers("seconds"), table.numbers("tokens"), table.text("group"))
    return joined([rows._replace(kinds=kinds)], str(path))


def read_vidur_linear(path: Path, device: str) -> Rows:
    """Products, norms, rotations, activations and sums of Vidur's MLP profile."""
    shape = ("num_tokens", "tp", "n_head", "n_kv_head", "n_embd", "n_expanded_embd")
    table = Table(path, ("device", "model", "use_gated_mlp", *shape), device=device)
    tokens, tp, heads, kv_heads, E, F = (table.numbers(name) for name in shape)
    head_dim = E / heads
    gates = np.asarray([2 if gated == "True" else 1 for gated in table.text("use_gated_mlp")])
    qkv, rotated = (heads + 2 * kv_heads) * head_dim / tp, (heads + kv_heads) * head_dim / tp
    works = {
        "attn_pre_proj": (LINEAR, kernels.product(tokens, E, qkv)),
        "attn_post_proj": (LINEAR, kernels.product(tokens, E / tp, E)),
        "mlp_up_proj": (LINEAR, kernels.product(tokens, E, gates * F / tp)),
        "mlp_down_proj": (LINEAR, kernels.product(tokens, F / tp, E)),
        "input_layernorm": (NORM, kernels.elementwise(tokens, 2 * E)),
        "attn_rope": (ROPE, kernels.elementwise(tokens, 2 * rotated)),
        "mlp_act": (ACTIVATION, kernels.elementwise(tokens, (gates + 1) * F / tp)),
        "add": (ADD, kernels.elementwise(tokens, 3 * E)),
    }
    parts = []
    for name, (kind, work) in works.items():
        groups = [
            f"{model} tp{degree} {name}"
            for model, degree in zip(table.text("model"), table.text("tp"), strict=True)
        ]
        seconds = table.numbers(f"{name}_median_ms") * 1e-3
        parts.append(_rows(kind, work, seconds, tokens, groups))
    return joined(parts, f"{path}, device {device!r}")


def read_vidur_attention(path: Path, shape: ModelShape, tp: int) -> Rows:
    """Attention of one layer of a model on one of `tp` devices, of Vidur's profile."""
    sizes = ("batch_size", "prefill_chunk_size", "kv_cache_size")
    parts = []
    for name, is_prefill, kind in (("decode", "False", DECODE), ("prefill", "True", PREFILL)):
        column = f"attn_{name}_median_ms"
        table = Table(path, (*sizes, "is_prefill", column), is_prefill=is_prefill)
        batch, chunk, before = (table.numbers(size) for size in sizes)
        queries = chunk if kind == PREFILL else np.ones_like(chunk)
        work = kernels.attention(
            batch * queries,
            batch * (queries * before + queries * (queries + 1) / 2),
            batch * (before + queries),
            batch * kernels.tiles_of(queries),
            num_heads=shape.num_heads / tp,
            num_kv_heads=shape.num_kv_heads / tp,
            head_dim=shape.head_dim,
        )
        groups = [f"{shape.name} tp{tp} attn_{name}"] * len(batch)
        parts.append(_rows(kind, work, table.numbers(column) * 1e-3, batch * queries, groups))
    return joined(parts, str(path))


def read_vidur_collectives(path: Path, node_type: str) -> Rows:
    """Sums over the devices of one host, of Vidur's network profile."""
    sizes = ("num_workers", "devices_per_node", "size_bytes", "median_over_ranks_ms")
    where = {"node_type": node_type, "collective": "all_reduce"}
    table = Table(path, (*where, *sizes), **where)
    workers, on_a_host, num_bytes, times_ms = (table.numbers(size) for size in sizes)
    work = kernels.all_reduce(num_bytes, workers)
    groups = [f"{node_type} {count}" for count in table.text("num_workers")]
    rows = _rows(ALL_REDUCE, work, times_ms * 1e-3, np.zeros_like(workers), groups)
    return joined([rows.take(workers == on_a_host)], f"{path}, {node_type!r}")


def read_vidur_host(path: Path, model: str, tp: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of steps and what the host took for each, `f64[n]` and `f64[n]` in seconds.

    Of Vidur's profile of CPU overheads, for a model by its full name on `tp` devices.
    """
    where = {"model_name": model, "tensor_parallel_degree": str(tp)}
    table = Table(path, (*where, "batch_size", *HOST_COLUMNS), **where)
    times_ms = np.sum([table.numbers(name) for name in HOST_COLUMNS], axis=0)
    return table.numbers("batch_size"), times_ms * 1e-3
