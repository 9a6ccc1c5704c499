"""The forward diffusion process: corruption and noise levels."""

from diffusiongemma.diffusion.corruption import (
    Corruption,
    MaskedCorruption,
    UniformCorruption,
    sample_noise_levels,
)

__all__ = ['Corruption', 'MaskedCorruption', 'UniformCorruption', 'sample_noise_levels']
