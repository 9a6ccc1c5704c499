"""Converts a ModelConfig to a config.json of the published format; the inverse of hf_config.py.

The result is read back and compared, so a model that the format cannot represent is an error
instead of a silently changed model.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict

from diffusiongemma.checkpoints.families import (
    FULL_NAME,
    SLIDING_NAME,
    Family,
    family_of,
    is_denoiser,
)
from diffusiongemma.checkpoints.hf_config import model_config_from_hf
from diffusiongemma.models.config import FULL, SLIDING, AttentionConfig, ModelConfig

_LAYER_TYPES = {SLIDING: SLIDING_NAME, FULL: FULL_NAME}
# Settings that a ModelConfig does not have, unless the base checkpoint sets them. The values are
# those of the public transformers configs.
_TEXT_DEFAULTS = {
    'attention_bias': False,
    'attention_dropout': 0.0,
    'hidden_activation': 'gelu_pytorch_tanh',
    'initializer_range': 0.02,
    'max_position_embeddings': 131_072,
    'use_bidirectional_attention': None,
}
# These are the image tokens of the 26B checkpoint. They must lie outside a small vocabulary,
# because a token that marks an image would be treated as padding.
_DIFFUSION_DEFAULTS = {
    'boi_token_id': 255_999,
    'eoi_token_id': 258_882,
    'image_token_id': 258_880,
    'initializer_range': 0.02,
}
# transformers 5.17 always builds a vision tower. Without one in the base checkpoint, this tower has
# no layers, and its three tensors (all zeros) are written in addition to those of the text model.
PLACEHOLDER_VISION: dict[str, Any] = {
    'model_type': 'gemma4_vision',
    'hidden_size': 8,
    'intermediate_size': 8,
    'num_hidden_layers': 0,
    'num_attention_heads': 1,
    'num_key_value_heads': 1,
    'head_dim': 8,
    'patch_size': 1,
    'position_embedding_size': 1,
}


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """The special token ids in config.json and generation_config.json."""

    pad: int = 0
    bos: int = 2
    eos: tuple[int, ...] = (1,)

    def to_hf(self) -> dict[str, Any]:
        """Returns the JSON keys; `eos_token_id` is a number if there is only one id."""
        eos = self.eos[0] if len(self.eos) == 1 else list(self.eos)
        return {'pad_token_id': self.pad, 'bos_token_id': self.bos, 'eos_token_id': eos}


def hf_config(
    config: ModelConfig, dtype: str, tokens: TokenIds, base: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the content of config.json.

    Args:
      config: the config of the model.
      dtype: the name of the dtype of the weights.
      tokens: the special tokens, for keys that the base does not set.
      base: the config.json of the checkpoint that the model comes from. Settings that a
        `ModelConfig` does not have (token ids, vision tower) are copied from it.

    Raises:
      ValueError: if the format cannot represent this model; the message names the setting.
    """
    base = dict(base or {})
    family = family_of(config)
    model_type = family.model_types[-1]
    base_text = base | base.get('text_config', {})  # token ids may be outside of text_config
    text = _TEXT_DEFAULTS | tokens.to_hf()
    text |= {name: base_text[name] for name in text if name in base_text}
    text |= _text_config(config, family)
    head = {'architectures': [family.architecture], 'dtype': dtype}
    if config.is_diffusion:
        text |= {'model_type': 'diffusion_gemma_text'}
        content = _DIFFUSION_DEFAULTS | {
            name: base[name] for name in _DIFFUSION_DEFAULTS if base.get(name) is not None
        }
        content |= {
            'model_type': model_type,
            'canvas_length': config.canvas_length,
            'text_config': text,
            'vision_config': vision_config(base) or PLACEHOLDER_VISION,
            'tie_word_embeddings': True,
        }
    else:
        content = text | {'model_type': model_type, 'use_cache': True}
    content = head | content
    _check_faithful(config, content, family)
    return content


