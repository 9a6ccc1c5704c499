"""Builds expressions over digits for JSON numbers within bounds.

Texts are compared digit by digit. Python parses a text with a point or an exponent as the nearest
float, and this rounding preserves order. So a text denotes a float within bounds exactly when its
value lies between the smallest and the largest such floats, which are taken from `repr`.
"""

import dataclasses
import math
from fractions import Fraction

import numpy as np

from diffusiongemma.constraints.dfa import Dfa, from_table
from diffusiongemma.constraints.expressions import (
    EMPTY,
    NOTHING,
    Characters,
    Expression,
    Literal,
    choice,
    repeat,
    sequence,
)

# The maximum number of digits on a bounded side of an integer.
MAX_DIGITS = 30
_DIGIT = Characters(((48, 57),))
_DIGITS = repeat(_DIGIT, 0)
# `repr` writes floats below 1e-4, and floats of at least 1e16, with an exponent.
_SMALL, _LARGE = -5, 16
_MIN_EXPONENT, _MAX_EXPONENT = -324, 307


@dataclasses.dataclass(frozen=True)
class Bounds:
    """A range of numbers; None means unbounded, and `open_*` excludes the bound itself."""

    low: Fraction | None = None
    high: Fraction | None = None
    open_low: bool = False
    open_high: bool = False

    def integers(self) -> tuple[int | None, int | None]:
        """Returns the smallest and the largest integer within the bounds."""
        low = high = None
        if self.low is not None:
            low = math.floor(self.low) + 1 if self.open_low else math.ceil(self.low)
        if self.high is not None:
            high = math.ceil(self.high) - 1 if self.open_high else math.floor(self.high)
        return low, high

    def floats(self) -> tuple[float | None, float | None]:
        """Returns the smallest and the largest float within the bounds."""
        low = high = None
        if self.low is not None:
            low = _nearest(self.low)
            if Fraction(low) < self.low or self.open_low and Fraction(low) == self.low:
                low = math.nextafter(low, math.inf)
        if self.high is not None:
            high = _nearest(self.high)
            if Fraction(high) > self.high or self.open_high and Fraction(high) == self.high:
                high = math.nextafter(high, -math.inf)
        return low, high

    def hold(self, value: int | float) -> bool:
        """Returns whether a finite number lies within the bounds."""
        exact = Fraction(value)
        above = self.low is None or exact > self.low or exact == self.low and not self.open_low
        below = self.high is None or exact < self.high or exact == self.high and not self.open_high
        return above and below


def _nearest(value: Fraction) -> float:
    limit = Fraction(10) ** 307
    return float(max(min(value, limit), -limit))


def integers(low: int | None, high: int | None) -> Expression:
    """Returns an expression for the integers from low to high; None means unbounded.

    A bounded side has at most MAX_DIGITS digits.
    """
    limit = 10**MAX_DIGITS - 1
    if low is not None and high is not None and low > high:
        return NOTHING
    parts = []
    if high is None or high >= 0:
        first = max(low or 0, 0)
        last = None if high is None else min(high, limit)
        parts.append(_naturals(first, last))
    if low is None or low < 0:
        first = 1 if high is None or high >= 0 else -high
        last = None if low is None else min(-low, limit)
        parts.append(sequence(Literal('-'), _naturals(first, last)))
    return choice(parts)


def _naturals(low: int, high: int | None) -> Expression:
    if low > 10**MAX_DIGITS - 1 or high is not None and low > high:
        return NOTHING
    text = str(low)
    if high is not None and len(str(high)) == len(text):
        return _same_length(text, str(high))
    if low == 0:
        return choice([Literal('0'), _naturals(1, high)])
    parts = [_same_length(text, '9' * len(text))]
    nonzero = Characters(((49, 57),))
    if high is None:
        parts.append(sequence(nonzero, repeat(_DIGIT, len(text))))
    else:
        last = str(high)
        parts.append(_same_length('1' + '0' * (len(last) - 1), last))
        if len(text) + 1 < len(last):
            middle = repeat(_DIGIT, len(text), len(last) - 2)
            parts.append(sequence(nonzero, middle))
    return choice(parts)


def _digit_range(low: int, high: int) -> Expression:
    return Characters(((48 + low, 48 + high),)) if low <= high else NOTHING


