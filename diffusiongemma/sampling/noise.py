"""What a canvas holds before anything is known of it."""

import jax
import jax.numpy as jnp

from diffusiongemma.sampling import passes
from diffusiongemma.sampling.config import SamplingConfig
from diffusiongemma.sampling.controls import OPEN
from diffusiongemma.sampling.passes import DenoisingModel
from diffusiongemma.sampling.randomness import uniform_tokens


def first_canvas(
    model: DenoisingModel, config: SamplingConfig, keys: jax.Array, length: int
) -> jax.Array:
    """Noise [B, length] int32: uniform tokens, or the mask token."""
    vocab_size = noise_vocab(model, config)
    if vocab_size is None:
        return jnp.full((keys.shape[0], length), passes.mask_id(model), jnp.int32)
    return uniform_tokens(keys, length, vocab_size)


def noise_vocab(model: DenoisingModel, config: SamplingConfig) -> int | None:
    """Tokens that noise is drawn from; None where it is the mask token."""
    if passes.mask_id(model) is not None:
        return None
    return config.vocab_size or model.config.vocab_size


def hold(tokens: jax.Array | None, canvas: jax.Array) -> jax.Array:
    """The canvas with these tokens in their places; [..., C] int32 twice, or None and one."""
    return canvas if tokens is None else jnp.where(tokens == OPEN, canvas, tokens)
