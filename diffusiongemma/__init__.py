"""DiffusionGemma: an autoregressive Gemma distilled into a parallel text-diffusion model."""

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
