"""TFDS builders of the built-in tasks; importing this package registers them.

    >>> import tensorflow_datasets as tfds
    >>> from diffusiongemma.data import tfds_builders  # registers them
    >>> tfds_builders.prepare('diffusiongemma_wordmath', data_dir='/tmp/tfds')
    >>> tfds.data_source('diffusiongemma_wordmath', split='train', data_dir='/tmp/tfds')[0]

`DataSpec(kind='tfds', name='diffusiongemma_wordmath', path='/tmp/tfds')` then selects this
dataset. None of this needs TensorFlow; `tfds.load`, which returns a `tf.data.Dataset`, does.
"""

from diffusiongemma.data.tfds_builders.builders import (
    DiffusiongemmaSudoku,
    DiffusiongemmaWordmath,
    prepare,
)

__all__ = ['DiffusiongemmaSudoku', 'DiffusiongemmaWordmath', 'prepare']
