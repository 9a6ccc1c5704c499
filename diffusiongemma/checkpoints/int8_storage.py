"""Stores weights as int8 values with one scale per block.

This only makes files small; loaded weights are floating-point again. A weight NAME is stored as
two tensors: NAME, int8 in the shape of the weight, and NAME:scale, bfloat16 [ceil(size / BLOCK)],
for blocks of the weight in row-major order: weight = value * scale.
"""

import jax.numpy as jnp
import ml_dtypes
import numpy as np

INT8 = 'int8'  # the name of this storage as a `dtype` argument
BLOCK = 128
SCALE = ':scale'
# Smaller tensors (norms, biases) keep their dtype: they need few bytes and affect results much.
SMALLEST = 1 << 14


def to_int8(name: str, value: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the tensors that store a weight: values and scales, or the unchanged weight.

    Args:
      name: the name of the weight.
      value: the weight. It is only quantized if it is floating-point, has at least two axes and
        at least SMALLEST values.
    """
    is_float = jnp.issubdtype(value.dtype, jnp.floating)
    if not is_float or value.ndim < 2 or value.size < SMALLEST:
        return {name: value}
    blocks = _blocks(value.astype(np.float32).reshape(-1))  # [blocks, BLOCK]
    scale = (np.abs(blocks).max(axis=1) / 127).astype(ml_dtypes.bfloat16)  # [blocks]
    # Divides by the scale as it is stored, in bfloat16, because reading multiplies by it.
    divisor = np.where(scale == 0, 1, scale.astype(np.float32))[:, None]  # [blocks, 1]
    rounded = np.clip(np.rint(blocks / divisor), -127, 127).astype(np.int8)
    return {name: rounded.reshape(-1)[: value.size].reshape(value.shape), name + SCALE: scale}


def from_int8(value: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Returns the weight, float32 in the shape of `value`, from its int8 values and scales."""
    blocks = _blocks(value.reshape(-1)).astype(np.float32)  # [blocks, BLOCK]
    weight = blocks * scale.astype(np.float32)[:, None]
    return weight.reshape(-1)[: value.size].reshape(value.shape)


def _blocks(flat: np.ndarray) -> np.ndarray:
    """Returns an array [N] as blocks [ceil(N / BLOCK), BLOCK], padded with zeros."""
    return np.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK)
