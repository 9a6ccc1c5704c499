"""From a JSON schema to a regular expression that matches only valid JSON texts."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

# Keywords that describe and do not constrain.
_ANNOTATIONS = {
    '$schema', '$id', '$comment', '$defs', 'definitions', 'title', 'description', 'default',
    'examples', 'deprecated', 'readOnly', 'writeOnly',
}  # fmt: skip
# Keywords that are honoured beside `type`, for each type.
_KEYWORDS = {
    'object': {'properties', 'required', 'additionalProperties'},
    'array': {'items', 'minItems', 'maxItems'},
    'string': {'minLength', 'maxLength'},
    'integer': {'minimum', 'maximum'},
    'number': set(),
    'boolean': set(),
    'null': set(),
}
_TYPES = {
    'object': dict,
    'array': list,
    'string': str,
    'integer': int,
    'number': (int, float),
    'boolean': bool,
    'null': type(None),
}
# Characters of a string as they are, or behind a backslash; \u escapes are not written, since
# half of a surrogate pair would be no character.
_CHARACTER = r'(?:[^"\\\x00-\x1f]|\\["\\/bfnrt])'
_INTEGER = r'-?(?:0|[1-9][0-9]*)'
# An exponent of three digits could be more than a float holds.
_NUMBER = rf'{_INTEGER}(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{{1,2}})?'
_MAX_INTEGER_RANGE = 10_000


def to_pattern(schema: Any, separators: tuple[str, str] = (',', ':')) -> str:
    """A regular expression, in Python's syntax, of JSON texts that are valid under a schema.

    Supported are objects (`properties` in their order, `required`), arrays (`items`, `minItems`,
    `maxItems`), strings (`minLength`, `maxLength`), integers (`minimum` and `maximum` together),
    numbers, booleans, null, lists of types, `enum`, `const`, `anyOf`, an `allOf` of one schema,
    and a local `$ref` that is not recursive. Objects get no properties beyond those named.
    Descriptive keywords are passed over; any other is an error, for what it asks could be broken.

    Args:
      schema: the schema as `json.loads` gives it.
      separators: between items and behind keys, as of `json.dumps`.

    Raises:
      ValueError: when the schema uses what is not supported, or no value can be valid.
    """
    return _Compiler(schema, separators).pattern(schema, '#', ())


class _Compiler:
    """Walks a schema. `where` is the path of the part at hand, for errors."""

    def __init__(self, root: Any, separators: tuple[str, str]):
        self._root = root
        self._separators = separators
        self._comma, self._colon = (re.escape(separator) for separator in separators)

    def pattern(self, schema: Any, where: str, refs: tuple[str, ...]) -> str:
        """The pattern of one schema; `refs` are the references that led to it."""
        if not isinstance(schema, dict):
            raise ValueError(f'The schema at {where} must be an object, got {schema!r}.')
        kinds = [k for k in ('$ref', 'enum', 'const', 'anyOf', 'allOf', 'type') if k in schema]
        if not kinds:
            found = ', '.join(sorted(schema.keys() - _ANNOTATIONS)) or 'nothing that constrains'
            raise ValueError(
                f'The schema at {where} has {found}; it needs one of type, enum, const, anyOf '
                'and $ref. A value of any kind is not supported.'
            )
        kind = kinds[0]
        if kind in ('enum', 'const'):
            self._check(schema, {kind, 'type'}, where)
            values = schema['enum'] if kind == 'enum' else [schema['const']]
            return self._values(values, _types(schema, where) if 'type' in schema else None, where)
        if kind == 'type':
            types = _types(schema, where)
            self._check(schema, {'type'}.union(*(_KEYWORDS[t] for t in types)), where)
            return _any_of(getattr(self, f'_{t}')(schema, where, refs) for t in types)
        self._check(schema, {kind}, where)
        if kind == '$ref':
            return self._reference(schema['$ref'], where, refs)
        parts = schema[kind]
        if not parts or kind == 'allOf' and len(parts) > 1:
            raise ValueError(f'{kind} of {len(parts)} schemas is not supported, at {where}.')
        return _any_of(
            self.pattern(part, f'{where}/{kind}/{i}', refs) for i, part in enumerate(parts)
        )

    def _check(self, schema: dict, known: set[str], where: str) -> None:
        unknown = sorted(schema.keys() - known - _ANNOTATIONS)
        if unknown:
            raise ValueError(
                f'The keyword {unknown[0]!r} is not supported at {where}, beside '
                f'{", ".join(sorted(schema.keys() & known))}. Take it out if answers may break '
                'it, or write the schema without it.'
            )

    def _reference(self, ref: str, where: str, refs: tuple[str, ...]) -> str:
        if ref in refs:
            raise ValueError(
                f'The reference {ref!r} at {where} is recursive, which no regular expression '
                'can express. Unroll it to the depth that you need.'
            )
        if not ref.startswith('#'):
            raise ValueError(f'The reference {ref!r} at {where} is not local (#/...).')
        target = self._root
        for name in filter(None, ref[1:].split('/')):
            name = name.replace('~1', '/').replace('~0', '~')
            if not isinstance(target, dict) or name not in target:
                raise ValueError(f'The reference {ref!r} at {where} leads nowhere.')
            target = target[name]
        return self.pattern(target, ref, (*refs, ref))

    def _values(self, values: list, types: list[str] | None, where: str) -> str:
        fitting = [v for v in values if types is None or any(_has_type(v, t) for t in types)]
        if not fitting:
            raise ValueError(f'No value of {values!r} at {where} has the type {types}.')
        texts = (json.dumps(v, ensure_ascii=False, separators=self._separators) for v in fitting)
        return _any_of(re.escape(text) for text in texts)

    def _object(self, schema: dict, where: str, refs: tuple[str, ...]) -> str:
        properties, required = schema.get('properties', {}), set(schema.get('required', ()))
        if missing := sorted(required - properties.keys()):
            raise ValueError(
                f'The required property {missing[0]!r} at {where} is not among its properties.'
            )
        members = []
        for name, part in properties.items():
            key = re.escape(json.dumps(name, ensure_ascii=False))
            value = self.pattern(part, f'{where}/properties/{name}', refs)
            members.append((f'{key}{self._colon}{value}', name in required))
        return rf'\{{{_members(members, self._comma)}\}}'

    def _array(self, schema: dict, where: str, refs: tuple[str, ...]) -> str:
        low, high = _limits(schema, 'minItems', 'maxItems', where)
        if high == 0:
            return r'\[\]'
        if 'items' not in schema:
            raise ValueError(f'The array at {where} needs items: any value is not supported.')
        item = self.pattern(schema['items'], f'{where}/items', refs)
        rest = '' if high is None else high - 1
        items = f'{item}(?:{self._comma}{item}){{{max(low - 1, 0)},{rest}}}'
        return rf'\[{items}\]' if low else rf'\[(?:{items})?\]'

    def _string(self, schema: dict, where: str, refs: tuple[str, ...]) -> str:
        low, high = _limits(schema, 'minLength', 'maxLength', where)
        return f'"{_CHARACTER}{{{low},{"" if high is None else high}}}"'

    def _integer(self, schema: dict, where: str, refs: tuple[str, ...]) -> str:
        if not schema.keys() & {'minimum', 'maximum'}:
            return _INTEGER
        low, high = schema.get('minimum'), schema.get('maximum')
        whole = all(isinstance(bound, int) for bound in (low, high))
        if not whole or not low <= high < low + _MAX_INTEGER_RANGE:
            raise ValueError(
                f'minimum={low} and maximum={high} at {where} are not supported: they must both '
                f'be there, whole, and hold 1 to {_MAX_INTEGER_RANGE} integers.'
            )
        return _any_of(str(value) for value in range(low, high + 1))

    def _number(self, schema: dict, where: str, refs: tuple[str, ...]) -> str:
        return _NUMBER

    def _boolean(self, schema: dict, where: str, refs: tuple[str, ...]) -> str:
        return 'true|false'

    def _null(self, schema: dict, where: str, refs: tuple[str, ...]) -> str:
        return 'null'


def _any_of(patterns: Iterable[str]) -> str:
    return f'(?:{"|".join(patterns)})'


def _members(members: list[tuple[str, bool]], comma: str) -> str:
    """An object's members in order, with commas between those that are there.

    The first one that is there is either an optional one or the first required one; what comes
    behind it has its comma in front.
    """

    def starts() -> Iterator[str]:
        for i, (member, required) in enumerate(members):
            rest = (f'(?:{comma}{m}){"" if needed else "?"}' for m, needed in members[i + 1 :])
            yield member + ''.join(rest)
            if required:
                return
        yield ''

    return _any_of(starts())


def _types(schema: dict, where: str) -> list[str]:
    types = schema['type'] if isinstance(schema['type'], list) else [schema['type']]
    for name in types:
        if name not in _TYPES:
            raise ValueError(f'Unknown type {name!r} at {where}; known are {", ".join(_TYPES)}.')
    return types


def _has_type(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == 'boolean'
    return isinstance(value, _TYPES[name])


def _limits(schema: dict, low_name: str, high_name: str, where: str) -> tuple[int, int | None]:
    low, high = schema.get(low_name, 0), schema.get(high_name)
    if low < 0 or high is not None and high < low:
        raise ValueError(f'{low_name}={low} and {high_name}={high} at {where} fit no value.')
    return low, high
