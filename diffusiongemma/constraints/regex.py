"""Compiles a regular expression in Python's syntax to an expression and to its automaton.

Python's own parser reads the pattern, so it has the same meaning as in `re.fullmatch`, or in
`re.search` for the keyword `pattern` of a JSON schema.
"""

import functools
import re

# The parser behind `re`; its public name, `sre_parse`, is deprecated.
from re import _constants as sre  # type: ignore[attr-defined]  # not in typeshed
from re import _parser as sre_parser  # type: ignore[attr-defined]  # likewise
from typing import Any

import numpy as np

from diffusiongemma.constraints.dfa import TooManyStatesError
from diffusiongemma.constraints.expressions import (
    Anchor,
    Characters,
    Choice,
    Expression,
    Repeat,
    Sequence,
)
from diffusiongemma.constraints.nfa import compile_expression
from diffusiongemma.constraints.utf8 import MAX_CODE_POINT, Ranges, complement, normalized

_START_ANCHORS = (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING)
_END_ANCHORS = (sre.AT_END, sre.AT_END_STRING)
_UNSUPPORTED = {
    sre.ASSERT: 'lookahead or lookbehind',
    sre.ASSERT_NOT: 'negative lookahead or lookbehind',
    sre.GROUPREF: 'a backreference',
    sre.GROUPREF_EXISTS: 'a conditional group',
    sre.AT: 'an anchor or word boundary inside the pattern',
    sre.ATOMIC_GROUP: 'an atomic group',
    sre.POSSESSIVE_REPEAT: 'a possessive quantifier',
}
ANY_TEXT = Repeat(Characters(complement(())), 0, None)


class _UnsupportedError(Exception):
    """An error: a pattern has a feature that a finite automaton cannot express."""


def byte_automaton(pattern: str, max_states: int) -> tuple[np.ndarray, np.ndarray]:
    r"""Returns the automaton of the texts that a pattern matches as a whole.

    Groups, classes, alternatives and repetition are supported; lazy repetition matches the same
    texts as greedy repetition. Anchors at both ends of the pattern have no effect. \d, \s and \w
    follow Unicode unless the pattern has the flag (?a). Backreferences, lookaround and IGNORECASE
    are refused.

    Args:
      pattern: a regular expression in Python's syntax.
      max_states: the maximum number of states S before minimization.

    Returns:
      [S, 256] int32, the next state for each state and byte; and [S] bool, whether a match may
      end in each state. State 0 is dead, state 1 is the start.

    Raises:
      ValueError: if the pattern is invalid, uses an unsupported feature, matches no string, or
        takes more than max_states states.
    """
    expression = parse(pattern)
    try:
        dfa = compile_expression(expression, max_states)
    except RecursionError:
        raise _too_deep(pattern) from None
    except TooManyStatesError:
        raise ValueError(
            f'The automaton of {shown(pattern)} has more than max_states={max_states} states. '
            r'Lower its repetition counts, name characters instead of . and \w, or raise '
            'max_states.'
        ) from None
    if dfa.is_empty:
        raise ValueError(
            f'The regular expression {shown(pattern)} matches no string. Write one that does.'
        )
    return dfa.by_byte(), dfa.accepting


def parse(pattern: str, *, search: bool = False) -> Expression:
    """Returns an expression for the texts that a pattern matches as a whole.

    With `search`, the pattern may match anywhere in the text, anchors may stand anywhere, and `$`
    only matches at the end of the text, as in ECMA 262 (Python's `$` also matches before a final
    line feed).

    Raises:
      ValueError: if the pattern is invalid or uses an unsupported feature.
    """
    if not isinstance(pattern, str):
        raise ValueError(f'A regular expression must be a string, got {pattern!r}.')
    try:
        tree = sre_parser.parse(pattern)
        reader = _Reader(search)
        items = list(tree) if search else _without_anchors(list(tree))
        expression = reader.sequence(items, tree.state.flags)
    except re.error as error:
        raise ValueError(
            f'Invalid regular expression {shown(pattern)}: {error.msg} at position {error.pos}. '
            "Write it in the syntax of Python's re."
        ) from error
    except _UnsupportedError as error:
        raise ValueError(
            f'The regular expression {shown(pattern)} has {error}, which is not supported. '
            'Write it without.'
        ) from None
    except (OverflowError, RecursionError):
        raise _too_deep(pattern) from None
    return Sequence((ANY_TEXT, expression, ANY_TEXT)) if search else expression