def _same_length(low: str, high: str) -> Expression:
    """Returns an expression for the digit strings from low to high, all of the same length."""
    if low == high:
        return Literal(low)
    if set(low) == {'0'} and set(high) == {'9'}:
        return repeat(_DIGIT, len(low), len(low))
    first, last = int(low[0]), int(high[0])
    others = len(low) - 1
    if first == last:
        return sequence(Literal(low[0]), _same_length(low[1:], high[1:]))
    if not others:
        return _digit_range(first, last)
    return choice(
        [
            sequence(Literal(low[0]), _same_length(low[1:], '9' * others)),
            sequence(_digit_range(first + 1, last - 1), repeat(_DIGIT, others, others)),
            sequence(Literal(high[0]), _same_length('0' * others, high[1:])),
        ]
    )


def _fractions(low: str, high: str | None) -> Expression:
    """Returns an expression for zero or more digits after a point, from 0.low to 0.high.

    None for `high` means up to 1.
    """
    low = low.rstrip('0')
    high = None if high is None else high.rstrip('0')
    if not low and high is None:
        return _DIGITS
    if not low and not high:
        return repeat(Literal('0'), 0)
    first = int(low[0]) if low else 0
    last = 9 if high is None else int(high[0]) if high else 0
    if first > last or high == '' and low:
        return NOTHING
    after_high = None if high is None else high[1:]
    if first == last and high is not None:
        parts = [sequence(Literal(str(first)), _fractions(low[1:], after_high))]
    else:
        parts = [sequence(Literal(str(first)), _fractions(low[1:], None))]
        if high is None:
            parts.append(sequence(_digit_range(first + 1, 9), _DIGITS))
        else:
            parts.append(sequence(_digit_range(first + 1, last - 1), _DIGITS))
            parts.append(sequence(Literal(str(last)), _fractions('', after_high)))
    return choice([*parts, *([] if low else [EMPTY])])


def _with_point(low: str, high: str | None) -> Expression:
    """Returns an expression for a point and one or more digits, from 0.low to 0.high."""
    low, high = low.rstrip('0'), None if high is None else high.rstrip('0')
    parts = []
    for digit in range(10):  # the first digit
        first, last = int(low[0]) if low else 0, 9 if high is None else int((high or '0')[0])
        if first <= digit <= last:
            tail_low = low[1:] if digit == first else ''
            tail_high = high[1:] if high is not None and digit == last else None
            parts.append(sequence(Literal(str(digit)), _fractions(tail_low, tail_high)))
    return sequence(Literal('.'), choice(parts))


def _decimal(value: float) -> tuple[str, int]:
    """Returns the shortest digits d and exponent e of a positive float, d[0].d[1:] * 10^e."""
    digits, _, exponent = f'{value!r}'.partition('e')
    whole, _, fraction = digits.partition('.')
    fraction = fraction.rstrip('0')
    stripped = (whole + fraction).lstrip('0')
    shift = len(whole) - 1 if whole.strip('0') else len(stripped) - len(fraction) - 1
    return stripped.rstrip('0') or '0', shift + int(exponent or 0)


def _positional(low: float, high: float | None) -> Expression:
    """Returns an expression for floats without an exponent from low > 0 to high."""
    digits, exponent = _decimal(low)
    if exponent >= _LARGE or high is not None and high < low:
        return NOTHING
    if exponent < _SMALL + 1:
        digits, exponent = '1', _SMALL + 1
    whole_low, part_low = _split(digits, exponent)
    whole_high, part_high = '9' * _LARGE, None
    if high is not None:
        digits, exponent = _decimal(high)
        if exponent < _SMALL + 1:
            return NOTHING
        if exponent < _LARGE:
            whole_high, part_high = _split(digits, exponent)
    if whole_low == whole_high:
        return sequence(Literal(whole_low), _with_point(part_low, part_high))
    between = integers(int(whole_low) + 1, int(whole_high) - 1)
    return choice(
        [
            sequence(Literal(whole_low), _with_point(part_low, None)),
            sequence(between, _with_point('', None)),
            sequence(Literal(whole_high), _with_point('', part_high)),
        ]
    )


def _split(digits: str, exponent: int) -> tuple[str, str]:
    """Returns the digits before and after the decimal point."""
    if exponent < 0:
        return '0', '0' * (-exponent - 1) + digits
    digits = digits.ljust(exponent + 1, '0')
    return digits[: exponent + 1], digits[exponent + 1 :]


