"""The families of published models: what config.json means in each. A new one is an entry here.

What a family's files may leave out takes the default of the public transformers code (5.17.0).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from diffusiongemma.models.config import ModelConfig

FULL_NAME, SLIDING_NAME = 'full_attention', 'sliding_attention'

_GEMMA3_ROPE = {FULL_NAME: {'rope_theta': 1e6}, SLIDING_NAME: {'rope_theta': 1e4}}
_GEMMA4_ROPE = {
    FULL_NAME: {'rope_type': 'proportional', 'partial_rotary_factor': 0.25, 'rope_theta': 1e6},
    SLIDING_NAME: {'rope_type': 'default', 'rope_theta': 1e4},
}
_GEMMA4_FIELDS = {'value_norm': True, 'layer_scalar': True, 'norm_scale_offset': 0.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How the config.json of a family is read and written.

    Attributes:
      model_types: its names in config.json; by the last of them it is exported.
      architecture: its class in transformers; '' for a family that is not exported.
      fields: of `ModelConfig`, the same in all its models.
      defaults: of keys of the text config that a file may leave out.
      canvas_length: where a denoiser's file does not say; None for autoregressive models.
      final_logit_softcap: where a file does not say.
      max_positions: where a file does not say.
      rope: rotary settings of each layer type, where a file has none.
      rope_at_top: `rope_theta`, `rope_local_base_freq` and `rope_scaling` beside the layer types'
        settings complete them.
      scales_queries: by `query_pre_attn_scalar`.
      value_is_key: in full layers; None where `attention_k_eq_v` says so.
      free_pattern: a file may have any pattern of layers. Otherwise it ends in a full one.
      full_sizes: full layers may have heads of their own number and size.
      experts: layers may have some, and `experts_by_flag` whether `enable_moe_block` says so.
      experts_by_flag: see `experts`.
      per_layer: there may be per-layer embeddings.
      shared_kv: layers may share the keys and values of earlier ones.
      sees_images: 'vision' attention is fine, which is causal in text.
      heads_divide_width: as transformers wants it.
    """

    model_types: tuple[str, ...]
    architecture: str = ''
    fields: Mapping[str, Any]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    canvas_length: int | None = None
    final_logit_softcap: float | None = None
    max_positions: int = 131_072
    rope: Mapping[str, Mapping[str, Any]]
    rope_at_top: bool = False
    scales_queries: bool = False
    value_is_key: bool | None = None
    free_pattern: bool = False
    full_sizes: bool = True
    experts: bool = True
    experts_by_flag: bool = True
    per_layer: bool = False
    shared_kv: bool = True
    sees_images: bool = True
    heads_divide_width: bool = False


FAMILIES = (
    Family(
        model_types=('diffusion_gemma',),
        architecture='DiffusionGemmaForBlockDiffusion',
        fields=_GEMMA4_FIELDS,
        canvas_length=256,
        final_logit_softcap=30.0,
        rope=_GEMMA4_ROPE,
        value_is_key=True,
        experts_by_flag=False,
        shared_kv=False,
    ),
    Family(
        model_types=('gemma4', 'gemma4_text'),
        architecture='Gemma4ForCausalLM',
        fields=_GEMMA4_FIELDS,
        rope=_GEMMA4_ROPE,
        per_layer=True,
    ),
    Family(
        model_types=('gemma4_unified', 'gemma4_unified_text'),
        fields=_GEMMA4_FIELDS,
        max_positions=262_144,
        rope=_GEMMA4_ROPE,
    ),
    Family(
        model_types=('gemma3', 'gemma3_text'),
        architecture='Gemma3ForCausalLM',
        fields={'value_norm': False, 'layer_scalar': False, 'norm_scale_offset': 1.0},
        defaults={  # multimodal files may say only what differs from it
            'vocab_size': 262_208,
            'num_attention_heads': 8,
            'num_key_value_heads': 4,
            'head_dim': 256,
            'sliding_window': 4096,
            'query_pre_attn_scalar': 256,
        },
        rope=_GEMMA3_ROPE,
        rope_at_top=True,
        scales_queries=True,
        value_is_key=False,
        free_pattern=True,
        full_sizes=False,
        experts=False,
        experts_by_flag=False,
        shared_kv=False,
        sees_images=False,
        heads_divide_width=True,
    ),
)
BY_MODEL_TYPE = {name: family for family in FAMILIES for name in family.model_types}


def is_denoiser(content: Mapping[str, Any]) -> bool:
    """Returns whether a parsed config.json is that of a model with a denoise pass."""
    family = BY_MODEL_TYPE.get(str(content.get('model_type')))
    return family is not None and family.canvas_length is not None


def family_of(config: ModelConfig) -> Family:
    """Returns the family that a model is exported as; whether it fits is another question."""
    candidates = [
        family
        for family in FAMILIES
        if family.architecture and (family.canvas_length is not None) == config.is_diffusion
    ]
    offset = config.norm_scale_offset
    alike = (family for family in candidates if family.fields['norm_scale_offset'] == offset)
    return next(alike, candidates[-1])
