"""Builds automata for JSON strings under constraints.

Every character has exactly one spelling, that of `json.dumps(..., ensure_ascii=False)`. Only
control characters with a short escape are allowed (backspace, form feed, line feed, carriage
return and tab).
"""

import dataclasses
import functools

import numpy as np

from diffusiongemma.constraints import regex
from diffusiongemma.constraints.dfa import Dfa, from_table, product
from diffusiongemma.constraints.expressions import (
    NOTHING,
    Accepted,
    Characters,
    Expression,
    Literal,
    characters,
    choice,
    literals,
    repeat,
    sequence,
)
from diffusiongemma.constraints.nfa import compile_shared
from diffusiongemma.constraints.utf8 import complement

# Maps a character to the letter after the backslash in its escape.
_ESCAPES = {'"': '"', '\\': '\\', '\b': 'b', '\f': 'f', '\n': 'n', '\r': 'r', '\t': 't'}
_CHARACTER = choice(
    [
        Characters(complement([(0, 31), (ord('"'), ord('"')), (ord('\\'), ord('\\'))])),
        sequence(Literal('\\'), characters(''.join(_ESCAPES.values()))),
    ]
)
_ANY_CHARACTER = Characters(complement(()))

_MONTH_DAY = (
    '(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])'
    '|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))'
)
_YEAR = '(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])'
_MULTIPLE_OF_4 = '(?:0[48]|[2468][048]|[13579][26])'
_LEAP_YEAR = f'(?:[0-9]{{2}}{_MULTIPLE_OF_4}|{_MULTIPLE_OF_4}00)'
_DATE = f'(?:{_YEAR}-{_MONTH_DAY}|{_LEAP_YEAR}-02-29)'
_TIME = (
    r'(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?'
    '(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])'
)
_BYTE = '(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])'
_LABEL = '[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?'
_WORDS = '[a-z0-9]+(?:-+[a-z0-9]+)*'
_COUNT = '[0-9]{1,4}'
_DURATION_TIME = f'T(?:{_COUNT}H(?:{_COUNT}M)?(?:{_COUNT}S)?|{_COUNT}M(?:{_COUNT}S)?|{_COUNT}S)'
_DURATION_DAY = f'(?:{_COUNT}Y(?:{_COUNT}M(?:{_COUNT}D)?)?|{_COUNT}M(?:{_COUNT}D)?|{_COUNT}D)'
_HEX = '[0-9a-f]'
# Formats that constrain a string, as patterns that match the whole text.
FORMATS = {
    'date': _DATE,
    'time': _TIME,
    'date-time': f'{_DATE}T{_TIME}',
    'duration': f'P(?:{_DURATION_DAY}(?:{_DURATION_TIME})?|{_DURATION_TIME}|{_COUNT}W)',
    'uuid': f'{_HEX}{{8}}(?:-{_HEX}{{4}}){{3}}-{_HEX}{{12}}',
    **{
        f'uuid{version}': f'{_HEX}{{8}}-{_HEX}{{4}}-{version}{_HEX}{{3}}-'
        f'[89ab]{_HEX}{{3}}-{_HEX}{{12}}'
        for version in (1, 3, 4, 5)
    },
    'ipv4': rf'{_BYTE}(?:\.{_BYTE}){{3}}',
    'ipv6': f'(?:{_HEX}{{1,4}}:){{7}}{_HEX}{{1,4}}',
    'email': rf'[A-Za-z0-9_+-]+(?:\.[A-Za-z0-9_+-]+)*@(?:{_LABEL}\.)+[A-Za-z]{{2,24}}',
    'uri': rf'https?://(?:{_WORDS}\.)*[a-z]+(?::[0-9]{{1,4}})?(?:/[A-Za-z0-9._~/-]*)?',
}
# Formats that do not constrain a string: they describe how a text is displayed or stored.
FREE_FORMATS = {'password', 'binary', 'path', 'file-path', 'directory-path'}


@dataclasses.dataclass(frozen=True)
class Texts:
    """A set of constraints on the text of a JSON string.

    Attributes:
      low: the minimum number of characters.
      high: the maximum number of characters; None means no limit.
      patterns: regular expressions that must match somewhere in the text.
      not_patterns: regular expressions that must not match anywhere in the text.
      formats: names of FORMATS that the text must have.
      excluded: texts that are not allowed.
    """

    low: int = 0
    high: int | None = None
    patterns: tuple[str, ...] = ()
    not_patterns: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()

    def dfa(self, max_states: int) -> Dfa:
        """Returns the automaton of the allowed texts, without quotes and escapes.

        Raises:
          TooManyStatesError: if it takes more than max_states states.
          ValueError: if a pattern is invalid or uses an unsupported feature.
        """
        result = compile_shared(repeat(_ANY_CHARACTER, self.low, self.high), max_states)
        for pattern in self.patterns:
            result = product(result, search_dfa(pattern, max_states), max_states)
        for name in self.formats:
            other = compile_shared(regex.parse(FORMATS[name]), max_states)
            result = product(result, other, max_states)
        for pattern in self.not_patterns:
            other = search_dfa(pattern, max_states)
            result = product(result, other, max_states, difference=True)
        if self.excluded:
            other = compile_shared(literals(self.excluded), max_states)
            result = product(result, other, max_states, difference=True)
        return result

    def expression(self, max_states: int) -> Expression:
        """Returns an expression for the JSON strings of the texts; raises the errors of `dfa`."""
        if self.patterns or self.not_patterns or self.formats or self.excluded:
            return _string_of(self, max_states)
        return sequence(Literal('"'), repeat(_CHARACTER, self.low, self.high), Literal('"'))


def search_dfa(pattern: str, max_states: int) -> Dfa:
    """Returns the automaton of the texts in which a pattern matches somewhere."""
    return compile_shared(regex.parse(pattern, search=True), max_states)


@functools.lru_cache(maxsize=512)
def _string_of(texts: Texts, max_states: int) -> Expression:
    return strings_of(texts.dfa(max_states))


def strings_of(dfa: Dfa) -> Expression:
    """Returns an expression for the JSON strings of the texts that an automaton accepts."""
    table = dfa.by_byte().copy()
    after_backslash = np.zeros_like(table)  # one extra state per state, after a backslash
    for character, name in _ESCAPES.items():
        after_backslash[:, ord(name)] = table[:, ord(character)]
    table[:, :32] = table[:, ord('"')] = 0
    table[:, ord('\\')] = np.arange(len(table)) + len(table)
    table[0] = 0
    accepting = np.append(dfa.accepting, np.zeros_like(dfa.accepting))
    escaped = from_table(np.concatenate([table, after_backslash]), accepting)
    if escaped.is_empty:
        return NOTHING
    return sequence(Literal('"'), Accepted(escaped), Literal('"'))
