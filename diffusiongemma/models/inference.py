"""Converts a model and its parameters for sampling: the fastest layout, and int8 or fp8 weights.

A layout does not change the computed function. Checkpoints and training use stacked layers and
kernels in the layout [in, out]. Weight-only quantization halves the bytes of bfloat16 weights.
"""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from diffusiongemma.models.arrays import Params
from diffusiongemma.models.denoiser import (
    DENOISER_ALONE,
    DRAFT_HEAD,
    DRAFT_IDS,
    DiffusionGemma,
)
from diffusiongemma.models.layers import is_quantized
from diffusiongemma.models.transformer import Gemma
from diffusiongemma.models.weights import Weight, map_kernels

STACKED = ('layers', 'shared_layers')
WEIGHT_DTYPES = {'int8': jnp.int8, 'fp8': jnp.float8_e4m3fn}

AnyGemma = TypeVar('AnyGemma', bound=Gemma)


def for_inference(model: Gemma, params: Params) -> tuple[Gemma, Params]:
    """Returns the model and its parameters in the fastest layout for the current devices.

    The parameters of a separate or light denoiser are cast to its compute dtype, so that passes
    need not convert them. Layers are unrolled if `is_unrolled`. On one device the head rows of a
    draft vocabulary are gathered, and on a CPU kernels have the transposed layout.

    Args:
      model: a model of any family, in the layout of training.
      params: the parameters of the model as a nested dict of arrays.
    """
    platform = model.execution.platform or jax.default_backend()
    params = _in_denoise_dtype(model, params)
    if model.execution.mesh is None:
        model, params = gather_draft_head(model, params)
        if platform == 'cpu':
            model, params = output_major_kernels(model, params)
    if is_unrolled(model):
        model, params = unroll_layers(model, params)
    return model, params


def is_unrolled(model: Gemma) -> bool:
    """Returns whether a model samples faster without a scan over its layers.

    On one CPU or GPU every model does. On TPUs, XLA reads dense weights in place from the stack,
    but expert kernels need whole arrays: in a scan the experts of each layer, which are most of the
    weights, would be copied.
    """
    platform = model.execution.platform or jax.default_backend()
    if platform == 'tpu':
        return model.config.moe is not None
    return model.execution.mesh is None and platform in ('cpu', 'gpu', 'cuda')


def unroll_layers(model: Gemma, params: Params) -> tuple[Gemma, Params]:
    """Returns the model with its layer scan unrolled, and the parameters in the matching layout.

    A scan copies the weights of each layer out of the stack before it uses them, which takes longer
    than a pass over few tokens. Without the scan they are read in place, but compile time grows
    with depth.

    Args:
      model: a model of any family, with `Execution.scan_layers`.
      params: the parameters of the model as a nested dict of arrays.

    Returns:
      The model and its parameters: `layers` [G, ...] becomes `layers_0` to `layers_{G - 1}`.

    Raises:
      ValueError: if the model is already unrolled.
    """
    if not model.execution.scan_layers:
        raise ValueError('the layers of this model are unrolled already (scan_layers=False).')

    def unrolled(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        result = {}
        for name, child in node.items():
            if name in STACKED:
                for g in range(jax.tree.leaves(child)[0].shape[0]):
                    result[f'{name}_{g}'] = jax.tree.map(lambda leaf, g=g: leaf[g], child)
            else:
                result[name] = unrolled(child)
        return result

    return with_execution(model, scan_layers=False), unrolled(params)


def with_execution(model: AnyGemma, **changes: Any) -> AnyGemma:
    """Returns the model with other execution settings, see `Execution`."""
    return model.clone(execution=dataclasses.replace(model.execution, **changes))


def gather_draft_head(model: Gemma, params: Params) -> tuple[Gemma, Params]:
    """Returns the model with the head rows of a draft vocabulary as a separate parameter.

    Without a draft vocabulary, model and parameters are returned unchanged.
    """
    if DRAFT_IDS not in params or model.execution.gather_draft_head:
        return model, params
    head = jnp.take(params['embedder']['embedding'], params[DRAFT_IDS], axis=0)  # [Vd, D]
    head = head.astype(model.denoise_dtype)
    return with_execution(model, gather_draft_head=True), params | {DRAFT_HEAD: head}


def output_major_kernels(model: Gemma, params: Params) -> tuple[Gemma, Params]:
    """Returns the model and its parameters in the transposed weight layout, [out, in].

    XLA's matmuls on a CPU are up to three times faster in this layout for few rows (`FEW_ROWS`).
    Routed experts have no gradient in this layout.

    Args:
      model: a model of any family, without `Execution.output_major`.
      params: the parameters of the model as a nested dict of arrays, with layers stacked or not.

    Raises:
      ValueError: if the kernels already have the transposed layout.
    """
    if model.execution.output_major:
        raise ValueError('the kernels of this model already have the transposed layout.')

    transposed = map_kernels(_outputs_first, params)
    return with_execution(model, output_major=True), transposed


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


def kernels_in_compute_dtype(model: DiffusionGemma, params: Params) -> Params:
    """Returns the parameters with the kernels of layers cast to the compute dtype.

    Router, norms and embedding are unchanged. If a training step casts once before its passes, all
    passes share one bfloat16 copy, and the gradients of every pass are stacked over layers in
    bfloat16, the dtype in which their matmuls return them, instead of float32.
    """

    def cast(name: str, part: Any) -> Any:
        dtype = model.denoise_dtype if name in DENOISER_ALONE else model.dtype
        return map_kernels(lambda kernel, _: kernel.astype(dtype), {name: part})[name]

    return {name: cast(name, part) for name, part in params.items()}


def _outputs_first(kernel: Any, weight: Weight) -> jax.Array:
    """Transposes [..., *inputs, *outputs] to [..., *outputs, *inputs]."""
    last = weight.input_axes(kernel.ndim, output_major=True)
    return jnp.moveaxis(kernel, weight.input_axes(kernel.ndim), last)


def _in_denoise_dtype(model: Gemma, params: Params) -> Params:
    if not isinstance(model, DiffusionGemma) or not model.config.has_frozen_encoder:
        return params
    if model.execution.denoise_dtype is None:
        return params
    cast = {
        name: jax.tree.map(lambda leaf: leaf.astype(model.denoise_dtype), params[name])
        for name in DENOISER_ALONE
        if name in params
    }
    return params | cast
