"""Responses that a teacher wrote, kept as JSONL shards with a record of what made them.

    writer = TargetsWriter(directory, made_from={'teacher': ..., 'seed': 0}, size=len(source))
    for indices in writer.pending():
        writer.write(indices, [answer(source[i]) for i in indices])
    ...
    source = load_source(DataSpec(kind='targets', path=directory))

A shard holds the rows of a range of prompts. It gets its name only when it is complete, so an
interrupted writer leaves whole shards, and its successor goes on with those that are missing.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import operator
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from diffusiongemma.data.jsonl import JsonlSource

METADATA_FILE = 'metadata.json'


def _write_atomically(file: epath.Path, text: str) -> None:
    partial = file.with_name(f'{file.name}.partial-{uuid.uuid4().hex[:8]}')
    partial.write_text(text)
    partial.replace(file)


def _ranges(size: int, shard_size: int) -> list[range]:
    return [range(i, min(i + shard_size, size)) for i in range(0, size, shard_size)]


def _shard_file(directory: epath.Path, indices: range) -> epath.Path:
    return directory / f'targets-{indices.start:09d}-{indices.stop:09d}.jsonl'


def read_metadata(path: epath.PathLike) -> dict[str, Any]:
    """What a targets directory was made from: 'made_from', 'size' (prompts) and 'shard_size'.

    Raises:
      FileNotFoundError: when the directory holds no targets.
      ValueError: when its metadata is damaged.
    """
    file = epath.Path(path) / METADATA_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f'{path} holds no targets: there is no {METADATA_FILE}. Give a directory that '
            'diffusiongemma.generate_targets wrote.'
        )
    try:
        metadata = json.loads(file.read_text())
        if not all(metadata[name] >= 1 for name in ('size', 'shard_size')):
            raise ValueError('size and shard_size must be >= 1')
        return {name: metadata[name] for name in ('made_from', 'size', 'shard_size')}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{file} is damaged ({error!r}). Generate the targets again.') from error


class TargetsWriter:
    """Writes a targets directory, or what is still missing of one."""

    def __init__(
        self,
        path: epath.PathLike,
        *,
        made_from: Mapping[str, Any],
        size: int,
        shard_size: int = 1024,
    ):
        """Starts a directory, or goes on with one that was made from the same.

        Args:
          path: the directory; made if it is not there.
          made_from: all that the rows depend on (teacher, tokenizer, prompts, seed, ...), JSON.
          size: number of prompts.
          shard_size: prompts a shard.

        Raises:
          ValueError: when the directory holds targets that were made from something else.
        """
        if size < 1 or shard_size < 1:
            raise ValueError(
                f'size and shard_size must be >= 1, got size={size}, shard_size={shard_size}.'
            )
        self._directory = epath.Path(path)
        self._shards = _ranges(size, shard_size)
        metadata = {'made_from': dict(made_from), 'size': size, 'shard_size': shard_size}
        metadata = json.loads(json.dumps(metadata))  # tuples become lists, as in the file
        file = self._directory / METADATA_FILE
        if not file.exists():
            self._directory.mkdir(parents=True, exist_ok=True)
            _write_atomically(file, json.dumps(metadata, indent=2) + '\n')
            return
        there = read_metadata(self._directory)
        here = {**metadata.pop('made_from'), **metadata}
        there = {**there.pop('made_from'), **there}
        differing = sorted(name for name in {*here, *there} if here.get(name) != there.get(name))
        if differing:
            raise ValueError(
                f'{path} holds targets made with another {", ".join(differing)}. Write to '
                'another directory, or remove that one.'
            )

    def pending(self, process_index: int = 0, process_count: int = 1) -> Iterator[range]:
        """The ranges of prompts whose shards this process has yet to write."""
        for indices in self._shards[process_index::process_count]:
            if not _shard_file(self._directory, indices).exists():
                yield indices

    def write(self, indices: range, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes the shard of a range that `pending` gave.

        Args:
          indices: the range.
          rows: {'prompt', 'response', ...}; there may be fewer than prompts, even none.
        """
        if indices not in self._shards:
            raise ValueError(f'{indices} is no shard of these targets.')
        text = ''.join(json.dumps(dict(row)) + '\n' for row in rows)
        _write_atomically(_shard_file(self._directory, indices), text)


class TargetsSource:
    """Random access to all rows of a complete targets directory, in the order of the prompts.

    Attributes:
      metadata: what the targets were made from, see `read_metadata`.
      fingerprint: hash of the rows.
    """

    def __init__(self, path: epath.PathLike):
        """Opens the shards and checks every row.

        Raises:
          FileNotFoundError: when the directory holds no targets.
          ValueError: when shards are missing, a row is bad, or there are no rows.
        """
        self._directory = epath.Path(path)
        self.metadata = read_metadata(self._directory)
        ranges = _ranges(self.metadata['size'], self.metadata['shard_size'])
        files = [_shard_file(self._directory, indices) for indices in ranges]
        missing = sum(not file.exists() for file in files)
        if missing:
            raise ValueError(
                f'{path} is unfinished: {missing} of {len(files)} shards are missing. Run '
                'generate_targets again with the same settings to write the rest.'
            )
        self._shards = [JsonlSource(file) for file in files if file.stat().length]
        self._ends = list(itertools.accumulate(len(shard) for shard in self._shards))
        if not self._shards:
            raise ValueError(f'{path}: empty dataset, no prompt has a response.')
        text = ' '.join(shard.fingerprint for shard in self._shards)
        self.fingerprint = f'targets {hashlib.sha256(text.encode()).hexdigest()[:16]}'

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f'index {index} is out of range for {self!r}.')
        index %= len(self)
        shard = bisect.bisect_right(self._ends, index)
        return self._shards[shard][index - self._ends[shard]]  # counted from the shard's end

    def __repr__(self) -> str:
        return f'TargetsSource({str(self._directory)!r}, rows={len(self)})'
