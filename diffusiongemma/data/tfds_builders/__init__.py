"""TFDS builders of the built-in tasks, registered when this package is imported.

    >>> import tensorflow_datasets as tfds
    >>> from diffusiongemma.data import tfds_builders  # registers them
    >>> tfds_builders.prepare('diffusiongemma_wordmath', data_dir='/tmp/tfds')
    >>> tfds.data_source('diffusiongemma_wordmath', split='train', data_dir='/tmp/tfds')[0]

`DataSpec(kind='tfds', name='diffusiongemma_wordmath', path='/tmp/tfds')` then trains on it. All of
that works without TensorFlow; `tfds.load`, which makes a `tf.data.Dataset`, needs it.
"""

from diffusiongemma.data.tfds_builders.builders import (
    DiffusiongemmaSudoku,
    DiffusiongemmaWordmath,
    prepare,
)

__all__ = ['DiffusiongemmaSudoku', 'DiffusiongemmaWordmath', 'prepare']
