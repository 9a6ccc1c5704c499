"""Parameters from pieces on the host straight into their shards."""

import functools
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from diffusiongemma.models.transformer import init_params
from diffusiongemma.parallel.sharding import param_shardings

Bounds = tuple[tuple[int, int], ...]  # of a shard: (start, stop) along each axis


def param_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of `model` by its '/'-joined path; nothing is allocated."""
    return dict(_param_shapes(model))


@functools.lru_cache(maxsize=16)  # tracing a model takes longer than reading a small one
def _param_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    return {name: value.shape for name, value in flatten_dict(shapes, sep='/').items()}


def flat_shardings(
    model: nn.Module, mesh: jax.sharding.Mesh | None
) -> dict[str, jax.sharding.Sharding | None]:
    """Sharding of every parameter by its '/'-joined path; None (default device) without mesh."""
    if mesh is None:
        return dict.fromkeys(param_shapes(model))
    return flatten_dict(param_shardings(model, mesh), sep='/')


def assemble(
    shape: tuple[int, ...],
    dtype: Any,
    sharding: jax.sharding.Sharding | None,
    parts: Iterable[tuple[Any, np.ndarray]],
) -> jax.Array:
    """One parameter from parts that come one at a time.

    The host holds one part and, of the parameter, the shards of its own devices.

    Args:
      shape: of the parameter.
      dtype: of the parameter; None for that of its first part.
      sharding: where it lies; None for the default device, uncommitted.
      parts: pairs of an index into the first axis and the value there, or one pair of `...` and
        the whole value. Together they fill the parameter.
    """
    if sharding is None:
        device_bounds = {None: tuple((0, size) for size in shape)}
    else:
        device_bounds = {
            device: tuple(s.indices(size)[:2] for s, size in zip(index or (), shape, strict=True))
            for device, index in sharding.addressable_devices_indices_map(shape).items()
        }
    buffers: dict[Bounds, np.ndarray] = {}
    for index, value in parts:
        for bounds in set(device_bounds.values()):
            if bounds not in buffers:
                size = [stop - start for start, stop in bounds]
                buffers[bounds] = np.empty(size, dtype or value.dtype)
            _copy_into(buffers[bounds], bounds, index, value)
        del value  # before the next one is read
    if sharding is None:
        (buffer,) = buffers.values()
        return jnp.asarray(buffer)
    shards = [jax.device_put(buffers[bounds], device) for device, bounds in device_bounds.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _copy_into(buffer: np.ndarray, bounds: Bounds, index: Any, value: np.ndarray) -> None:
    """Copies what of `value` lies within `bounds`, casting it."""
    region = tuple(slice(*pair) for pair in bounds)
    if index is ...:
        buffer[...] = value[region]
        return
    start, stop = bounds[0]
    if start <= index < stop:
        buffer[index - start] = value[region[1:]]
