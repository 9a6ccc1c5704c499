"""Defines the families of published models and how their config.json is read and written.

To add a family, add an entry here. Keys that a config.json may omit take the defaults of the public
transformers code (5.17.0).
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
    """A description of how the config.json of a family is read and written.

    Attributes:
      model_types: the values of `model_type`; the last one is written on export.
      architecture: the class name in transformers; '' if the family cannot be exported.
      fields: the fields of `ModelConfig` that are the same for all models of the family.
      defaults: the defaults of keys that the text config may omit.
      canvas_length: the default canvas length; None for autoregressive models.
      final_logit_softcap: the default soft cap of the logits.
      max_positions: the default number of positions.
      rope: the default rotary settings of each layer type.
      rope_at_top: whether the top-level keys `rope_theta`, `rope_local_base_freq` and
        `rope_scaling` complete the rotary settings of the layer types.
      scales_queries: whether `query_pre_attn_scalar` sets the scale of queries.
      value_is_key: whether full layers use their keys as values; None if `attention_k_eq_v`
        decides.
      free_pattern: whether any layer pattern is allowed; otherwise the last layer is a full one.
      full_sizes: whether full layers may have a different number and size of heads.
      experts: whether layers may have experts.
      experts_by_flag: whether `enable_moe_block`, not the number of experts, enables them.
      per_layer: whether a model may have per-layer embeddings.
      shared_kv: whether layers may share the keys and values of earlier layers.
      sees_images: whether 'vision' attention is allowed, which is causal for text.
      heads_divide_width: whether the number of heads must divide the width, as in transformers.
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
        defaults={  # multimodal files may omit equal values
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
    """Returns the family that a model is exported as, without a check that the family fits it.

    It is the one with the most equal `fields`; of several, the first one in the list.
    """
    candidates = [
        family
        for family in FAMILIES
        if family.architecture and (family.canvas_length is not None) == config.is_diffusion
    ]

    def fit(family: Family) -> tuple[bool, int]:
        equal = {name: getattr(config, name) == value for name, value in family.fields.items()}
        return equal['norm_scale_offset'], sum(equal.values())

    return max(candidates, key=fit)
