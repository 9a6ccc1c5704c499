"""Compiles the arrays of a JSON schema: `prefixItems` in their order, then `items`."""

from diffusiongemma.constraints.branches import Branch, items_at
from diffusiongemma.constraints.compiler import Compiler
from diffusiongemma.constraints.expressions import (
    EMPTY,
    NOTHING,
    Expression,
    Literal,
    Repeat,
    choice,
    is_nothing,
    joined,
    repeat,
    sequence,
    shared,
)
from diffusiongemma.constraints.schema_parts import Located, common_types
from diffusiongemma.constraints.validity import canonical

# Distinct items need one automaton state for each set of values that has already occurred.
_MAX_DISTINCT = 6


def array_expression(compiler: Compiler, branch: Branch) -> Expression:
    """Returns an expression for the JSON arrays that a branch allows.

    Raises:
      ValueError: if the branch uses an unsupported feature.
    """
    low, high = compiler.count(branch, 'Items')
    if high is not None and high < low:
        return NOTHING
    unique = [part for part in branch if part.schema.get('uniqueItems')]
    if unique and (high is None or high > 1):
        return _bracketed(_distinct(compiler, branch, unique[0], low, high))
    length = max((len(part.each('prefixItems')) for part in branch), default=0)
    length = length if high is None else min(length, high)
    unlimited = high is None or high > length
    item = compiler.value(items_at(length, branch)) if unlimited else NOTHING
    tail = Repeat(item, max(low - length, 0), None if high is None else high - length)
    if not length:
        return _bracketed(joined([tail], compiler.comma))
    comma = Literal(compiler.comma)
    inner = repeat(sequence(comma, item), tail.low, tail.high)
    for index in reversed(range(length)):
        item = compiler.value(items_at(index, branch))
        inner = sequence(*([comma] if index else []), item, inner)
        inner = inner if index < low else choice([EMPTY, inner])
    return _bracketed(inner)


def _bracketed(inner: Expression) -> Expression:
    return sequence(Literal('['), inner, Literal(']'))


def _distinct(
    compiler: Compiler, branch: Branch, unique: Located, low: int, high: int | None
) -> Expression:
    """Returns an expression for `low` to `high` distinct items, each one of a few known values."""
    texts: dict[str, Expression] | None = _listed_items(compiler, items_at(0, branch))
    has_prefix = any('prefixItems' in part.schema for part in branch)
    if has_prefix or texts is None or len(texts) > _MAX_DISTINCT:
        raise compiler.refuse(
            'uniqueItems',
            unique.where,
            f'a finite automaton can compare at most {_MAX_DISTINCT} values, which enum or const '
            'must list. Leave it out, or list the values of items.',
        )
    known: dict[frozenset[str], Expression] = {}

    def after(used: frozenset[str]) -> Expression:
        if used not in known:
            comma: list[Expression] = [Literal(compiler.comma)] if used else []
            more = high is None or len(used) < high
            parts: list[Expression] = [EMPTY] if len(used) >= low else []
            parts += [
                sequence(*comma, text, after(used | {value}))
                for value, text in texts.items()
                if value not in used and more
            ]
            known[used] = shared(choice(parts))
        return known[used]

    return after(frozenset())


def _listed_items(compiler: Compiler, parts: list[Located]) -> dict[str, Expression] | None:
    """Returns the JSON texts of each value that items may have, or None if none are listed."""
    result: dict[str, Expression] = {}
    for branch in compiler.branches.of(*parts):
        types = common_types(branch)
        values = compiler.branches.values(branch)
        if values is None and branch and types <= {'null', 'boolean'}:
            values = [None] * ('null' in types) + [False, True] * ('boolean' in types)
        if values is None:
            return None
        for value in values:
            texts = compiler.listed([value], 'number' not in types)
            known = result.get(canonical(value), NOTHING)
            result[canonical(value)] = texts if is_nothing(known) else choice([known, texts])
    return result
