"""The models: the Gemma backbone, the autoregressive Gemma and DiffusionGemma."""

from diffusiongemma.models.cache import KVCache, Prefix, cache_bytes
from diffusiongemma.models.config import (
    AttentionConfig,
    DenoiserConfig,
    LightConfig,
    ModelConfig,
    MoEConfig,
    PerLayerConfig,
)
from diffusiongemma.models.denoiser import DiffusionGemma
from diffusiongemma.models.inference import (
    for_inference,
    output_major_kernels,
    quantize_weights,
    unroll_layers,
)
from diffusiongemma.models.parameter_counts import ParameterCounts, parameter_counts
from diffusiongemma.models.presets import PRESETS
from diffusiongemma.models.transformer import Gemma, init_params, parameter_count

__all__ = [
    'PRESETS',
    'AttentionConfig',
    'DenoiserConfig',
    'DiffusionGemma',
    'Gemma',
    'KVCache',
    'LightConfig',
    'MoEConfig',
    'ModelConfig',
    'ParameterCounts',
    'PerLayerConfig',
    'Prefix',
    'cache_bytes',
    'for_inference',
    'init_params',
    'output_major_kernels',
    'parameter_count',
    'parameter_counts',
    'quantize_weights',
    'unroll_layers',
]
