"""int8/fp8 weight-only quantization for sampling, which halves the bytes of bfloat16 weights."""

from typing import Any

import jax
import jax.numpy as jnp

from diffusiongemma.models.arrays import Params
from diffusiongemma.models.layers import is_quantized
from diffusiongemma.models.transformer import Gemma
from diffusiongemma.models.weights import Weight, map_kernels

WEIGHT_DTYPES = {'int8': jnp.int8, 'fp8': jnp.float8_e4m3fn}


def quantize_weights(model: Gemma, params: Params, weights: str) -> Params:
    """Returns the parameters with int8 or fp8 kernels of layers and experts (weight-only).

    Each output of a kernel has a float32 scale from its largest absolute weight (`qwix.quantize`,
    absmax). Matmuls use the quantized weights in the compute dtype, are summed in float32 and then
    scaled. Embedding, router, norms and activations are not quantized. The result is for sampling,
    after `for_inference`; it has no gradient.

    Args:
      model: a model of any family, on one device.
      params: the parameters of the model in any layout, as a nested dict of arrays.
      weights: 'int8' or 'fp8' (float8_e4m3fn).

    Returns:
      A nested dict with the structure of `params`, with a `qwix.QArray` for each kernel.

    Raises:
      ValueError: if the name is unknown, the model is on a mesh, or the kernels are already
        quantized.
    """
    import qwix  # the import takes a third of a second, and only quantized models need it

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
        output_axes = tuple(axis for axis in range(kernel.ndim) if axis not in summed)
        return quantize(
            kernel.astype(jnp.float32), qtype=WEIGHT_DTYPES[weights], channelwise_axes=output_axes
        )

    return map_kernels(quantized, params)
