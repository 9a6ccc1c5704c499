"""Generates grade-school word problems with a worked solution and a checkable answer.

    >>> from diffusiongemma.data.tasks import wordmath
    >>> example = wordmath.generate(0, 'train')
    >>> wordmath.check(example['response'], example['answer'])
    True

An example is a pure function of (seed, split, index). The split is a property of the problem:
a hash of (template, drawn numbers) assigns one combination in eight to the test split. So no
combination is in both splits, even with other names and another wording.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping

import numpy as np

from diffusiongemma.data.indexing import from_start
from diffusiongemma.data.tasks.wordmath_long import FOUR_STEPS, THREE_STEPS
from diffusiongemma.data.tasks.wordmath_short import ONE_STEP, TWO_STEPS
from diffusiongemma.data.tasks.wordmath_templates import MAX_DRAWS, Template

TEMPLATES: tuple[Template, ...] = ONE_STEP + TWO_STEPS + THREE_STEPS + FOUR_STEPS
SPLITS = ('train', 'test')
TEST_ONE_IN = 8  # each template has at least 200 combinations, so about 25 or more are in test
MAX_DIGITS = 9  # longer numbers in a response are not evaluated

_ANSWER = re.compile(r'The answer is (-?\d[\d.,]*)')
_STATEMENT = re.compile(r'-?\d+(?: [-+*/=] -?\d+)+')


def combination_split(template: str, numbers: Mapping[str, int]) -> str:
    """Returns the split of a template's drawn numbers, stable across versions and hosts."""
    text = template + ''.join(f',{name}={value}' for name, value in sorted(numbers.items()))
    return 'test' if zlib.crc32(text.encode()) % TEST_ONE_IN == 0 else 'train'


def generate(index: int, split: str, seed: int = 0) -> dict[str, str]:
    """Returns one example.

    Args:
      index: the index of the example, any non-negative integer.
      split: 'train' or 'test'.
      seed: a non-negative seed; other seeds give other streams over the same problems per split.

    Returns:
      {'prompt', 'response', 'answer', 'task', 'template'}, all str.

    Raises:
      ValueError: on an unknown split or a negative index or seed.
    """
    if split not in SPLITS:
        raise ValueError(f'split must be one of {SPLITS}, got {split!r}.')
    if index < 0 or seed < 0:
        raise ValueError(f'index and seed must be >= 0, got index={index}, seed={seed}.')
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    template = TEMPLATES[int(rng.random() * len(TEMPLATES))]
    for _ in range(MAX_DRAWS):
        numbers = template.draw(rng)
        if numbers is not None and combination_split(template.name, numbers) == split:
            example = template.render(numbers, rng)
            return {**example, 'task': 'wordmath', 'template': template.name}
    raise ValueError(
        f'Template {template.name!r} yielded no {split} problem in {MAX_DRAWS} draws; '
        'widen its number ranges.'
    )


class Wordmath:
    """A source with random access to `size` examples of one split."""

    def __init__(self, split: str, size: int, seed: int = 0) -> None:
        """Raises ValueError on an unknown split or a size below 1."""
        if split not in SPLITS:
            raise ValueError(f'split must be one of {SPLITS}, got {split!r}.')
        if size < 1:
            raise ValueError(f'size must be >= 1, got {size}.')
        self._split = split
        self._size = size
        self._seed = seed

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, str]:
        index = from_start(index, self)
        return generate(index, self._split, self._seed)

    def __repr__(self) -> str:  # grain identifies a source by its repr
        return f'Wordmath(split={self._split!r}, size={self._size}, seed={self._seed})'


def check(response: str, answer: str) -> bool:
    """Returns whether the last 'The answer is N' of a response states `answer`."""
    answers = _ANSWER.findall(response)
    return bool(answers) and answers[-1].rstrip('.,') == answer


def _evaluate(expression: str) -> int | None:
    """Returns the integer value of `a op b op ...` with the usual precedence.

    It is None if the value is not an integer or a number has more than MAX_DIGITS characters.
    """
    if any(len(text) > MAX_DIGITS for text in expression.split()):
        return None
    first, *others = expression.split()
    terms = [int(first)]
    for op, text in zip(others[::2], others[1::2], strict=True):
        value = int(text)
        if op == '*':
            terms[-1] *= value
        elif op == '/':
            if value == 0 or terms[-1] % value:
                return None
            terms[-1] //= value
        else:
            terms.append(value if op == '+' else -value)
    return sum(terms)


def verify_steps(response: str) -> bool:
    """Returns whether a response has equations (`a + b = c`, or chains) and all of them hold."""
    statements = [s for s in _STATEMENT.findall(response) if ' = ' in s]
    for statement in statements:
        values = [_evaluate(side) for side in statement.split(' = ')]
        if None in values or len(set(values)) != 1:
            return False
    return bool(statements)
