"""Compiles the objects of a JSON schema: listed properties in schema order, then other names."""

import itertools
import json

from diffusiongemma.constraints.branches import Branch, required
from diffusiongemma.constraints.compiler import Compiler
from diffusiongemma.constraints.dfa import product
from diffusiongemma.constraints.expressions import (
    NOTHING,
    Expression,
    Literal,
    Repeat,
    accepted,
    choice,
    is_nothing,
    joined,
    literals,
    sequence,
)
from diffusiongemma.constraints.nfa import compile_expression, compile_shared
from diffusiongemma.constraints.schema_parts import Located, common_types
from diffusiongemma.constraints.strings import Texts, strings_of

_MAX_PATTERNS = 4  # each pattern doubles the number of cases


def object_expression(compiler: Compiler, branch: Branch) -> Expression:
    """Returns an expression for the JSON objects that a branch allows.

    Raises:
      ValueError: if the branch uses an unsupported feature.
    """
    for part in branch:
        for pattern in part.schema.get('patternProperties', {}):
            compiler.checked_pattern(pattern, f'{part.where}/patternProperties')
    needed = required(branch)
    listed = _listed_names(compiler, branch)
    names = [n for part in branch for n in part.schema.get('properties', {})]
    if _is_closed(branch):
        listed = listed and [n for n in listed if _has_pattern(compiler, branch, n)]
    names = list(dict.fromkeys([*names, *(listed or []), *needed]))
    members = []
    for name in names:
        key = Literal(json.dumps(name, ensure_ascii=False) + compiler.colon)
        member = sequence(key, compiler.value(compiler.branches.members(name, branch)))
        if not is_nothing(member):
            members.append(Repeat(member, int(name in needed), 1))
        elif name in needed:
            return NOTHING
    other = NOTHING if listed is not None else _other_members(compiler, branch, names)
    low, high = compiler.count(branch, 'Properties')
    return _counted(compiler, branch, members, other, low, high)


def _is_closed(branch: Branch) -> bool:
    """Returns whether a branch names properties and does not set `additionalProperties`."""
    keywords = {keyword for part in branch for keyword in part.schema}
    named = keywords & {'properties', 'patternProperties'}
    return bool(named) and 'additionalProperties' not in keywords


def _has_pattern(compiler: Compiler, branch: Branch, name: str) -> bool:
    return any(
        compiler.validator.matches(pattern, name)
        for part in branch
        for pattern in part.schema.get('patternProperties', {})
    )


def _counted(
    compiler: Compiler,
    branch: Branch,
    members: list[Repeat],
    other: Expression,
    low: int,
    high: int | None,
) -> Expression:
    """Returns an expression for objects with `low` to `high` of these members."""
    fixed = sum(member.low for member in members)
    optional = len(members) - fixed
    low = low - fixed
    high = None if high is None else high - fixed
    if high is not None and high < max(low, 0):
        return NOTHING
    if low > 1 and not is_nothing(other):
        raise compiler.refuse(
            'minProperties',
            _where(branch, 'minProperties'),
            'names could repeat, and a finite automaton cannot compare them. Set it to at most '
            'one more than the number of required properties.',
        )
    if optional and (low > 1 or high is not None and (high < optional or not is_nothing(other))):
        raise compiler.refuse(
            'minProperties' if low > 1 else 'maxProperties',
            _where(branch, 'minProperties' if low > 1 else 'maxProperties'),
            'it cannot be combined with optional properties. Make them required, or leave it out.',
        )
    if low > 0 and not optional and is_nothing(other):
        return NOTHING
    parts = list(members)
    if not is_nothing(other):
        parts.append(Repeat(other, 0 if optional else max(low, 0), high))
    inner = joined(parts, compiler.comma)
    result = sequence(Literal('{'), inner, Literal('}'))
    if low > 0 and optional:
        if fixed:
            raise compiler.refuse(
                'minProperties',
                _where(branch, 'minProperties'),
                'it cannot be combined with optional properties. Make one more property required, '
                'or leave it out.',
            )
        automaton = compile_expression(result, compiler.max_states)
        empty = compile_shared(Literal('{}'), compiler.max_states)
        return accepted(product(automaton, empty, compiler.max_states, difference=True))
    return result


def _where(branch: Branch, keyword: str) -> str:
    return next(part.where for part in branch if keyword in part.schema)


def _listed_names(compiler: Compiler, branch: Branch) -> list[str] | None:
    """Returns the names that `propertyNames` lists, or None if it lists none."""
    for part in branch:
        if 'propertyNames' in part.schema:
            values = [
                compiler.branches.values(names)
                for names in compiler.branches.of(part / 'propertyNames')
            ]
            if all(listed is not None for listed in values):
                listed_names = [v for listed in values for v in listed or [] if isinstance(v, str)]
                return list(dict.fromkeys(listed_names))
    return None


def _other_members(compiler: Compiler, branch: Branch, names: list[str]) -> Expression:
    """Returns an expression for a member with any other name, or NOTHING if none is allowed."""
    closed = _is_closed(branch)
    patterns = list(
        dict.fromkeys(p for part in branch for p in part.schema.get('patternProperties', {}))
    )
    if len(patterns) > _MAX_PATTERNS:
        raise compiler.refuse(
            'patternProperties',
            _where(branch, 'patternProperties'),
            f'it has more than {_MAX_PATTERNS} patterns. Use fewer.',
        )
    members = []
    for chosen in itertools.product((True, False), repeat=len(patterns)):
        matched = [p for p, is_matched in zip(patterns, chosen, strict=True) if is_matched]
        if closed and not matched:
            continue
        value = compiler.value(_values_of(branch, matched))
        if is_nothing(value):
            continue
        others = [p for p in patterns if p not in matched]
        key = _names_expression(
            compiler, branch, Texts(0, None, tuple(matched), tuple(others), (), tuple(names))
        )
        members.append(sequence(key, Literal(compiler.colon), value))
    return choice(members)


def _values_of(branch: Branch, matched: list[str]) -> list[Located]:
    """Returns the schemas of a property whose name matches exactly these patterns."""
    result = []
    for part in branch:
        schemas = [
            part / 'patternProperties' / pattern
            for pattern in part.schema.get('patternProperties', {})
            if pattern in matched
        ]
        if not schemas and 'additionalProperties' in part.schema:
            schemas = [part / 'additionalProperties']
        result += schemas
    return result


def _names_expression(compiler: Compiler, branch: Branch, texts: Texts) -> Expression:
    """Returns an expression for the names in `texts` that all `propertyNames` allow, as JSON."""
    constraints = [part / 'propertyNames' for part in branch if 'propertyNames' in part.schema]
    if not constraints:
        return texts.expression(compiler.max_states)
    result = texts.dfa(compiler.max_states)
    allowed = choice(_name_texts(compiler, names) for names in compiler.branches.of(*constraints))
    if is_nothing(allowed):
        return NOTHING
    other = compile_expression(allowed, compiler.max_states)
    return strings_of(product(result, other, compiler.max_states))


def _name_texts(compiler: Compiler, names: Branch) -> Expression:
    """Returns an expression for the unquoted texts that a branch of `propertyNames` allows."""
    values = compiler.branches.values(names)
    if values is not None:
        return literals(value for value in values if isinstance(value, str))
    if 'string' not in common_types(names):
        return NOTHING
    return accepted(compiler.texts(names).dfa(compiler.max_states))
