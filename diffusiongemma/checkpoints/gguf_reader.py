"""Reads GGUF files, the format of llama.cpp: first the whole header, then tensors one at a time.

The package `gguf` documents the layout and provides block sizes and dequantization. Only the
header is parsed here, because the reader of that package keeps one array per vocabulary entry: it
takes 15 s for the 262,144 tokens of Gemma, instead of 0.3 s.
"""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

VERSIONS = (2, 3)
_MAGIC = b'GGUF'
_STRING, _ARRAY = 8, 9
# The format character of `struct` for each scalar type number of the header.
_SCALARS = {
    0: 'B', 1: 'b', 2: 'H', 3: 'h', 4: 'I', 5: 'i', 6: 'f', 7: '?', 10: 'Q', 11: 'q', 12: 'd',
}  # fmt: skip
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS of llama.cpp
INSTALL = 'pip install gguf'


class GgufTensor(NamedTuple):
    """The position and the type of a tensor in the file.

    Attributes:
      shape: the shape in the order of numpy: the last axis is contiguous (the file lists it first).
      type_number: the number of its ggml type, such as 12 for Q4_K.
      offset: the first byte, from the start of the file.
      num_bytes: the stored size in bytes.
    """

    shape: tuple[int, ...]
    type_number: int
    offset: int
    num_bytes: int


