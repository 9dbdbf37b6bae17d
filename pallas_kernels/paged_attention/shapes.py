"""Real shapes by name: what tests, benches, tuning and inspection all run on.

Heads of Llama 3.1 8B and 70B, the latter whole and as one device of 2, 4 or 8 sees it, of
SmolLM2-135M, of Phi-2, Phi-3-mini and the global layers of Gemma 3 12B for their head dims, and of
a multi-query and a multi-head model of the same width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention.config import QUANTISED


@dataclass(frozen=True)
class Shape:
    """One call of `paged_attention`, q in bfloat16, in its letters; `name` says it all."""

    name: str
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # D
    page_size: int  # S
    num_rows: int  # B
    context: int  # tokens of the longest row, this step's included
    prompt_tokens: int = 0  # of the first row, in this step; the others decode
    is_skewed: bool = False  # a few long rows and many short ones, not all the longest
    pages: str = "bfloat16"  # dtype of KV; one of 8 bits comes with scales

    @property
    def is_ragged(self) -> bool:
        """Whether the call takes `cu_q_lens`."""
        return self.prompt_tokens > 0

    @property
    def num_tokens(self) -> int:
        """Queries of the step, `T`."""
        return max(self.prompt_tokens, 1) + self.num_rows - 1

    @property
    def pages_per_row(self) -> int:
        """Columns of the page table, `M`."""
        return -(-self.context // self.page_size)

    @property
    def num_pages(self) -> int:
        """Pages of the pool, `P`: enough for the rows, and a tenth that nobody owns."""
        live = int(np.sum(-(-self.lengths() // self.page_size)))
        return live + live // 10 + 1

    def lengths(self) -> np.ndarray:
        """KV tokens of each row, i32[B]; skewed ones are log-normal, as in recorded traces."""
        if not self.is_skewed:
            return np.full(self.num_rows, self.context, np.int32)
        drawn = np.random.default_rng(0).lognormal(0.0, 1.0, self.num_rows)
        scaled = np.ceil(drawn / drawn.max() * self.context).astype(np.int32)
        scaled[0] = max(scaled[0], self.prompt_tokens)
        return scaled

    def cu_q_lens(self) -> np.ndarray | None:
        """Running sum of the rows' query counts, i32[B + 1]; None for decode."""
        if not self.is_ragged:
            return None
        q_lens = np.ones(self.num_rows, np.int32)
        q_lens[0] = self.prompt_tokens
        return np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)

    @property
    def is_quantised(self) -> bool:
        """Whether the pages come with scales."""
        return self.pages in QUANTISED

    def least_bytes(self) -> int:
        """Bytes that any algorithm must move: each live KV token, each query and output, once."""
        lengths = self.lengths()
        kv = 2 * int(lengths.sum()) * self.num_kv_heads * self.head_dim
        kv *= jnp.dtype(self.pages).itemsize
        if self.is_quantised:
            kv += 2 * int(np.sum(-(-lengths // self.page_size))) * self.num_kv_heads * 4
        return kv + 2 * self.num_tokens * self.num_heads * self.head_dim * 2

    def arguments(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The call's arrays by name, as shapes: nothing is allocated."""
        pages = (self.num_pages, self.num_kv_heads, self.page_size, self.head_dim)
        shapes: dict[str, tuple[tuple[int, ...], object]] = {
            "q": ((self.num_tokens, self.num_heads, self.head_dim), jnp.bfloat16),
            "k_pages": (pages, self.pages),
            "v_pages": (pages, self.pages),
            "lengths": ((self.num_rows,), jnp.int32),
            "page_indices": ((self.num_rows, self.pages_per_row), jnp.int32),
        }
        if self.is_ragged:
            shapes["cu_q_lens"] = ((self.num_rows + 1,), jnp.int32)
        if self.is_quantised:
            shapes["k_scales"] = shapes["v_scales"] = (pages[:2], jnp.float32)
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}

    def make(self, seed: int = 0) -> dict[str, jax.Array]:
        """Random arrays for the call; pages shuffled over the pool."""
        rng = np.random.default_rng(seed)
        arguments, found = self.arguments(), {}
        keys = iter(jax.random.split(jax.random.key(seed), 5))
        for name in ("q", "k_pages", "v_pages"):
            wanted = arguments[name]
            drawn = jax.random.normal(next(keys), wanted.shape, jnp.bfloat16)
            # Quantised, most of the range is used, and nothing is out of it.
            drawn = (30 * drawn).clip(-127, 127) if wanted.dtype.name in QUANTISED else drawn
            found[name] = drawn.astype(wanted.dtype)
        if self.is_quantised:
            for name in ("k_scales", "v_scales"):
                found[name] = jax.random.uniform(next(keys), arguments[name].shape, maxval=1 / 15)
        num_live = -(-self.lengths() // self.page_size)
        table = np.full((self.num_rows, self.pages_per_row), self.num_pages, np.int32)
        shuffled = rng.permutation(self.num_pages).astype(np.int32)
        is_live = np.arange(self.pages_per_row)[None] < num_live[:, None]
        table[is_live] = shuffled[: num_live.sum()]
        found |= {"lengths": jnp.asarray(self.lengths()), "page_indices": jnp.asarray(table)}
        if self.is_ragged:
            found["cu_q_lens"] = jnp.asarray(self.cu_q_lens())
        return found


# H, K, D.
HEADS = {
    "llama3.1-8b": (32, 8, 128),
    "llama3.1-70b": (64, 8, 128),
    "llama3.1-70b-tp2": (32, 4, 128),
    "llama3.1-70b-tp4": (16, 2, 128),
    "llama3.1-70b-tp8": (8, 1, 128),
    "smollm2-135m": (9, 3, 64),
    "phi2": (32, 32, 80),
    "phi3-mini": (32, 32, 96),
    "gemma3-12b": (16, 8, 256),
    "mqa": (32, 1, 128),
    "mha": (32, 32, 128),
}


def _decode(
    heads: str, num_rows: int, context: int, page_size: int, skew: bool = False,
    pages: str = "bfloat16",
) -> Shape:  # fmt: skip
    name = f"{heads}-decode-b{num_rows}-c{context}-p{page_size}{'-skewed' if skew else ''}"
    return _named(name, Shape("", *HEADS[heads], page_size, num_rows, context, 0, skew, pages))


def _mixed(
    heads: str, prompt: int, num_rows: int, context: int, page_size: int, pages: str = "bfloat16"
) -> Shape:
    name = f"{heads}-mixed{prompt}-b{num_rows}-c{context}-p{page_size}"
    shape = Shape("", *HEADS[heads], page_size, num_rows, context, prompt, pages=pages)
    return _named(name, shape)


def _named(name: str, shape: Shape) -> Shape:
    return replace(shape, name=f"{name}-{shape.pages}" if shape.is_quantised else name)


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        # Llama 3.1 70B over batch, context, page and devices.
        _decode("llama3.1-70b", 1, 64, 16),
        _decode("llama3.1-70b", 1, 32_768, 16),
        _decode("llama3.1-70b", 32, 2_048, 16),
        _decode("llama3.1-70b", 32, 2_048, 64),
        _decode("llama3.1-70b", 32, 2_048, 128),
        _decode("llama3.1-70b", 64, 4_096, 16),
        _decode("llama3.1-70b", 256, 4_096, 16, skew=True),
        _decode("llama3.1-70b-tp2", 64, 4_096, 16),
        _decode("llama3.1-70b-tp4", 128, 4_096, 16),
        _decode("llama3.1-70b-tp8", 256, 4_096, 16),
        _decode("llama3.1-8b", 32, 2_048, 16),
        _decode("llama3.1-8b", 128, 8_192, 64, skew=True),
        _decode("smollm2-135m", 32, 512, 16),
        _decode("mqa", 64, 4_096, 16),
        _decode("mha", 32, 2_048, 16),
        # Other head dims, and KV of 8 bits.
        _decode("phi2", 32, 2_048, 32),
        _decode("phi3-mini", 32, 4_096, 16),
        _decode("gemma3-12b", 32, 8_192, 16),
        _decode("llama3.1-70b", 64, 4_096, 16, pages="int8"),
        _decode("llama3.1-70b", 64, 4_096, 16, pages="float8_e4m3fn"),
        _decode("gemma3-12b", 32, 8_192, 64, pages="int8"),
        # A prompt's chunk among rows that decode.
        _mixed("llama3.1-70b", 512, 1, 512, 16),
        _mixed("llama3.1-70b", 512, 32, 4_096, 16),
        _mixed("llama3.1-70b-tp8", 2_048, 64, 8_192, 64),
        _mixed("llama3.1-8b", 512, 64, 2_048, 16),
        _mixed("smollm2-135m", 256, 32, 512, 16),
        _mixed("gemma3-12b", 512, 32, 4_096, 16),
        _mixed("llama3.1-8b", 512, 64, 2_048, 16, pages="int8"),
        _mixed("llama3.1-8b", 512, 64, 2_048, 16, pages="float8_e4m3fn"),
    )
}


def choose_shapes(names: Sequence[str]) -> list[Shape]:
    """The shapes of these names, or with these parts of names; "all" is all.

    Raises:
      ValueError: no shape has such a name.
    """
    chosen: dict[str, Shape] = {}
    for wanted in names or [""]:
        found = [n for n in SHAPES if wanted == "all" or (wanted and wanted in n)]
        found = [wanted] if wanted in SHAPES else found
        if not found:
            raise ValueError(f"--shape={wanted} is in no name: choose of {', '.join(SHAPES)}")
        chosen |= {name: SHAPES[name] for name in found}
    return list(chosen.values())
