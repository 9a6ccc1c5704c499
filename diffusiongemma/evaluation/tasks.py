"""Checks whether answers are right, with the checker of an example's `task`."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffusiongemma.data.tasks import sudoku, wordmath


def is_correct(example: Mapping[str, Any], response: str) -> bool:
    """Returns whether `response` solves the example.

    Word problems are checked by their final answer, sudokus as grids; an example of any other
    task must be matched exactly.
    """
    task = example.get('task')
    if task == 'wordmath':
        return wordmath.check(response, example['answer'])
    if task == 'sudoku':
        return sudoku.check(example['prompt'], response)
    expected: str = example['response']
    return response.strip() == expected.strip()


def accuracy(examples: Sequence[Mapping[str, Any]], responses: Sequence[str]) -> float:
    """Returns the share of examples that their responses solve."""
    pairs = zip(examples, responses, strict=True)
    return sum(is_correct(example, response) for example, response in pairs) / len(examples)
