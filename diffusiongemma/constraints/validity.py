"""Decides whether a value is valid under a schema; `enum` and `const` need it for their values."""

import json
from fractions import Fraction
from typing import Any

from diffusiongemma.constraints.numbers import Bounds
from diffusiongemma.constraints.schema_parts import Located, check, resolve, types_of
from diffusiongemma.constraints.strings import search_dfa


def canonical(value: Any) -> str:
    """Returns a text that is equal for values that JSON Schema considers equal, like 1 and 1.0."""
    return json.dumps(with_whole_numbers(value), sort_keys=True)


def with_whole_numbers(value: Any) -> Any:
    """Returns a value with whole floats as integers, also inside arrays and objects."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [with_whole_numbers(item) for item in value]
    if isinstance(value, dict):
        return {name: with_whole_numbers(item) for name, item in value.items()}
    return value


def bounds_of(parts: tuple[Located, ...]) -> Bounds:
    """Returns the range of numbers that all parts allow."""
    lows: list[tuple[Fraction, bool]] = []
    highs: list[tuple[Fraction, bool]] = []
    for part in parts:
        for keyword, ends, is_open in (
            ('minimum', lows, False),
            ('exclusiveMinimum', lows, True),
            ('maximum', highs, False),
            ('exclusiveMaximum', highs, True),
        ):
            if keyword in part.schema:
                ends.append((Fraction(part.schema[keyword]), is_open))
    low = max(lows, default=None)
    high = min(highs, key=lambda end: (end[0], not end[1]), default=None)
    return Bounds(low and low[0], high and high[0], bool(low and low[1]), bool(high and high[1]))


def limits_of(parts: tuple[Located, ...], name: str) -> tuple[int, int | None]:
    """Returns the limits under `min<name>` and `max<name>`, for a name such as `Items`."""
    lows = [int(part.schema[f'min{name}']) for part in parts if f'min{name}' in part.schema]
    highs = [int(part.schema[f'max{name}']) for part in parts if f'max{name}' in part.schema]
    return max(lows, default=0), min(highs, default=None)


class Validator:
    """A validator of values under the parts of one schema.

    `format` is ignored: in JSON Schema it describes and does not constrain.
    """

    def __init__(self, root: Any, max_states: int) -> None:
        self._root = root
        self._max_states = max_states
        self._checked: set[str] = set()
        self._values: dict[str, set[str] | None] = {}

    def is_valid(self, value: Any, part: Located) -> bool:
        """Returns whether a value is valid under a part; raises the errors of `check`."""
        if part.where not in self._checked:
            check(part)
            self._checked.add(part.where)
        if isinstance(part.schema, bool):
            return part.schema
        if not self._has_type(value, types_of(part)) or not self._combines(value, part):
            return False
        if isinstance(value, str):
            return self._is_string(value, part)
        if isinstance(value, list):
            return self._is_array(value, part)
        if isinstance(value, dict):
            return self._is_object(value, part)
        return value is None or isinstance(value, bool) or self._is_number(value, part)

    def matches(self, pattern: str, text: str) -> bool:
        """Returns whether a pattern matches somewhere in a text."""
        return search_dfa(pattern, self._max_states).accepts(text.encode())

    def _has_type(self, value: Any, types: set[str]) -> bool:
        if isinstance(value, bool):
            return 'boolean' in types
        if isinstance(value, int | float):
            return 'number' in types or 'integer' in types and value == int(value)
        names = {str: 'string', list: 'array', dict: 'object', type(None): 'null'}
        return names[type(value)] in types

    def _combines(self, value: Any, part: Located) -> bool:
        schema = part.schema
        if '$ref' in schema and not self.is_valid(value, resolve(self._root, part)):
            return False
        listed = self._listed(part)
        if listed is not None and canonical(value) not in listed:
            return False
        valid = {
            keyword: [self.is_valid(value, choice) for choice in part.each(keyword)]
            for keyword in ('allOf', 'anyOf', 'oneOf')
            if keyword in schema
        }
        return (
            all(valid.get('allOf', [True]))
            and any(valid.get('anyOf', [True]))
            and sum(valid.get('oneOf', [True])) == 1
        )

    def _listed(self, part: Located) -> set[str] | None:
        """Returns the canonical texts of the values that `enum` and `const` allow, or None."""
        if part.where not in self._values:
            listed = []
            if 'enum' in part.schema:
                listed.append({canonical(value) for value in part.schema['enum']})
            if 'const' in part.schema:
                listed.append({canonical(part.schema['const'])})
            self._values[part.where] = set.intersection(*listed) if listed else None
        return self._values[part.where]

    def _is_number(self, value: int | float, part: Located) -> bool:
        divisor = part.schema.get('multipleOf')
        whole = divisor is None or Fraction(value) % Fraction(divisor) == 0
        return whole and bounds_of((part,)).hold(value)

    def _is_string(self, value: str, part: Located) -> bool:
        low, high = limits_of((part,), 'Length')
        if len(value) < low or high is not None and len(value) > high:
            return False
        return 'pattern' not in part.schema or self.matches(part.schema['pattern'], value)

    def _is_array(self, value: list[Any], part: Located) -> bool:
        low, high = limits_of((part,), 'Items')
        if len(value) < low or high is not None and len(value) > high:
            return False
        if part.schema.get('uniqueItems') and len(set(map(canonical, value))) < len(value):
            return False
        prefix = part.each('prefixItems')
        items = [part / 'items'] * len(value) if 'items' in part.schema else []
        schemas = [*prefix, *items[len(prefix) :]]
        return all(map(self.is_valid, value, schemas))

    def _is_object(self, value: dict[str, Any], part: Located) -> bool:
        low, high = limits_of((part,), 'Properties')
        if len(value) < low or high is not None and len(value) > high:
            return False
        if not set(part.schema.get('required', ())) <= value.keys():
            return False
        return all(
            self.is_valid(item, schema)
            for name, item in value.items()
            for schema in self.members(name, part)
        ) and all(self.is_name(name, part) for name in value)

    def is_name(self, name: str, part: Located) -> bool:
        """Returns whether `propertyNames` of a part allows this name."""
        return 'propertyNames' not in part.schema or self.is_valid(name, part / 'propertyNames')

    def members(self, name: str, part: Located) -> list[Located]:
        """Returns the schemas of a part that apply to the property with this name."""
        schema = part.schema
        result = [part / 'properties' / name] if name in schema.get('properties', {}) else []
        for pattern in schema.get('patternProperties', {}):
            if self.matches(pattern, name):
                result.append(part / 'patternProperties' / pattern)
        if not result and 'additionalProperties' in schema:
            result.append(part / 'additionalProperties')
        return result
