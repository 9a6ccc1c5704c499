"""Parameters laid out for speed when sampling; the function that they parametrize stays the same.

Checkpoints and training are of stacked layers with the inputs of each kernel in front.
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
from diffusiongemma.models.transformer import Gemma
from diffusiongemma.models.weights import Weight, map_kernels

STACKED = ('layers', 'shared_layers')

AnyGemma = TypeVar('AnyGemma', bound=Gemma)


def for_inference(model: Gemma, params: Params) -> tuple[Gemma, Params]:
    """The model and its parameters as they compute fastest on the devices at hand.

    The parameters of a denoiser with layers of its own are in its compute dtype, so that no pass
    has to convert them. Layers are unrolled where that `is_unrolled`. On one device the rows of a
    draft vocabulary's head are gathered, and on a CPU kernels are in the transposed layout.

    Args:
      model: of any family, in the layout of training.
      params: its parameters; nested dict of arrays.
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
    """Whether a model samples faster without a loop over its layers.

    On one CPU or GPU every model does. A TPU's compiler multiplies by dense weights where they lie
    in the stack, but a kernel takes whole arrays: in a loop each layer's experts, most of all
    weights, would be copied for it.
    """
    platform = model.execution.platform or jax.default_backend()
    if platform == 'tpu':
        return model.config.moe is not None
    return model.execution.mesh is None and platform in ('cpu', 'gpu', 'cuda')


def unroll_layers(model: Gemma, params: Params) -> tuple[Gemma, Params]:
    """The same function with the loop over layers unrolled, and the parameters that it takes.

    A loop copies each layer's weights out of the stacked ones before it uses them, which
    takes longer than a pass over few tokens itself; without the loop they are read where they lie.
    Compile time then grows with depth.

    Args:
      model: of any family, with `Execution.scan_layers`.
      params: its parameters; nested dict of arrays.

    Returns:
      The model and its parameters: `layers` [G, ...] has become `layers_0` to `layers_{G - 1}`.

    Raises:
      ValueError: the model is unrolled already.
    """
    if not model.execution.scan_layers:
        raise ValueError('the layers of this model are unrolled already (scan_layers=False).')

    def unrolled(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        made = {}
        for name, child in node.items():
            if name in STACKED:
                for g in range(jax.tree.leaves(child)[0].shape[0]):
                    made[f'{name}_{g}'] = jax.tree.map(lambda leaf, g=g: leaf[g], child)
            else:
                made[name] = unrolled(child)
        return made

    return with_execution(model, scan_layers=False), unrolled(params)


def with_execution(model: AnyGemma, **changes: Any) -> AnyGemma:
    """The model computed in another way, see `Execution`."""
    return model.clone(execution=dataclasses.replace(model.execution, **changes))


def gather_draft_head(model: Gemma, params: Params) -> tuple[Gemma, Params]:
    """The same function with the rows that a draft vocabulary scores as a parameter of their own.

    Without a draft vocabulary model and parameters are returned as they are.
    """
    if DRAFT_IDS not in params or model.execution.gather_draft_head:
        return model, params
    head = jnp.take(params['embedder']['embedding'], params[DRAFT_IDS], axis=0)
    head = head.astype(model.denoise_dtype)
    return with_execution(model, gather_draft_head=True), params | {DRAFT_HEAD: head}


def output_major_kernels(model: Gemma, params: Params) -> tuple[Gemma, Params]:
    """The same function with the outputs of each kernel in front of its inputs.

    XLA's products on a CPU are up to three times faster so, where the rows are few (`FEW_ROWS`).
    Routed experts have no gradient in this layout.

    Args:
      model: of any family, without `Execution.output_major`.
      params: its parameters; nested dict of arrays, layers stacked or not.

    Raises:
      ValueError: the kernels have their outputs in front already.
    """
    if model.execution.output_major:
        raise ValueError('the kernels of this model have their outputs in front already.')

    turned = map_kernels(_outputs_first, params)
    return with_execution(model, output_major=True), turned


def kernels_in_compute_dtype(model: DiffusionGemma, params: Params) -> Params:
    """The parameters with the kernels of layers in the dtype that every pass casts them to.

    Router, norms and embedding stay as they are. A step that casts once, before its passes, has one
    copy in bfloat16 for all of them, and gradients of every pass are stacked over layers in
    bfloat16, which is what their matmuls return, in place of float32.
    """

    def cast(name: str, part: Any) -> Any:
        dtype = model.denoise_dtype if name in DENOISER_ALONE else model.dtype
        return map_kernels(lambda kernel, _: kernel.astype(dtype), {name: part})[name]

    return {name: cast(name, part) for name, part in params.items()}


def _outputs_first(kernel: Any, weight: Weight) -> jax.Array:
    """Turns [..., *inputs, *outputs] into [..., *outputs, *inputs]."""
    last = weight.input_axes(kernel.ndim, output_major=True)
    return jnp.moveaxis(kernel, weight.input_axes(kernel.ndim), last)


def _in_denoise_dtype(model: Gemma, params: Params) -> Params:
    if not isinstance(model, DiffusionGemma) or not model.config.has_frozen_encoder:
        return params
    if model.execution.denoise_dtype is None:
        return params
    own = {
        name: jax.tree.map(lambda leaf: leaf.astype(model.denoise_dtype), params[name])
        for name in DENOISER_ALONE
        if name in params
    }
    return params | own
