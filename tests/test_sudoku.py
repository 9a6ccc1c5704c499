"""Tests the sudoku task: unique solutions, reproducibility, and disjoint splits."""

import itertools
import pickle

import jax
import numpy as np
import pytest

from diffusiongemma import Sampler, SamplingConfig, load_model
from diffusiongemma.data.tasks import sudoku
from diffusiongemma.models import for_inference
from diffusiongemma.sampling import generate_text

SOLVED_9 = '\n'.join(
    [
        '534678912',
        '672195348',
        '198342567',
        '859761423',
        '426853791',
        '713924856',
        '961537284',
        '287419635',
        '345286179',
    ]
)
PROMPT_9 = '\n'.join(
    [
        'Solve this sudoku:',
        '53__7____',
        '6__195___',
        '_98____6_',
        '8___6___3',
        '4__8_3__1',
        '7___2___6',
        '_6____28_',
        '___419__5',
        '____8__79',
    ]
)


def _is_valid(rows):
    """An independent check of a solved grid, given as a list of strings."""
    n = len(rows)
    box = int(n**0.5)
    digits = set('123456789'[:n])
    columns = [''.join(column) for column in zip(*rows, strict=True)]
    boxes = [
        ''.join(rows[r + i][c : c + box] for i in range(box))
        for r in range(0, n, box)
        for c in range(0, n, box)
    ]
    return all(set(unit) == digits for unit in (*rows, *columns, *boxes))


@pytest.fixture(scope='module')
def all_4x4_grids():
    rows = [''.join(row) for row in itertools.permutations('1234')]
    # The boxes of the upper half hold all digits, as do those of the lower half.
    halves = [(a, b) for a, b in itertools.product(rows, rows) if not set(a[:2]) & set(b[:2])]
    return [a + b for a, b in itertools.product(halves, halves) if _is_valid(a + b)]


@pytest.fixture(scope='module')
def puzzles():
    return {
        (size, split): [sudoku.generate(i, split, size=size) for i in range(150)]
        for size in (4, 9)
        for split in sudoku.SPLITS
    }


def _rows(example):
    return example['prompt'].split('\n')[1:], example['response'].split('\n')


def test_solutions_are_valid_and_keep_the_clues(puzzles):
    for (size, _), examples in puzzles.items():
        for example in examples:
            clues, solution = _rows(example)
            assert example['prompt'].startswith(f'{sudoku.INSTRUCTION}\n')
            assert len(clues) == len(solution) == size
            assert _is_valid(solution)
            for clue, digit in zip(''.join(clues), ''.join(solution), strict=True):
                assert clue in ('_', digit)
            assert example['task'] == 'sudoku'
            assert example['answer'] == example['response']
            assert sudoku.check(example['prompt'], example['response'])


def test_every_4x4_puzzle_has_exactly_one_solution_among_all_grids(puzzles, all_4x4_grids):
    assert len(all_4x4_grids) == 288
    grids = [''.join(rows) for rows in all_4x4_grids]
    for split in sudoku.SPLITS:
        for example in puzzles[4, split]:
            clues, solution = (''.join(rows) for rows in _rows(example))
            pattern = [(i, clue) for i, clue in enumerate(clues) if clue != '_']
            assert [g for g in grids if all(g[i] == c for i, c in pattern)] == [solution]


def test_no_9x9_puzzle_has_a_solution_that_differs_anywhere(puzzles):
    # This check is independent of the generator's: it forbids each blank's digit in turn.
    for example in puzzles[9, 'train'][:5]:
        cells, box = sudoku.parse_prompt(example['prompt'])
        solution = [int(c) for c in example['response'].replace('\n', '')]
        for cell in [i for i, clue in enumerate(cells) if not clue]:
            for digit in set(range(1, 10)) - {solution[cell]}:
                other = [*cells[:cell], digit, *cells[cell + 1 :]]
                assert sudoku.solve(other, box, limit=1) == []


def test_solve_finds_all_4x4_grids_and_stops_at_its_limit(all_4x4_grids):
    found = sudoku.solve([0] * 16, box=2, limit=1000)
    expected = {tuple(int(c) for c in ''.join(rows)) for rows in all_4x4_grids}
    assert len(found) == 288
    assert set(found) == expected
    assert len(sudoku.solve([0] * 16, box=2, limit=7)) == 7
    assert len(sudoku.solve([0] * 81)) == 2


def test_solve_knows_puzzles_without_a_solution():
    assert sudoku.solve([1, 1, *[0] * 14], box=2) == []
    assert sudoku.solve([1, 2, 3, 0, 0, 0, 0, 4, *[0] * 8], box=2) == []


def test_solve_solves_a_known_puzzle():
    cells, box = sudoku.parse_prompt(PROMPT_9)
    assert box == 3
    assert sudoku.solve(cells) == [tuple(int(c) for c in SOLVED_9.replace('\n', ''))]


def test_no_solution_nor_a_renaming_of_its_digits_is_in_both_splits(puzzles):
    def renamed(grid):
        names = {digit: str(k) for k, digit in enumerate(dict.fromkeys(grid))}
        return ''.join(names[digit] for digit in grid)

    for size in (4, 9):
        train, test = (
            {renamed(e['response'].replace('\n', '')) for e in puzzles[size, split]}
            for split in sudoku.SPLITS
        )
        assert train and test and not train & test


