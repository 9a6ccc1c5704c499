"""Lazy reading of safetensors: one file, or shards with an index."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

SINGLE_FILE = 'model.safetensors'
INDEX_FILE = 'model.safetensors.index.json'


class TensorReader:
    """The tensors of a checkpoint directory by name, read one at a time.

    Only headers are read on construction.

    Attributes:
      shapes: shape of every tensor.

    Raises:
      FileNotFoundError: neither a single file nor an index, or a shard is missing.
      ValueError: a file is damaged, or the index does not fit the shards.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        if (directory / SINGLE_FILE).exists():
            with self._open(SINGLE_FILE) as file:
                self._file_of = dict.fromkeys(file.keys(), SINGLE_FILE)
        elif (directory / INDEX_FILE).exists():
            self._file_of = self._read_index(directory / INDEX_FILE)
        else:
            raise FileNotFoundError(
                f'{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}; it is no checkpoint '
                'in the published format.'
            )
        self.shapes: Mapping[str, tuple[int, ...]] = self._read_shapes()

    def read(self, name: str) -> np.ndarray:
        """One tensor in its stored dtype."""
        with self._open(self._file_of[name]) as file:
            return file.get_tensor(name)

    def _open(self, file_name: str) -> safe_open:
        path = self.directory / file_name
        if not path.exists():
            raise FileNotFoundError(
                f'{path} is missing, but {INDEX_FILE} names it; copy that shard too.'
            )
        try:
            return safe_open(path, framework='numpy')
        except SafetensorError as error:
            raise ValueError(f'{path} is damaged or truncated ({error}); copy it again.') from error

    def _read_index(self, path: Path) -> dict[str, str]:
        try:
            file_of = dict(json.loads(path.read_text(encoding='utf-8'))['weight_map'])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f'{path} is no index with a "weight_map" ({error!r}).') from error
        for name, where in file_of.items():
            if not isinstance(where, str) or Path(where).name != where:
                raise ValueError(f'{path} places {name} in {where!r}, which is no file beside it.')
        return file_of

    def _read_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for file_name in sorted(set(self._file_of.values())):
            expected = {name for name, where in self._file_of.items() if where == file_name}
            with self._open(file_name) as file:
                absent = sorted(expected - set(file.keys()))
                if absent:
                    raise ValueError(
                        f'{INDEX_FILE} places {absent[0]} in {file_name}, which does not hold it.'
                    )
                for name in expected:
                    shapes[name] = tuple(file.get_slice(name).get_shape())
        return shapes
