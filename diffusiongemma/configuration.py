"""Converts a ConfigDict (ml_collections) to frozen dataclasses, and these to JSON."""

import dataclasses
import json
import numbers
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from diffusiongemma.errors import nearest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar('T', bound='DataclassInstance')
# Plain type of a field -> accepted types of a value (NumPy's too), and the words for messages.
_PLAIN: Mapping[Any, tuple[Any, str]] = {
    bool: ((bool, np.bool_), 'True or False'),
    int: (numbers.Integral, 'an integer'),
    float: (numbers.Real, 'a number'),
    str: (str, 'a string'),
    tuple: (tuple, 'a tuple'),
}

KNOWN = 'known keys'  # the words before a list of keys in an error message
SAMPLING = 'diffusiongemma.sampling.'  # rules of this package are written without their module
# Metadata keys of a field that is a section. SECTION: the dataclass that checks a section which
# stays a mapping. READER: a function of values and path that returns the section, not `build`.
SECTION, READER = 'section', 'reader'


def build(cls: type[T], values: Any, where: str = '') -> T:
    """Returns a config dataclass from a dict of its fields, including nested sections.

    A value of None means that the field is not set, unless the field may be None. An empty section
    becomes None if the field may be None.

    Args:
      cls: the dataclass.
      values: a ConfigDict or another mapping of field names to values.
      where: the path of the section, such as 'eval.sweep'; '' for the whole config.

    Raises:
      ValueError: if a key is unknown (the message names the nearest known one) or missing, or a
        value is invalid.
    """
    values = values.to_dict() if isinstance(values, ConfigDict) else dict(values)
    path = f'config.{where}' if where else 'config'
    fields, hints = {field.name: field for field in dataclasses.fields(cls)}, _hints(cls)
    read = {}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(f'{path} has no key {name!r}; {nearest(name, fields, KNOWN)}')
        optional = type(None) in typing.get_args(hints[name])
        section = section_of(cls, name)
        if section is not None and not (value is None or isinstance(value, (Mapping, section))):
            raise ValueError(f'{path}.{name} must be a section, with keys, got {value!r}.')
        if section is not None and isinstance(value, Mapping):
            inside = f'{where}.{name}' if where else name
            if SECTION in fields[name].metadata:
                build(section, value, inside)  # only checks the values
            elif READER in fields[name].metadata:
                value = fields[name].metadata[READER](value, f'config.{inside}')
            else:
                value = build(section, value, inside) if value or not optional else None
        value = _checked(value, hints[name], f'{path}.{name}')
        if value is not None or optional:
            read[name] = value
    missing = [name for name, field in fields.items() if name not in read and _is_needed(field)]
    if missing:
        raise ValueError(f'{path} lacks {missing}{"" if where else "; see configs/tiny.py"}.')
    try:
        return cls(**read)
    except ValueError as error:
        raise ValueError(_placed(str(error), path, fields)) from error


def _placed(message: str, path: str, fields: Iterable[str]) -> str:
    """Returns an error message of a section, with the path of the section or of its field."""
    if message.startswith('config.'):  # it already has the paths of its keys
        return message
    (name,) = re.findall(r'^\w*', message)
    return f'{path}.{message}' if name in fields else f'{path}: {message}'


def complete(config: ConfigDict, cls: type, asked: Iterable[str] = ()) -> ConfigDict:
    """Adds the missing keys of the dataclass `cls` to a config, with their defaults.

    A key without a default is added as a placeholder. Sections that may be None, and the keys of
    sections that stay mappings, are only added if a path in `asked` names them.

    Args:
      config: the config, which is changed in place.
      cls: the dataclass of the config, or of a section of it.
      asked: paths of keys in the config, such as 'light.serial_rank'.

    Returns:
      The same config.
    """
    asked_in: dict[str, list[str]] = {}  # by key: the asked paths inside that section
    for path in asked:
        name, _, subpath = path.partition('.')
        asked_in.setdefault(name, []).extend([subpath] if subpath else [])
    with config.unlocked():
        for field in dataclasses.fields(cls):
            name, section = field.name, section_of(cls, field.name)
            if section is None:
                if name not in config:
                    _add_value(config, cls, field)
                continue
            value = config.get(name)
            if value is not None and not isinstance(value, Mapping | ConfigDict):
                raise ValueError(f'config.{name} must be a section, with keys, got {value!r}.')
            default, is_asked = _default(field), name in asked_in
            if not config.get(name):
                if default is None and not is_asked and not _is_needed(field):
                    continue
                values = vars(default) if dataclasses.is_dataclass(default) else {}
                config[name] = ConfigDict({k: v for k, v in values.items() if v is not None})
            if SECTION in field.metadata:
                _add_asked(config[name], section, asked_in.get(name, ()))
            else:
                complete(config[name], section, asked_in.get(name, ()))
    return config


