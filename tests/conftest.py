"""The tiny configs that tests share."""

import pytest

from diffusiongemma.models import AttentionConfig, ModelConfig, MoEConfig


@pytest.fixture
def tiny_config() -> ModelConfig:
    """A dense 3-layer denoiser: one scanned pattern and a tail, windows shorter than rows."""
    return ModelConfig(
        vocab_size=37,
        width=32,
        num_heads=4,
        ffn_width=48,
        layer_types=('sliding', 'full', 'sliding'),
        sliding=AttentionConfig(num_kv_heads=2, head_dim=8, window=5),
        full=AttentionConfig(
            num_kv_heads=1, head_dim=16, rope_theta=1e6, rope_fraction=0.25, value_is_key=True
        ),
        canvas_length=4,
    )


@pytest.fixture
def tiny_moe_config(tiny_config) -> ModelConfig:
    """The same with routed experts."""
    return tiny_config.replace(moe=MoEConfig(num_experts=4, top_k=2, expert_width=16))
