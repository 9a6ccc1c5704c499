"""Deterministic automata over bytes: determinization, products and minimization."""

import dataclasses
import functools

import numpy as np

_FEW_STATES = 4096  # up to this number `_refined_by_rounds` is the faster minimization


class TooManyStatesError(Exception):
    """An error: an automaton exceeds its maximum number of states."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dfa:
    """A deterministic automaton over UTF-8 bytes.

    State 0 is dead (no text can be accepted any more); state 1 is the start.

    Attributes:
      byte_classes: [256] integer, the class (table column) of each byte.
      table: [S, K] int32, the next state for each state and byte class.
      accepting: [S] bool, whether a text may end in each state.
    """

    byte_classes: np.ndarray
    table: np.ndarray
    accepting: np.ndarray

    @property
    def num_states(self) -> int:
        """Returns the number of states S, including the dead state."""
        return len(self.table)

    @property
    def is_empty(self) -> bool:
        """Returns whether no text is accepted; only valid for results of `minimized`."""
        return not self.accepting.any()

    @functools.cached_property
    def arrows(self) -> list[list[tuple[int, int, int]]]:
        """Returns the transitions of each state as (first byte, last byte, next state).

        Transitions to the dead state are left out.
        """
        table = self.by_byte()
        starts = np.ones(table.shape, bool)
        starts[:, 1:] = table[:, 1:] != table[:, :-1]
        states, firsts = np.nonzero(starts)  # [ranges] each
        lasts = (np.append(firsts[1:], 0) - 1) % 256  # a row starts at 0: the last one ends at 255
        targets = table[states, firsts]
        arrows: list[list[tuple[int, int, int]]] = [[] for _ in table]
        columns = (states, firsts, lasts, targets)
        for state, *arrow in zip(
            *(column[targets > 0].tolist() for column in columns), strict=True
        ):
            arrows[state].append(tuple(arrow))
        return arrows

    def by_byte(self) -> np.ndarray:
        """Returns the transition table with one column per byte, [S, 256] int32."""
        return self.table[:, self.byte_classes]

    def accepts(self, text: bytes) -> bool:
        """Returns whether a text is accepted."""
        state = 1
        for column in self.byte_classes[np.frombuffer(text, np.uint8)]:
            state = self.table[state, column]
        return bool(self.accepting[state])


def from_table(by_byte: np.ndarray, accepting: np.ndarray) -> Dfa:
    """Returns the minimal automaton of a transition table.

    Args:
      by_byte: [S, 256] integer, the next state for each state and byte.
      accepting: [S] bool, whether a text may end in each state.
    """
    table, byte_classes = np.unique(by_byte, axis=1, return_inverse=True)  # [S, K]
    return minimized(Dfa(byte_classes.ravel(), table, accepting))


def product(left: Dfa, right: Dfa, max_states: int, *, difference: bool = False) -> Dfa:
    """Returns the minimal automaton of the texts that both automata accept.

    With `difference` it accepts the texts that `left` accepts and `right` does not.

    Raises:
      TooManyStatesError: if there are more than max_states pairs of states.
    """
    pairs, columns = np.unique(
        np.stack([left.byte_classes, right.byte_classes]), axis=1, return_inverse=True
    )
    left_table, right_table = left.table[:, pairs[0]], right.table[:, pairs[1]]
    width = right.num_states
    # A pair of states has the code left * width + right; this maps the codes to new states.
    numbers = {0: 0, width + 1: 1}
    queue = [0, width + 1]
    rows: list[list[int]] = []
    while len(rows) < len(queue):
        first, second = divmod(queue[len(rows)], width)
        targets = left_table[first].astype(np.int64) * width + right_table[second]
        targets[left_table[first] == 0] = 0
        if not difference:
            targets[right_table[second] == 0] = 0
        row = []
        for target in targets.tolist():
            if target not in numbers:
                numbers[target] = len(queue)
                queue.append(target)
            row.append(numbers[target])
        rows.append(row)
        if len(queue) > max_states:
            raise TooManyStatesError
    firsts, seconds = np.divmod(np.array(queue), width)
    accepting = left.accepting[firsts] & (right.accepting[seconds] != difference)
    return minimized(Dfa(columns.ravel(), np.array(rows, np.int32), accepting))


def minimized(dfa: Dfa) -> Dfa:
    """Returns the equivalent automaton with the fewest states and byte classes.

    Large automata use the algorithm of Valmari 2012, "Fast brief practical DFA minimization".
    Small ones use Moore's rounds over the whole table, which are faster at that size.
    """
    live = _useful(dfa.table, dfa.accepting)
    if not live[1]:
        dead = np.zeros((2, 1), np.int32)
        return Dfa(np.zeros(256, np.int64), dead, np.zeros(2, bool))
    if dfa.num_states <= _FEW_STATES:
        blocks = _refined_by_rounds(dfa.table * live[dfa.table], dfa.accepting & live)
    else:
        tails, labels = np.nonzero(live[dfa.table] & live[:, None])
        heads = dfa.table[tails, labels]
        final = np.flatnonzero(dfa.accepting & live)
        blocks = _refined_by_splits(dfa.num_states, tails, labels, heads, final)
    # New numbering: the dead state first, then the block of the start state, then other live ones.
    order = np.unique(blocks[live])
    numbers = np.zeros(dfa.num_states, np.int32)
    rank = np.searchsorted(order, blocks[live])
    start = int(np.searchsorted(order, blocks[1]))
    numbers[live] = np.where(rank == start, 1, np.where(rank < start, rank + 2, rank + 1))
    _, examples = np.unique(numbers, return_index=True)
    if 0 not in numbers:
        examples = np.append(0, examples)
    table = numbers[dfa.table[examples]]
    table[0] = 0
    accepting = dfa.accepting[examples] & live[examples]
    columns, inverse = np.unique(table, axis=1, return_inverse=True)
    return Dfa(inverse.ravel()[dfa.byte_classes], columns, accepting)


def _useful(table: np.ndarray, accepting: np.ndarray) -> np.ndarray:
    """Returns whether an accepting state can be reached from each state, [S] bool."""
    num_columns = table.shape[1]
    by_target = np.argsort(table, axis=None, kind='stable')  # [S * K], transitions by target
    bounds = np.searchsorted(table.ravel()[by_target], np.arange(len(table) + 1))
    sources = (by_target // num_columns).tolist()
    limits = bounds.tolist()
    useful = accepting.copy()
    useful[0] = False
    queue = np.flatnonzero(useful).tolist()
    visited = set(queue)
    while queue:
        state = queue.pop()
        for source in sources[limits[state] : limits[state + 1]]:
            if source and source not in visited:
                visited.add(source)
                queue.append(source)
    useful[list(visited)] = True
    return useful


def _refined_by_rounds(table: np.ndarray, accepting: np.ndarray) -> np.ndarray:
    """Returns the block of each state, [S] integer; states of one block accept the same texts.

    Each round splits states whose next states were split in the previous round (Moore 1956).
    The initial blocks are the distances to an accepting state, because states with different
    distances accept different texts.
    """
    blocks, count = _shortest(table, accepting), 0
    while True:
        rows = np.concatenate([blocks[:, None], blocks[table]], axis=1).astype(np.int32)
        keys = np.ascontiguousarray(rows).view(f'V{4 * rows.shape[1]}').ravel()
        _, blocks = np.unique(keys, return_inverse=True)
        if blocks.max() == count:
            return blocks
        count = blocks.max()


def _shortest(table: np.ndarray, accepting: np.ndarray) -> np.ndarray:
    """Returns the fewest bytes from each state to an accepting state, [S]; S if there is none."""
    distances = np.where(accepting, 0, len(table))
    while True:
        shorter = np.minimum(distances, 1 + distances[table].min(axis=1))
        shorter[0] = len(table)
        if np.array_equal(shorter, distances):
            return distances
        distances = shorter


class _Partition:
    """A partition of 0 .. size - 1 whose sets are split into marked and unmarked elements."""

    def __init__(self, size: int) -> None:
        self.elements = list(range(size))
        self.places = list(range(size))
        self.sets = [0] * size
        self.firsts, self.ends = [0], [size]
        self.marks = [0]
        self.touched: list[int] = []

    def mark(self, element: int) -> None:
        block = self.sets[element]
        marked = self.marks[block]
        place, target = self.places[element], self.firsts[block] + marked
        if place < target:
            return
        other = self.elements[target]
        self.elements[place], self.places[other] = other, place
        self.elements[target], self.places[element] = element, target
        if not marked:
            self.touched.append(block)
        self.marks[block] = marked + 1

    def split(self) -> None:
        for block in self.touched:
            middle = self.firsts[block] + self.marks[block]
            self.marks[block] = 0
            if middle == self.ends[block]:
                continue
            if middle - self.firsts[block] <= self.ends[block] - middle:  # the smaller part moves
                first, end = self.firsts[block], middle
                self.firsts[block] = middle
            else:
                first, end = middle, self.ends[block]
                self.ends[block] = middle
            for element in self.elements[first:end]:
                self.sets[element] = len(self.firsts)
            self.firsts.append(first)
            self.ends.append(end)
            self.marks.append(0)
        self.touched = []


def _refined_by_splits(
    num_states: int, tails: np.ndarray, labels: np.ndarray, heads: np.ndarray, final: np.ndarray
) -> np.ndarray:
    """Returns the same blocks as `_refined_by_rounds`.

    Partitions of states (into blocks) and of transitions (into cords, as Valmari calls them) refine
    each other in O(M log S). Dead states are not included.

    Args:
      num_states: the number of states S.
      tails: [M] integer, the source state of each transition.
      labels: [M] integer, the byte class of each transition.
      heads: [M] integer, the target state of each transition.
      final: indices of the accepting states.
    """
    states, arrows = _Partition(num_states), _Partition(len(tails))
    for state in final.tolist():
        states.mark(state)
    states.split()
    order = np.argsort(labels, kind='stable')
    cuts = np.flatnonzero(np.diff(labels[order], prepend=-1)) if len(order) else np.zeros(0, int)
    arrows.elements = order.tolist()
    arrows.places = np.argsort(order, kind='stable').tolist()
    arrows.firsts, arrows.ends = cuts.tolist(), [*cuts[1:].tolist(), len(order)]
    arrows.sets = (np.searchsorted(np.unique(labels), labels)).tolist()
    arrows.marks = [0] * len(arrows.firsts)
    by_head = np.argsort(heads, kind='stable').tolist()
    limits = np.searchsorted(heads[by_head], np.arange(num_states + 1)).tolist()
    tail_list = tails.tolist()
    block, cord = 1, 0
    while cord < len(arrows.firsts):
        for arrow in arrows.elements[arrows.firsts[cord] : arrows.ends[cord]]:
            states.mark(tail_list[arrow])
        states.split()
        cord += 1
        while block < len(states.firsts):
            for state in states.elements[states.firsts[block] : states.ends[block]]:
                for arrow in by_head[limits[state] : limits[state + 1]]:
                    arrows.mark(arrow)
            arrows.split()
            block += 1
    return np.array(states.sets)
