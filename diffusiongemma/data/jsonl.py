"""Examples from a JSONL file: one object with a prompt and a response on each line."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import operator
import zlib
from typing import Any, BinaryIO

import numpy as np
from etils import epath

# What Excel and PowerShell put at the start of UTF-8 text; it is skipped.
_BYTE_ORDER_MARK = b'\xef\xbb\xbf'
_GZIP, _UTF16 = b'\x1f\x8b', (b'\xff\xfe', b'\xfe\xff')  # first bytes of such files
# First bytes of what is often taken for JSONL, and what to do about it.
_FOREIGN = (
    (b'BZh', 'is compressed (bzip2); unpack it with bunzip2'),
    (b'\xfd7zXZ', 'is compressed (xz); unpack it with unxz'),
    (b'\x28\xb5\x2f\xfd', 'is compressed (zstd); unpack it with unzstd'),
    (b'PK\x03\x04', 'is a ZIP archive; unpack it'),
    (b'PAR1', 'is a Parquet file; write its rows as JSON lines'),
)


def parse_row(line: bytes, where: str, prompt_feature: str, response_feature: str) -> dict:
    """One line as an example; keys other than the two features are kept as they are.

    Args:
      line: a line of the file.
      where: file and line number, for error messages.
      prompt_feature: key of the prompt; the example has it as 'prompt'.
      response_feature: key of the response; the example has it as 'response'.

    Raises:
      ValueError: on anything but a JSON object whose two features are text.
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
            raise ValueError(f'{where}: "{name}" is no valid Unicode text: {error}') from error
    prompt, response = row[prompt_feature], row[response_feature]
    rest = {k: v for k, v in row.items() if k not in (prompt_feature, response_feature)}
    return {**rest, 'prompt': prompt, 'response': response}


class JsonlSource:
    """Random access to the rows of a JSONL file.

    Every row is checked once, at construction. Only the place of each row is held in memory, and
    the whole text where the file is compressed (gzip) or UTF-16 with a byte order mark; other text
    is UTF-8. Blank lines and byte order marks are skipped.

    Attributes:
      fingerprint: hash of the content; a file that was only moved keeps it.
    """

    def __init__(
        self,
        path: epath.PathLike,
        prompt_feature: str = 'prompt',
        response_feature: str = 'response',
    ) -> None:
        """Reads the file once.

        Raises:
          FileNotFoundError: when there is no such file.
          ValueError: on the first bad row, with its line number, when there is no row, or when
            the file is damaged, compressed by another program or in another encoding.
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
        spans, numbers, offset = [], [], 0  # (start, length) and line number of each row
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
            raise ValueError(f'{self._file}: empty dataset, the file has no rows.')
        self._spans = np.array(spans, np.int64)
        self._numbers = np.array(numbers, np.int64)
        self.fingerprint = f'jsonl {digest.hexdigest()[:16]}'

    def _unpacked(self) -> bytes | None:
        """Returns the text in UTF-8 where the file holds it in another form, else None.

        Raises:
          ValueError: the file is damaged, or in a form that is not read; with what to do.
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
                    f'{self._file} begins as UTF-16 text and is none ({error}); save it as UTF-8.'
                ) from error
        return text

    def _open(self) -> BinaryIO:
        if self._text is not None:
            return io.BytesIO(self._text)
        return self._file.open('rb')

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f'index {index} is out of range for {self!r}.')
        start, length = self._spans[index].tolist()
        with self._open() as file:  # opened anew: safe in threads, and picklable
            file.seek(start)
            line = file.read(length)
        where = f'{self._file}, line {self._numbers[index]}'
        return parse_row(line, where, *self._features)

    def __repr__(self) -> str:  # grain identifies a source by its repr
        return f'JsonlSource({str(self._file)!r}, rows={len(self)})'
