"""Models as the cost model sees them: sizes of products, and bytes; published `config.json`s."""

from dataclasses import dataclass

from jaxpage.config import ModelConfig


@dataclass(frozen=True)
class ModelShape:
    """A decoder of which only sizes are known."""

    name: str
    num_layers: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    num_mlp_inputs: int = 2  # products into the MLP: 2 where one is a gate
    itemsize: int = 2  # bytes of a weight, and of an activation
    kv_itemsize: int = 2

    @property
    def num_params(self) -> int:
        """Weights of all products, and of the embedding where it is not the head's."""
        E, D = self.embed_dim, self.head_dim
        attention = 2 * E * (self.num_heads + self.num_kv_heads) * D
        mlp = (self.num_mlp_inputs + 1) * E * self.mlp_dim
        return self.num_layers * (attention + mlp) + 2 * self.vocab_size * E

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.kv_itemsize


def shape_of(config: ModelConfig, itemsize: int = 2, kv_itemsize: int = 2) -> ModelShape:
    """The shape of a model that can be run."""
    return ModelShape(
        config.name,
        config.num_layers,
        config.embed_dim,
        config.mlp_dim,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.vocab_size,
        itemsize=itemsize,
        kv_itemsize=kv_itemsize,
    )


def _opt(name: str, num_layers: int, embed_dim: int, num_heads: int) -> ModelShape:
    """Zhang et al. 2022, table 1."""
    head_dim = embed_dim // num_heads
    sizes = (num_layers, embed_dim, 4 * embed_dim, num_heads, num_heads, head_dim)
    return ModelShape(name, *sizes, vocab_size=50_272, num_mlp_inputs=1)


SHAPES: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        _opt("opt-13b", 40, 5120, 40),
        _opt("opt-66b", 64, 9216, 72),
        _opt("opt-175b", 96, 12_288, 96),
        ModelShape("llama-13b", 40, 5120, 13_824, 40, 40, 128, 32_000),
        ModelShape("llama-2-70b", 80, 8192, 28_672, 64, 8, 128, 32_000),
        ModelShape("llama-3.1-8b", 32, 4096, 14_336, 32, 8, 128, 128_256),
        ModelShape("llama-3.1-70b", 80, 8192, 28_672, 64, 8, 128, 128_256),
    )
}
