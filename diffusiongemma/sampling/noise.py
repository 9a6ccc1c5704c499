"""The initial noise of a canvas."""

import jax
import jax.numpy as jnp

from diffusiongemma.sampling.config import SamplingConfig
from diffusiongemma.sampling.controls import OPEN
from diffusiongemma.sampling.interface import CausalModel, traits
from diffusiongemma.sampling.randomness import uniform_tokens


def first_canvas(
    model: CausalModel, config: SamplingConfig, keys: jax.Array, length: int
) -> jax.Array:
    """Returns noise [B, length] int32: uniform tokens, or the mask token."""
    mask_id = traits(model).mask_id
    if mask_id is not None:
        return jnp.full((keys.shape[0], length), mask_id, jnp.int32)
    return uniform_tokens(keys, length, _vocab(model, config))


def noise_vocab(model: CausalModel, config: SamplingConfig) -> int | None:
    """Returns the number of tokens that noise is drawn from; None if noise is the mask token."""
    return _vocab(model, config) if traits(model).mask_id is None else None


def _vocab(model: CausalModel, config: SamplingConfig) -> int:
    return config.vocab_size or model.config.vocab_size


def hold(tokens: jax.Array | None, canvas: jax.Array) -> jax.Array:
    """Returns the canvas [..., C] with fixed tokens.

    Args:
      tokens: [..., C] int32, -1 for positions that keep the token of the canvas, or None.
      canvas: [..., C] int32.
    """
    return canvas if tokens is None else jnp.where(tokens == OPEN, canvas, tokens)
