"""Reads the rotary settings of config.json in every layout that transformers 5.17 reads.

- nested: `rope_parameters` with one object for `full_attention` and one for `sliding_attention`;
- older Gemma 3 files: `rope_theta`, `rope_local_base_freq` and `rope_scaling` (only for full
  layers) at the top level, possibly in addition to `rope_parameters`.

Settings that transformers refuses, contradictory keys and embeddings that this backbone does not
implement are errors. transformers is less strict: of two contradictory values it uses one.
"""

from collections.abc import Mapping
from typing import Any

from diffusiongemma.checkpoints.families import FULL_NAME, SLIDING_NAME, Family
from diffusiongemma.checkpoints.hf_schema import is_number

_NAMES = (FULL_NAME, SLIDING_NAME)
# `original_max_position_embeddings` has no effect on the supported types.
_KEYS = (
    'rope_type',
    'type',
    'rope_theta',
    'factor',
    'partial_rotary_factor',
    'original_max_position_embeddings',
)
_OLD_THETA = {FULL_NAME: 'rope_theta', SLIDING_NAME: 'rope_local_base_freq'}


def rope_of(text: Mapping[str, Any], name: str, family: Family, used: bool) -> dict[str, Any]:
    """Returns the rotary settings of one layer type.

    Args:
      text: the type-checked config of the text model.
      name: 'full_attention' or 'sliding_attention'.
      family: the family of the model.
      used: whether any layer has this type; if not, missing settings take the defaults.

    Returns:
      `rope_theta`, `factor` and `partial_rotary_factor`. The first fraction
      `partial_rotary_factor` of the frequencies is theta^(-2i/H) / factor; the others are zero.

    Raises:
      ValueError: if other frequencies are requested, or the layout is contradictory or unknown.
    """
    defaults = family.rope[name]
    if family.rope_at_top:
        rope = _completed(text, name, defaults)
    else:
        rope = _by_layer_type(text, name, defaults, used)
    _check(rope, name)
    top = text.get(_OLD_THETA[name])
    if top is not None and top != rope['rope_theta']:
        raise ValueError(
            f'{_OLD_THETA[name]}={top} contradicts rope_theta={rope["rope_theta"]} of the {name} '
            'layers; keep one of them.'
        )
    factor = text.get('partial_rotary_factor')
    if factor is not None and name == FULL_NAME and factor != rope.get('partial_rotary_factor', 1):
        raise ValueError(
            f'partial_rotary_factor={factor} outside of rope_parameters has no effect; write it '
            f'into the parameters of {FULL_NAME}.'
        )
    return {
        'rope_theta': rope['rope_theta'],
        'factor': rope.get('factor', 1.0),
        'partial_rotary_factor': rope.get('partial_rotary_factor', 1.0),
    }


def _completed(text: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a layer type, completed by those at the top."""
    rope = dict(_nested(text.get('rope_parameters'), 'rope_parameters').get(name) or {})
    _check_keys(rope, name)
    scaling = text.get('rope_scaling') or {}
    if name == FULL_NAME and scaling:
        if set(scaling) & set(_NAMES):
            raise ValueError(
                'rope_scaling is nested; Gemma 3 has its settings by layer type in rope_parameters.'
            )
        if 'rope_type' not in scaling:
            raise ValueError(
                f'rope_scaling={scaling} has no "rope_type", and transformers 5.17 ignores it '
                'then; name the type, such as "rope_type": "linear".'
            )
        for key, value in scaling.items():
            if key != 'rope_type' and rope.get(key, value) != value:
                raise ValueError(
                    f'rope_scaling has {key}={value}, and rope_parameters of the full layers '
                    f'{key}={rope[key]}; keep one of them.'
                )
        if rope.get('rope_type', 'default') not in ('default', scaling['rope_type']):
            raise ValueError(
                f'rope_scaling is {scaling["rope_type"]!r}, and rope_parameters of the full layers '
                f'are {rope["rope_type"]!r}; keep one of them.'
            )
        rope |= scaling
    return {'rope_theta': text.get(_OLD_THETA[name], defaults['rope_theta'])} | rope


def _by_layer_type(
    text: Mapping[str, Any], name: str, defaults: Mapping[str, Any], used: bool
) -> dict[str, Any]:
    """Returns the settings of a layer type, which only `rope_parameters` contains."""
    parameters = text.get('rope_parameters')
    if text.get('rope_scaling') is not None:  # transformers replaces rope_parameters with it
        if parameters is not None and parameters != text['rope_scaling']:
            raise ValueError('rope_scaling contradicts rope_parameters; keep the latter.')
        parameters = text['rope_scaling']
    if parameters is None:
        return dict(defaults)
    rope = _nested(parameters, 'rope_parameters').get(name)
    if rope is None:
        if used:
            raise ValueError(
                f'rope_parameters has nothing for the {name} layers; write their rope_type and '
                'rope_theta.'
            )
        return dict(defaults)
    if 'rope_theta' not in rope:
        raise ValueError(f'rope_parameters.{name} lacks the key rope_theta; write it there.')
    return dict(rope)


def _nested(parameters: Any, where: str) -> Mapping[str, Any]:
    """Returns parameters by layer type; raises ValueError if they have another layout."""
    nested: Mapping[str, Any] = parameters or {}
    flat = sorted(set(nested) - set(_NAMES))
    if flat:
        raise ValueError(
            f'{where} has {flat} beside or in place of {list(_NAMES)}, which transformers refuses '
            'for this model; write the settings of each layer type.'
        )
    for name, rope in nested.items():
        if rope is not None and not isinstance(rope, Mapping):
            raise ValueError(f'{where}.{name} must be an object or null, got {rope!r}.')
    return nested


def _check_keys(rope: Mapping[str, Any], name: str) -> None:
    unknown = sorted(set(rope) - set(_KEYS))
    if unknown:
        raise ValueError(
            f'the rotary settings {unknown} of the {name} layers are not supported; known: '
            f'{list(_KEYS)}.'
        )


def _check(rope: dict[str, Any], name: str) -> None:
    """Raises ValueError for frequencies that the backbone does not implement."""
    kind = name.removesuffix('_attention')
    rope_type = rope.get('rope_type', rope.get('type', 'default'))
    if rope.get('type', rope_type) != rope_type:
        raise ValueError(
            f'the {kind} layers have rope_type={rope_type!r} and type={rope["type"]!r}; keep one.'
        )
    for key in ('rope_theta', 'factor', 'partial_rotary_factor'):
        if key in rope and not is_number(rope[key]):
            raise ValueError(f'{key} of the {name} layers must be a number > 0, got {rope[key]!r}.')
    fraction = rope.get('partial_rotary_factor', 1.0)
    supported = {
        'default': fraction == 1.0 and rope.get('factor', 1.0) == 1.0,
        'linear': fraction == 1.0,
        'proportional': fraction <= 1.0,
    }
    if not isinstance(rope_type, str) or not supported.get(rope_type, False):
        raise ValueError(
            f'rotary embedding {rope} of the {kind} layers is not supported: rope_type must be '
            '"default", "linear" with a factor, or "proportional" with a fraction <= 1.'
        )
    if rope_type == 'linear' and 'factor' not in rope:
        raise ValueError(f'the {kind} layers have rope_type "linear" without a factor; write it.')
    _check_keys(rope, name)
