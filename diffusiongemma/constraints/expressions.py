"""Regular expressions as trees of frozen values, the common form of all front ends.

`regex` builds them from Python's syntax and `json_schema` from a schema. `nfa` compiles them to
automata, and `to_regex` writes them in Python's syntax.
"""

import dataclasses
import re
from collections.abc import Iterable

from diffusiongemma.constraints.dfa import Dfa
from diffusiongemma.constraints.utf8 import Ranges


@dataclasses.dataclass(frozen=True)
class Literal:
    """An expression that matches exactly this text."""

    text: str


@dataclasses.dataclass(frozen=True)
class Characters:
    """An expression that matches one character within ranges of code points."""

    ranges: Ranges


@dataclasses.dataclass(frozen=True)
class Sequence:
    """An expression that matches its parts one after the other."""

    parts: tuple['Expression', ...]


@dataclasses.dataclass(frozen=True)
class Choice:
    """An expression that matches one of its parts; without parts it matches no text (`NOTHING`)."""

    parts: tuple['Expression', ...]


@dataclasses.dataclass(frozen=True)
class Repeat:
    """An expression that matches its part `low` to `high` times; `high=None` means no limit."""

    part: 'Expression'
    low: int
    high: int | None


@dataclasses.dataclass(frozen=True)
class Joined:
    """An expression that matches repeated parts in order, with a separator between any two texts.

    Written as a `Choice`, optional parts would need one copy of each part for every part that may
    come first. This node needs only one copy of each.
    """

    parts: tuple[Repeat, ...]
    separator: str


@dataclasses.dataclass(frozen=True)
class Shared:
    """An expression whose part is compiled and minimized once, however often it occurs."""

    part: 'Expression'


@dataclasses.dataclass(frozen=True)
class Accepted:
    """An expression that matches the texts that an automaton accepts."""

    dfa: Dfa


@dataclasses.dataclass(frozen=True)
class Anchor:
    """An expression that matches the empty text at the start or, with `at_end`, at the end."""

    at_end: bool


Expression = Literal | Characters | Sequence | Choice | Repeat | Joined | Shared | Accepted | Anchor

EMPTY = Literal('')  # matches the empty text
NOTHING = Choice(())  # matches no text


def is_nothing(part: Expression) -> bool:
    """Returns whether an expression built by the functions of this module matches no text."""
    return isinstance(part, Choice) and not part.parts


def sequence(*parts: Expression) -> Expression:
    """Returns a sequence of the parts, or NOTHING if one of them is NOTHING."""
    return NOTHING if any(map(is_nothing, parts)) else Sequence(parts)


def choice(parts: Iterable[Expression]) -> Expression:
    """Returns a choice between those parts that are not NOTHING."""
    kept = tuple(part for part in parts if not is_nothing(part))
    return kept[0] if len(kept) == 1 else Choice(kept)


def accepted(dfa: Dfa) -> Expression:
    """Returns an expression for the texts that a minimal automaton accepts."""
    return NOTHING if dfa.is_empty else Accepted(dfa)


def shared(part: Expression) -> Expression:
    """Returns an expression that is compiled once, however often it occurs."""
    return part if is_nothing(part) else Shared(part)


def repeat(part: Expression, low: int, high: int | None = None) -> Expression:
    """Returns a part repeated `low` to `high` times, or NOTHING if that is impossible."""
    if high is not None and high < low or is_nothing(part) and low:
        return NOTHING
    return EMPTY if high == 0 or is_nothing(part) else Repeat(part, low, high)


def joined(parts: Iterable[Repeat], separator: str) -> Expression:
    """Returns the parts in order with separators, or NOTHING if a required part is impossible."""
    kept = []
    for part in parts:
        if is_nothing(repeat(part.part, part.low, part.high)):
            return NOTHING
        if part.high != 0 and not is_nothing(part.part):
            kept.append(part)
    return Joined(tuple(kept), separator) if kept else EMPTY


def literals(texts: Iterable[str]) -> Expression:
    """Returns a choice between texts."""
    return choice(Literal(text) for text in dict.fromkeys(texts))


def characters(text: str) -> Characters:
    """Returns an expression for any one of the characters of a text."""
    return Characters(tuple((ord(c), ord(c)) for c in sorted(set(text))))


def to_regex(part: Expression) -> str:
    """Returns an expression in the syntax of Python's `re`.

    Raises:
      ValueError: if a part exists only as an automaton.
    """
    match part:
        case Literal(text):
            return re.escape(text)
        case Characters(ranges):
            return f'[{"".join(_range_text(low, high) for low, high in ranges)}]'
        case Sequence(parts):
            return ''.join(map(to_regex, parts))
        case Choice(parts):
            return f'(?:{"|".join(map(to_regex, parts))})'
        case Repeat(inner, low, high):
            return f'(?:{to_regex(inner)}){_count_text(low, high)}'
        case Shared(inner):
            return to_regex(inner)
        case Joined(parts, separator):
            text, may_be_empty = _joined_text(parts, re.escape(separator))
            return f'(?:{text})?' if may_be_empty else f'(?:{text})'
    raise ValueError(
        'This constraint is an intersection of several and has no short regular expression. '
        'Compile it with from_json_schema instead.'
    )


def _range_text(low: int, high: int) -> str:
    start, end = re.escape(chr(low)), re.escape(chr(high))
    return start if low == high else f'{start}-{end}'


def _count_text(low: int, high: int | None) -> str:
    known = {(0, None): '*', (1, None): '+', (0, 1): '?'}
    return known.get((low, high), f'{{{low},{"" if high is None else high}}}')


def _joined_text(parts: tuple[Repeat, ...], separator: str) -> tuple[str, bool]:
    """Returns a pattern for the non-empty texts, and whether the empty text matches as well.

    The parts are joined by halves, so n optional parts need n^1.6 copies instead of n^2.
    """
    if len(parts) == 1:
        inner, low = to_regex(parts[0].part), parts[0].low
        high = None if parts[0].high is None else parts[0].high - 1
        if high == 0:
            return inner, low == 0
        more = f'(?:{separator}{inner}){_count_text(max(low - 1, 0), high)}'
        return f'{inner}{more}', low == 0
    half = len(parts) // 2
    left, left_empty = _joined_text(parts[:half], separator)
    right, right_empty = _joined_text(parts[half:], separator)
    if left_empty and right_empty:
        return f'(?:(?:{left})(?:{separator}(?:{right}))?|{right})', True
    if left_empty:
        return f'(?:(?:{left}){separator})?(?:{right})', False
    if right_empty:
        return f'(?:{left})(?:{separator}(?:{right}))?', False
    return f'(?:{left}){separator}(?:{right})', False
