"""Reading and writing of model files; `load_model` opens any supported format."""

from diffusiongemma.checkpoints.bundle import load_bundle, save_bundle
from diffusiongemma.checkpoints.hf_export import save_hf
from diffusiongemma.checkpoints.load import load_for_sampling, load_model
from diffusiongemma.checkpoints.store import CheckpointStore, read_ema
from diffusiongemma.errors import CheckpointError

__all__ = [
    'CheckpointError',
    'CheckpointStore',
    'load_bundle',
    'load_for_sampling',
    'load_model',
    'read_ema',
    'save_bundle',
    'save_hf',
]
