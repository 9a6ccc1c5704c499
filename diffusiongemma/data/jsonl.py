"""Reads examples from a JSONL file: one object with a prompt and a response on each line."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from diffusiongemma.data.indexing import from_start

# Excel and PowerShell write this mark at the start of UTF-8 text; it is skipped.
_BYTE_ORDER_MARK = b'\xef\xbb\xbf'
_GZIP, _UTF16 = b'\x1f\x8b', (b'\xff\xfe', b'\xfe\xff')  # the first bytes of such files
# The first bytes of other formats that are often passed as JSONL, and the remedy for each.
_FOREIGN = (
    (b'BZh', 'is compressed (bzip2); unpack it with bunzip2'),
    (b'\xfd7zXZ', 'is compressed (xz); unpack it with unxz'),
    (b'\x28\xb5\x2f\xfd', 'is compressed (zstd); unpack it with unzstd'),
    (b'PK\x03\x04', 'is a ZIP archive; unpack it'),
    (b'PAR1', 'is a Parquet file; write its rows as JSON lines'),
)


def parse_row(
    line: bytes, where: str, prompt_feature: str, response_feature: str
) -> dict[str, Any]:
    """Returns the example on one line; keys other than the two features are kept unchanged.

    Args:
      line: a line of the file.
      where: file and line number, for error messages.
      prompt_feature: key of the prompt; the example has it as 'prompt'.
      response_feature: key of the response; the example has it as 'response'.

    Raises:
      ValueError: if the line is not a JSON object whose two features are text.
    """
    try:
        row = json.loads(line.removeprefix(_BYTE_ORDER_MARK).decode('utf-8'))
    except UnicodeDecodeError as error:
        raise ValueError(f'{where}: the text is not UTF-8; save the file as UTF-8.') from error
    except (ValueError, RecursionError) as error:
        hint = ' The text may be UTF-16; save the file as UTF-8.' if b'\0' in line else ''
        raise ValueError(f'{where}: invalid JSON: {error}.{hint} Correct the line.') from error
    if not isinstance(row, dict):
        raise ValueError(
            f'{where}: expected an object like {{"{prompt_feature}": "...", '
            f'"{response_feature}": "..."}}, got {type(row).__name__}.'
        )
    for name in (prompt_feature, response_feature):
        if name not in row:
            raise ValueError(f'{where}: missing "{name}"; the keys there are {sorted(row)}.')
        if not isinstance(row[name], str):
            raise ValueError(
                f'{where}: "{name}" must be a string, got {type(row[name]).__name__}: '
                f'{json.dumps(row[name])[:80]}.'
            )
        try:
            row[name].encode('utf-8')
        except UnicodeEncodeError as error:
            raise ValueError(f'{where}: "{name}" is not valid Unicode text: {error}') from error
    prompt, response = row[prompt_feature], row[response_feature]
    others = {k: v for k, v in row.items() if k not in (prompt_feature, response_feature)}
    return {**others, 'prompt': prompt, 'response': response}


class JsonlSource:
    """A source with random access to the rows of a JSONL file.

    The file must be UTF-8, UTF-16 with a byte order mark, or either of them compressed with gzip.
    Every row is checked once, at construction. Only the position of each row is kept in memory,
    except for compressed and UTF-16 files, whose whole text is kept. Blank lines and byte order
    marks are skipped.

    Attributes:
      fingerprint: a hash of the content, which does not depend on the path.
    """

    def __init__(
        self,
        path: epath.PathLike,
        prompt_feature: str = 'prompt',
        response_feature: str = 'response',
    ) -> None:
        """Reads and checks the whole file once.

        Raises:
          FileNotFoundError: if the file does not exist.
          ValueError: on the first bad row, with its line number; if there are no rows; or if the
            file is damaged, compressed by another program or in another encoding.
        """
        self._file = epath.Path(path)
        self._features = prompt_feature, response_feature
        if not self._file.is_file():
            raise FileNotFoundError(
                f'No file at {self._file}. Give the path of a JSONL file with one '
                f'{{"{prompt_feature}": ..., "{response_feature}": ...}} a line.'
            )
        self._text = self._unpacked()
        digest = hashlib.sha256()
        spans, numbers, offset = [], [], 0  # (start, length) in bytes, line number of each row
        with self._open() as lines:
            for number, line in enumerate(lines, start=1):
                content = line.removeprefix(_BYTE_ORDER_MARK).strip()
                if content:
                    parse_row(line, f'{self._file}, line {number}', *self._features)
                    spans.append((offset, len(line)))
                    numbers.append(number)
                    digest.update(content + b'\n')
                offset += len(line)
        if not spans:
            raise ValueError(
                f'{self._file}: empty dataset, the file has no rows; give one example per line.'
            )
        self._spans = np.array(spans, np.int64)
        self._numbers = np.array(numbers, np.int64)
        self.fingerprint = f'jsonl {digest.hexdigest()[:16]}'

    def _unpacked(self) -> bytes | None:
        """Returns the text in UTF-8 if the file stores it in another form, else None.

        Raises:
          ValueError: if the file is damaged or in an unsupported format; it names a remedy.
        """
        with self._file.open('rb') as file:
            start = file.read(8)
        for first, remedy in _FOREIGN:
            if start.startswith(first):
                raise ValueError(f'{self._file} {remedy}.')
        text = None
        if start.startswith(_GZIP):
            try:
                text = gzip.decompress(self._file.read_bytes())
            except (OSError, EOFError, zlib.error) as error:
                raise ValueError(
                    f'{self._file} is a damaged gzip file ({error}); copy it again.'
                ) from error
            start = text[:8]
        if start.startswith(_UTF16):
            text = self._file.read_bytes() if text is None else text
            try:
                text = text.decode('utf-16').encode('utf-8')
            except UnicodeError as error:
                raise ValueError(
                    f'{self._file} begins as UTF-16 text but is not valid UTF-16 ({error}); '
                    'save it as UTF-8.'
                ) from error
        return text

    def _open(self) -> BinaryIO:
        if self._text is not None:
            return io.BytesIO(self._text)
        file: BinaryIO = self._file.open('rb')
        return file

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = from_start(index, self)
        start, length = self._spans[index].tolist()
        with self._open() as file:  # reopened each time, which is thread-safe and picklable
            file.seek(start)
            line = file.read(length)
        where = f'{self._file}, line {self._numbers[index]}'
        return parse_row(line, where, *self._features)

    def __repr__(self) -> str:  # grain identifies a source by its repr
        return f'JsonlSource({str(self._file)!r}, rows={len(self)})'
