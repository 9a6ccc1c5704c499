"""Compiles an expression to the minimal automaton over bytes.

The steps are the textbook ones: a nondeterministic automaton (Thompson 1968), the subset
construction, and minimization.
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

# The nondeterministic automaton may have this many states per allowed state of the result.
_NFA_FACTOR = 20


def compile_expression(expression: Expression, max_states: int) -> Dfa:
    """Returns the minimal automaton of an expression.

    Raises:
      TooManyStatesError: if the automaton has more than max_states states before minimization.
    """
    nfa = _Nfa(max_states * _NFA_FACTOR)
    end = nfa.add(expression, nfa.new_state())
    return minimized(_determinized(nfa, end, max_states))


@functools.lru_cache(maxsize=512)
def compile_shared(expression: Expression, max_states: int) -> Dfa:
    """Returns the cached result of `compile_expression`."""
    return compile_expression(expression, max_states)


class _Nfa:
    """A nondeterministic automaton that is built from left to right and starts in state 0.

    Attributes:
      arrows: the transitions of each state as (first byte, last byte, next state).
      jumps: the empty transitions (without a byte) of each state, as next states.
      start_jumps: empty transitions that apply only at the start of the text.
      end_jumps: empty transitions that apply only at the end of the text.
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
        """Adds an expression that starts in `state`; returns the state that it ends in.

        No added transition leads back to `state`, so several expressions can start in it.
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
            raise TooManyStatesError  # even if the part takes no state
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
        """Adds a `Joined` expression; returns its end state.

        There are two tracks: `empty`, where no part has matched yet, and `full`, where a separator
        must come next. Both lead into the same copy of each part, so the size is linear in the
        number of parts.
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
                entry = None  # later copies can only follow the first one
                full = self.add(part.part, start)
                exits = [full] if copy < part.low else [*exits, full]
            if part.high is None:
                assert full is not None  # there is at least one copy
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
        # Maps the byte ranges that complete a character to the state before them.
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
        """Returns all states that can be reached from `states` by empty transitions.

        Args:
          states: the states to start from.
          *more: empty transitions in addition to `jumps`, such as `start_jumps`.
        """
        reached, open_states = set(states), list(states)
        while open_states:
            state = open_states.pop()
            targets = self.jumps[state]
            for jumps in more:
                targets = targets + jumps.get(state, [])
            for target in targets:
                if target not in reached:
                    reached.add(target)
                    open_states.append(target)
        return frozenset(reached)


def _determinized(nfa: _Nfa, end: int, max_states: int) -> Dfa:
    """Returns the deterministic automaton, computed by the subset construction.

    No transition leads back to state 1, the start: start anchors only match there.
    """
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
        """Returns the closure of one state, without states that only have empty transitions."""
        states = nfa.closure(frozenset([state])) if nfa.jumps[state] else [state]
        return frozenset(s for s in states if moves[s] or s == end or s in nfa.end_jumps)

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


# The states that one byte leads to, before their closure; an integer if there is only one.
_Kernel = int | frozenset[int]


def _kernels(
    moves: list[list[tuple[int, int, int]]], states: frozenset[int], num_classes: int
) -> list[_Kernel | None]:
    """Returns the states that each byte class leads to from a set of states, or None if none."""
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
