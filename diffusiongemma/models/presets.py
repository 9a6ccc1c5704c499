"""Text backbones of the published Gemma models, as values of `ModelConfig`.

A preset is an architecture without weights: `Gemma(GEMMA3_1B)` is the autoregressive model, and
`GEMMA3_1B.replace(canvas_length=64)` is the config of a DiffusionGemma with the same backbone.
Vision and audio towers are not included.

Sources, unless a preset names another one:
- Gemma 3: `gemma/gm/nn/_gemma.py` of github.com/google-deepmind/gemma. The files on Hugging Face
  have 64 more rows of embeddings (262,208) from 4B on, for image tokens: `load_model` follows the
  checkpoint.
- Gemma 4: `gemma/gm/nn/gemma4/_gemma4.py` there, and `Gemma4TextConfig` of transformers 5.17.0.
- `max_positions`: the context lengths of the technical report of Gemma 3 (arXiv:2503.19786: 32K for
  1B, 128K for the others) and of the model cards of Gemma 3 270M (32K), Gemma 4 (128K for E2B and
  E4B, 256K for the others; ai.google.dev/gemma/docs/core) and DiffusionGemma (256K).
"""

from typing import Any

from diffusiongemma.models.config import (
    FULL,
    SLIDING,
    AttentionConfig,
    ModelConfig,
    MoEConfig,
    PerLayerConfig,
)

VOCAB_SIZE = 262_144
_K = 1024


def _layer_types(num_layers: int, every: int = 6) -> tuple[str, ...]:
    """Returns layer types with one full layer after every `every` - 1 sliding layers."""
    return tuple(FULL if (i + 1) % every == 0 else SLIDING for i in range(num_layers))


def _gemma3(
    *,
    width: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    ffn_width: int,
    window: int,
    max_positions: int,
    head_dim: int = 256,
    query_scale: float = 256**-0.5,
    rope_scale: float = 1.0,
) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCAB_SIZE,
        width=width,
        num_heads=num_heads,
        ffn_width=ffn_width,
        layer_types=_layer_types(num_layers),
        sliding=AttentionConfig(num_kv_heads, head_dim, rope_theta=1e4, window=window),
        full=AttentionConfig(num_kv_heads, head_dim, rope_theta=1e6, rope_scale=rope_scale),
        max_positions=max_positions,
        query_scale=query_scale,
        value_norm=False,
        layer_scalar=False,
        norm_scale_offset=1.0,
        final_logit_softcap=None,
    )


def _gemma4(
    *,
    width: int,
    layer_types: tuple[str, ...],
    num_heads: int,
    num_kv_heads: int,
    num_full_kv_heads: int,
    ffn_width: int,
    window: int,
    max_positions: int,
    value_is_key: bool,
    **more: Any,
) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCAB_SIZE,
        width=width,
        num_heads=num_heads,
        ffn_width=ffn_width,
        layer_types=layer_types,
        sliding=AttentionConfig(num_kv_heads, head_dim=256, rope_theta=1e4, window=window),
        full=AttentionConfig(
            num_full_kv_heads,
            head_dim=512,
            rope_theta=1e6,
            rope_fraction=0.25,
            value_is_key=value_is_key,
        ),
        max_positions=max_positions,
        **more,
    )


GEMMA3_270M = _gemma3(
    width=640,
    num_layers=18,
    num_heads=4,
    num_kv_heads=1,
    ffn_width=2048,
    window=512,
    max_positions=32 * _K,
)
GEMMA3_1B = _gemma3(
    width=1152,
    num_layers=26,
    num_heads=4,
    num_kv_heads=1,
    ffn_width=6912,
    window=512,
    max_positions=32 * _K,
)
GEMMA3_4B = _gemma3(
    width=2560,
    num_layers=34,
    num_heads=8,
    num_kv_heads=4,
    ffn_width=10_240,
    window=1024,
    max_positions=128 * _K,
    rope_scale=8.0,
)
GEMMA3_12B = _gemma3(
    width=3840,
    num_layers=48,
    num_heads=16,
    num_kv_heads=8,
    ffn_width=15_360,
    window=1024,
    max_positions=128 * _K,
    rope_scale=8.0,
)
GEMMA3_27B = _gemma3(
    width=5376,
    num_layers=62,
    num_heads=32,
    num_kv_heads=16,
    ffn_width=21_504,
    window=1024,
    max_positions=128 * _K,
    head_dim=128,
    query_scale=(5376 / 32) ** -0.5,  # (D / N)^-1/2; the head width is 128
    rope_scale=8.0,
)

GEMMA4_E2B = _gemma4(
    width=1536,
    layer_types=_layer_types(35, every=5),
    num_heads=8,
    num_kv_heads=1,
    num_full_kv_heads=1,
    ffn_width=6144,
    window=512,
    max_positions=128 * _K,
    value_is_key=False,
    per_layer=PerLayerConfig(width=256, vocab_size=VOCAB_SIZE),
    num_kv_shared_layers=20,
    kv_shared_ffn_width=2 * 6144,  # `override_kv_shared_ffw_hidden` in _gemma4.py
)
GEMMA4_E4B = _gemma4(
    width=2560,
    layer_types=_layer_types(42),
    num_heads=8,
    num_kv_heads=2,
    num_full_kv_heads=2,
    ffn_width=10_240,
    window=512,
    max_positions=128 * _K,
    value_is_key=False,
    per_layer=PerLayerConfig(width=256, vocab_size=VOCAB_SIZE),
    num_kv_shared_layers=18,
)
# Not in Google's repository. Layers, width, window: the model card of google/gemma-4-12B; heads
# and F: its config.json as quoted in iamulya.one/posts/decoder-forward-pass-dimensions. The
# parameter count agrees with the one published.
GEMMA4_12B = _gemma4(
    width=3840,
    layer_types=_layer_types(48),
    num_heads=16,
    num_kv_heads=8,
    num_full_kv_heads=1,
    ffn_width=15_360,
    window=1024,
    max_positions=256 * _K,
    value_is_key=True,
)
GEMMA4_31B = _gemma4(
    width=5376,
    layer_types=_layer_types(60),
    num_heads=32,
    num_kv_heads=16,
    num_full_kv_heads=4,
    ffn_width=21_504,
    window=1024,
    max_positions=256 * _K,
    value_is_key=True,
)
GEMMA4_26B_A4B = _gemma4(
    width=2816,
    layer_types=_layer_types(30),
    num_heads=16,
    num_kv_heads=8,
    num_full_kv_heads=2,
    ffn_width=2112,
    window=1024,
    max_positions=256 * _K,
    value_is_key=True,
    moe=MoEConfig(num_experts=128, top_k=8, expert_width=704),
)
# canvas_length: DiffusionGemmaConfig of transformers 5.17.0.
DIFFUSIONGEMMA_26B_A4B = GEMMA4_26B_A4B.replace(canvas_length=256)

PRESETS = {
    'gemma3_270m': GEMMA3_270M,
    'gemma3_1b': GEMMA3_1B,
    'gemma3_4b': GEMMA3_4B,
    'gemma3_12b': GEMMA3_12B,
    'gemma3_27b': GEMMA3_27B,
    'gemma4_e2b': GEMMA4_E2B,
    'gemma4_e4b': GEMMA4_E4B,
    'gemma4_12b': GEMMA4_12B,
    'gemma4_26b_a4b': GEMMA4_26B_A4B,
    'gemma4_31b': GEMMA4_31B,
    'diffusiongemma_26b_a4b': DIFFUSIONGEMMA_26B_A4B,
}
