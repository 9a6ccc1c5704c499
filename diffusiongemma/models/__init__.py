"""Backbone, teacher and denoiser."""

from diffusiongemma.models.cache import KVCache, Prefix, cache_bytes
from diffusiongemma.models.config import AttentionConfig, ModelConfig, MoEConfig, PerLayerConfig
from diffusiongemma.models.denoiser import DiffusionGemma
from diffusiongemma.models.parameter_counts import ParameterCounts, parameter_counts
from diffusiongemma.models.presets import PRESETS
from diffusiongemma.models.transformer import Gemma, init_params, parameter_count
from diffusiongemma.models.unroll import unroll_layers

__all__ = [
    'PRESETS',
    'AttentionConfig',
    'DiffusionGemma',
    'Gemma',
    'KVCache',
    'MoEConfig',
    'ModelConfig',
    'ParameterCounts',
    'PerLayerConfig',
    'Prefix',
    'cache_bytes',
    'init_params',
    'parameter_count',
    'parameter_counts',
    'unroll_layers',
]
