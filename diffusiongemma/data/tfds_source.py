"""Reads examples from any TFDS dataset that has text features for prompt and response."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from diffusiongemma.data import tfds_builders  # noqa: F401, registers the built-in datasets
from diffusiongemma.data.indexing import from_start


class TfdsSource:
    """A source with random access to a split of a TFDS dataset, without TensorFlow.

    A dataset that is not in the data directory yet is downloaded and prepared as ArrayRecord.

    Attributes:
      fingerprint: a text with the name, the version and the split of the dataset.
    """

    def __init__(
        self, name: str, split: str, data_dir: str, prompt_feature: str, response_feature: str
    ) -> None:
        """Opens the dataset.

        Args:
          name: the dataset, optionally with its config and version: 'name/config:1.0.0'.
          split: any split expression of TFDS, such as 'train' or 'train[:10%]'.
          data_dir: the data directory of TFDS; '' for the default of TFDS.
          prompt_feature: the feature that becomes 'prompt'.
          response_feature: the feature that becomes 'response'.

        Raises:
          ValueError: if the dataset, split or feature does not exist, the split is empty, or the
            dataset was prepared in a format without random access.
        """
        self._name = f'tfds:{name}:{split}'
        self._features = {prompt_feature: 'prompt', response_feature: 'response'}
        try:
            builder = tfds.builder(name, data_dir=data_dir or None, file_format='array_record')
        except tfds.core.registered.DatasetNotFoundError as error:
            raise ValueError(f'TFDS has no dataset {name!r}; check its name.') from error
        except ValueError as error:
            raise ValueError(
                f'{name!r} cannot be read with random access ({error}); prepare it again with '
                'file_format="array_record", or use another data directory.'
            ) from error
        known = sorted(builder.info.features)
        missing = [feature for feature in self._features if feature not in known]
        if missing:
            raise ValueError(
                f'{name!r} has no feature {missing}; it has {known}. Set prompt_feature and '
                'response_feature.'
            )
        builder.download_and_prepare()
        try:
            self._rows = builder.as_data_source(split=split)
        except (ValueError, KeyError) as error:
            raise ValueError(
                f'{name!r} has no split {split!r}; it has {sorted(builder.info.splits)}.'
            ) from error
        if not len(self._rows):
            raise ValueError(f'{self._name}: empty dataset.')
        self.fingerprint = f'tfds {builder.info.full_name} {split}'

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = from_start(index, self)
        row = self._rows[index]
        return {self._features.get(key, key): _plain(value) for key, value in row.items()}

    def __repr__(self) -> str:
        return f'TfdsSource({self._name!r}, rows={len(self)})'


def _plain(value: Any) -> Any:
    """Returns text as str, scalars as Python numbers, and everything else unchanged."""
    if isinstance(value, np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    return value.decode('utf-8') if isinstance(value, bytes) else value
