"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) as pure functions of parameters.

Adapters are a tree with the structure of the parameters, in which an adapted kernel W is replaced
by two factors `lora_a` [.., in, r] and `lora_b` [.., r, out]; the merged kernel is
W + (alpha / r) A B. Leading axes are those of the kernel: repetitions of the layer pattern, and
experts. Parameters that are trained in full are also in the tree. Modules do not depend on
adapters: a model runs on merged parameters.

Adapters for only the denoise pass need a model with a separate denoiser; its encode pass then
equals that of the base bit for bit. `base_params` converts the parameters of any base to such a
model.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from diffusiongemma.models.arrays import Params
from diffusiongemma.models.config import SHARED, ModelConfig
from diffusiongemma.models.execution import product
from diffusiongemma.models.weights import weight_at

BOTH, DENOISE = 'both', 'denoise'
_ENCODE_ALONE = ('embedder/', 'backbone/')  # in a model with a separate denoiser
_A, _B = 'lora_a', 'lora_b'
_MeshAxes = str | tuple[str, ...] | None  # the mesh axes that split one dimension


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The config of LoRA adapters.

    Attributes:
      rank: r, the number of columns of A and rows of B.
      alpha: A B is scaled by alpha / r.
      targets: patterns (`fnmatch`) of '/'-joined names; matching kernels are adapted.
      whole: patterns of parameters that are trained in full, by default those that an
        autoregressive base does not have.
      passes: 'both', or 'denoise' to adapt only the denoise pass.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ('*/attention/*', '*/mlp/*', '*/moe/experts/*')
    whole: tuple[str, ...] = ('self_conditioning/*', '*/denoise_scalar')
    passes: str = DENOISE

    def __post_init__(self) -> None:
        object.__setattr__(self, 'targets', tuple(self.targets))
        object.__setattr__(self, 'whole', tuple(self.whole))
        if self.rank < 1:
            raise ValueError(f'rank must be >= 1, got {self.rank}.')
        if self.alpha <= 0:
            raise ValueError(f'alpha must be > 0, got {self.alpha}.')
        if self.passes not in (BOTH, DENOISE):
            raise ValueError(f'passes must be {BOTH!r} or {DENOISE!r}, got {self.passes!r}.')

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class _Axes(NamedTuple):
    """The numbers of batch (layers, experts), input and output axes of a kernel."""

    batch: int
    inputs: int
    outputs: int


def init_lora(config: LoraConfig, params: Mapping[str, Any], key: jax.Array) -> Params:
    """Returns initial adapters, which do not change the model: A is random, B is zero, float32.

    Args:
      config: the config of the adapters.
      params: the parameters of the model; only shapes are used, except for parameters that are
        trained in full.
      key: the PRNG key; each factor gets it folded with the index of its name in sorted order.

    Raises:
      ValueError: if no parameter matches, or the model has no separate denoiser to adapt.
    """
    if config.passes == DENOISE and 'denoise_backbone' not in params:
        raise ValueError(
            "adapters of passes='denoise' need a model with a separate denoiser; make its "
            'parameters with base_params.'
        )
    adapters = {}
    for index, (name, value) in enumerate(sorted(flatten_dict(dict(params), sep='/').items())):
        axes = _axes(name, value.ndim)
        if _matches(config, config.whole, name):
            adapters[name] = jnp.asarray(value, jnp.float32)
        elif _matches(config, config.targets, name) and axes is not None:
            rows, columns = _factor_shapes(value.shape, axes, config.rank)
            noise = jax.random.normal(jax.random.fold_in(key, index), rows, jnp.float32)
            adapters[f'{name}/{_A}'] = noise * rows[-2] ** -0.5
            adapters[f'{name}/{_B}'] = jnp.zeros(columns, jnp.float32)
    if not any(name.endswith(_A) for name in adapters):
        raise ValueError(f'no kernel matches the targets {list(config.targets)}.')
    tree: Params = unflatten_dict(adapters, sep='/')
    return tree


def merge_lora(
    params: Mapping[str, Any], adapters: Mapping[str, Any], config: LoraConfig
) -> Params:
    """Returns the parameters with the adapters merged in, in the dtypes of the parameters.

    Args:
      params: the parameters of the base. Those that are trained in full may be missing.
      adapters: trained adapters with the structure of `init_lora`.
      config: the config of the adapters.

    Raises:
      ValueError: if the base lacks a kernel or has one with another shape.
    """
    merged = flatten_dict(dict(params), sep='/')
    factors = flatten_dict(dict(adapters), sep='/')
    for name, value in factors.items():
        kernel, _, leaf = name.rpartition('/')
        if leaf == _A:
            b = factors[f'{kernel}/{_B}']
            merged[kernel] = _with_delta(kernel, merged.get(kernel), value, b, config)
        elif leaf != _B:
            like = merged.get(name)
            merged[name] = value if like is None else value.astype(like.dtype)
    tree: Params = unflatten_dict(merged, sep='/')
    return tree