def test_both_splits_hold_several_4x4_solutions(all_4x4_grids):
    splits = [sudoku.solution_split([int(c) for c in ''.join(g)]) for g in all_4x4_grids]
    assert 48 <= splits.count('test') <= 144
    assert splits.count('train') >= 144


@pytest.mark.parametrize(
    ('size', 'low', 'high'), [(9, 30, 45), (9, 24, 27), (4, 4, 6), (4, 16, 16)]
)
def test_the_number_of_clues_stays_within_its_bounds(size, low, high):
    for index in range(6):
        example = sudoku.generate(index, 'train', size=size, min_clues=low, max_clues=high)
        clues = sum(c != '_' for row in _rows(example)[0] for c in row)
        assert low <= clues <= high
        assert example['clues'] == clues


def test_default_clue_counts_are_varied(puzzles):
    counts = {example['clues'] for example in puzzles[9, 'train']}
    assert min(counts) < 33 and max(counts) > 42 and counts <= set(range(30, 46))


def test_a_puzzle_depends_only_on_its_arguments():
    first = [sudoku.generate(i, 'test', seed=2, size=4) for i in (0, 1)]
    assert [sudoku.generate(i, 'test', seed=2, size=4) for i in (1, 0)] == first[::-1]
    assert sudoku.generate(0, 'test', seed=3, size=4) != first[0]


def test_the_source_is_a_picklable_sequence():
    source = sudoku.Sudoku('train', size=3, seed=5, box=2, min_clues=6, max_clues=8)
    assert len(source) == 3
    expected = sudoku.generate(1, 'train', seed=5, size=4, min_clues=6, max_clues=8)
    assert source[1] == source[-2] == source[np.int64(1)] == expected
    assert pickle.loads(pickle.dumps(source))[1] == source[1]
    assert len(list(source)) == 3
    with pytest.raises(IndexError, match='index 3'):
        source[3]


def test_check_accepts_the_solution_with_blanks_around_it():
    assert sudoku.check(PROMPT_9, SOLVED_9)
    assert sudoku.check(PROMPT_9, f'\n{SOLVED_9}\n')


def test_check_rejects_any_single_wrong_cell():
    for cell, old in enumerate(SOLVED_9):
        if old != '\n':
            for new in set('123456789_') - {old}:
                assert not sudoku.check(PROMPT_9, SOLVED_9[:cell] + new + SOLVED_9[cell + 1 :])


@pytest.mark.parametrize(
    'response',
    [
        '',
        'no idea',
        SOLVED_9.replace('\n', ''),
        SOLVED_9[:-10],
        SOLVED_9 + '\n345286179',
        SOLVED_9.replace('1', '0'),
        SOLVED_9.replace('1', '\u00b9'),  # a superscript is a digit to str.isdigit
        SOLVED_9.translate(str.maketrans('12', '21')),  # valid, but not with these clues
        '\n'.join(reversed(SOLVED_9.split('\n'))),
    ],
)
def test_check_rejects_what_is_not_the_solution(response):
    assert sudoku.check(PROMPT_9, response) is False


def test_check_rejects_digits_that_a_small_grid_does_not_have():
    prompt = f'{sudoku.INSTRUCTION}\n____\n____\n____\n____'
    assert sudoku.check(prompt, '1234\n3412\n2143\n4321')
    assert not sudoku.check(prompt, '5234\n3452\n2543\n4325')


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="'valid'"):
        sudoku.generate(0, 'valid')
    with pytest.raises(ValueError, match='size must be one of'):
        sudoku.generate(0, 'train', size=16)
    with pytest.raises(ValueError, match='seed=-1'):
        sudoku.generate(0, 'train', seed=-1)
    with pytest.raises(ValueError, match='min_clues=16, max_clues=20'):
        sudoku.generate(0, 'train', min_clues=16, max_clues=20)
    with pytest.raises(ValueError, match='raise max_clues'):
        sudoku.generate(0, 'test', min_clues=17, max_clues=17)
    with pytest.raises(ValueError, match='box must be'):
        sudoku.Sudoku('train', size=1, box=4)
    with pytest.raises(ValueError, match='size must be >= 1'):
        sudoku.Sudoku('train', size=0)
    for prompt in ('hello', '12\n34', f'{sudoku.INSTRUCTION}\n____\n____\n____\n___5'):
        with pytest.raises(ValueError, match='sudoku prompt needs'):
            sudoku.check(prompt, SOLVED_9)


@pytest.mark.slow
def test_the_shipped_student_solves_puzzles_that_its_teacher_does_not():
    puzzles = [sudoku.generate(index, 'test') for index in range(32)]
    solved = {}
    for name, mode in (('builtin-teacher', 'autoregressive'), ('builtin-sudoku', 'diffusion')):
        model, params, tokenizer = load_model(name)
        model, params = for_inference(model, params)
        config = SamplingConfig.for_tokenizer(
            tokenizer,
            max_new_tokens=96,
            max_denoising_steps=64,
            entropy_bound=0.01,
            temperature=0.0,
        )
        texts, _ = generate_text(
            Sampler(model, config, mode),
            params,
            tokenizer,
            [puzzle['prompt'] for puzzle in puzzles],
            rng=jax.random.key(0),
        )
        right = map(sudoku.check, (puzzle['prompt'] for puzzle in puzzles), texts)
        solved[mode] = sum(right)
    assert solved['diffusion'] > 4 > solved['autoregressive'], solved