def vision_config(base: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the vision tower config of a DiffusionGemma base, or None for other bases."""
    return base.get('vision_config') if is_denoiser(base) else None


def _text_config(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Returns the keys of the text config that the `ModelConfig` determines."""
    text = {
        'vocab_size': config.vocab_size,
        'hidden_size': config.width,
        'intermediate_size': config.ffn_width,
        'num_hidden_layers': config.num_layers,
        'layer_types': [_LAYER_TYPES[kind] for kind in config.layer_types],
        'num_attention_heads': config.num_heads,
        'num_key_value_heads': config.sliding.num_kv_heads,
        'head_dim': config.sliding.head_dim,
        'sliding_window': config.sliding.window,
        'rms_norm_eps': config.norm_eps,
        'final_logit_softcapping': config.final_logit_softcap,
        'tie_word_embeddings': True,
        'rope_parameters': {
            _LAYER_TYPES[kind]: _rope(config.attention(kind)) for kind in (FULL, SLIDING)
        },
    }
    if config.max_positions is not None:
        text['max_position_embeddings'] = config.max_positions
    if family.scales_queries:
        text |= {
            'query_pre_attn_scalar': round(config.query_scale**-2),
            'attn_logit_softcapping': None,
            'use_bidirectional_attention': False,
        }
    if family.full_sizes:
        text['per_layer_config'] = _full_sizes(config)
    if family.experts:
        text |= _experts(config)
        if family.experts_by_flag:
            text['enable_moe_block'] = config.moe is not None
    if family.value_is_key is None:
        text['attention_k_eq_v'] = config.full.value_is_key
    if family.per_layer:
        text |= _per_layer(config)
    if family.shared_kv:
        text |= _kv_sharing(config)
    return text


def _full_sizes(config: ModelConfig) -> dict[str, Any]:
    full = {'head_dim': config.full.head_dim, 'num_key_value_heads': config.full.num_kv_heads}
    return {str(layer): dict(full) for layer, kind in enumerate(config.layer_types) if kind == FULL}


def _experts(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    return {
        'num_experts': moe.num_experts if moe else None,
        'top_k_experts': moe.top_k if moe else None,
        'moe_intermediate_size': moe.expert_width if moe else None,
    }


def _per_layer(config: ModelConfig) -> dict[str, Any]:
    if config.per_layer is None:
        return {'hidden_size_per_layer_input': 0}
    return {
        'hidden_size_per_layer_input': config.per_layer.width,
        'vocab_size_per_layer_input': config.per_layer.vocab_size,
    }


def _kv_sharing(config: ModelConfig) -> dict[str, Any]:
    return {
        'num_kv_shared_layers': config.num_kv_shared_layers,
        'use_double_wide_mlp': config.kv_shared_ffn_width == 2 * config.ffn_width,
    }


def _rope(attention: AttentionConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {'rope_type': 'default', 'rope_theta': attention.rope_theta}
    if attention.rope_scale != 1.0:
        rope |= {'rope_type': 'linear', 'factor': attention.rope_scale}
    if attention.rope_fraction != 1.0:  # a factor also applies to this type
        rope |= {'rope_type': 'proportional', 'partial_rotary_factor': attention.rope_fraction}
    return rope


def _check_faithful(config: ModelConfig, content: Mapping[str, Any], family: Family) -> None:
    """Raises ValueError unless this library and transformers read `content` as `config`."""
    problems = []
    if config.has_frozen_encoder:
        problems.append(
            f'it has one set of layers for both passes, and a {config.kind} denoiser has '
            "layers of its own; distill with denoiser='shared' for a model that it can represent"
        )
    else:
        problems += _differences(config, content)
    if not family.free_pattern and config.layer_types[-1] != FULL:
        problems.append('transformers makes the last layer a full one, and here it is sliding')
    if family.heads_divide_width and config.width % config.num_heads:
        problems.append(
            f'in transformers num_heads={config.num_heads} must divide width={config.width}'
        )
    if config.is_diffusion and config.final_logit_softcap is None:
        problems.append('final_logit_softcap is None')
    if config.is_diffusion and config.moe is None:
        problems.append('every layer needs experts, and moe is None')
    if problems:
        raise ValueError(
            f'the published format ({family.model_types[-1]}) cannot hold this model: '
            f'{"; ".join(problems)}. Keep it as a bundle (--format=bundle).'
        )


def _differences(config: ModelConfig, content: Mapping[str, Any]) -> list[str]:
    try:
        read = model_config_from_hf(content)
    except ValueError as error:
        return [str(error)]
    # Ignore attention types that no layer has, and the number of positions if it is unlimited.
    unused = {
        name: getattr(config, name) for name in (SLIDING, FULL) if name not in config.layer_types
    }
    if config.max_positions is None:
        unused['max_positions'] = None
    expected, actual = (
        flatten_dict(c.to_dict(), sep='.') for c in (config, dataclasses.replace(read, **unused))
    )
    return [
        f'{name}={value} would be read as {actual.get(name)}'
        for name, value in expected.items()
        if value != actual.get(name)
    ]
