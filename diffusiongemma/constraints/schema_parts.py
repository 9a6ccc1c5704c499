"""The parts of a JSON schema: their paths, references and supported keywords."""

import dataclasses
import functools
import json
import re
import urllib.parse
from collections.abc import Callable
from typing import Any

from diffusiongemma.constraints.expressions import Expression
from diffusiongemma.constraints.regex import parse

# Keywords that describe and do not constrain: those of JSON Schema, and two of OpenAPI (`example`
# and `discriminator`) that pydantic writes.
ANNOTATIONS = {
    '$schema', '$id', '$comment', '$defs', 'definitions', 'title', 'description', 'default',
    'examples', 'example', 'deprecated', 'readOnly', 'writeOnly', 'discriminator',
}  # fmt: skip
TYPES = ('null', 'boolean', 'object', 'array', 'string', 'integer', 'number')
_COUNTS = (
    'minLength', 'maxLength', 'minItems', 'maxItems', 'minProperties', 'maxProperties',
)  # fmt: skip
_BOUNDS = ('minimum', 'maximum', 'exclusiveMinimum', 'exclusiveMaximum')
_REMEDIES = {
    'nullable': "It is OpenAPI's: add 'null' to the type instead.",
    'items': 'Write prefixItems for a list of schemas.',
    'definitions': 'Write $defs.',
}


@dataclasses.dataclass(frozen=True)
class Located:
    """A part of a schema together with its path.

    Attributes:
      schema: the part, a dict or a bool.
      where: the path of the part, an RFC 6901 fragment with percent-encoding only where needed.
      refs: the paths of the references that led to this part.
    """

    schema: Any = dataclasses.field(compare=False)
    where: str
    refs: tuple[str, ...] = ()

    def __truediv__(self, name: str | int) -> 'Located':
        """Returns the part under a key or an index."""
        key = str(name).replace('~', '~0').replace('/', '~1').replace('%', '%25')
        key = ''.join(c if c.isprintable() else urllib.parse.quote(c) for c in key)
        return Located(self.schema[name], f'{self.where}/{key}', self.refs)

    def each(self, keyword: str) -> list['Located']:
        """Returns the schemas in the list or object under a keyword; [] if it is missing."""
        if keyword not in self.schema:
            return []
        parts = self / keyword
        keys = parts.schema if isinstance(parts.schema, dict) else range(len(parts.schema))
        return [parts / key for key in keys]


def load(schema: Any) -> Any:
    """Returns a schema after a round trip through JSON.

    Raises:
      ValueError: if the schema is not valid JSON, has numbers that are not finite, or has strings
        with lone surrogates.
    """
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        text.encode()
        return json.loads(text)
    except UnicodeEncodeError:
        raise ValueError(
            'The schema has half of a surrogate pair (U+D800 to U+DFFF), which is not a character. '
            'Remove it.'
        ) from None
    except RecursionError:
        raise ValueError('The schema is nested too deeply. Nest fewer schemas.') from None
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f'The schema is not valid JSON: {error}. Pass dicts, lists, strings, finite numbers, '
            'booleans and None.'
        ) from None


def resolve(root: Any, part: Located) -> Located:
    """Returns the part that the `$ref` of a part refers to.

    Raises:
      ValueError: if the reference is not local, does not exist, or is recursive.
    """
    ref = part.schema['$ref']
    if not isinstance(ref, str):
        raise ValueError(f'$ref at {part.where} must be a string, got {ref!r}.')
    if ref and not ref.startswith('#'):
        raise ValueError(
            f'The reference {ref!r} at {part.where} is not local. Copy what it names into $defs '
            'and refer to it as #/$defs/NAME.'
        )
    pointer = urllib.parse.unquote(ref[1:])
    if pointer and not pointer.startswith('/'):
        raise ValueError(
            f'The reference {ref!r} at {part.where} names an anchor, which is not supported. '
            'Refer to it by its path, as #/$defs/NAME.'
        )
    target = Located(root, '#', part.refs)
    for token in pointer.split('/')[1:]:
        name: str | int = token.replace('~1', '/').replace('~0', '~')
        if isinstance(target.schema, list) and re.fullmatch('0|[1-9][0-9]*', token):
            name = int(token) if len(token) < 10 else -1
        known = (
            range(len(target.schema)) if isinstance(target.schema, list)
            else target.schema if isinstance(target.schema, dict) else ()
        )  # fmt: skip
        if name not in known or re.search('~(?![01])', token):
            raise ValueError(
                f'The reference {ref!r} at {part.where} leads nowhere: {target.where} has no '
                f'{token!r}. Define it there.'
            )
        target = target / name
    if target.where in part.refs:
        raise ValueError(
            f'The reference {ref!r} at {part.where} is recursive, which no finite automaton can '
            'hold. Unroll it to the depth that you need.'
        )
    return dataclasses.replace(target, refs=(*part.refs, target.where))


