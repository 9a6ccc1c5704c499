"""Sampling settings as the published format's generation_config.json names them."""

from typing import Any

from diffusiongemma.sampling.acceptance import EntropyBound
from diffusiongemma.sampling.config import SamplingConfig
from diffusiongemma.sampling.stopping import StableAndConfident


def generation_config(config: SamplingConfig, is_diffusion: bool) -> dict[str, Any]:
    """The content of generation_config.json, without the token ids.

    The format has the entropy bound and one stopping rule: of others it gets the defaults.

    Args:
      config: how to sample.
      is_diffusion: whether the model denoises; else only what an autoregressive one needs.
    """
    if not is_diffusion:
        return {'max_new_tokens': config.max_new_tokens, 'do_sample': config.temperature > 0}
    acceptance, stopping = config.acceptance_rule, config.stopping_rule
    bound = acceptance if isinstance(acceptance, EntropyBound) else EntropyBound()
    stop = stopping if isinstance(stopping, StableAndConfident) else StableAndConfident()
    return {
        'max_new_tokens': config.max_new_tokens,
        'max_denoising_steps': config.max_denoising_steps,
        'sampler_config': {
            '_cls_name': 'EntropyBoundSamplerConfig',
            'entropy_bound': bound.entropy_bound,
        },
        't_min': config.t_min,
        't_max': config.t_max,
        'stability_threshold': stop.stability_threshold,
        'confidence_threshold': stop.confidence_threshold,
    }
