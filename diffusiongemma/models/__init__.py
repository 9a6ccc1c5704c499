"""Backbone, teacher and denoiser."""

from diffusiongemma.models.cache import KVCache, Prefix
from diffusiongemma.models.config import AttentionConfig, ModelConfig, MoEConfig, PerLayerConfig
from diffusiongemma.models.denoiser import DiffusionGemma
from diffusiongemma.models.transformer import Gemma, init_params, parameter_count

__all__ = [
    'AttentionConfig',
    'DiffusionGemma',
    'Gemma',
    'KVCache',
    'MoEConfig',
    'ModelConfig',
    'PerLayerConfig',
    'Prefix',
    'init_params',
    'parameter_count',
]
