"""Reads safetensors lazily, from one file or from several files with an index."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

SINGLE_FILE = 'model.safetensors'
INDEX_FILE = 'model.safetensors.index.json'
_DTYPES = {
    'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16,
    'I64': np.int64, 'I32': np.int32, 'I16': np.int16, 'I8': np.int8, 'U8': np.uint8,
    'BOOL': np.bool_,
}  # fmt: skip
_FLOATING = ('F64', 'F32', 'F16', 'BF16')


class TensorReader:
    """A reader of the tensors in a checkpoint directory, by name and one at a time.

    The tensors are in one file, `single`, or in the files that an index lists. The constructor
    only reads headers.

    Attributes:
      shapes: the shape of every tensor.
      dtypes: the stored dtype of every tensor, as safetensors names it ('F32').

    Raises:
      FileNotFoundError: if there is neither a single file nor an index, or a file is missing.
      ValueError: if a file is damaged, or the index does not match the files.
    """

    def __init__(self, directory: Path, single: str = SINGLE_FILE) -> None:
        self.directory = directory
        if (directory / single).exists():
            with self._open(single) as file:
                self._file_of = dict.fromkeys(file.keys(), single)
        elif (directory / INDEX_FILE).exists():
            self._file_of = self._read_index(directory / INDEX_FILE)
        else:
            raise FileNotFoundError(
                f'{directory} has neither {single} nor {INDEX_FILE}; it is not a checkpoint '
                'in the published format.'
            )
        self.dtypes: dict[str, str] = {}
        self.shapes: Mapping[str, tuple[int, ...]] = self._read_shapes()

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor in its stored dtype."""
        with self._open(self._file_of[name]) as file:
            tensor: np.ndarray = file.get_tensor(name)
            return tensor

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Returns rows [start, stop) of one tensor, clipped to its size; only these are read."""
        with self._open(self._file_of[name]) as file:
            rows: np.ndarray = file.get_slice(name)[start : min(stop, self.shapes[name][0])]
            return rows

    def dtype(self, name: str) -> np.dtype:
        """Returns the stored dtype of one tensor; raises ValueError if it is not supported."""
        stored = self.dtypes[name]
        if stored not in _DTYPES:
            raise ValueError(
                f'{self.directory}: {name} is stored as {stored}, which cannot be read; store it '
                'as BF16, F16 or F32.'
            )
        dtype: np.dtype = np.dtype(_DTYPES[stored])
        return dtype

    def check_weights(self, names: Iterable[str]) -> None:
        """Raises ValueError unless all these tensors have a supported floating-point dtype."""
        for name in names:
            if self.dtypes.get(name, 'F32') not in _FLOATING:
                raise ValueError(
                    f'{self.directory}: the weight {name} is stored as {self.dtypes[name]}; '
                    f'store it as one of {", ".join(_FLOATING)} (dequantize it first).'
                )

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
            raise ValueError(f'{path} is not an index with a "weight_map" ({error!r}).') from error
        for name, where in file_of.items():
            if not isinstance(where, str) or Path(where).name != where:
                raise ValueError(
                    f'{path} places {name} in {where!r}, which is not a file beside it.'
                )
        return file_of

    def _read_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes, unplaced = {}, []
        for file_name in sorted(set(self._file_of.values())):
            expected = {name for name, where in self._file_of.items() if where == file_name}
            with self._open(file_name) as file:
                present = set(file.keys())
                absent = sorted(expected - present)
                if absent:
                    raise ValueError(
                        f'{INDEX_FILE} places {absent[0]} in {file_name}, which does not hold it.'
                    )
                unplaced += [(file_name, name) for name in sorted(present - expected)]
                for name in sorted(expected):
                    tensor = file.get_slice(name)
                    shapes[name] = tuple(tensor.get_shape())
                    self.dtypes[name] = tensor.get_dtype()
        if unplaced:
            file_name, name = unplaced[0]
            raise ValueError(f'{file_name} holds {name}, which {INDEX_FILE} does not place there.')
        return shapes
