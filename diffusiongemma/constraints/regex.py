"""From a regular expression to a deterministic automaton over bytes of UTF-8.

Python's own parser reads the pattern, so that it means what it means to `re.fullmatch`. Then the
textbook way: a nondeterministic automaton (Thompson 1968) and its sets of states.
"""

import functools
import re
from collections.abc import Iterator

# The parser behind `re`; its public name, `sre_parse`, is deprecated.
from re import _constants as sre
from re import _parser as sre_parser
from typing import Any

import numpy as np

_MAX_CODE_POINT = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)  # no characters of UTF-8
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
# States of the nondeterministic automaton for each one that the result may have.
_NFA_FACTOR = 20


def byte_automaton(pattern: str, max_states: int) -> tuple[np.ndarray, np.ndarray]:
    r"""The automaton of the byte strings that a pattern matches as a whole.

    Groups, classes, alternatives and repetition are supported; lazy repetition matches the same.
    Anchors at the ends of the pattern say nothing new. \d, \s and \w are those of Unicode unless
    the pattern has the flag (?a). What needs memory or looks around is no finite automaton of
    this kind, and is refused, as is IGNORECASE.

    Args:
      pattern: in Python's syntax.
      max_states: limit of S.

    Returns:
      [S, 256] int32, the state after a byte; and [S] bool, where a match ends. State 0 is dead,
      1 is the start.

    Raises:
      ValueError: when the pattern is invalid, uses what is not supported, matches no string, or
        takes more than max_states states.
    """
    nfa = _Nfa(max_states * _NFA_FACTOR)
    try:
        tree = sre_parser.parse(pattern)
        end = nfa.sequence(_without_anchors(list(tree)), tree.state.flags, nfa.new_state())
        table, accepting = _determinise(nfa, end, max_states)
    except re.error as error:
        raise ValueError(
            f'Invalid regular expression {shown(pattern)}: {error.msg} at position {error.pos}.'
        ) from error
    except NotImplementedError as error:
        raise ValueError(
            f'The regular expression {shown(pattern)} has {error}, which is not supported. '
            'Write it without.'
        ) from None
    except OverflowError:
        raise ValueError(
            f'The automaton of {shown(pattern)} has more than max_states={max_states} states. '
            r'Lower its repetition counts, name characters instead of . and \w, or raise '
            'max_states.'
        ) from None
    if not accepting.any():
        raise ValueError(f'The regular expression {shown(pattern)} matches no string.')
    return table, accepting


def _without_anchors(items: list) -> list:
    """The items of a pattern without the anchors at its two ends."""
    while items and items[0][0] is sre.AT and items[0][1] in _START_ANCHORS:
        del items[0]
    while items and items[-1][0] is sre.AT and items[-1][1] in _END_ANCHORS:
        del items[-1]
    return items


def shown(pattern: str) -> str:
    """The pattern as error messages show it."""
    return repr(pattern if len(pattern) <= 60 else f'{pattern[:57]}...')


class _Nfa:
    """A nondeterministic automaton, built from left to right.

    Every method takes the state that a part of the pattern starts from and returns the one that
    it ends in.

    Attributes:
      arrows: for each state the (first byte, last byte, next state) that leave it.
      jumps: for each state the states that it may turn into without a byte.
    """

    def __init__(self, max_states: int):
        self.arrows: list[list[tuple[int, int, int]]] = []
        self.jumps: list[list[int]] = []
        self._max_states = max_states

    def new_state(self) -> int:
        if len(self.arrows) > self._max_states:
            raise OverflowError
        self.arrows.append([])
        self.jumps.append([])
        return len(self.arrows) - 1

    def sequence(self, items: Any, flags: int, state: int) -> int:
        for op, value in items:
            state = self._item(op, value, flags, state)
        return state

    def _item(self, op: Any, value: Any, flags: int, state: int) -> int:
        if op in _UNSUPPORTED:
            raise NotImplementedError(_UNSUPPORTED[op])
        if flags & re.IGNORECASE:
            raise NotImplementedError('the flag IGNORECASE')
        if op is sre.SUBPATTERN:
            _, added, removed, items = value
            return self.sequence(items, (flags | added) & ~removed, state)
        if op is sre.BRANCH:
            end = self.new_state()
            for items in value[1]:
                self.jumps[self.sequence(items, flags, state)].append(end)
            return end
        if op in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            low, high, items = value
            return self._repeat(low, high, items, flags, state)
        return self._character(_ranges(op, value, flags), state)

    def _repeat(self, low: int, high: int, items: Any, flags: int, state: int) -> int:
        if low > self._max_states or self._max_states < high < sre.MAXREPEAT:
            raise OverflowError  # also where what is repeated takes no state
        for _ in range(low):
            state = self.sequence(items, flags, state)
        if high is sre.MAXREPEAT:
            loop = self.new_state()
            self.jumps[state].append(loop)
            self.jumps[self.sequence(items, flags, loop)].append(loop)
            return loop
        end = self.new_state()
        for _ in range(high - low):
            self.jumps[state].append(end)
            state = self.sequence(items, flags, state)
        self.jumps[state].append(end)
        return end

    def _character(self, ranges: list[tuple[int, int]], state: int) -> int:
        end = self.new_state()
        before: dict[tuple, int] = {
            (): end
        }  # for each rest of a character's bytes, the state before it
        for low, high in ranges:
            for spans in _utf8_spans(low, high):
                for i in range(len(spans) - 1, 0, -1):
                    if spans[i:] not in before:
                        before[spans[i:]] = self.new_state()
                        self.arrows[before[spans[i:]]].append((*spans[i], before[spans[i + 1 :]]))
                self.arrows[state].append((*spans[0], before[spans[1:]]))
        return end


