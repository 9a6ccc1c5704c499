"""Sampling: the diffusion decoder, its autoregressive baseline, and the rules they follow."""

from diffusiongemma.sampling.acceptance import AcceptanceRule, EntropyBound
from diffusiongemma.sampling.passes import CausalModel, DenoisingModel
from diffusiongemma.sampling.sampler import Sampler, pad_prompts
from diffusiongemma.sampling.schedule import TemperatureSchedule
from diffusiongemma.sampling.state import SamplerOutput, SamplingConfig
from diffusiongemma.sampling.stopping import StableAndConfident, StoppingRule
from diffusiongemma.sampling.text import decode_responses, generate_text

__all__ = [
    'AcceptanceRule',
    'CausalModel',
    'DenoisingModel',
    'EntropyBound',
    'Sampler',
    'SamplerOutput',
    'SamplingConfig',
    'StableAndConfident',
    'StoppingRule',
    'TemperatureSchedule',
    'decode_responses',
    'generate_text',
    'pad_prompts',
]
