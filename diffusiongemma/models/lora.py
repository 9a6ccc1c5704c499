"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) as pure functions of parameters.

Adapters are a tree like the parameters': an adapted kernel W is replaced by two factors
`lora_a` [.., in, r] and `lora_b` [.., r, out], and W + (alpha / r) A B takes its place. Leading
axes are those of the kernel: repetitions of the layer pattern, experts. What is trained whole
(beside the low-rank part) is in the tree as it is. No module knows of any of this: a model runs on
merged parameters.

Adapters of the denoise pass alone need a model whose denoise pass has layers of its own
(kind 'separate'); the encode pass then stays the base's to the bit. `base_params` makes such
parameters from those of any base.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from diffusiongemma.models.config import SHARED, ModelConfig
from diffusiongemma.models.execution import product
from diffusiongemma.models.weights import weight_at

BOTH, DENOISE = 'both', 'denoise'
_ENCODE_ALONE = ('embedder/', 'backbone/')  # in a model with a separate denoiser
_A, _B = 'lora_a', 'lora_b'


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What is adapted, and how.

    Attributes:
      rank: r, columns of A and rows of B.
      alpha: the product A B is scaled by alpha / r.
      targets: patterns (`fnmatch`) of '/'-joined names; the kernels that match one are adapted.
      whole: patterns of parameters that are trained themselves. By default what an
        autoregressive base does not have.
      passes: 'both', or 'denoise' for the denoise pass alone.
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
    """How many axes of a kernel are batch (layers, experts), inputs and outputs."""

    batch: int
    inputs: int
    outputs: int


def init_lora(config: LoraConfig, params: Mapping[str, Any], key: jax.Array) -> dict:
    """Adapters that change nothing yet: A is random, B zero, in float32.

    Args:
      config: what is adapted.
      params: of the model; only shapes are used, and the values of what is trained whole.
      key: of the random factors; split by the order of the names.

    Raises:
      ValueError: no parameter matches, or the pass cannot be adapted alone.
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
    return unflatten_dict(adapters, sep='/')


def merge_lora(params: Mapping[str, Any], adapters: Mapping[str, Any], config: LoraConfig) -> dict:
    """The parameters with the adapters in them, in the parameters' dtypes.

    Args:
      params: of the base. What is trained whole may be missing.
      adapters: from `init_lora`, trained.
      config: of the adapters.

    Raises:
      ValueError: the base has no such kernel, or one of another shape.
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
    return unflatten_dict(merged, sep='/')


def base_params(target: ModelConfig, params: Mapping[str, Any]) -> dict:
    """Parameters of a base as those of the `target` model; shared arrays are not copied.

    A separate denoiser starts at the base's layers, with the scalars of its denoise pass; a
    shared one at the encode scalars, where the base is autoregressive. What the base does not
    have (self-conditioning) is left out.

    Args:
      target: config of the adapted model.
      params: of the base, a Gemma or DiffusionGemma with the same backbone.
    """
    flat = flatten_dict(dict(params))
    found = dict(flat)
    for path, value in flat.items():
        if path[0] != 'backbone' or target.kind is None or 'denoise_backbone' in params:
            continue
        denoise_scalar = (*path[:-1], 'denoise_scalar')
        if target.kind == SHARED:
            if path[-1] == 'encode_scalar':
                found.setdefault(denoise_scalar, value)
            continue
        separate = ('denoise_backbone', *path[1:])
        if path[-1] == 'denoise_scalar':
            del found[path]
            found[(*separate[:-1], 'encode_scalar')] = value
        elif path[-1] != 'encode_scalar' or denoise_scalar not in flat:
            found[separate] = value
    return unflatten_dict(found)


def adapter_shardings(adapters: Mapping[str, Any], shardings: Mapping[str, Any]) -> dict:
    """Shardings of adapters: a factor lies as its kernel does, the rank on every device.

    Args:
      adapters: a tree from `init_lora` (of arrays or shapes).
      shardings: NamedSharding of every parameter, `parallel.param_shardings`.
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
            rest = (inner[0] if axes.inputs == 1 else None, None)
        else:
            rest = (None, inner[-1] if axes.outputs == 1 else None)
        kept = _divisible((*outer, *rest), value.shape, sharding.mesh)
        placed[name] = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*kept))
    return unflatten_dict(placed, sep='/')


def _divisible(spec: tuple, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> tuple:
    def ways(axes: str | tuple[str, ...] | None) -> int:
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
    """The axes of the kernel `name`; None where the parameter is no kernel."""
    weight = weight_at(name.split('/'))
    if weight is None or not weight.inputs:
        return None
    inputs, outputs = len(weight.inputs), len(weight.outputs)
    return _Axes(ndim - inputs - outputs, inputs, outputs)


def _factor_shapes(
    shape: tuple[int, ...], axes: _Axes, rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A [*batch, in, r] and B [*batch, r, out] of a kernel [*batch, *in, *out]."""
    batch, rest = shape[: axes.batch], shape[axes.batch :]
    inputs, outputs = math.prod(rest[: axes.inputs]), math.prod(rest[axes.inputs :])
    return (*batch, inputs, rank), (*batch, rank, outputs)


def _with_delta(
    name: str, kernel: jax.Array | None, a: jax.Array, b: jax.Array, config: LoraConfig
) -> jax.Array:
    """kernel + scale * A B, computed in float32."""
    axes = None if kernel is None else _axes(name, kernel.ndim)
    factors = tuple(a.shape), tuple(b.shape)
    if kernel is None or axes is None or _factor_shapes(kernel.shape, axes, a.shape[-1]) != factors:
        have = 'none' if kernel is None else f'one of shape {kernel.shape}'
        raise ValueError(
            f'the adapters of {name} have shapes {a.shape} and {b.shape}, and the base has {have}: '
            'they are not of this base.'
        )
    delta = jnp.einsum('...ir,...ro->...io', a, b, preferred_element_type=jnp.float32)
    delta = config.scale * delta.reshape(kernel.shape)
    return (jnp.asarray(kernel).astype(jnp.float32) + delta).astype(kernel.dtype)
