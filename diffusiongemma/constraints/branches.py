"""Expands references and combinations of a JSON schema into alternatives of plain conjunctions.

`$ref`, `allOf`, `anyOf` and `oneOf` determine which schemas apply together. A branch is one
choice among the alternatives: a tuple of parts that all apply, whose `$ref` and combination
keywords are already resolved.
"""

import itertools
from typing import Any

from diffusiongemma.constraints.schema_parts import (
    ANNOTATIONS,
    Located,
    check,
    common_types,
    resolve,
)
from diffusiongemma.constraints.validity import Validator, bounds_of, canonical, limits_of

Branch = tuple[Located, ...]

_COMBINATIONS = {'$ref', 'allOf', 'anyOf', 'oneOf'}
_MAX_BRANCHES = 1000


class Branches:
    """A cached expansion of the parts of one schema into branches."""

    def __init__(self, root: Any, validator: Validator) -> None:
        self._root = root
        self._validator = validator
        self._known: dict[tuple[object, ...], list[Branch]] = {}

    def of(self, *parts: Located) -> list[Branch]:
        """Returns the branches of a conjunction of parts; a valid value satisfies one of them.

        Raises:
          ValueError: if a part is not a schema, uses an unsupported feature, or has alternatives
            under `oneOf` that are not known to exclude each other.
        """
        key = tuple((part.where, part.refs) for part in parts)
        if key not in self._known:
            result: list[Branch] = [()]
            for part in parts:
                result = _both(result, self._of_one(part), part.where)
            self._known[key] = result
        return self._known[key]

    def _of_one(self, part: Located) -> list[Branch]:
        """Returns the branches of one part."""
        check(part)
        if isinstance(part.schema, bool):
            return [()] if part.schema else []
        plain = part.schema.keys() - ANNOTATIONS - _COMBINATIONS
        plain = {keyword for keyword in plain if not keyword.startswith('x-')}
        result: list[Branch] = [(part,)] if plain else [()]
        if '$ref' in part.schema:
            result = _both(result, self.of(resolve(self._root, part)), part.where)
        for each in part.each('allOf'):
            result = _both(result, self.of(each), part.where)
        for keyword in ('anyOf', 'oneOf'):
            if keyword in part.schema:
                choices = [self.of(each) for each in part.each(keyword)]
                if keyword == 'oneOf':
                    self._check_exclusive(choices, result, part)
                result = _both(result, list(itertools.chain(*choices)), part.where)
        return result

    def _check_exclusive(
        self, choices: list[list[Branch]], context: list[Branch], part: Located
    ) -> None:
        """Raises ValueError unless every two alternatives of a `oneOf` exclude each other."""
        for (i, left), (j, right) in itertools.combinations(enumerate(choices), 2):
            if not all(
                self.is_impossible((*sibling, *a, *b))
                for sibling in context
                for a in left
                for b in right
            ):
                raise ValueError(
                    f'oneOf at {part.where} is not supported here: its alternatives {i} and {j} '
                    'may hold for one value. Use anyOf, or give both a required property with '
                    'different constants.'
                )

    def values(self, branch: Branch) -> list[Any] | None:
        """Returns the values that `enum` or `const` of a branch list; None without them."""
        for part in branch:
            if 'enum' in part.schema or 'const' in part.schema:
                listed = part.schema.get('enum', [part.schema.get('const')])
                distinct = {canonical(value): value for value in reversed(listed)}
                return [
                    value
                    for value in reversed(distinct.values())
                    if all(self._validator.is_valid(value, other) for other in branch)
                ]
        return None

    def is_impossible(self, branch: Branch) -> bool:
        """Returns whether a branch provably allows no value."""
        values = self.values(branch)
        if values is not None:
            return not values
        return all(self._is_impossible_for(name, branch) for name in common_types(branch))

    def _is_impossible_for(self, name: str, branch: Branch) -> bool:
        if name in ('integer', 'number'):
            ends: list[tuple[float | None, float | None]] = [bounds_of(branch).integers()]
            if name == 'number':
                ends.append(bounds_of(branch).floats())
            return all(low is not None and high is not None and low > high for low, high in ends)
        if name in ('null', 'boolean'):
            return False
        counted = {'string': 'Length', 'array': 'Items', 'object': 'Properties'}
        low, high = limits_of(branch, counted[name])
        if high is not None and low > high:
            return True
        if name == 'array':
            return any(self._all_impossible(items_at(i, branch)) for i in range(min(low, 64)))
        if name == 'object':
            return any(self._all_impossible(self.members(n, branch)) for n in required(branch))
        return False

    def _all_impossible(self, parts: list[Located]) -> bool:
        return all(map(self.is_impossible, self.of(*parts)))

    def members(self, name: str, branch: Branch) -> list[Located]:
        """Returns the schemas that apply to the property with this name."""
        for part in branch:
            if not self._validator.is_name(name, part):
                return [Located(False, f'{part.where}/propertyNames: {name}')]
        return [schema for part in branch for schema in self._validator.members(name, part)]


def _both(left: list[Branch], right: list[Branch], where: str) -> list[Branch]:
    """Returns the conjunctions of each branch in `left` with each branch in `right`."""
    if len(left) * len(right) > _MAX_BRANCHES:
        raise ValueError(
            f'The schema at {where} has more than {_MAX_BRANCHES} combinations of alternatives. '
            'Use fewer anyOf and oneOf that apply together.'
        )
    return [(*a, *(part for part in b if part not in a)) for a in left for b in right]


def required(branch: Branch) -> list[str]:
    """Returns the names of the properties that an object must have."""
    return list(dict.fromkeys(n for part in branch for n in part.schema.get('required', ())))


def items_at(index: int, branch: Branch) -> list[Located]:
    """Returns the schemas that apply to the array item at this index."""
    result = []
    for part in branch:
        prefix = part.each('prefixItems')
        if index < len(prefix):
            result.append(prefix[index])
        elif 'items' in part.schema:
            result.append(part / 'items')
    return result
