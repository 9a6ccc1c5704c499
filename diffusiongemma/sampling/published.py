"""Sampling settings as the published format's generation_config.json names them."""

from typing import Any

from diffusiongemma.sampling.state import SamplingConfig


def generation_config(config: SamplingConfig, is_diffusion: bool) -> dict[str, Any]:
    """The content of generation_config.json, without the token ids.

    Args:
      config: how to sample.
      is_diffusion: whether the model denoises; else only what an autoregressive one needs.
    """
    if not is_diffusion:
        return {'max_new_tokens': config.max_new_tokens, 'do_sample': config.temperature > 0}
    return {
        'max_new_tokens': config.max_new_tokens,
        'max_denoising_steps': config.max_denoising_steps,
        'sampler_config': {
            '_cls_name': 'EntropyBoundSamplerConfig',
            'entropy_bound': config.entropy_bound,
        },
        't_min': config.t_min,
        't_max': config.t_max,
        'stability_threshold': config.stability_threshold,
        'confidence_threshold': config.confidence_threshold,
    }
