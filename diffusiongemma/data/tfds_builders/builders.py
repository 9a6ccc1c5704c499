"""Implements the builders; the docstring of the package shows how to use them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from diffusiongemma.data.tasks.sudoku import Sudoku
from diffusiongemma.data.tasks.wordmath import Wordmath


@dataclasses.dataclass(kw_only=True)
class TaskConfig(tfds.core.BuilderConfig):  # type: ignore[misc]  # tfds has no annotations
    """A TFDS config with the number of examples per split and the seed of a task."""

    train_size: int
    test_size: int
    seed: int = 0


def _configs(**sizes: tuple[int, int]) -> list[TaskConfig]:
    return [
        TaskConfig(
            name=name,
            description=f'{train} training and {test} test examples.',
            train_size=train,
            test_size=test,
        )
        for name, (train, test) in sizes.items()
    ]


class _TaskBuilder(  # type: ignore[call-arg]  # its base has no types
    tfds.core.GeneratorBasedBuilder,  # type: ignore[misc]  # tfds has no annotations
    skip_registration=True,
):
    """A builder that writes the examples of a built-in task to a TFDS data directory."""

    VERSION = tfds.core.Version('1.0.0')
    RELEASE_NOTES = {'1.0.0': 'First release.'}

    def __init__(self, *, file_format: Any = 'array_record', **kwargs: Any) -> None:
        """Takes the arguments of a TFDS builder; the default format allows random access."""
        super().__init__(file_format=file_format, **kwargs)

    def _task(self, split: str, size: int, seed: int) -> Any:
        raise NotImplementedError

    def _features(self) -> dict[str, Any]:
        return {name: tfds.features.Text() for name in ('prompt', 'response', 'answer', 'task')}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            features=tfds.features.FeaturesDict(self._features()),
            supervised_keys=('prompt', 'response'),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        config = self.builder_config
        sizes = {'train': config.train_size, 'test': config.test_size}
        return {
            split: self._generate_examples(self._task(split, size, config.seed))
            for split, size in sizes.items()
        }

    def _generate_examples(self, task: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in range(len(task)):
            yield index, task[index]


class DiffusiongemmaWordmath(_TaskBuilder):
    """Grade-school word problems with a worked solution and a checkable answer."""

    BUILDER_CONFIGS = _configs(default=(100_000, 2_000), small=(2_000, 200))

    def _features(self) -> dict[str, Any]:
        return {**super()._features(), 'template': tfds.features.Text()}

    def _task(self, split: str, size: int, seed: int) -> Wordmath:
        return Wordmath(split, size, seed)


class DiffusiongemmaSudoku(_TaskBuilder):
    """Sudoku puzzles of 9x9 cells with exactly one solution."""

    BUILDER_CONFIGS = _configs(default=(100_000, 2_000), small=(2_000, 200))

    def _features(self) -> dict[str, Any]:
        return {**super()._features(), 'clues': np.int64}

    def _task(self, split: str, size: int, seed: int) -> Sudoku:
        return Sudoku(split, size, seed)


def prepare(name: str, data_dir: epath.PathLike | None = None) -> tfds.core.DatasetBuilder:
    """Writes a dataset of `tfds.builder(name)` as ArrayRecord, unless it is there already.

    Args:
      name: the dataset, optionally with its config, such as 'diffusiongemma_wordmath/small'.
      data_dir: the data directory of TFDS; None for the default of TFDS.

    Returns:
      The TFDS builder.
    """
    builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
    builder.download_and_prepare()
    return builder
