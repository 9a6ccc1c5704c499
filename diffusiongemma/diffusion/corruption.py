"""Forward processes on discrete tokens, and the noise levels of training."""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


@runtime_checkable
class Corruption(Protocol):
    """A forward process, which maps clean tokens and noise levels to noisy tokens."""

    def corrupt(
        self, key: Key[Array, ''], tokens: Int[Array, '*B'], noise_level: Float[Array, '*#B']
    ) -> tuple[Int[Array, '*B'], Bool[Array, '*B']]:
        """Corrupts each token independently with probability `noise_level`.

        Args:
          key: a PRNG key.
          tokens: [...] int32, clean tokens.
          noise_level: float32 in [0, 1], broadcast against tokens; 1 is all noise.

        Returns:
          Noisy tokens [...] int32 and a bool mask [...] of the corrupted positions.
        """
        ...


@dataclasses.dataclass(frozen=True)
class UniformCorruption:
    """A forward process that replaces corrupted tokens by uniform draws from the vocabulary.

    A draw may equal the clean token. This is the multinomial diffusion of Hoogeboom et al. 2021
    (arXiv:2102.05379).
    """

    vocab_size: int

    def corrupt(
        self, key: Key[Array, ''], tokens: Int[Array, '*B'], noise_level: Float[Array, '*#B']
    ) -> tuple[Int[Array, '*B'], Bool[Array, '*B']]:
        position_key, noise_key = jax.random.split(key)
        # A uniform draw is less than 1, so a noise level of 1 corrupts every token.
        corrupted = jax.random.uniform(position_key, tokens.shape) < noise_level
        noise = jax.random.randint(noise_key, tokens.shape, 0, self.vocab_size, tokens.dtype)
        return jnp.where(corrupted, noise, tokens), corrupted


@dataclasses.dataclass(frozen=True)
class MaskedCorruption:
    """A forward process that masks corrupted tokens (absorbing D3PM, arXiv:2107.03006)."""

    mask_id: int

    def corrupt(
        self, key: Key[Array, ''], tokens: Int[Array, '*B'], noise_level: Float[Array, '*#B']
    ) -> tuple[Int[Array, '*B'], Bool[Array, '*B']]:
        corrupted = jax.random.uniform(key, tokens.shape) < noise_level
        return jnp.where(corrupted, jnp.asarray(self.mask_id, tokens.dtype), tokens), corrupted


def sample_noise_levels(
    key: Key[Array, ''], shape: tuple[int, ...], minimum: float
) -> Float[Array, '...']:
    """Returns noise levels t ~ U(minimum, 1), evenly spread over the batch.

    One uniform offset shifts an even grid (low-discrepancy sampling of VDM, Kingma et al.
    2021, arXiv:2107.00630), which lowers the variance of the loss. The grid is permuted, so
    that neighboring canvases do not get similar levels.

    Returns:
      float32 array of the shape `shape`.
    """
    offset_key, order_key = jax.random.split(key)
    count = 1
    for size in shape:
        count *= size
    grid = (jax.random.uniform(offset_key) + jnp.arange(count) / count) % 1.0  # [count]
    levels = minimum + (1.0 - minimum) * jax.random.permutation(order_key, grid)
    return levels.reshape(shape)
