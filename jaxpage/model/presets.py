"""Named model configurations, by the numbers of their published `config.json`."""

from jaxpage.config import ModelConfig, RopeScaling

_LLAMA31_ROPE = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
)

PRESETS: dict[str, ModelConfig] = {
    config.name: config
    for config in (
        ModelConfig(
            name="tiny", num_layers=2, embed_dim=32, mlp_dim=64, num_heads=6, num_kv_heads=2,
            head_dim=8, vocab_size=128, max_position=512, tie_embeddings=True, eos_ids=(2,),
        ),
        ModelConfig(
            name="smollm2-135m", num_layers=30, embed_dim=576, mlp_dim=1536, num_heads=9,
            num_kv_heads=3, head_dim=64, vocab_size=49_152, max_position=8192,
            rope_theta=100_000.0, norm_eps=1e-5, tie_embeddings=True, eos_ids=(2,),
        ),
        ModelConfig(
            name="llama-3.1-8b", num_layers=32, embed_dim=4096, mlp_dim=14_336, num_heads=32,
            num_kv_heads=8, head_dim=128, vocab_size=128_256, max_position=131_072,
            rope_theta=500_000.0, rope_scaling=_LLAMA31_ROPE, norm_eps=1e-5,
            eos_ids=(128_001, 128_008, 128_009),
        ),
        ModelConfig(
            name="llama-3.1-70b", num_layers=80, embed_dim=8192, mlp_dim=28_672, num_heads=64,
            num_kv_heads=8, head_dim=128, vocab_size=128_256, max_position=131_072,
            rope_theta=500_000.0, rope_scaling=_LLAMA31_ROPE, norm_eps=1e-5,
            eos_ids=(128_001, 128_008, 128_009),
        ),
    )
}  # fmt: skip
