"""Weights stored in eight bits: int8 values, and one scale for each block of them.

It makes a file small; what is loaded is floating-point again. A tensor NAME is then two: NAME of
dtype int8 in the weight's own shape, and NAME:scale of dtype bfloat16 [ceil(size / BLOCK)], for the
weight read in row-major order: weight = value * scale.
"""

import jax.numpy as jnp
import ml_dtypes
import numpy as np

INT8 = 'int8'  # as the dtype of a bundle
BLOCK = 128
SCALE = ':scale'
# Smaller tensors (norms, biases) keep their dtype: they are few bytes and matter much.
SMALLEST = 1 << 14


def to_int8(name: str, value: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors that store a weight: two of them, or itself where it stays as it is.

    Args:
      name: of the weight.
      value: of any dtype; only matrices of floating-point numbers, and larger ones, are quantized.
    """
    is_float = jnp.issubdtype(value.dtype, jnp.floating)
    if not is_float or value.ndim < 2 or value.size < SMALLEST:
        return {name: value}
    blocks = _blocks(value.astype(np.float32).reshape(-1))  # [blocks, BLOCK]
    scale = (np.abs(blocks).max(axis=1) / 127).astype(ml_dtypes.bfloat16)
    divisor = np.where(scale == 0, 1, scale.astype(np.float32))[:, None]
    rounded = np.clip(np.rint(blocks / divisor), -127, 127).astype(np.int8)
    return {name: rounded.reshape(-1)[: value.size].reshape(value.shape), name + SCALE: scale}


def from_int8(value: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The weight, float32 in the shape of `value`, from its int8 values and scales."""
    blocks = _blocks(value.reshape(-1)).astype(np.float32)
    weight = blocks * scale.astype(np.float32)[:, None]
    return weight.reshape(-1)[: value.size].reshape(value.shape)


def _blocks(flat: np.ndarray) -> np.ndarray:
    """[N] -> [ceil(N / BLOCK), BLOCK], filled up with zeros."""
    return np.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK)
