"""Foreign tensor names: where each lands in our parameters, and the copying of them, row by row.

The tables are the whole knowledge of the two formats. A weight's leading destination axes are
merged into the rows of the foreign matrix, so foreign shapes follow from ours.
"""

import fnmatch
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from jaxpage.checkpoint.errors import CheckpointError
from jaxpage.config import ModelConfig
from jaxpage.model.params import Params, is_spec, num_parameters, param_specs

BLOCK_BYTES = 32 * 2**20  # of a tensor that are in memory at once


class TensorSource(Protocol):
    """A foreign checkpoint: the shapes of its tensors, and some rows of one at a time."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Those of a tensor along its first axis, in a floating dtype."""
        ...


@dataclass(frozen=True)
class Rule:
    """Where one foreign tensor lands.

    `path` names the leaf, `part` the slice of a fused leaf (after the layer axis), `rows` the
    number of destination axes in the foreign tensor's first axis. `permuted` marks rows stored
    for interleaved rotary embeddings, as GGUF does for a Llama's queries and keys.
    """

    name: str
    path: tuple[str, ...]
    part: str = ""
    rows: int = 1
    permuted: bool = False


@dataclass(frozen=True)
class NameTable:
    """The rules of a format, the name of the output head, and names that carry no weights."""

    rules: tuple[Rule, ...]
    head: str
    ignored: tuple[str, ...] = ()  # patterns


HF_NAMES = NameTable(
    rules=(
        Rule("model.embed_tokens.weight", ("embed",)),
        Rule("model.layers.{}.input_layernorm.weight", ("layers", "attn_norm")),
        Rule("model.layers.{}.self_attn.q_proj.weight", ("layers", "qkv"), "query", rows=3),
        Rule("model.layers.{}.self_attn.k_proj.weight", ("layers", "qkv"), "key", rows=2),
        Rule("model.layers.{}.self_attn.v_proj.weight", ("layers", "qkv"), "value", rows=2),
        Rule("model.layers.{}.self_attn.o_proj.weight", ("layers", "out")),
        Rule("model.layers.{}.post_attention_layernorm.weight", ("layers", "mlp_norm")),
        Rule("model.layers.{}.mlp.gate_proj.weight", ("layers", "gate_up"), "gate"),
        Rule("model.layers.{}.mlp.up_proj.weight", ("layers", "gate_up"), "up"),
        Rule("model.layers.{}.mlp.down_proj.weight", ("layers", "down")),
        Rule("model.norm.weight", ("final_norm",)),
        Rule("lm_head.weight", ("head",)),
    ),
    head="lm_head.weight",
    ignored=("model.layers.*.self_attn.rotary_emb.inv_freq",),
)

GGUF_NAMES = NameTable(
    rules=(
        Rule("token_embd.weight", ("embed",)),
        Rule("blk.{}.attn_norm.weight", ("layers", "attn_norm")),
        Rule("blk.{}.attn_q.weight", ("layers", "qkv"), "query", rows=3, permuted=True),
        Rule("blk.{}.attn_k.weight", ("layers", "qkv"), "key", rows=2, permuted=True),
        Rule("blk.{}.attn_v.weight", ("layers", "qkv"), "value", rows=2),
        Rule("blk.{}.attn_output.weight", ("layers", "out")),
        Rule("blk.{}.ffn_norm.weight", ("layers", "mlp_norm")),
        Rule("blk.{}.ffn_gate.weight", ("layers", "gate_up"), "gate"),
        Rule("blk.{}.ffn_up.weight", ("layers", "gate_up"), "up"),
        Rule("blk.{}.ffn_down.weight", ("layers", "down")),
        Rule("output_norm.weight", ("final_norm",)),
        Rule("output.weight", ("head",)),
    ),
    head="output.weight",
    ignored=("rope_freqs.weight",),  # read with the configuration, which it must agree with
)

# Indices from the start: an array on disk takes no others.
_PARTS = {
    "query": lambda leaf: leaf[:, : leaf.shape[1] - 2],
    "key": lambda leaf: leaf[:, leaf.shape[1] - 2],
    "value": lambda leaf: leaf[:, leaf.shape[1] - 1],
    "gate": lambda leaf: leaf[0],
    "up": lambda leaf: leaf[1],
    "": lambda leaf: leaf,
}


