"""Compiles a JSON schema to an automaton of the JSON texts that are valid under it."""

import json
from typing import Any

from diffusiongemma.constraints.arrays import array_expression
from diffusiongemma.constraints.branches import Branch, Branches
from diffusiongemma.constraints.dfa import Dfa, TooManyStatesError, product
from diffusiongemma.constraints.expressions import (
    Expression,
    Literal,
    Repeat,
    accepted,
    choice,
    is_nothing,
    joined,
    literals,
    sequence,
    shared,
    to_regex,
)
from diffusiongemma.constraints.nfa import compile_expression, compile_shared
from diffusiongemma.constraints.numbers import MAX_DIGITS, integers, multiples, numbers
from diffusiongemma.constraints.objects import object_expression
from diffusiongemma.constraints.schema_parts import Located, common_types, load
from diffusiongemma.constraints.strings import FORMATS, FREE_FORMATS, Texts
from diffusiongemma.constraints.validity import (
    Validator,
    bounds_of,
    limits_of,
    with_whole_numbers,
)

# Whole floats of at least this value are written with an exponent, as `repr` does.
_MAX_WHOLE = 1e16
# The maximum number of characters of a string with both a format and maxLength: each one costs
# automaton states.
_MAX_FORMATTED = 255


def schema_dfa(
    schema: Any, separators: tuple[str, str] = (',', ':'), *, max_states: int, any_depth: int = 1
) -> Dfa:
    """Returns the automaton over bytes of the JSON texts that are valid under a schema.

    Args:
      schema: the schema as `json.loads` returns it; docs/constraints.md lists the supported
        keywords.
      separators: the texts between items and after keys, as in `json.dumps`.
      max_states: the maximum number of states before minimization.
      any_depth: the maximum nesting depth of arrays and objects in a value without constraints.

    Raises:
      ValueError: if the schema is invalid, uses an unsupported feature, allows no value, or
        takes more than max_states states. The message names the keyword and its path.
    """
    compiler = _Compiler(schema, separators, max_states, any_depth)
    try:
        dfa = compile_expression(compiler.root(), max_states)
    except TooManyStatesError:
        raise ValueError(compiler.too_large()) from None
    except RecursionError:
        raise ValueError('The schema is nested too deeply. Nest fewer schemas.') from None
    if dfa.is_empty:
        raise ValueError(compiler.impossible())
    return dfa


def to_pattern(
    schema: Any,
    separators: tuple[str, str] = (',', ':'),
    *,
    max_states: int = 20_000,
    any_depth: int = 1,
) -> str:
    """Returns a regular expression, in Python's syntax, of the valid JSON texts.

    The arguments are those of `schema_dfa`.

    Raises:
      ValueError: if `schema_dfa` would raise it, or if the schema needs an intersection of
        patterns.
    """
    compiler = _Compiler(schema, separators, max_states, any_depth)
    try:
        expression = compiler.root()
        if is_nothing(expression):
            raise ValueError(compiler.impossible())
        return to_regex(expression)
    except TooManyStatesError:
        raise ValueError(compiler.too_large()) from None
    except RecursionError:
        raise ValueError('The schema is nested too deeply. Nest fewer schemas.') from None


