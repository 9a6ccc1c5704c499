"""Checks the types in a config.json of the published format before anything is built from it.

A table lists the allowed JSON values of each key; keys that are not in it have no effect on the
text model. `null` is allowed wherever the transformers configs allow it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

MAX_SIZE = 2**31 - 1  # the maximum size of an array axis
MAX_LAYERS = 4096


class _Kind(NamedTuple):
    """The allowed values of a key: a description, and a function that tests a value."""

    words: str
    holds: Callable[[Any], bool]

    def or_null(self) -> '_Kind':
        return _Kind(f'{self.words} or null', lambda value: value is None or self.holds(value))


def _is_integer(value: Any, least: int, most: int = MAX_SIZE) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: Any) -> bool:
    """Returns whether a JSON value is a finite number > 0 (true and false are not numbers)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return 0 < float(value) < math.inf
    except OverflowError:
        return False


_SIZE = _Kind('an integer >= 1', lambda value: _is_integer(value, 1))
_COUNT = _Kind('an integer >= 0', lambda value: _is_integer(value, 0))
_LAYERS = _Kind(f'an integer in [1, {MAX_LAYERS}]', lambda value: _is_integer(value, 1, MAX_LAYERS))
_NUMBER = _Kind('a number > 0', is_number)
_FLAG = _Kind('true or false', lambda value: isinstance(value, bool))
_TEXT = _Kind('a string', lambda value: isinstance(value, str))
_OBJECT = _Kind('an object', lambda value: isinstance(value, dict))
_TEXTS = _Kind(
    f'a list of 1 to {MAX_LAYERS} strings',
    lambda value: (
        isinstance(value, (list, tuple))
        and 1 <= len(value) <= MAX_LAYERS
        and all(isinstance(item, str) for item in value)
    ),
)

_TEXT_KEYS: Mapping[str, _Kind] = {
    'vocab_size': _SIZE,
    'hidden_size': _SIZE,
    'intermediate_size': _SIZE,
    'num_hidden_layers': _LAYERS,
    'num_attention_heads': _SIZE,
    'num_key_value_heads': _SIZE,
    'head_dim': _SIZE,
    'global_head_dim': _SIZE,
    'num_global_key_value_heads': _SIZE.or_null(),
    'per_layer_config': _OBJECT,
    'layer_types': _TEXTS.or_null(),
    'sliding_window': _SIZE.or_null(),  # null is valid if there are no sliding layers
    'sliding_window_pattern': _SIZE,
    'max_position_embeddings': _SIZE,
    'query_pre_attn_scalar': _NUMBER,
    'rms_norm_eps': _NUMBER,
    'final_logit_softcapping': _NUMBER.or_null(),
    'attn_logit_softcapping': _NUMBER.or_null(),
    'hidden_activation': _TEXT,
    'attention_bias': _FLAG,
    'attention_k_eq_v': _FLAG,
    'tie_word_embeddings': _FLAG,
    'use_bidirectional_attention': _Kind(
        'true, false, "all", "vision" or null',
        lambda value: value is None or isinstance(value, bool) or value in ('all', 'vision'),
    ),
    'enable_moe_block': _FLAG,
    'num_experts': _COUNT.or_null(),
    'top_k_experts': _SIZE.or_null(),
    'moe_intermediate_size': _SIZE.or_null(),
    'hidden_size_per_layer_input': _COUNT,
    'vocab_size_per_layer_input': _SIZE,
    'num_kv_shared_layers': _COUNT,
    'use_double_wide_mlp': _FLAG,
    'rope_parameters': _OBJECT.or_null(),
    'rope_scaling': _OBJECT.or_null(),
    'rope_theta': _NUMBER,
    'rope_local_base_freq': _NUMBER,
    'partial_rotary_factor': _NUMBER.or_null(),
}
_TOP_KEYS: Mapping[str, _Kind] = {
    'canvas_length': _SIZE,
    'tie_word_embeddings': _FLAG,
    'text_config': _OBJECT,
}
_LAYER_KEYS: Mapping[str, _Kind] = {'head_dim': _SIZE, 'num_key_value_heads': _SIZE}


def check_types(content: Any) -> None:
    """Checks every key of a parsed config.json that describes the text model.

    Raises:
      ValueError: if a value has a wrong type or is out of range; one line names the first few
        keys with their values and the allowed values.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f'must hold a JSON object, got {_shown(content)}.')
    problems = _problems(content, _TOP_KEYS, '')
    text = content.get('text_config', content)
    if isinstance(text, Mapping):
        where = '' if text is content else 'text_config.'
        problems += _problems(text, _TEXT_KEYS, where)
        layers = text.get('per_layer_config')
        if isinstance(layers, Mapping):
            problems += _layer_problems(layers, f'{where}per_layer_config')
    if problems:
        more = f' (and {len(problems) - 3} more)' if len(problems) > 3 else ''
        raise ValueError(f'{"; ".join(problems[:3])}{more}. Correct the file, or copy it again.')


def _problems(values: Mapping[str, Any], kinds: Mapping[str, _Kind], where: str) -> list[str]:
    return [
        f'{where}{name} must be {kind.words}, got {_shown(values[name])}'
        for name, kind in kinds.items()
        if name in values and not kind.holds(values[name])
    ]


def _layer_problems(layers: Mapping[str, Any], where: str) -> list[str]:
    problems = []
    for number, values in layers.items():
        if not (str(number).isascii() and str(number).isdecimal()):
            problems.append(f'{where} has the key {_shown(number)}, which is not a layer number')
        elif not isinstance(values, Mapping):
            problems.append(f'{where}.{number} must be an object, got {_shown(values)}')
        else:
            problems += _problems(values, _LAYER_KEYS, f'{where}.{number}.')
    return problems


def _shown(value: Any) -> str:
    """Returns a JSON value on one short line."""
    text = {True: 'true', False: 'false', None: 'null'}.get(value) if _is_word(value) else None
    text = text or repr(value)
    return text if len(text) <= 60 else f'{text[:57]}...'


def _is_word(value: Any) -> bool:
    return value is None or isinstance(value, bool)