def _too_deep(pattern: str) -> ValueError:
    return ValueError(
        f'The regular expression {shown(pattern)} has too large a count or too deep groups. '
        'Lower its repetition counts, or nest fewer groups.'
    )


def _without_anchors(items: list[Any]) -> list[Any]:
    """Returns the items of a pattern without the anchors at its two ends."""
    while items and items[0][0] is sre.AT and items[0][1] in _START_ANCHORS:
        del items[0]
    while items and items[-1][0] is sre.AT and items[-1][1] in _END_ANCHORS:
        del items[-1]
    return items


def shown(pattern: str) -> str:
    """Returns the pattern as error messages show it."""
    return repr(pattern if len(pattern) <= 60 else f'{pattern[:57]}...')


class _Reader:
    """A converter of the items of Python's regex parser to expressions."""

    def __init__(self, anchors: bool) -> None:
        self._anchors = anchors

    def sequence(self, items: Any, flags: int) -> Expression:
        return Sequence(tuple(self._item(op, value, flags) for op, value in items))

    def _item(self, op: Any, value: Any, flags: int) -> Expression:
        if op is sre.AT and self._anchors and value in _START_ANCHORS + _END_ANCHORS:
            if flags & re.MULTILINE:
                raise _UnsupportedError('the flag MULTILINE')
            return Anchor(at_end=value in _END_ANCHORS)
        if op in _UNSUPPORTED:
            raise _UnsupportedError(_UNSUPPORTED[op])
        if flags & re.IGNORECASE:
            raise _UnsupportedError('the flag IGNORECASE')
        if op is sre.SUBPATTERN:
            _, added, removed, items = value
            return self.sequence(items, (flags | added) & ~removed)
        if op is sre.BRANCH:
            return Choice(tuple(self.sequence(items, flags) for items in value[1]))
        if op in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            low, high, items = value
            return Repeat(self.sequence(items, flags), low, None if high is sre.MAXREPEAT else high)
        return Characters(_ranges(op, value, flags))


def _ranges(op: Any, value: Any, flags: int) -> Ranges:
    """Returns the code points that one item of a pattern matches."""
    if op is sre.LITERAL:
        return normalized([(value, value)])
    if op is sre.NOT_LITERAL:
        return complement([(value, value)])
    if op is sre.RANGE:
        return normalized([value])
    if op is sre.ANY:
        return complement([] if flags & re.DOTALL else [(10, 10)])
    if op is sre.CATEGORY:
        return _category(value.name, bool(flags & re.ASCII))
    assert op is sre.IN, op
    negated = value[0][0] is sre.NEGATE
    ranges = [span for kind, item in value[negated:] for span in _ranges(kind, item, flags)]
    return complement(ranges) if negated else normalized(ranges)


@functools.cache
def _category(name: str, ascii_only: bool) -> Ranges:
    r"""Returns the code points of \d, \s, \w or their complements, according to `re` itself."""
    letter = {'DIGIT': 'd', 'SPACE': 's', 'WORD': 'w'}[name.rpartition('_')[2]]
    limit = 128 if ascii_only else MAX_CODE_POINT + 1
    text = ''.join(map(chr, range(limit)))
    runs = re.finditer(rf'\{letter}+', text, re.ASCII if ascii_only else 0)
    ranges = [(run.start(), run.end() - 1) for run in runs]
    return complement(ranges) if '_NOT_' in name else normalized(ranges)
