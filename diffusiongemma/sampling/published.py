"""Converts sampling settings to a generation_config.json of the published format."""

from typing import Any

from diffusiongemma.sampling.acceptance import EntropyBound
from diffusiongemma.sampling.config import SamplingConfig
from diffusiongemma.sampling.stopping import StableAndConfident


def generation_config(config: SamplingConfig, is_diffusion: bool) -> dict[str, Any]:
    """Returns the content of generation_config.json, without the token ids.

    The format only supports the entropy bound and one stopping rule. Other rules are replaced by
    the defaults of these.

    Args:
      config: the sampling settings.
      is_diffusion: whether the model has a denoiser; an autoregressive model needs fewer keys.
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
