"""The template language of the word problems: lexicon, number drawing and rendering.

A template declares the numbers that it draws, the wordings of its prompt and one worked response.
The equations of the response are executable: ``[c = a + b]`` computes ``c`` *and* prints
``3 + 4 = 7``, so the text and the numbers always agree. The result of the last equation is the
answer.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping

import numpy as np

MAX_NUMBER = 200  # the largest number in any text
MAX_SMALL_FACTOR = 9  # one factor of a product, and every divisor
MAX_LARGE_FACTOR = 20  # the other factor, and every quotient
MIN_RESULT = 2  # because every result is printed before a plural noun
MAX_DRAWS = 10_000  # a valid template needs only a few draws; an impossible one becomes an error

_EQUATION = re.compile(r'\[(\w+) = (\w+) ([-+*/]) (\w+)\]')
_FIELD = re.compile(r'\{(\w+)')


@dataclasses.dataclass(frozen=True)
class Person:
    """A first name with the pronouns that agree with it."""

    name: str
    he: str
    his: str
    him: str

    @property
    def He(self) -> str:  # noqa: N802 - in a template, `{A.He}` looks like the word that it prints
        return self.he.capitalize()

    @property
    def His(self) -> str:  # noqa: N802
        return self.his.capitalize()

    def __str__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class Noun:
    """A countable noun that prints as its plural; `.one` is the singular."""

    one: str
    many: str

    def __str__(self) -> str:
        return self.many


Word = Person | Noun | str


def _nouns(words: str) -> tuple[Noun, ...]:
    """Returns nouns with a regular plural, from singulars separated by spaces."""
    endings = ('x', 's', 'ch', 'sh')
    return tuple(Noun(w, w + ('es' if w.endswith(endings) else 's')) for w in words.split())


def _people(names: str, he: str, his: str, him: str) -> tuple[Person, ...]:
    return tuple(Person(name, he, his, him) for name in names.split())


def _words(words: str) -> tuple[str, ...]:
    return tuple(words.split())


PEOPLE = (
    *_people('Mia Anna Lily Emma Zoe Nina Sara Ruby Maya Clara Lucy Alice', 'she', 'her', 'her'),
    *_people('Tom Ben Sam Leo Max Omar Jack Noah Hugo Ivan Adam Paul', 'he', 'his', 'him'),
)
# Fields of a template are looked up here without their trailing digits: {item}, {item2}, ...
LEXICON: Mapping[str, tuple[Word, ...]] = {
    'A': PEOPLE,
    'B': PEOPLE,
    'C': PEOPLE,
    'item': _nouns('sticker marble card coin shell stamp pencil crayon button bead balloon badge'),
    'fruit': _nouns('apple orange pear lemon plum peach'),
    'bake': _nouns('cookie muffin roll cupcake bun'),
    'plant': _nouns('rose tulip tree bush'),
    'animal': _nouns('hen cow goat duck horse pig rabbit'),
    'box': _nouns('box bag basket jar crate'),
    'shop': _words('market store shop fair'),
    'place': _words('park school library farm beach garden zoo museum station gym pool office'),
    'color': _words('red blue green yellow white black'),
    'day': _words('Monday Tuesday Wednesday Thursday Friday'),
}


def apply(x: int, op: str, y: int) -> int | None:
    """Returns the result of one equation, or None if it violates the limits of this module."""
    if op == '+':
        result = x + y
    elif op == '-':
        result = x - y
    elif op == '*':
        if min(x, y) > MAX_SMALL_FACTOR or max(x, y) > MAX_LARGE_FACTOR:
            return None
        result = x * y
    else:
        if not 2 <= y <= MAX_SMALL_FACTOR or x % y or x // y > MAX_LARGE_FACTOR:
            return None
        result = x // y
    return result if MIN_RESULT <= result <= MAX_NUMBER else None


@dataclasses.dataclass(frozen=True)
class Template:
    """A template for one kind of problem.

    Attributes:
      name: a unique name, which is part of the hash that determines the split.
      numbers: the inclusive range of each drawn number, e.g. ``{'a': (2, 9)}``.
      prompts: the wordings of the prompt; fields are numbers or words of `LEXICON`.
      response: the worked solution with its equations in brackets, without the final answer line.
      hidden: equations (``'t = q * k'``) that run before those of the response, for numbers that
        must be consistent; numbers that only they use (here ``q``) need not be printed.
    """

    name: str
    numbers: Mapping[str, tuple[int, int]]
    prompts: tuple[str, ...]
    response: str
    hidden: tuple[str, ...] = ()

    @functools.cached_property
    def steps(self) -> tuple[tuple[str, str, str, str], ...]:
        """Returns the printed equations as (result, left, operator, right)."""
        return tuple(_EQUATION.findall(self.response))

    @functools.cached_property
    def _program(self) -> tuple[tuple[str, str, str, str], ...]:
        return tuple(_EQUATION.findall(f'[{h}]')[0] for h in self.hidden) + self.steps

    @functools.cached_property
    def _ranges(self) -> tuple[tuple[str, int, int], ...]:
        return tuple((name, low, high - low + 1) for name, (low, high) in self.numbers.items())

    @functools.cached_property
    def _response_format(self) -> str:
        def operand(text: str) -> str:
            return text if text.isdigit() else '{' + text + '}'

        def equation(m: re.Match[str]) -> str:
            return f'{operand(m[2])} {m[3]} {operand(m[4])} = {operand(m[1])}'

        answer = '{' + self.steps[-1][0] + '}'
        return f'{_EQUATION.sub(equation, self.response)} The answer is {answer}.'

    @functools.cached_property
    def _choices(self) -> tuple[tuple[str, tuple[Word, ...]], ...]:
        """Returns the (field, pool) pairs of all wordings of this template, in a fixed order."""
        fields = set(_FIELD.findall(' '.join(self.prompts) + self.response))
        pools = ((field, LEXICON.get(field.rstrip('0123456789'))) for field in sorted(fields))
        return tuple((field, pool) for field, pool in pools if pool is not None)

    def draw(self, rng: np.random.Generator) -> dict[str, int] | None:
        """Draws all numbers of the problem once; returns None if they violate the limits."""
        uniform = rng.random(len(self._ranges)).tolist()
        values = {
            name: low + int(u * count)
            for u, (name, low, count) in zip(uniform, self._ranges, strict=True)
        }
        for result, left, op, right in self._program:
            x = int(left) if left.isdigit() else values[left]
            y = int(right) if right.isdigit() else values[right]
            value = apply(x, op, y)
            if value is None:
                return None
            values[result] = value
        return values

    def render(self, values: Mapping[str, int], rng: np.random.Generator) -> dict[str, str]:
        """Returns the problem with words filled in: {'prompt', 'response', 'answer'}."""
        uniform = rng.random(len(self._choices) + 1).tolist()
        fields: dict[str, object] = dict(values)
        used: set[Word] = set()
        for u, (field, pool) in zip(uniform, self._choices, strict=False):
            choice = int(u * len(pool))
            while pool[choice] in used:  # two people or two things in a problem must differ
                choice = (choice + 1) % len(pool)
            used.add(pool[choice])
            fields[field] = pool[choice]
        prompt = self.prompts[int(uniform[-1] * len(self.prompts))]
        return {
            'prompt': prompt.format(**fields),
            'response': self._response_format.format(**fields),
            'answer': str(values[self.steps[-1][0]]),
        }