class GgufFile:
    """A GGUF file with its metadata and tensors.

    Attributes:
      path: the path of the file.
      metadata: the value of every key: a number, a bool, a str or a list of them. A float32 value
        is converted to its shortest decimal (1e-06, not 9.99e-07).
      tensors: the position and type of every tensor by name.
    """

    def __init__(self, path: Path) -> None:
        """Reads and checks the header.

        Raises:
          FileNotFoundError: if the file or the package `gguf` is missing.
          ValueError: if it is not a GGUF file, is truncated or damaged, is one of several parts,
            or contains a tensor of a type that cannot be dequantized.
        """
        self._gguf = _import_gguf(path)
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f'no file at {path}.')
        self._bytes = np.memmap(path, mode='r') if path.stat().st_size else np.empty(0, np.uint8)
        cursor = _Cursor(self._bytes, path)
        if cursor.take(4) != _MAGIC:
            raise ValueError(f'{path} is not a GGUF file: it does not start with "GGUF".')
        version = cursor.number('I')
        if version not in VERSIONS:
            raise ValueError(
                f'{path} has version {version} of GGUF; the versions {VERSIONS} in little-endian '
                'byte order can be read.'
            )
        num_tensors, num_keys = cursor.number('Q'), cursor.number('Q')
        self.metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.number('I'))
        parts = self.metadata.get('split.count', 0)
        if parts > 1:
            raise ValueError(
                f'{path} is one of {parts} parts; merge them with `llama-gguf-split --merge`.'
            )
        headers = [cursor.tensor() for _ in range(num_tensors)]
        alignment = self.metadata.get('general.alignment', self._gguf.GGUF_DEFAULT_ALIGNMENT)
        start = -(-cursor.offset // alignment) * alignment
        self.tensors = {
            name: self._tensor(name, shape, number, start + offset)
            for name, shape, number, offset in headers
        }
        self._check_types()

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor, dequantized to float32."""
        tensor = self.tensors[name]
        stored = self._bytes[tensor.offset : tensor.offset + tensor.num_bytes]
        qtype = self._gguf.GGMLQuantizationType(tensor.type_number)
        rows = stored.reshape(*tensor.shape[:-1], -1)  # the blocks of a row are contiguous
        if qtype in (self._gguf.GGMLQuantizationType.F32, self._gguf.GGMLQuantizationType.F16):
            values = stored.view(np.float32 if qtype.name == 'F32' else np.float16)
            return np.asarray(values.reshape(tensor.shape), np.float32)
        numbers: np.ndarray = self._gguf.dequantize(rows, qtype)
        return numbers.reshape(tensor.shape)

    def type_name(self, name: str) -> str:
        """Returns the name of the type in which a tensor is stored, such as 'Q4_K'."""
        number = self.tensors[name].type_number
        try:
            type_name: str = self._gguf.GGMLQuantizationType(number).name
        except ValueError:
            return f'type {number}'
        return type_name

    def _tensor(self, name: str, shape: tuple[int, ...], number: int, offset: int) -> GgufTensor:
        sizes = self._gguf.GGML_QUANT_SIZES.get(number)
        if sizes is None:
            raise ValueError(f'{self.path}: {name} is stored as type {number}, which is unknown.')
        block, block_bytes = sizes
        if shape and shape[-1] % block:
            raise ValueError(
                f'{self.path}: the last axis of {name}, {shape}, is not a multiple of the '
                f'{block} values in a block of its type.'
            )
        num_bytes = int(np.prod(shape, dtype=np.int64)) // block * block_bytes
        if offset + num_bytes > self._bytes.size:
            raise ValueError(
                f'{self.path} is truncated: {name} ends at byte {offset + num_bytes:,}, the file '
                f'has {self._bytes.size:,}; copy it again.'
            )
        return GgufTensor(shape, number, offset, num_bytes)

    def _check_types(self) -> None:
        first_of = {tensor.type_number: name for name, tensor in self.tensors.items()}
        for number, name in first_of.items():
            qtype = self._gguf.GGMLQuantizationType(number)
            if qtype.name in ('F32', 'F16'):
                continue
            block = np.zeros((1, self._gguf.GGML_QUANT_SIZES[qtype][1]), np.uint8)
            try:
                self._gguf.dequantize(block, qtype)
            except NotImplementedError as error:
                raise ValueError(
                    f'{self.path}: {name} is stored as {qtype.name}, which the package gguf '
                    f'{_version()} cannot dequantize; use a file of another quantization.'
                ) from error


class _Cursor:
    """A position in the header that advances with every read."""

    def __init__(self, data: np.ndarray, path: Path) -> None:
        self.offset = 0
        self._data = data.data
        self._path = path

    def take(self, size: int) -> bytes:
        end = self.offset + size
        if end > len(self._data):
            raise ValueError(
                f'{self._path} is truncated: its header goes on after byte '
                f'{len(self._data):,}; copy it again.'
            )
        start, self.offset = self.offset, end
        return bytes(self._data[start:end])

    def number(self, letter: str) -> Any:
        return self.numbers(letter, 1)[0]

    def numbers(self, letter: str, count: int) -> list[Any]:
        form = np.dtype(letter).newbyteorder('<')
        values = np.frombuffer(self.take(count * form.itemsize), form)
        # The shortest decimal of the float32 value, so 1e-6 stays 1e-6.
        return [float(str(v)) for v in values] if letter == 'f' else values.tolist()

    def string(self) -> str:
        try:
            return self.take(self.number('Q')).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f'{self._path} is damaged: {error} in its header.') from error

    def strings(self, count: int) -> list[str]:
        """Returns many strings, faster than `string`: vocabularies have 262,144 of them."""
        data, offset, size = self._data, self.offset, len(self._data)
        length_at: Callable[..., tuple[int]] = struct.Struct('<Q').unpack_from
        texts = []
        for _ in range(count):
            end = offset + 8
            if end <= size:
                end += length_at(data, offset)[0]
            if end > size:
                self.take(end - self.offset)  # raises the error for a truncated file
            texts.append(bytes(data[offset + 8 : end]))
            offset = end
        self.offset = offset
        try:
            return [text.decode() for text in texts]
        except UnicodeDecodeError as error:
            raise ValueError(f'{self._path} is damaged: {error} in its header.') from error

    def value(self, number: int) -> Any:
        if number == _STRING:
            return self.string()
        if number == _ARRAY:
            item, count = self.number('I'), self.number('Q')
            if item == _STRING:
                return self.strings(count)
            if item in _SCALARS:
                return self.numbers(_SCALARS[item], count)
            number = item
        elif number in _SCALARS:
            return self.number(_SCALARS[number])
        raise ValueError(f'{self._path} is damaged: it has a value of the unknown type {number}.')

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Returns name, shape in the order of numpy, type number, and offset into the data."""
        name, rank = self.string(), self.number('I')
        if rank > _MAX_DIMENSIONS:
            raise ValueError(f'{self._path} is damaged: {name} has {rank} axes.')
        shape = tuple(reversed(self.numbers('Q', rank)))
        return name, shape, self.number('I'), self.number('Q')


def _import_gguf(path: Path) -> Any:
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise FileNotFoundError(f'{path} needs the package gguf: {INSTALL}.') from error
    return gguf


def _version() -> str:
    from importlib.metadata import version

    return version('gguf')
