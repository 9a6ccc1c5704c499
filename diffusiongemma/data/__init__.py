"""Examples and tokens.

Training batches are in `data.packing` and `data.pipeline`, which need the extra `train`.
"""

from diffusiongemma.data.sources import DataSpec, Source, load_source, split_source
from diffusiongemma.data.tokenizer import Tokenizer

__all__ = [
    'DataSpec',
    'Source',
    'Tokenizer',
    'load_source',
    'split_source',
]
