"""Generates sudoku puzzles with exactly one solution, and checks responses without an answer key.

    >>> from diffusiongemma.data.tasks import sudoku
    >>> example = sudoku.generate(0, 'train')
    >>> sudoku.check(example['prompt'], example['response'])
    True

A prompt is `INSTRUCTION` and the rows of the grid with `_` for a blank; a response is the rows of
the solved grid. An example is a pure function of its arguments. The split is a property of the
solution: a hash of the grid with its digits renamed in order of appearance. So neither a solution
grid nor a renaming of it is in both splits.
"""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Sequence

import numpy as np

from diffusiongemma.data.indexing import from_start

INSTRUCTION = 'Solve this sudoku:'
SPLITS = ('train', 'test')
TEST_ONE_IN = 8
# Grid size -> (box size, default minimum and maximum number of clues). A unique solution needs at
# least 17 clues in a 9x9 grid (McGuire et al., 2012) and at least 4 in a 4x4 grid.
GRIDS = {9: (3, 30, 45), 4: (2, 5, 9)}
FEWEST_CLUES = {9: 17, 4: 4}

_ROW = re.compile(r'[1-9_]+')


@functools.cache
def _units(box: int) -> tuple[tuple[int, int, int], ...]:
    """Returns row, column and box index of each cell in reading order, for box x box boxes."""
    n = box * box
    return tuple((i // n, i % n, i // n // box * box + i % n // box) for i in range(n * n))


@functools.cache
def _neighbors(box: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Returns the other cells in the row, the column and the box of each cell."""
    units = _units(box)
    return tuple(
        tuple(
            tuple(j for j, other in enumerate(units) if j != i and other[kind] == unit[kind])
            for kind in range(3)
        )
        for i, unit in enumerate(units)
    )


def solve(
    cells: Sequence[int], box: int = 3, limit: int = 2, order: Sequence[int] | None = None
) -> list[tuple[int, ...]]:
    """Returns solutions of a puzzle by depth-first search on the cell with the fewest candidates.

    Args:
      cells: n*n digits in reading order, n = box * box, 0 for a blank.
      box: 3 for 9x9 grids, 2 for 4x4 grids.
      limit: the maximum number of solutions; two are enough to test uniqueness.
      order: the digits in the order in which they are tried, ascending by default.

    Returns:
      At most `limit` solved grids; none if the clues contradict each other.
    """
    n = box * box
    units = _units(box)
    bits = [1 << digit for digit in (order or range(1, n + 1))]
    full = sum(bits)
    rows, columns, boxes = [0] * n, [0] * n, [0] * n
    grid = list(cells)
    for cell, digit in enumerate(grid):
        if digit:
            r, c, b = units[cell]
            bit = 1 << digit
            if (rows[r] | columns[c] | boxes[b]) & bit:
                return []
            rows[r] |= bit
            columns[c] |= bit
            boxes[b] |= bit
    blanks = [cell for cell, digit in enumerate(grid) if not digit]
    solutions: list[tuple[int, ...]] = []

    def search() -> None:
        if not blanks:
            solutions.append(tuple(grid))
            return
        fewest = n + 1
        for k, cell in enumerate(blanks):
            r, c, b = units[cell]
            free = full & ~(rows[r] | columns[c] | boxes[b])
            count = free.bit_count()
            if count < fewest:
                fewest, best, candidates = count, k, free
                if count <= 1:
                    break
        if not fewest:
            return
        cell = blanks[best]
        blanks[best] = blanks[-1]
        blanks.pop()
        r, c, b = units[cell]
        for bit in bits:
            if candidates & bit:
                rows[r] |= bit
                columns[c] |= bit
                boxes[b] |= bit
                grid[cell] = bit.bit_length() - 1
                search()
                rows[r] ^= bit
                columns[c] ^= bit
                boxes[b] ^= bit
                if len(solutions) >= limit:
                    break
        grid[cell] = 0
        blanks.append(cell)
        blanks[best], blanks[-1] = blanks[-1], blanks[best]

    search()
    return solutions


def _random_solution(rng: np.random.Generator, box: int) -> tuple[int, ...]:
    """Returns a random solved grid: random boxes on the diagonal, completed by search."""
    n = box * box
    while True:
        cells = [0] * (n * n)
        for start in range(0, n, box):
            digits = iter((rng.permutation(n) + 1).tolist())
            for row in range(start, start + box):
                for column in range(start, start + box):
                    cells[row * n + column] = next(digits)
        solved = solve(cells, box, limit=1, order=(rng.permutation(n) + 1).tolist())
        if solved:  # the two diagonal boxes of a 4x4 grid can contradict each other
            return solved[0]


def solution_split(solution: Sequence[int]) -> str:
    """Returns the split of a solved grid, which is the same for all renamings of its digits."""
    names = {digit: chr(ord('1') + k) for k, digit in enumerate(dict.fromkeys(solution))}
    key = 'sudoku ' + ''.join(names[digit] for digit in solution)
    return 'test' if zlib.crc32(key.encode()) % TEST_ONE_IN == 0 else 'train'


def _is_single(cells: list[int], cell: int, digit: int, box: int) -> bool:
    """Returns whether the clues force `digit` into a blank cell as a naked or hidden single."""
    neighbors = _neighbors(box)

    def excluded(blank: int, value: int) -> bool:
        return any(cells[j] == value for unit in neighbors[blank] for j in unit)

    nearby = {cells[j] for unit in neighbors[cell] for j in unit}
    if all(other in nearby for other in range(1, box * box + 1) if other != digit):
        return True
    return any(all(cells[j] or excluded(j, digit) for j in unit) for unit in neighbors[cell])


def _dig(solution: Sequence[int], clues: int, rng: np.random.Generator, box: int) -> list[int]:
    """Returns the cells after removing clues in random order.

    A clue is only removed if the solution stays unique, and only until `clues` are left.
    """
    cells = list(solution)
    left = len(cells)
    clue_cells = []
    for cell in rng.permutation(len(cells)).tolist():
        if left == clues:
            return cells
        digit, cells[cell] = cells[cell], 0
        # A digit that the other clues force can be removed without a search for a second solution.
        if _is_single(cells, cell, digit, box):
            left -= 1
        else:
            cells[cell] = digit
            clue_cells.append(cell)
    for cell in clue_cells:
        if left == clues:
            break
        digit, cells[cell] = cells[cell], 0
        if len(solve(cells, box)) == 1:
            left -= 1
        else:
            cells[cell] = digit
    return cells


def _rows(cells: Sequence[int], box: int) -> str:
    n = box * box
    text = ''.join(str(digit) if digit else '_' for digit in cells)
    return '\n'.join(text[row : row + n] for row in range(0, n * n, n))


def _resolve_clues(size: int, min_clues: int | None, max_clues: int | None) -> tuple[int, int]:
    if size not in GRIDS:
        raise ValueError(f'size must be one of {sorted(GRIDS)}, got {size}.')
    _, low, high = GRIDS[size]
    low = min_clues if min_clues is not None else low
    high = max_clues if max_clues is not None else max(high, low)
    if not FEWEST_CLUES[size] <= low <= high <= size * size:
        raise ValueError(
            f'A {size}x{size} sudoku needs {FEWEST_CLUES[size]} <= min_clues <= max_clues <= '
            f'{size * size}, got min_clues={low}, max_clues={high}.'
        )
    return low, high


def generate(
    index: int,
    split: str,
    seed: int = 0,
    size: int = 9,
    min_clues: int | None = None,
    max_clues: int | None = None,
) -> dict[str, str | int]:
    """Returns one puzzle.

    Args:
      index: the index of the puzzle, any non-negative integer.
      split: 'train' or 'test'.
      seed: a non-negative seed; other seeds give other streams over the same solutions per split.
      size: the number of rows of the grid, 9 or 4.
      min_clues: the minimum number of clues; by default 30 of 81 or 5 of 16.
      max_clues: the maximum number of clues; by default 45 of 81 or 9 of 16.

    Returns:
      {'prompt', 'response', 'answer', 'task', 'clues'}; 'clues' is an int, all others are str.

    Raises:
      ValueError: on an unknown split or size, a negative index or seed, or clue bounds that no
        puzzle meets (random removal often cannot go below about 24 clues of 81).
    """
    if split not in SPLITS:
        raise ValueError(f'split must be one of {SPLITS}, got {split!r}.')
    if index < 0 or seed < 0:
        raise ValueError(f'index and seed must be >= 0, got index={index}, seed={seed}.')
    low, high = _resolve_clues(size, min_clues, max_clues)
    box = GRIDS[size][0]
    rng = np.random.default_rng((seed, SPLITS.index(split), index, size))
    clues = int(rng.integers(low, high + 1))
    for _ in range(200):
        solution = _random_solution(rng, box)
        if solution_split(solution) != split:
            continue
        puzzle = _dig(solution, clues, rng, box)
        count = sum(digit > 0 for digit in puzzle)
        if count <= high and solve(puzzle, box) == [solution]:
            response = _rows(solution, box)
            return {
                'prompt': f'{INSTRUCTION}\n{_rows(puzzle, box)}',
                'response': response,
                'answer': response,
                'task': 'sudoku',
                'clues': count,
            }
    raise ValueError(f'Found no {size}x{size} puzzle with at most {high} clues; raise max_clues.')


class Sudoku:
    """A source with random access to `size` puzzles of one split."""

    def __init__(
        self,
        split: str,
        size: int,
        seed: int = 0,
        box: int = 3,
        min_clues: int | None = None,
        max_clues: int | None = None,
    ) -> None:
        """Raises ValueError on an unknown split, a size below 1, or invalid box or clue bounds."""
        if split not in SPLITS:
            raise ValueError(f'split must be one of {SPLITS}, got {split!r}.')
        if size < 1:
            raise ValueError(f'size must be >= 1, got {size}.')
        if box not in (2, 3):
            raise ValueError(f'box must be 2 (4x4 grids) or 3 (9x9 grids), got {box}.')
        self._split = split
        self._size = size
        self._seed = seed
        self._grid = box * box
        self._clues = _resolve_clues(self._grid, min_clues, max_clues)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, str | int]:
        index = from_start(index, self)
        return generate(index, self._split, self._seed, self._grid, *self._clues)

    def __repr__(self) -> str:  # grain identifies a source by its repr
        return (
            f'Sudoku(split={self._split!r}, size={self._size}, seed={self._seed}, '
            f'grid={self._grid}, clues={self._clues})'
        )


def parse_prompt(prompt: str) -> tuple[list[int], int]:
    """Returns the cells (0 for a blank) and the box size of the grid in a prompt.

    Raises:
      ValueError: if the prompt does not end in the rows of a 4x4 or a 9x9 grid.
    """
    rows = [line for line in prompt.split('\n') if _ROW.fullmatch(line)]
    size = len(rows)
    too_large = any(c != '_' and int(c) > size for row in rows for c in row)
    if size not in GRIDS or too_large or any(len(row) != size for row in rows):
        raise ValueError(
            f'A sudoku prompt needs 4 rows of 1-4 and _, or 9 rows of 1-9 and _, got {prompt!r}.'
        )
    return [0 if c == '_' else int(c) for row in rows for c in row], GRIDS[size][0]


def check(prompt: str, response: str) -> bool:
    """Returns whether a response is a valid solved grid that keeps all clues of the prompt.

    Raises:
      ValueError: if the prompt has no grid; a malformed response only returns False.
    """
    cells, box = parse_prompt(prompt)
    n = box * box
    rows = response.strip().split('\n')
    if len(rows) != n or any(len(row) != n or not _ROW.fullmatch(row) for row in rows):
        return False
    text = ''.join(rows)
    if '_' in text or int(max(text)) > n:
        return False
    digits = [int(c) for c in text]
    if any(clue and clue != digit for clue, digit in zip(cells, digits, strict=True)):
        return False
    return bool(solve(digits, box, limit=1))  # for a full grid: no unit repeats a digit
