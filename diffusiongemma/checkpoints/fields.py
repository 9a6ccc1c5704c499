"""Reads config dataclasses from the JSON files beside weights and checks every field."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from diffusiongemma.checkpoints.hf_schema import MAX_LAYERS, MAX_SIZE
from diffusiongemma.configuration import keys_of
from diffusiongemma.models.config import ModelConfig, with_nested_denoiser

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar('T', bound='DataclassInstance')

_MAY_BE_ZERO = (
    'num_kv_shared_layers',
    'mask_id',
    'layers',
    'draft_vocab_size',
    'serial_rank',
)
_POSITIVE = ('rope_theta', 'rope_scale', 'norm_eps', 'final_logit_softcap', 'alpha', 'query_scale')


def read_model_config(values: Any, where: str) -> ModelConfig:
    """Returns a `ModelConfig` from the result of `ModelConfig.to_dict`.

    Raises:
      ValueError: if a field is unknown, missing, of a wrong type or out of range; the message
        names `where` and the field.
    """
    if isinstance(values, Mapping):
        values = with_nested_denoiser(values)
    return read_fields(ModelConfig, values, where)


def read_fields(cls: type[T], values: Any, where: str) -> T:
    """Returns a config dataclass from parsed JSON, including nested dataclasses.

    Raises:
      ValueError: if a field is unknown, missing, of a wrong type or out of range.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f'{where} must be an object, got {_shown(values)}; copy the file again.')
    known, needed = keys_of(cls)
    unknown, missing = sorted(set(values) - known), sorted(needed - set(values))
    if unknown or missing:
        raise ValueError(
            f'{where}: unknown keys {unknown}, missing keys {missing}; known: {sorted(known)}.'
        )
    hints = typing.get_type_hints(cls)
    read = {name: _read(hints[name], value, where, name) for name, value in values.items()}
    try:
        return cls(**read)
    except ValueError as error:
        raise ValueError(f'{where}: {error}') from error


def _read(hint: Any, value: Any, where: str, name: str) -> Any:
    """Returns the value of a field; raises ValueError if it does not have the annotated type."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    option = next(option for option in options if option is not type(None))
    if dataclasses.is_dataclass(option):
        return read_fields(typing.cast(type, option), value, f'{where}, {name!r}')
    expected = _fault(option, value, name)
    if expected:
        null = ' or null' if type(None) in options else ''
        raise ValueError(f'{where}: {name} must be {expected}{null}, got {_shown(value)}.')
    if option is float:
        return float(value)  # a large Python int would overflow in an array operation
    return tuple(value) if isinstance(value, list) else value


def _fault(option: Any, value: Any, name: str) -> str | None:
    """Returns a description of what the value must be, or None if the value is valid."""
    if option is bool:
        return None if isinstance(value, bool) else 'true or false'
    if option is int:
        least = 0 if name in _MAY_BE_ZERO else 1
        good = isinstance(value, int) and not isinstance(value, bool) and least <= value <= MAX_SIZE
        return None if good else f'an integer >= {least}'
    if option is float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        good = good and abs(value) < 1e38 and math.isfinite(value)
        if name in _POSITIVE:
            return None if good and value > 0 else 'a number > 0'
        return None if good else 'a number'
    if option is str:
        return None if isinstance(value, str) else 'a string'
    if typing.get_origin(option) is tuple:
        item = typing.get_args(option)[0]
        good = isinstance(value, (list, tuple)) and len(value) <= MAX_LAYERS
        good = good and all(_fault(item, each, name) is None for each in value)
        kind = 'strings' if item is str else 'layer numbers >= 0'
        return None if good else f'a list of at most {MAX_LAYERS} {kind}'
    raise TypeError(f'{name} of type {option} cannot be read from JSON.')


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:57]}...'
