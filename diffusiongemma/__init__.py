"""DiffusionGemma: text-diffusion models and block drafters that are distilled from Gemma."""

from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.models import DiffusionGemma, Gemma, ModelConfig
from diffusiongemma.sampling import Sampler, SamplingConfig, pad_prompts

__all__ = [
    'DiffusionGemma',
    'Gemma',
    'ModelConfig',
    'Sampler',
    'SamplingConfig',
    'load_model',
    'pad_prompts',
]