@dataclass(frozen=True)
class _Landing:
    """One foreign tensor's place: its rule and the view of our leaf that it fills."""

    rule: Rule
    view: Any  # an array, in memory or on disk

    @property
    def foreign_shape(self) -> tuple[int, ...]:
        rows, rest = self.view.shape[: self.rule.rows], self.view.shape[self.rule.rows :]
        return (math.prod(rows), *((math.prod(rest),) if rest else ()))

    def fill(self, source: TensorSource, name: str, dtype: np.dtype) -> None:
        """Copies the tensor, a few rows at a time."""
        shape, permuted = self.view.shape, self.rule.permuted
        for start, stop in _blocks(shape, dtype):
            values = self.read(source, name, start, stop).astype(dtype, copy=False)
            if permuted:  # rows of a head go pair by pair; ours are halves
                dim = shape[self.rule.rows - 1]
                values = values.reshape(-1, dim // 2, 2, values.shape[-1]).swapaxes(1, 2)
            self.view[start:stop] = values.reshape(stop - start, *shape[1:])

    def read(self, source: TensorSource, name: str, start: int, stop: int) -> np.ndarray:
        """Of the foreign tensor what lands in `view[start:stop]`."""
        rows = math.prod(self.view.shape[1 : self.rule.rows])
        values = source.rows(name, start * rows, stop * rows)
        if values.dtype.name not in ("float64", "float32", "float16", "bfloat16"):
            raise CheckpointError(
                f"tensor {name} has dtype {values.dtype}; use a checkpoint in float32, float16 or "
                "bfloat16, or a GGUF"
            )
        return values


def check(config: ModelConfig, table: NameTable, source: TensorSource) -> None:
    """Looks whether a checkpoint of the format of `table` holds the model, and reads nothing.

    Raises:
      CheckpointError: naming every unknown, missing or misshapen tensor.
    """
    nothing = jax.tree.map(
        lambda spec: np.broadcast_to(np.float32(0), spec.shape),
        param_specs(config),
        is_leaf=is_spec,
    )
    landings = _landings(config, table, nothing)
    skipped = {table.head} if _has_tied_head(config, table, source) else set()
    _check_names(landings, source.shapes, skipped, table.ignored)
    num_filled = sum(landing.view.size for landing in landings.values())
    num_expected = num_parameters(config)
    if num_filled != num_expected:
        raise CheckpointError(f"the names fill {num_filled} of {num_expected} numbers")


def convert(
    config: ModelConfig,
    table: NameTable,
    source: TensorSource,
    dtype: np.dtype,
    leaves: Params,
    done: Collection[str] = (),
    note: Callable[[str], None] = lambda name: None,
) -> None:
    """Copies a foreign checkpoint into our parameters, one tensor after the other.

    Args:
      config: the model that the checkpoint must hold, see `check`.
      table: the names of the checkpoint's format.
      source: its tensors.
      dtype: float32 or bfloat16; values are rounded to it from the source's.
      leaves: arrays shaped as `param_specs(config)`, in memory or on disk.
      done: names of tensors that are there already.
      note: is told the name of each that is.
    """
    landings = _landings(config, table, leaves)
    for name, landing in landings.items():
        if name not in done:
            landing.fill(source, name, dtype)
            note(name)
    if _has_tied_head(config, table, source):
        head = _Landing(Rule(table.head, ("embed",)), leaves["embed"])
        _check_tied_head(head, source, table.head, dtype)


def _has_tied_head(config: ModelConfig, table: NameTable, source: TensorSource) -> bool:
    return config.tie_embeddings and table.head in source.shapes


def _blocks(shape: tuple[int, ...], dtype: np.dtype) -> Iterator[tuple[int, int]]:
    """Ranges along the first axis, of at most `BLOCK_BYTES`, or one."""
    step = max(BLOCK_BYTES // (math.prod(shape[1:]) * dtype.itemsize), 1)
    return ((start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _landings(config: ModelConfig, table: NameTable, params: Params) -> dict[str, _Landing]:
    landings = {}
    for rule in table.rules:
        leaf = params
        for key in rule.path:
            leaf = leaf.get(key) if isinstance(leaf, dict) else None
        if leaf is None:  # a head, where embeddings are tied
            continue
        assert not isinstance(leaf, dict)
        if "{}" not in rule.name:
            landings[rule.name] = _Landing(rule, leaf)
            continue
        for layer in range(config.num_layers):
            view = _PARTS[rule.part](leaf[layer])
            landings[rule.name.format(layer)] = _Landing(rule, view)
    return landings


def _check_names(
    landings: Mapping[str, _Landing],
    shapes: Mapping[str, tuple[int, ...]],
    skipped: set[str],
    ignored: tuple[str, ...],
) -> None:
    problems = [
        f"missing {name} {landing.foreign_shape}"
        for name, landing in landings.items()
        if name not in shapes
    ]
    for name, shape in shapes.items():
        if name in landings:
            expected = landings[name].foreign_shape
            if tuple(shape) != expected:
                problems.append(f"misshapen {name}: found {tuple(shape)}, expected {expected}")
        elif name not in skipped and not any(fnmatch.fnmatchcase(name, p) for p in ignored):
            problems.append(f"unknown {name} {tuple(shape)}")
    if problems:
        shown = "; ".join(problems[:12]) + ("; ..." if len(problems) > 12 else "")
        raise CheckpointError(
            f"{len(problems)} tensors do not fit the configuration: {shown}. Check that the "
            "configuration belongs to this checkpoint and that no shard is missing"
        )


def _check_tied_head(head: _Landing, source: TensorSource, name: str, dtype: np.dtype) -> None:
    embed, shape = head.view, source.shapes[name]
    same = tuple(shape) == tuple(embed.shape)
    for start, stop in _blocks(embed.shape, dtype) if same else ():
        values = head.read(source, name, start, stop).astype(dtype, copy=False)
        same = same and np.array_equal(values, np.asarray(embed[start:stop]))
    if not same:
        raise CheckpointError(
            f"{name} {tuple(shape)} differs from the embedding {tuple(embed.shape)} although the "
            "configuration ties them; set tie_word_embeddings to false"
        )
