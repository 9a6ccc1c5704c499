"""From an expression to the minimal automaton over bytes.

The textbook way: a nondeterministic automaton (Thompson 1968), its sets of states, and their
minimization.
"""

import functools

import numpy as np

from diffusiongemma.constraints.dfa import Dfa, TooManyStatesError, minimized
from diffusiongemma.constraints.expressions import (
    Accepted,
    Anchor,
    Characters,
    Choice,
    Expression,
    Joined,
    Literal,
    Repeat,
    Sequence,
    Shared,
)
from diffusiongemma.constraints.utf8 import Ranges, products

# States of the nondeterministic automaton for each one that the result may have.
_NFA_FACTOR = 20


def compile_expression(expression: Expression, max_states: int) -> Dfa:
    """Returns the minimal automaton of an expression.

    Raises:
      TooManyStatesError: when the automaton, before it is minimized, has more than max_states
        states.
    """
    nfa = _Nfa(max_states * _NFA_FACTOR)
    end = nfa.add(expression, nfa.new_state())
    return minimized(_determinized(nfa, end, max_states))


@functools.lru_cache(maxsize=512)
def compile_shared(expression: Expression, max_states: int) -> Dfa:
    """Returns what `compile_expression` does, and keeps it."""
    return compile_expression(expression, max_states)


class _Nfa:
    """A nondeterministic automaton, built from left to right; it starts in state 0.

    Attributes:
      arrows: for each state the (first byte, last byte, next state) that leave it.
      jumps: for each state the states that it may turn into without a byte.
      start_jumps: those that it may turn into where the text starts.
      end_jumps: those that it may turn into where the text ends.
    """

    def __init__(self, max_states: int) -> None:
        self.arrows: list[list[tuple[int, int, int]]] = []
        self.jumps: list[list[int]] = []
        self.start_jumps: dict[int, list[int]] = {}
        self.end_jumps: dict[int, list[int]] = {}
        self._max_states = max_states

    def new_state(self) -> int:
        if len(self.arrows) > self._max_states:
            raise TooManyStatesError
        self.arrows.append([])
        self.jumps.append([])
        return len(self.arrows) - 1

    def add(self, expression: Expression, state: int) -> int:
        """Adds an expression that starts in a state; returns the state that it ends in.

        No arrow or jump that it adds leads back to the state that it starts in, so that several
        expressions can start in one.
        """
        match expression:
            case Literal(text):
                for byte in text.encode():
                    target = self.new_state()
                    self.arrows[state].append((byte, byte, target))
                    state = target
                return state
            case Characters(ranges):
                return self._characters(ranges, state)
            case Sequence(parts):
                for part in parts:
                    state = self.add(part, state)
                return state
            case Choice(parts):
                end = self.new_state()
                for part in parts:
                    self.jumps[self.add(part, state)].append(end)
                return end
            case Repeat(part, low, high):
                return self._repeat(part, low, high, state)
            case Joined(parts, separator):
                return self._joined(parts, separator, state)
            case Shared(part):
                return self._accepted(compile_shared(part, self._max_states), state)
            case Accepted(dfa):
                return self._accepted(dfa, state)
            case Anchor(at_end):
                target = self.new_state()
                jumps = self.end_jumps if at_end else self.start_jumps
                jumps.setdefault(state, []).append(target)
                return target

    def _repeat(self, part: Expression, low: int, high: int | None, state: int) -> int:
        if max(low, high or 0) > self._max_states:
            raise TooManyStatesError  # also where the part takes no state
        for _ in range(low):
            state = self.add(part, state)
        if high is None:
            loop = self.new_state()
            self.jumps[state].append(loop)
            self.jumps[self.add(part, loop)].append(loop)
            return loop
        end = self.new_state()
        for _ in range(high - low):
            self.jumps[state].append(end)
            state = self.add(part, state)
        self.jumps[state].append(end)
        return end

    def _joined(self, parts: tuple[Repeat, ...], separator: str, state: int) -> int:
        """Two tracks: `empty`, where no text came yet, and `full`, where a separator is due.

        Both lead into the same copy of each part, so that the size is linear in their number.
        """
        empty: int | None = state
        full: int | None = None
        for part in parts:
            entry, exits = empty, [] if full is None else [full]
            copies = max(part.low, 1) if part.high is None else part.high
            for copy in range(copies):
                start = self.new_state()
                if entry is not None:
                    self.jumps[entry].append(start)
                if full is not None:
                    self.jumps[self.add(Literal(separator), full)].append(start)
                entry = None  # later copies come after the first one only
                full = self.add(part.part, start)
                exits = [full] if copy < part.low else [*exits, full]
            if part.high is None:
                assert full is not None  # there is a copy at least
                self.jumps[self.add(Literal(separator), full)].append(start)
            full = self.new_state()
            for exit_state in exits:
                self.jumps[exit_state].append(full)
            empty = None if part.low else empty
        end = self.new_state()
        for track in (empty, full):
            if track is not None:
                self.jumps[track].append(end)
        return end

    def _accepted(self, dfa: Dfa, state: int) -> int:
        end = self.new_state()
        numbers = [self.new_state() for _ in range(dfa.num_states)]
        self.jumps[state].append(numbers[1])
        for number, arrows, accepting in zip(numbers, dfa.arrows, dfa.accepting, strict=True):
            self.arrows[number] = [(low, high, numbers[target]) for low, high, target in arrows]
            if accepting:
                self.jumps[number].append(end)
        return end

    def _characters(self, ranges: Ranges, state: int) -> int:
        end = self.new_state()
        # For each sequence of bytes that completes a character, the state before it.
        before: dict[Ranges, int] = {(): end}
        for byte_ranges in products(ranges):
            for i in range(len(byte_ranges) - 1, 0, -1):
                if byte_ranges[i:] not in before:
                    before[byte_ranges[i:]] = self.new_state()
                    self.arrows[before[byte_ranges[i:]]].append(
                        (*byte_ranges[i], before[byte_ranges[i + 1 :]])
                    )
            self.arrows[state].append((*byte_ranges[0], before[byte_ranges[1:]]))
        return end

    def closure(self, states: frozenset[int], *more: dict[int, list[int]]) -> frozenset[int]:
        """Returns the states that these may turn into, by jumps and by those of `more`."""
        found, open_states = set(states), list(states)
        while open_states:
            state = open_states.pop()
            targets = self.jumps[state]
            for jumps in more:
                targets = targets + jumps.get(state, [])
            for target in targets:
                if target not in found:
                    found.add(target)
                    open_states.append(target)
        return frozenset(found)