def _mantissas(low: str, high: str | None) -> Expression:
    """Returns an expression for mantissas in [1, 10) from low to high, which are digit strings."""
    parts = []
    last = 9 if high is None else int(high[0])
    for digit in range(int(low[0]), last + 1):
        part_low = low[1:] if digit == int(low[0]) else ''
        part_high = high[1:] if high is not None and digit == last else None
        after = [_with_point(part_low, part_high)]
        if not part_low.strip('0'):
            after.append(EMPTY)
        parts.append(sequence(Literal(str(digit)), choice(after)))
    return choice(parts)


def _exponents(low: int, high: int) -> Expression:
    """Returns an expression for exponents from low to high as `repr` writes them, e included."""
    parts = []
    for sign, first, last in (
        ('e+', max(low, _LARGE), min(high, _MAX_EXPONENT)),
        ('e-', max(-high, -_SMALL), min(-low, -_MIN_EXPONENT)),
    ):
        if first <= min(last, 9):
            digit = sequence(Literal('0'), _digit_range(first, min(last, 9)))
            parts.append(sequence(Literal(sign), digit))
        if max(first, 10) <= last:
            parts.append(sequence(Literal(sign), integers(max(first, 10), last)))
    return choice(parts)


def _scientific(low: float, high: float | None) -> Expression:
    """Returns an expression for floats with an exponent from low > 0 to high."""
    digits_low, exponent_low = _decimal(low)
    digits_high, exponent_high = (None, _MAX_EXPONENT) if high is None else _decimal(high)
    if exponent_low == exponent_high:
        if high is not None and high < low:
            return NOTHING
        return sequence(_mantissas(digits_low, digits_high), _exponents(exponent_low, exponent_low))
    between = _exponents(exponent_low + 1, exponent_high - 1)
    return choice(
        [
            sequence(_mantissas(digits_low, None), _exponents(exponent_low, exponent_low)),
            sequence(_mantissas('1', None), between),
            sequence(_mantissas('1', digits_high), _exponents(exponent_high, exponent_high)),
        ]
    )


def _magnitudes(low: float, high: float | None) -> Expression:
    """Returns an expression for floats from low >= 0 to high, without a sign."""
    if high is not None and high < low:
        return NOTHING
    parts: list[Expression] = []
    if low == 0:
        parts.append(sequence(Literal('0.'), repeat(Literal('0'), 1)))
        low = math.nextafter(0, 1)
    if high is None or high >= low:
        parts += [_positional(low, high), _scientific(low, high)]
    return choice(parts)


def _any_float() -> Expression:
    """Returns an expression for all floats; exponents need not be written as `repr` does."""
    whole = choice([Literal('0'), sequence(Characters(((49, 57),)), _DIGITS)])
    point = sequence(Literal('.'), repeat(_DIGIT, 1))
    mantissa = sequence(_DIGIT, repeat(point, 0, 1))
    mark = Characters(((69, 69), (101, 101)))
    sign = Characters(((43, 43), (45, 45)))
    short = sequence(mark, repeat(sign, 0, 1), repeat(_DIGIT, 1, 2))
    magnitude = choice(
        [
            sequence(whole, point),
            sequence(mantissa, choice([short, _exponents(_MIN_EXPONENT, _MAX_EXPONENT)])),
        ]
    )
    return sequence(repeat(Literal('-'), 0, 1), magnitude)


def numbers(bounds: Bounds) -> Expression:
    """Returns an expression for integers and floats within bounds.

    Floats have a decimal point or, below 1e308, an exponent. With bounds, exponents must be
    written as `repr` does.
    """
    low, high = bounds.floats()
    parts = [integers(*bounds.integers())]
    if low is None and high is None:
        return choice([*parts, _any_float()])
    if high is None or high >= 0:
        parts.append(_magnitudes(max(low or 0.0, 0.0), high))
    if low is None or low <= 0:
        first = 0.0 if high is None or high >= 0 else -high
        negative = _magnitudes(first, None if low is None else abs(low))
        parts.append(sequence(Literal('-'), negative))
    return choice(parts)


def multiples(divisor: int) -> Dfa:
    """Returns the automaton of the multiples of `divisor` >= 1, with or without a minus sign."""
    remainders = np.arange(divisor)
    table = np.zeros((divisor + 3, 256), np.int32)
    # State 1 is the start, state 2 follows the sign, state 3 + r has read digits of remainder r.
    for digit in range(10):
        table[1:3, 48 + digit] = 3 + digit % divisor
        table[3:, 48 + digit] = 3 + (remainders * 10 + digit) % divisor
    table[1, ord('-')] = 2
    accepting = np.zeros(divisor + 3, bool)
    accepting[3] = True
    return from_table(table, accepting)
