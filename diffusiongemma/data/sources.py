"""Sources of examples: built-in tasks, Python source, HumanEval, JSONL files, TFDS datasets.

    >>> source = load_source(DataSpec(kind='wordmath', split='test', size=100))
    >>> sorted(source[0])
    ['answer', 'prompt', 'response', 'task', 'template']

A source has a length and random access; an example is {'prompt': str, 'response': str, ...}.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from diffusiongemma.data import jsonl
from diffusiongemma.data.indexing import from_start
from diffusiongemma.data.tasks import human_eval, python_source, sudoku, wordmath
from diffusiongemma.errors import nearest

DEFAULT_TASK_SIZE = 1_000_000
MAX_SEED = 2**32 - 1  # the largest seed that grain's shuffle takes
# The fields that each kind reads in addition to kind, size and weight.
_FIELDS_OF_KIND: Mapping[str, tuple[str, ...]] = {
    'wordmath': ('split', 'seed'),
    'sudoku': ('split', 'seed', 'box', 'min_clues', 'max_clues'),
    'python_source': ('split',),
    'human_eval': (),
    'jsonl': ('path', 'prompt_feature', 'response_feature'),
    'tfds': ('name', 'path', 'split', 'prompt_feature', 'response_feature'),
}
_NEEDED: Mapping[str, tuple[str, ...]] = {
    'jsonl': ('path',),
    'tfds': ('name',),
}


class Source(Protocol):
    """A collection of examples with random access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """A description of a source.

    Attributes:
      kind: 'wordmath' or 'sudoku' (built-in tasks), 'python_source' (the files of the standard
        library), 'human_eval' (the package human-eval), 'jsonl' or 'tfds'.
      name: the TFDS dataset, optionally with its config and version: 'name/config:1.0.0'.
      path: the file (jsonl) or the data directory (tfds; by default that of TFDS).
      split: 'train' or 'test' for a task or python_source; any split of a TFDS dataset, including
        slices.
      size: the number of examples. A task generates that many (by default 1,000,000); other kinds
        use the first ones (by default all).
      seed: the seed of a task's stream of examples.
      prompt_feature, response_feature: names of the text fields in JSONL rows and TFDS datasets.
      box, min_clues, max_clues: box size and range of the number of clues for sudoku, see
        `Sudoku`.
      weight: the share in a mixture, relative to the weights of the other sources.
    """

    kind: str
    name: str = ''
    path: str = ''
    split: str = 'train'
    size: int | None = None
    seed: int = 0
    prompt_feature: str = 'prompt'
    response_feature: str = 'response'
    box: int = 3
    min_clues: int | None = None
    max_clues: int | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in _FIELDS_OF_KIND:
            hint = nearest(str(self.kind), _FIELDS_OF_KIND)
            raise ValueError(f'Unknown kind of data {self.kind!r}; {hint}')
        for name in _NEEDED.get(self.kind, ()):
            if not getattr(self, name):
                raise ValueError(f'Data of kind {self.kind!r} needs {name!r}.')
        stray = [n for n in self._changed() if n not in _FIELDS_OF_KIND[self.kind]]
        if stray:
            raise ValueError(
                f'Data of kind {self.kind!r} has no use for {stray}; it reads '
                f'{sorted((*_FIELDS_OF_KIND[self.kind], "size", "weight"))}.'
            )
        if self.size is not None and (not isinstance(self.size, int) or self.size < 1):
            raise ValueError(f'size must be an integer >= 1, got {self.size!r}.')
        if not isinstance(self.weight, (int, float)) or not self.weight > 0:
            raise ValueError(f'weight must be a number > 0, got {self.weight!r}.')

    def _changed(self) -> dict[str, Any]:
        """Returns the fields that differ from their defaults, without kind, size and weight."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ('kind', 'size', 'weight')
            and getattr(self, field.name) != field.default
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DataSpec:
        """Returns a spec from a dict or an ml_collections ConfigDict.

        Raises:
          ValueError: on an unknown key (with the nearest known one) or an invalid value.
        """
        values = dict(config)
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise ValueError(f'Unknown key {name!r} in a data spec; {nearest(name, names)}')
        if 'kind' not in values:
            raise ValueError(f"A data spec needs 'kind', one of {sorted(_FIELDS_OF_KIND)}.")
        return cls(**values)

    def describe(self) -> str:
        """Returns a short name for logs and error messages, such as 'wordmath:train'."""
        fields = self._changed()
        head = [self.kind] + [str(fields.pop(name)) for name in ('name', 'path') if name in fields]
        if 'split' in _FIELDS_OF_KIND[self.kind]:
            head.append(self.split)
            fields.pop('split', None)
        return ' '.join([':'.join(head), *(f'{name}={value}' for name, value in fields.items())])


class _First:
    """A source that consists of the first `size` examples of another source."""

    def __init__(self, source: Source, size: int) -> None:
        self._source = source
        self._size = size
        self.fingerprint = getattr(source, 'fingerprint', type(source).__name__)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = from_start(index, self)
        return self._source[index]

    def __repr__(self) -> str:
        return f'{self._source!r}[:{self._size}]'


def split_source(data: DataSpec | Source, count: int) -> tuple[Source, list[dict[str, Any]]]:
    """Splits a source into a source without its last examples and a list of those examples.

    Args:
      data: a spec or a source.
      count: the number of held-out examples, at most a tenth of all examples.

    Raises:
      ValueError: if there are too few examples to hold one out.
    """
    source = load_source(data) if isinstance(data, DataSpec) else data
    count = min(count, len(source) // 10)
    if not count:
        raise ValueError(
            f'{len(source)} examples are too few to hold a tenth out; give at least 10.'
        )
    first_held_out = len(source) - count
    return _First(source, first_held_out), [
        source[index] for index in range(first_held_out, len(source))
    ]


def load_source(spec: DataSpec) -> Source:
    """Opens the source that a spec describes.

    Raises:
      FileNotFoundError: if the file or directory does not exist, or the package with the data is
        not installed.
      ValueError: on invalid rows, an empty dataset, or an unknown split, dataset or feature.
    """
    task_size = spec.size or DEFAULT_TASK_SIZE
    if spec.kind == 'wordmath':
        return wordmath.Wordmath(spec.split, task_size, spec.seed)
    if spec.kind == 'sudoku':
        return sudoku.Sudoku(
            spec.split, task_size, spec.seed, spec.box, spec.min_clues, spec.max_clues
        )
    source: Source
    if spec.kind == 'python_source':
        source = python_source.PythonSource(spec.split)
    elif spec.kind == 'human_eval':
        source = human_eval.HumanEval()
    elif spec.kind == 'jsonl':
        source = jsonl.JsonlSource(spec.path, spec.prompt_feature, spec.response_feature)
    else:
        # TFDS takes long to import, and most runs do not need it.
        from diffusiongemma.data.tfds_source import TfdsSource

        source = TfdsSource(
            spec.name, spec.split, spec.path, spec.prompt_feature, spec.response_feature
        )
    return source if spec.size is None or spec.size >= len(source) else _First(source, spec.size)