def _determinized(nfa: _Nfa, end: int, max_states: int) -> Dfa:
    """Subset construction. State 1, the start, is never entered again: anchors hold there."""
    firsts = sorted({0} | {b for arrows in nfa.arrows for a in arrows for b in (a[0], a[1] + 1)})
    firsts = [first for first in firsts if first < 256]
    classes = np.searchsorted(firsts, np.arange(256), side='right') - 1
    column = [*classes.tolist(), len(firsts)]
    moves = [
        [(column[low], column[high + 1], target) for low, high, target in arrows]
        for arrows in nfa.arrows
    ]

    @functools.cache
    def closed(state: int) -> frozenset[int]:
        """The closure of one state, without the states that only pass on to others."""
        found = nfa.closure(frozenset([state])) if nfa.jumps[state] else [state]
        return frozenset(s for s in found if moves[s] or s == end or s in nfa.end_jumps)

    sets = [frozenset(), nfa.closure(frozenset([0]), nfa.start_jumps)]
    numbers: dict[frozenset[int], int] = {frozenset(): 0}
    by_kernel: dict[_Kernel, int] = {}
    rows: list[list[int]] = [[0] * len(firsts)]
    while len(rows) < len(sets):
        row = [0] * len(firsts)
        for i, kernel in enumerate(_kernels(moves, sets[len(rows)], len(firsts))):
            if kernel is None:
                continue
            number = by_kernel.get(kernel)
            if number is None:
                parts = [kernel] if isinstance(kernel, int) else kernel
                reached = frozenset().union(*map(closed, parts))
                number = by_kernel[kernel] = numbers.setdefault(reached, len(sets))
                if number == len(sets):
                    sets.append(reached)
            row[i] = number
        if len(sets) > max_states:
            raise TooManyStatesError
        rows.append(row)
    accepting = [
        end in states
        or bool(nfa.end_jumps)
        and end in nfa.closure(states, nfa.end_jumps, nfa.start_jumps if i == 1 else {})
        for i, states in enumerate(sets)
    ]
    return Dfa(classes, np.array(rows, np.int32), np.array(accepting))


# The states that one byte leads to, before their closure; an integer where it is only one.
_Kernel = int | frozenset[int]


def _kernels(
    moves: list[list[tuple[int, int, int]]], states: frozenset[int], num_classes: int
) -> list[_Kernel | None]:
    """Returns what each class of bytes leads to from a set of states, None for nowhere."""
    kernels: list[_Kernel | None] = [None] * num_classes
    for state in states:
        for low, high, target in moves[state]:
            for i in range(low, high):
                known = kernels[i]
                if known is None:
                    kernels[i] = target
                elif known != target:
                    more = known if isinstance(known, frozenset) else (known,)
                    kernels[i] = frozenset((target, *more))
    return kernels