class _Compiler:
    """A compiler of one schema to expressions; `compiler.Compiler` documents it."""

    def __init__(
        self, schema: Any, separators: tuple[str, str], max_states: int, any_depth: int
    ) -> None:
        self.comma, self.colon = separators
        if (self.comma.strip(' \t\n\r'), self.colon.strip(' \t\n\r')) != (',', ':'):
            raise ValueError(
                f'separators={separators} do not make valid JSON. Pass a comma and a colon, '
                'with blanks or without.'
            )
        self._schema = load(schema)
        self.max_states = max_states
        self.validator = Validator(self._schema, max_states)
        self.branches = Branches(self._schema, self.validator)
        self._any_depth = any_depth
        self._known: dict[tuple[str, ...], Expression] = {}
        self._reasons: list[str] = []
        self._largest = (0, '', '#')

    def root(self) -> Expression:
        """Returns an expression for the texts that are valid under the whole schema."""
        return self.value([Located(self._schema, '#')])

    def value(self, parts: list[Located]) -> Expression:
        """Returns an expression for the texts that are valid under all parts."""
        key = tuple(part.where for part in parts)
        if key not in self._known:
            branches = self.branches.of(*parts)
            expression = choice(self._branch(branch) for branch in branches)
            if is_nothing(expression) and parts:
                self._reasons.append(parts[0].where)
            self._known[key] = expression
        return self._known[key]

    def any_value(self, depth: int) -> Expression:
        """Returns an expression for values whose arrays and objects nest at most `depth` deep."""
        string = Texts().expression(self.max_states)
        parts = [literals(['null', 'true', 'false']), string, self.number(())]
        if depth:
            inner = self.any_value(depth - 1)
            member = sequence(string, Literal(self.colon), inner)
            for start, item, end in (('[', inner, ']'), ('{', member, '}')):
                items = joined([Repeat(item, 0, None)], self.comma)
                parts.append(sequence(Literal(start), items, Literal(end)))
        return shared(choice(parts))

    def refuse(self, keyword: str, where: str, why: str) -> ValueError:
        """Returns the error for a keyword that is not supported at this place."""
        return ValueError(f'{keyword} at {where} is not supported here: {why}')

    def count(self, branch: Branch, name: str) -> tuple[int, int | None]:
        """Returns the limits of a count, and records the largest one for error messages."""
        for part in branch:
            for keyword in (f'min{name}', f'max{name}'):
                if keyword in part.schema:
                    entry = (int(part.schema[keyword]), keyword, part.where)
                    self._largest = max(self._largest, entry)
        low, high = limits_of(branch, name)
        if name == 'Length' and max(low, high or 0) > self.max_states:
            raise TooManyStatesError  # fail early: every character takes at least one state
        return low, high

    def too_large(self) -> str:
        """Returns the error message for a schema that takes too many states."""
        count, keyword, where = self._largest
        cause = f'{keyword}={count} at {where}' if keyword else 'its number of properties'
        return (
            f'The schema takes more than max_states={self.max_states} states. '
            f'Lower {cause}, or raise max_states.'
        )

    def impossible(self) -> str:
        """Returns the error message for a schema that allows no value."""
        where = self._reasons[0] if self._reasons else '#'
        return (
            f'No value is valid under the schema at {where}: its keywords contradict each other. '
            'Relax one of them.'
        )

    def _branch(self, branch: Branch) -> Expression:
        if not branch:
            return self.any_value(self._any_depth)
        values = self.branches.values(branch)
        types = common_types(branch)
        if values is not None:
            return self.listed(values, 'number' not in types)
        parts: list[Expression] = [literals(['null'])] if 'null' in types else []
        parts += [literals(['true', 'false'])] if 'boolean' in types else []
        parts += [self.number(branch)] if 'number' in types else []
        parts += [self._integer(branch)] if 'integer' in types else []
        parts += [self.texts(branch).expression(self.max_states)] if 'string' in types else []
        parts += [array_expression(self, branch)] if 'array' in types else []
        parts += [object_expression(self, branch)] if 'object' in types else []
        return choice(parts)

    def listed(self, values: list[Any], whole: bool) -> Expression:
        """Returns an expression for listed values.

        Whole floats are written as integers; without `whole` they may also be written as floats.
        """
        texts = []
        for value in values:
            if not (isinstance(value, float) and abs(value) >= _MAX_WHOLE and not whole):
                texts.append(self._text(with_whole_numbers(value)))
            if not (isinstance(value, float) and whole):
                texts.append(self._text(value))
        return literals(texts)

    def _text(self, value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, separators=(self.comma, self.colon))

    def number(self, branch: Branch) -> Expression:
        """Returns an expression for the numbers that a branch allows."""
        if any('multipleOf' in part.schema for part in branch):
            return self._integer(branch)
        return shared(numbers(bounds_of(branch)))

    def _integer(self, branch: Branch) -> Expression:
        low, high = bounds_of(branch).integers()
        limit = 10**MAX_DIGITS
        if low is not None and low >= limit or high is not None and high <= -limit:
            raise self.refuse(
                'a bound',
                branch[0].where,
                f'integers with bounds have at most {MAX_DIGITS} digits. Use a closer bound.',
            )
        result = shared(integers(low, high))
        for part in branch:
            divisor = part.schema.get('multipleOf', 1)
            if divisor != int(divisor):
                raise self.refuse(
                    f'multipleOf={divisor}',
                    part.where,
                    'only whole divisors are. Use an integer of the smaller unit, or leave it out.',
                )
            if divisor != 1 and not is_nothing(result):
                if divisor + 3 > self.max_states:
                    self._largest = (int(divisor), 'multipleOf', part.where)
                    raise TooManyStatesError
                dfa = compile_shared(result, self.max_states)
                result = accepted(product(dfa, multiples(int(divisor)), self.max_states))
        return result

    def texts(self, branch: Branch) -> Texts:
        """Returns the constraints that a branch puts on strings."""
        low, high = self.count(branch, 'Length')
        patterns, formats = [], []
        for part in branch:
            if 'pattern' in part.schema:
                patterns.append(self.checked_pattern(part.schema['pattern'], part.where))
            name = part.schema.get('format')
            if name is not None and name not in FREE_FORMATS:
                if name not in FORMATS:
                    raise self.refuse(
                        f'format={name!r}',
                        part.where,
                        f'known are {", ".join(FORMATS)}. Write a pattern instead.',
                    )
                formats.append(name)
        if formats and high is not None:
            high = min(high, max(low, _MAX_FORMATTED))
        if high is not None and high < low:
            return Texts(0, 0, (), ('',))
        return Texts(low, high, tuple(dict.fromkeys(patterns)), (), tuple(dict.fromkeys(formats)))

    def checked_pattern(self, pattern: str, where: str) -> str:
        """Returns the pattern, or raises ValueError with its path if it is too large."""
        try:
            self.validator.matches(pattern, '')
        except TooManyStatesError:
            raise ValueError(
                f'The pattern {pattern!r} at {where} takes more than max_states='
                f'{self.max_states} states. Lower its repetition counts, or raise max_states.'
            ) from None
        return pattern