def _checked(value: Any, hint: Any, path: str) -> Any:
    """Returns the value of a field in its plain type, which JSON has too.

    Lists become tuples, paths become strings, and NumPy numbers become Python numbers.

    Raises:
      ValueError: if the field has a plain type and the value has another type.
    """
    options, plain = _options(hint), _kind(hint)
    if value is None or len(options) != 1 or plain not in _PLAIN:
        return value
    if plain is tuple and isinstance(value, list | tuple):  # JSON has lists instead of tuples
        (kind, *_) = typing.get_args(options[0]) or (Any,)
        return tuple(_checked(part, kind, f'{path}[{i}]') for i, part in enumerate(value))
    if plain is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    kind, words = _PLAIN[plain]
    if not isinstance(value, kind) or (isinstance(value, bool) and plain is not bool):
        raise ValueError(f'{path} must be {words}, got {value!r}.')
    return value.item() if isinstance(value, np.generic) else value


def keys_of(cls: type) -> tuple[set[str], set[str]]:
    """Returns the keys of a section, and those of them that have no default."""
    fields = dataclasses.fields(cls)
    return {f.name for f in fields}, {f.name for f in fields if _is_needed(f)}


def section_of(cls: type, name: str) -> Any:
    """Returns the dataclass of the section in a field; None if the field is not a section."""
    (field,) = (field for field in dataclasses.fields(cls) if field.name == name)
    kind = field.metadata.get(SECTION) or _kind(_hints(cls)[name])
    return kind if dataclasses.is_dataclass(kind) else None


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _options(hint: Any) -> list[Any]:
    """Returns the types of a hint without None, with their parameters: [int] for `int | None`."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return [option for option in options if option is not type(None)]


def _kind(hint: Any) -> Any:
    """Returns the first type of a hint without parameters: tuple for `tuple[int, ...] | None`."""
    option = _options(hint)[0]
    return typing.get_origin(option) or option


def _default(field: dataclasses.Field[Any]) -> Any:
    """Returns the default of a field, or None if it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _is_needed(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _add_value(config: ConfigDict, cls: type, field: dataclasses.Field[Any]) -> None:
    """Adds a key of a plain type; if its default is None, as a placeholder."""
    kind, default = _kind(_hints(cls)[field.name]), _default(field)
    if kind in _PLAIN:
        config[field.name] = placeholder(kind) if default is None else kind(default)


def _add_asked(config: ConfigDict, cls: type, names: Iterable[str]) -> None:
    """Adds the named keys; the placeholder of a rule is a string."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in names:
        if name in fields and name not in config:
            _add_value(config, cls, fields[name])
            if name not in config:
                config[name] = placeholder(str)


def profiled(config: ConfigDict, profile: bool) -> ConfigDict:
    """Returns the config, with `train.profile_steps` set if `profile` is true (`LoopConfig`)."""
    if not profile:
        return config
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.train.profile_steps = config.train.get('profile_steps') or 3
    return config


def json_values(config: Any) -> dict[str, Any]:
    """Returns a config dataclass, or a mapping of its values, as JSON values; rules become text.

    Raises:
      ValueError: if a value is neither valid in JSON nor a rule.
    """
    values: dict[str, Any] = json.loads(json.dumps(_plain(config), default=_as_text))
    return values


def _plain(config: Any) -> Any:
    """Returns a config dataclass as a dict; nested sections, also in tuples, become dicts too."""
    if not dataclasses.is_dataclass(config):
        return config
    plain, cls = {}, type(config)
    for name, value in vars(config).items():
        if section_of(cls, name):
            value = _plain(value)
        elif isinstance(value, tuple):
            (kind, *_) = typing.get_args(_hints(cls)[name]) or (None,)
            value = [_plain(part) if type(part) is kind else part for part in value]
        plain[name] = value
    return plain


def _as_text(value: Any) -> str:
    """Returns the text of a rule or a loss for JSON, from which a config can be read again."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        module = type(value).__module__
        return repr(value) if module.startswith(SAMPLING) else f'{module}.{value!r}'
    raise ValueError(
        f'the config holds {value!r}, which config.json cannot hold: use numbers, strings, tuples, '
        "dicts and rules such as 'TopK(k=4)'."
    )
