"""The diffusion process: corruption, noise levels, temperature schedule."""

from diffusiongemma.diffusion.corruption import (
    Corruption,
    MaskedCorruption,
    UniformCorruption,
    sample_noise_levels,
)

__all__ = ['Corruption', 'MaskedCorruption', 'UniformCorruption', 'sample_noise_levels']
