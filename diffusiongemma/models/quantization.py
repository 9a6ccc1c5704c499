"""Weights of eight bits for sampling: a pass reads half of what it reads of bfloat16."""

from typing import Any

import jax
import jax.numpy as jnp

from diffusiongemma.models.arrays import Params
from diffusiongemma.models.layers import is_quantized
from diffusiongemma.models.transformer import Gemma
from diffusiongemma.models.weights import Weight, map_kernels

WEIGHT_DTYPES = {'int8': jnp.int8, 'fp8': jnp.float8_e4m3fn}


def quantize_weights(model: Gemma, params: Params, weights: str) -> Params:
    """The same parameters with the kernels of layers and experts in eight bits (weight-only).

    Every output of a kernel has a float32 scale of its own, the largest absolute weight that leads
    to it (`qwix.quantize`, absmax). Products are of the quantized weights in the compute dtype,
    summed in float32, then scaled. Embedding, router, norms and what is computed stay as they are.
    To sample with, after `for_inference`: it has no gradient.

    Args:
      model: of any family, on one device.
      params: its parameters, in whichever layout; nested dict of arrays.
      weights: 'int8' or 'fp8' (float8_e4m3fn).

    Returns:
      A nested dict like `params` with `qwix.QArray` in place of each kernel.

    Raises:
      ValueError: of another name, a model on a mesh, or kernels that are quantized already.
    """
    import qwix  # a third of a second, which other models do without

    if weights not in WEIGHT_DTYPES:
        raise ValueError(f'weights must be one of {sorted(WEIGHT_DTYPES)}, got {weights!r}.')
    if model.execution.mesh is not None:
        raise ValueError('quantized weights are for one device, but this model is on a mesh.')
    quantize = jax.jit(qwix.quantize, static_argnames=('qtype', 'channelwise_axes'))

    def quantized(kernel: Any, weight: Weight) -> Any:
        if is_quantized(kernel):
            raise ValueError('the weights are quantized already.')
        output_major = model.execution.output_major
        summed = weight.input_axes(kernel.ndim, output_major=output_major)
        kept = tuple(axis for axis in range(kernel.ndim) if axis not in summed)
        return quantize(
            kernel.astype(jnp.float32), qtype=WEIGHT_DTYPES[weights], channelwise_axes=kept
        )

    return map_kernels(quantized, params)
