"""A source of real code that every machine has: the standard library of Python.

    >>> from diffusiongemma.data.tasks.python_source import PythonSource
    >>> sorted(PythonSource('test')[0])
    ['path', 'prompt', 'response']

A file is cut at line ends into windows, and each window into a prompt and the response that
follows it. The split is a property of the file: a hash of its path assigns one in eight to the
test split. Windows are ordered by their hashes, so the first n are a sample of all files. Other
versions of Python have other files, which changes the fingerprint.
"""

from __future__ import annotations

import hashlib
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

from diffusiongemma.data.indexing import from_start

SPLITS = ('train', 'test')
TEST_ONE_IN = 8
PROMPT_CHARS = 384  # about 115 tokens of Gemma's vocabulary
RESPONSE_CHARS = 640
# Installed packages are not the standard library, and tests contain code that is wrong on purpose.
_LEFT_OUT = {'site-packages', 'dist-packages', '__pycache__', 'test', 'tests', 'idle_test'}


def file_split(path: str) -> str:
    """Returns the split of a file from its path in the library, written with '/' on all systems."""
    return 'test' if zlib.crc32(path.encode()) % TEST_ONE_IN == 0 else 'train'


def windows(text: str) -> Iterator[tuple[str, str]]:
    """Yields consecutive pairs of prompt and response from the text of a file.

    Each prompt and response ends with the line in which it reaches its length. A prompt without a
    response is left out.
    """
    parts, lengths, index = ['', ''], (PROMPT_CHARS, RESPONSE_CHARS), 0
    for line in text.splitlines(keepends=True):
        parts[index] += line
        if len(parts[index]) >= lengths[index]:
            index += 1
        if index == len(parts):
            yield parts[0], parts[1]
            parts, index = ['', ''], 0
    if parts[1]:
        yield parts[0], parts[1]


class PythonSource:
    """A source with random access to the windows of one split.

    Attributes:
      fingerprint: a hash of the paths and texts of the split and of the window lengths.
    """

    def __init__(self, split: str, directory: Path | None = None) -> None:
        """Reads the files once; the whole library is about 15 MB.

        Args:
          split: 'train' or 'test'.
          directory: the directory of the files, by default the standard library of this Python.

        Raises:
          ValueError: on an unknown split, or if the directory has no file of this split.
        """
        if split not in SPLITS:
            raise ValueError(f'split must be one of {SPLITS}, got {split!r}.')
        root = directory or Path(sysconfig.get_path('stdlib'))
        digest = hashlib.sha256(f'{PROMPT_CHARS} {RESPONSE_CHARS}'.encode())
        self._split = split
        self._examples: list[tuple[str, str, str]] = []
        for path, text in _files(root, split):
            digest.update(f'\n{path}\n{text}'.encode())
            self._examples += [(path, *window) for window in windows(text)]
        self._examples.sort(key=lambda example: zlib.crc32('\n'.join(example).encode()))
        if not self._examples:
            raise ValueError(f'{root} has no Python files of the {split} split.')
        self.fingerprint = f'python_source {split} {digest.hexdigest()[:16]}'

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, str]:
        index = from_start(index, self)
        path, prompt, response = self._examples[index]
        return {'prompt': prompt, 'response': response, 'path': path}

    def __repr__(self) -> str:  # grain identifies a source by its repr
        return f'PythonSource({self.fingerprint!r}, examples={len(self)})'


def _files(root: Path, split: str) -> Iterator[tuple[str, str]]:
    """Yields path and text of the files of a split, sorted by path."""
    files = ((file.relative_to(root), file) for file in root.rglob('*.py'))
    for relative, file in sorted(files):
        path = relative.as_posix()
        if _LEFT_OUT.intersection(relative.parts) or file_split(path) != split:
            continue
        try:
            text = file.read_text(encoding='utf-8')
        except (UnicodeDecodeError, OSError):  # a few files are in another encoding
            continue
        yield path, text