def _determinise(nfa: _Nfa, end: int, max_states: int) -> tuple[np.ndarray, np.ndarray]:
    """Subset construction from state 0; arguments and results as of `byte_automaton`."""
    firsts = sorted({0} | {b for arrows in nfa.arrows for a in arrows for b in (a[0], a[1] + 1)})
    byte_classes = np.searchsorted(firsts, np.arange(256), side='right') - 1

    def closure(states: frozenset[int]) -> frozenset[int]:
        found, open_states = set(states), list(states)
        while open_states:
            for state in nfa.jumps[open_states.pop()]:
                if state not in found:
                    found.add(state)
                    open_states.append(state)
        return frozenset(state for state in found if nfa.arrows[state] or state == end)

    sets = [frozenset(), closure(frozenset([0]))]
    numbers = {states: i for i, states in enumerate(sets)}
    closures: dict[frozenset[int], frozenset[int]] = {}
    table = [[0] * len(firsts)]
    while len(table) < len(sets):
        targets: list[set[int]] = [set() for _ in firsts]
        for state in sets[len(table)]:
            for low, high, target in nfa.arrows[state]:
                for i in range(byte_classes[low], byte_classes[high] + 1):
                    targets[i].add(target)
        row = []
        for states in map(frozenset, targets):
            if states not in closures:
                closures[states] = closure(states)
            reached = closures[states]
            if reached not in numbers:
                numbers[reached] = len(sets)
                sets.append(reached)
            row.append(numbers[reached])
        if len(sets) > max_states:
            raise OverflowError
        table.append(row)
    accepting = np.array([end in states for states in sets])
    return np.array(table, np.int32)[:, byte_classes], accepting


def _ranges(op: Any, value: Any, flags: int) -> list[tuple[int, int]]:
    """Code points that one item of a pattern matches, as sorted ranges."""
    if op is sre.LITERAL:
        return _without_surrogates([(value, value)])
    if op is sre.NOT_LITERAL:
        return _complement([(value, value)])
    if op is sre.RANGE:
        return _without_surrogates([value])
    if op is sre.ANY:
        return _complement([] if flags & re.DOTALL else [(10, 10)])
    if op is sre.CATEGORY:
        return list(_category(value.name, bool(flags & re.ASCII)))
    assert op is sre.IN, op
    negated = value[0][0] is sre.NEGATE
    ranges = [span for kind, item in value[negated:] for span in _ranges(kind, item, flags)]
    return _complement(ranges) if negated else _without_surrogates(ranges)


def _complement(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Characters outside the ranges, which may overlap; surrogates are neither in nor out."""
    result, start = [], 0
    beyond = (_MAX_CODE_POINT + 1, _MAX_CODE_POINT + 1)
    for low, high in sorted([*ranges, _SURROGATES, beyond]):
        if start < low:
            result.append((start, low - 1))
        start = max(start, high + 1)
    return result


def _without_surrogates(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return _complement(_complement(ranges))


@functools.cache
def _category(name: str, ascii_only: bool) -> tuple[tuple[int, int], ...]:
    r"""Ranges of \d, \s, \w and their complements, as `re` itself finds them."""
    letter = {'DIGIT': 'd', 'SPACE': 's', 'WORD': 'w'}[name.rpartition('_')[2]]
    negated = '_NOT_' in name
    matches = re.compile(rf'\{letter}', re.ASCII if ascii_only else 0).fullmatch
    limit = 128 if ascii_only else _MAX_CODE_POINT + 1
    ranges = [(point, point) for point in range(limit) if matches(chr(point))]
    return tuple(_complement(ranges) if negated else _without_surrogates(ranges))


def _utf8_spans(low: int, high: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """The range of code points as products of byte ranges, in UTF-8.

    A range is a product when its ends have equally many bytes and, from the first byte in which
    they differ on, run from the lowest to the highest that can follow.
    """
    cuts = [limit for limit in (0x7F, 0x7FF, 0xFFFF) if low <= limit < high]
    for bits in (6, 12, 18):  # of the bytes behind, 6 bits each
        mask = (1 << bits) - 1
        if not cuts and low & ~mask != high & ~mask:
            if low & mask:
                cuts = [low | mask]
            elif high & mask != mask:
                cuts = [(high & ~mask) - 1]
    if cuts:
        yield from _utf8_spans(low, cuts[0])
        yield from _utf8_spans(cuts[0] + 1, high)
    else:
        yield tuple(zip(chr(low).encode(), chr(high).encode(), strict=True))