def base_params(target: ModelConfig, params: Mapping[str, Any]) -> Params:
    """Returns the parameters of a base in the structure of the `target` model, without copies.

    A separate denoiser starts from the base's layers, with the scalars of its denoise pass. A
    shared one starts from the encode scalars if the base is autoregressive. Parameters that the
    base does not have (self-conditioning) are left out.

    Args:
      target: the config of the adapted model.
      params: the parameters of the base, a Gemma or DiffusionGemma with the same backbone.
    """
    flat = flatten_dict(dict(params))
    result = dict(flat)
    for path, value in flat.items():
        if path[0] != 'backbone' or target.kind is None or 'denoise_backbone' in params:
            continue
        denoise_scalar = (*path[:-1], 'denoise_scalar')
        if target.kind == SHARED:
            if path[-1] == 'encode_scalar':
                result.setdefault(denoise_scalar, value)
            continue
        separate = ('denoise_backbone', *path[1:])
        if path[-1] == 'denoise_scalar':
            del result[path]
            result[(*separate[:-1], 'encode_scalar')] = value
        elif path[-1] != 'encode_scalar' or denoise_scalar not in flat:
            result[separate] = value
    tree: Params = unflatten_dict(result)
    return tree


def adapter_shardings(adapters: Mapping[str, Any], shardings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the shardings of adapters: factors are sharded like their kernel, but not the rank.

    Args:
      adapters: a tree from `init_lora` (of arrays or shapes).
      shardings: the NamedSharding of every parameter, from `parallel.param_shardings`.
    """
    kernels = flatten_dict(dict(shardings), sep='/')
    placed = {}
    for name, value in flatten_dict(dict(adapters), sep='/').items():
        kernel, _, leaf = name.rpartition('/')
        if leaf not in (_A, _B):
            placed[name] = kernels[name]
            continue
        sharding = kernels[kernel]
        axes = _axes(kernel, len(sharding.spec))
        assert axes is not None  # only kernels have factors
        spec = tuple(sharding.spec)
        outer, inner = spec[: axes.batch], spec[axes.batch :]
        if leaf == _A:
            factor = (inner[0] if axes.inputs == 1 else None, None)
        else:
            factor = (None, inner[-1] if axes.outputs == 1 else None)
        divisible_axes = _divisible((*outer, *factor), value.shape, sharding.mesh)
        placed[name] = jax.sharding.NamedSharding(
            sharding.mesh, jax.sharding.PartitionSpec(*divisible_axes)
        )
    tree: dict[str, Any] = unflatten_dict(placed, sep='/')
    return tree


def _divisible(
    spec: tuple[_MeshAxes, ...], shape: tuple[int, ...], mesh: jax.sharding.Mesh
) -> tuple[_MeshAxes, ...]:
    def ways(axes: _MeshAxes) -> int:
        names = (axes,) if isinstance(axes, str) else axes or ()
        return product(names, mesh)

    return tuple(
        axes if size % ways(axes) == 0 else None for axes, size in zip(spec, shape, strict=True)
    )


def _matches(config: LoraConfig, patterns: tuple[str, ...], name: str) -> bool:
    if config.passes == DENOISE and name.startswith(_ENCODE_ALONE):
        return False
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _axes(name: str, ndim: int) -> _Axes | None:
    """Returns the axes of the kernel `name`; None if the parameter is not a kernel."""
    weight = weight_at(name.split('/'))
    if weight is None or not weight.inputs:
        return None
    inputs, outputs = len(weight.inputs), len(weight.outputs)
    return _Axes(ndim - inputs - outputs, inputs, outputs)


def _factor_shapes(
    shape: tuple[int, ...], axes: _Axes, rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes of A [*batch, in, r] and B [*batch, r, out] for [*batch, *in, *out]."""
    batch, matrix = shape[: axes.batch], shape[axes.batch :]
    inputs, outputs = math.prod(matrix[: axes.inputs]), math.prod(matrix[axes.inputs :])
    return (*batch, inputs, rank), (*batch, rank, outputs)


def _with_delta(
    name: str, kernel: jax.Array | None, a: jax.Array, b: jax.Array, config: LoraConfig
) -> jax.Array:
    """Returns kernel + scale * A B, computed in float32."""
    axes = None if kernel is None else _axes(name, kernel.ndim)
    factors = tuple(a.shape), tuple(b.shape)
    if kernel is None or axes is None or _factor_shapes(kernel.shape, axes, a.shape[-1]) != factors:
        actual = 'none' if kernel is None else f'one of shape {kernel.shape}'
        raise ValueError(
            f'the adapters of {name} have shapes {a.shape} and {b.shape}, the base has {actual}: '
            'they are for another base; pass the one that they were trained on.'
        )
    delta = jnp.einsum('...ir,...ro->...io', a, b, preferred_element_type=jnp.float32)
    delta = config.scale * delta.reshape(kernel.shape)  # [*batch, *in, *out]
    return (jnp.asarray(kernel).astype(jnp.float32) + delta).astype(kernel.dtype)
