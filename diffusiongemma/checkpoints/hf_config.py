"""Converts a config.json of the published format to a ModelConfig.

Supported are DiffusionGemma and the text backbones of autoregressive Gemma 3 and Gemma 4 models,
which can be its teacher; `families.py` lists their differences. Missing keys take the defaults of
the public transformers code. Features that the backbone does not implement are errors, because
ignoring them would change the model.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusiongemma.checkpoints.families import BY_MODEL_TYPE, FULL_NAME, SLIDING_NAME, Family
from diffusiongemma.checkpoints.hf_rope import rope_of
from diffusiongemma.checkpoints.hf_schema import check_types
from diffusiongemma.checkpoints.json_file import read_json
from diffusiongemma.models.config import (
    FULL,
    SLIDING,
    AttentionConfig,
    DenoiserConfig,
    ModelConfig,
    MoEConfig,
    PerLayerConfig,
)

_LAYER_TYPES = {SLIDING_NAME: SLIDING, FULL_NAME: FULL}
_EVERY = 6  # by default every sixth layer is a full one
_GLOBAL_HEAD_DIM = 512  # the default without per_layer_config and global_head_dim


def is_published(directory: Path) -> bool:
    """Returns whether `directory` is a readable checkpoint in the published format."""
    if not any(directory.glob('*.safetensors')):
        return False
    try:
        content = json.loads((directory / 'config.json').read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and str(content.get('model_type')) in BY_MODEL_TYPE


def read_hf_config(directory: Path) -> ModelConfig:
    """Returns the config of the model in `directory`/config.json.

    Raises:
      FileNotFoundError: if there is no config.json.
      ValueError: if it is not valid JSON, describes another model, lacks a key, has a value of a
        wrong type or requests an unsupported feature.
    """
    path = directory / 'config.json'
    if not path.is_file():
        raise FileNotFoundError(f'{path} is missing; a checkpoint needs it beside its weights.')
    content = read_json(path)
    try:
        return model_config_from_hf(content)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error


def model_config_from_hf(content: Mapping[str, Any]) -> ModelConfig:
    """Returns the `ModelConfig` of a parsed config.json.

    Raises:
      ValueError: if it describes another model, lacks a key, has a value of a wrong type or
        requests an unsupported feature.
    """
    check_types(content)
    try:
        return _model_config(content)
    except KeyError as error:
        raise ValueError(f'it lacks the key {error}; copy the file again.') from error


def _model_config(content: Mapping[str, Any]) -> ModelConfig:
    """Returns the `ModelConfig` of a type-checked config.json; KeyError if a key is missing."""
    model_type = content.get('model_type')
    family = BY_MODEL_TYPE.get(str(model_type))
    if family is None:
        supported = tuple(BY_MODEL_TYPE)
        raise ValueError(f'model_type {model_type!r} cannot be read; supported: {supported}.')
    fields = dict(family.fields)
    if family.canvas_length is not None:
        text = content['text_config']
        fields['denoiser'] = DenoiserConfig(content.get('canvas_length', family.canvas_length))
    else:
        text = content.get('text_config', content)
    text = family.defaults | text
    if family.scales_queries:
        fields['query_scale'] = float(text['query_pre_attn_scalar']) ** -0.5
    _check_supported(content, text, family)
    kinds = _layer_kinds(text, family, str(model_type))
    return ModelConfig(
        vocab_size=text['vocab_size'],
        width=text['hidden_size'],
        num_heads=text['num_attention_heads'],
        ffn_width=text['intermediate_size'],
        layer_types=kinds,
        sliding=_attention(text, kinds, SLIDING, family),
        full=_attention(text, kinds, FULL, family),
        final_logit_softcap=text.get('final_logit_softcapping', family.final_logit_softcap),
        max_positions=text.get('max_position_embeddings', family.max_positions),
        moe=_moe(text, family),
        per_layer=_per_layer(text, family),
        **_kv_sharing(text),
        norm_eps=text.get('rms_norm_eps', 1e-6),
        **fields,
    )


def _check_supported(content: Mapping[str, Any], text: Mapping[str, Any], family: Family) -> None:
    """Raises ValueError for settings that are not implemented and would change the model."""
    used = {
        'attention_bias': text.get('attention_bias'),
        'attn_logit_softcapping': text.get('attn_logit_softcapping'),
        # With "vision" only the vision tokens of Gemma 4 are bidirectional; text stays causal.
        'use_bidirectional_attention': text.get('use_bidirectional_attention')
        not in (None, False, *(['vision'] if family.sees_images else [])),
        'tie_word_embeddings=false': not (
            text.get('tie_word_embeddings', True) and content.get('tie_word_embeddings', True)
        ),
        'quantization_config': content.get('quantization_config'),
    }
    if not family.shared_kv:
        used |= {name: text.get(name) for name in ('num_kv_shared_layers', 'use_double_wide_mlp')}
    if not family.per_layer:
        used['hidden_size_per_layer_input'] = text.get('hidden_size_per_layer_input')
    unsupported = [name for name, value in used.items() if value]
    has = {'per_layer_config': family.full_sizes, 'num_experts': family.experts}
    unsupported += [name for name, allowed in has.items() if text.get(name) and not allowed]
    activation = text.get('hidden_activation', 'gelu_pytorch_tanh')
    if activation != 'gelu_pytorch_tanh':
        unsupported.append(f'hidden_activation={activation}')
    if unsupported:
        raise ValueError(f'{", ".join(unsupported)} is set, which is not supported.')


def _layer_kinds(text: Mapping[str, Any], family: Family, model_type: str) -> tuple[str, ...]:
    names = text.get('layer_types')
    if names is None:
        every = text.get('sliding_window_pattern', _EVERY)
        if every != _EVERY and not family.free_pattern:
            raise ValueError(
                f'sliding_window_pattern={every} has no effect on a {model_type}, which always has '
                f'{_EVERY}; set layer_types instead.'
            )
        count = text['num_hidden_layers']
        kinds = [SLIDING if (i + 1) % every else FULL for i in range(count)]
        if not family.free_pattern:
            kinds[-1] = FULL  # as in transformers, for any number of layers
        return tuple(kinds)
    unknown = sorted(set(names) - set(_LAYER_TYPES))
    if unknown:
        raise ValueError(f'layer_types {unknown} are unknown; known: {sorted(_LAYER_TYPES)}.')
    if len(names) != text.get('num_hidden_layers', len(names)):
        raise ValueError(
            f'num_hidden_layers is {text["num_hidden_layers"]}, but layer_types has {len(names)}.'
        )
    if not family.free_pattern and _LAYER_TYPES[names[-1]] != FULL:
        raise ValueError(
            f'the last of layer_types is {names[-1]}, and transformers makes it full_attention in '
            f'a {model_type}; write full_attention.'
        )
    return tuple(_LAYER_TYPES[name] for name in names)


def _moe(text: Mapping[str, Any], family: Family) -> MoEConfig | None:
    by_flag = family.experts_by_flag
    enabled = text.get('enable_moe_block', not by_flag)
    if not enabled or not (by_flag or text.get('num_experts')):
        return None
    for name in ('num_experts', 'top_k_experts', 'moe_intermediate_size'):
        if not text[name]:
            raise ValueError(f'{name} is {text[name]}, but the layers have experts; set it.')
    return MoEConfig(
        num_experts=text['num_experts'],
        top_k=text['top_k_experts'],
        expert_width=text['moe_intermediate_size'],
    )


def _per_layer(text: Mapping[str, Any], family: Family) -> PerLayerConfig | None:
    if not family.per_layer:
        return None
    # transformers assumes per-layer embeddings if the key is missing.
    width = text.get('hidden_size_per_layer_input', 256)
    return PerLayerConfig(width, text.get('vocab_size_per_layer_input', 262_144)) if width else None


def _kv_sharing(text: Mapping[str, Any]) -> dict[str, Any]:
    shared = text.get('num_kv_shared_layers') or 0  # _check_supported refuses it in other families
    wide = shared and text.get('use_double_wide_mlp', False)
    return {
        'num_kv_shared_layers': shared,
        'kv_shared_ffn_width': 2 * text['intermediate_size'] if wide else None,
    }


def _attention(
    text: Mapping[str, Any], kinds: tuple[str, ...], kind: str, family: Family
) -> AttentionConfig:
    full, value_is_key = kind == FULL, family.value_is_key
    if value_is_key is None:
        value_is_key = text.get('attention_k_eq_v', False)
    value_is_key = full and value_is_key
    sizes = {name: text[name] for name in ('head_dim', 'num_key_value_heads')}
    if family.full_sizes:
        sizes |= _overrides(text, kinds, kind, separate_kv_heads=value_is_key)
    name = next(name for name, ours in _LAYER_TYPES.items() if ours == kind)
    rope = rope_of(text, name, family, used=kind in kinds)
    window = None if full else text['sliding_window']
    if window is None and not full and kind in kinds:
        raise ValueError(
            'sliding_window is null, but there are sliding layers; set it to their window.'
        )
    return AttentionConfig(
        num_kv_heads=sizes['num_key_value_heads'],
        head_dim=sizes['head_dim'],
        rope_theta=rope['rope_theta'],
        rope_fraction=rope['partial_rotary_factor'],
        rope_scale=rope['factor'],
        window=window,
        value_is_key=value_is_key,
    )


def _overrides(
    text: Mapping[str, Any], kinds: tuple[str, ...], kind: str, separate_kv_heads: bool
) -> dict[str, int]:
    """Returns the head sizes of one layer type that differ from the general ones.

    `per_layer_config` (by layer number) takes precedence; older files have `global_head_dim` and
    `num_global_key_value_heads` for the full layers instead.
    """
    per_layer = text.get('per_layer_config')
    if per_layer is None:
        if kind == SLIDING:
            return {}
        sizes = {'head_dim': text.get('global_head_dim', _GLOBAL_HEAD_DIM)}
        if separate_kv_heads and text.get('num_global_key_value_heads') is not None:
            sizes['num_key_value_heads'] = text['num_global_key_value_heads']
        return sizes
    by_number = {int(i): value for i, value in per_layer.items()}  # keys may be padded, as '05'
    beyond = sorted(set(by_number) - set(range(len(kinds))))
    if beyond:
        raise ValueError(f'per_layer_config has layers {beyond[:3]}, but there are {len(kinds)}.')
    if len(by_number) != len(per_layer):
        raise ValueError('per_layer_config has a layer twice; keep one of them.')
    overrides = {i: by_number.get(i, {}) for i, k in enumerate(kinds) if k == kind}
    if not overrides:
        return {}
    first, sizes = next(iter(overrides.items()))
    for i, other in overrides.items():
        if other != sizes:
            raise ValueError(
                f'per_layer_config gives layer {first} {sizes} and layer {i} {other}, both '
                f'{kind}; layers of one type must be alike.'
            )
    unknown = sorted(set(sizes) - {'head_dim', 'num_key_value_heads'})
    if unknown:
        raise ValueError(f'per_layer_config sets {unknown}, which is not supported.')
    return dict(sizes)
