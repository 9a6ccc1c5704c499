"""Samplers for the diffusion, lossless and autoregressive modes, and their rules."""

from diffusiongemma.sampling.acceptance import (
    AcceptanceRule,
    Ancestral,
    ConfidenceThreshold,
    EntropyBound,
    Margin,
    Proposal,
    TopK,
)
from diffusiongemma.sampling.config import SamplingConfig
from diffusiongemma.sampling.controls import Controls, allow, ban, exact_lengths, pin
from diffusiongemma.sampling.decoder import Decoder
from diffusiongemma.sampling.drafts import DraftSource, PromptLookup
from diffusiongemma.sampling.gibbs import GibbsSweep
from diffusiongemma.sampling.interface import CausalModel, DenoisingModel, Traits
from diffusiongemma.sampling.prompts import pad_prompts
from diffusiongemma.sampling.remasking import Remask
from diffusiongemma.sampling.sampler import Sampler
from diffusiongemma.sampling.schedule import TemperatureSchedule
from diffusiongemma.sampling.state import SamplerOutput
from diffusiongemma.sampling.stopping import (
    AllOf,
    MeanEntropy,
    Never,
    StableAndConfident,
    StoppingRule,
    TokenStability,
)
from diffusiongemma.sampling.text import decode_responses, generate_text

__all__ = [
    'AcceptanceRule',
    'AllOf',
    'Ancestral',
    'CausalModel',
    'ConfidenceThreshold',
    'Controls',
    'Decoder',
    'DenoisingModel',
    'DraftSource',
    'EntropyBound',
    'GibbsSweep',
    'Margin',
    'MeanEntropy',
    'Never',
    'PromptLookup',
    'Proposal',
    'Remask',
    'Sampler',
    'SamplerOutput',
    'SamplingConfig',
    'StableAndConfident',
    'StoppingRule',
    'TemperatureSchedule',
    'TokenStability',
    'TopK',
    'Traits',
    'allow',
    'ban',
    'decode_responses',
    'exact_lengths',
    'generate_text',
    'pad_prompts',
    'pin',
]