def check(part: Located) -> None:
    """Raises ValueError if a part is not a schema or has an unsupported keyword."""
    schema, where = part.schema, part.where
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise ValueError(
            f'The schema at {where} must be an object or a boolean, got {_brief(schema)}.'
        )
    for keyword, value in schema.items():
        if keyword == '$id' and where == '#' or keyword.startswith('x-'):
            continue
        if keyword not in ANNOTATIONS | _CHECKS.keys() or keyword == '$id':
            remedy = _REMEDIES.get(
                keyword, 'Take it out if answers may break it, or write the schema without it.'
            )
            raise ValueError(f'The keyword {keyword!r} at {where} is not supported. {remedy}')
        if keyword in _CHECKS:
            accepts, expected = _CHECKS[keyword]
            if not accepts(value):
                remedy = f' {_REMEDIES[keyword]}' if keyword in _REMEDIES else ''
                raise ValueError(
                    f'{keyword} at {where} must be {expected}, got {_brief(value)}.{remedy}'
                )
    for keyword in ('pattern', 'patternProperties'):
        patterns = schema.get(keyword, ())
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            try:
                _parse_search(pattern)
            except ValueError as error:
                raise ValueError(f'At {where}/{keyword}: {error}') from None


@functools.lru_cache(maxsize=512)
def _parse_search(pattern: str) -> Expression:
    return parse(pattern, search=True)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f'{text[:77]}...'


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_number(value) and value >= 0 and value == int(value)


def _is_type(value: Any) -> bool:
    names = value if isinstance(value, list) else [value]
    return bool(names) and all(isinstance(name, str) and name in TYPES for name in names)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_schema(value: Any) -> bool:
    return isinstance(value, dict | bool)


def _is_schemas(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


_Check = tuple[Callable[[Any], bool], str]
_CHECKS: dict[str, _Check] = {
    **dict.fromkeys(_COUNTS, (_is_count, 'a whole number >= 0')),
    **dict.fromkeys(_BOUNDS, (_is_number, 'a number')),
    **dict.fromkeys(('anyOf', 'oneOf', 'allOf'), (_is_schemas, 'a list of schemas, not empty')),
    **dict.fromkeys(
        ('properties', 'patternProperties'),
        (lambda value: isinstance(value, dict), 'an object of schemas'),
    ),
    **dict.fromkeys(
        ('additionalProperties', 'propertyNames', 'items'), (_is_schema, 'a schema')
    ),
    '$ref': (lambda value: isinstance(value, str), 'a string'),
    'type': (_is_type, f'one of {", ".join(TYPES)}, or a list of them'),
    'enum': (lambda value: isinstance(value, list) and bool(value), 'a list of values'),
    'const': (lambda value: True, 'a value'),
    'required': (_is_texts, 'a list of names'),
    'prefixItems': (_is_schemas, 'a list of schemas, not empty'),
    'pattern': (lambda value: isinstance(value, str), 'a string'),
    'format': (lambda value: isinstance(value, str), 'a string'),
    'multipleOf': (lambda value: _is_number(value) and value > 0, 'a number > 0'),
    'uniqueItems': (lambda value: isinstance(value, bool), 'a boolean'),
}  # fmt: skip


def types_of(part: Located) -> set[str]:
    """Returns the types that a part allows; `number` includes `integer`."""
    names = part.schema.get('type', [t for t in TYPES if t != 'integer'])
    return {names} if isinstance(names, str) else set(names)


def common_types(parts: tuple[Located, ...]) -> set[str]:
    """Returns the types that all parts allow, with at most one of `number` and `integer`."""
    result = set(TYPES)
    for part in parts:
        allowed = types_of(part)
        result &= allowed | ({'integer'} if 'number' in allowed else set())
    return result - ({'integer'} if 'number' in result else set())
