"""Writes targets as a TFDS dataset: ArrayRecord shards, one by one, and their metadata.

Shards are written atomically. Any TFDS user can open the directory:

    tfds.builder_from_directory(DIRECTORY / NAME / '1.0.0').as_data_source('train')
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from diffusiongemma.data.packing import RESPONSE_IDS

_VERSION = '1.0.0'
_SPLIT = 'train'


class TargetFiles:
    """A writer of the files of one set of targets.

    An example has the features 'prompt' and 'response' (text) and 'index' (int64, the index of the
    prompt in its source). With k = top_k > 0 it also has, for the R tokens of the response
    including its turn end, 'teacher_ids' [R, k] int32, 'teacher_log_probs' [R, k] float16 and
    'teacher_log_rest' [R] float16. With `response_ids` it also has 'response_ids' [R] int32, see
    `packing`.
    """

    def __init__(
        self, directory: Path, name: str, num_shards: int, top_k: int, *, response_ids: bool = False
    ) -> None:
        """Describes the dataset; nothing is written yet.

        Args:
          directory: the data directory of TFDS.
          name: the name of the dataset.
          num_shards: the number of shards of the finished dataset.
          top_k: the number of tokens k per teacher distribution; 0 for none.
          response_ids: whether examples contain the tokens of their responses.
        """
        self._directory = directory / name / _VERSION
        self._template = tfds.core.ShardedFileTemplate(
            data_dir=self._directory,
            dataset_name=name,
            split=_SPLIT,
            filetype_suffix='array_record',
        )
        self._num_shards = num_shards
        text, tensor = tfds.features.Text(), tfds.features.Tensor
        features = {'prompt': text, 'response': text, 'index': np.int64}
        raw = {'encoding': tfds.features.Encoding.BYTES}
        if response_ids:
            features[RESPONSE_IDS] = tensor(shape=(None,), dtype=np.int32, **raw)
        if top_k:
            features |= {
                'teacher_ids': tensor(shape=(None, top_k), dtype=np.int32, **raw),
                'teacher_log_probs': tensor(shape=(None, top_k), dtype=np.float16, **raw),
                'teacher_log_rest': tensor(shape=(None,), dtype=np.float16, **raw),
            }
        self._features = tfds.features.FeaturesDict(features)

    def has(self, shard: int) -> bool:
        """Returns whether a shard has been written."""
        return self._path(shard).exists()

    def write(self, shard: int, examples: Iterable[Mapping[str, Any]]) -> None:
        """Writes all examples of a shard."""
        path = self._path(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f'partial.{path.name}')
        writer = ArrayRecordWriter(str(partial), 'group_size:1')  # for random access
        for example in examples:
            writer.write(self._features.serialize_example(example))
        writer.close()
        partial.replace(path)

    def finish(self) -> int:
        """Writes the TFDS metadata once all shards exist; returns the number of examples."""
        paths = [self._path(shard) for shard in range(self._num_shards)]
        lengths = [ArrayRecordReader(str(path)).num_records() for path in paths]
        split = tfds.core.SplitInfo(
            name=_SPLIT,
            shard_lengths=lengths,
            num_bytes=sum(path.stat().st_size for path in paths),
            filename_template=self._template,
        )
        tfds.folder_dataset.write_metadata(
            data_dir=self._directory,
            features=self._features,
            split_infos=[split],
            description='Responses of an autoregressive teacher.',
            check_data=False,
        )
        return sum(lengths)

    def _path(self, shard: int) -> Path:
        file = self._template.sharded_filepath(shard_index=shard, num_shards=self._num_shards)
        return Path(file)
