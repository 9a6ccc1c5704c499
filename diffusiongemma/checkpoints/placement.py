"""Assembles sharded parameters from pieces on the host."""

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

Bounds = tuple[tuple[int, int], ...]  # (start, stop) of a shard along each axis


def param_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter by its '/'-joined path, without allocating any."""
    return dict(_param_shapes(model))


@functools.lru_cache(maxsize=16)  # tracing a model takes longer than reading a small one
def _param_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    return {name: value.shape for name, value in flatten_dict(shapes, sep='/').items()}


def flat_shardings(
    model: nn.Module, mesh: jax.sharding.Mesh | None
) -> dict[str, jax.sharding.Sharding | None]:
    """Returns the sharding of every parameter by its '/'-joined path; None without a mesh."""
    if mesh is None:
        return dict.fromkeys(param_shapes(model))
    shardings: dict[str, jax.sharding.Sharding | None] = flatten_dict(
        param_shardings(model, mesh), sep='/'
    )
    return shardings


def assemble(
    shape: tuple[int, ...],
    dtype: Any,
    sharding: jax.sharding.Sharding | None,
    parts: Iterable[tuple[Any, np.ndarray]],
) -> jax.Array:
    """Returns one parameter, assembled from parts that are read one at a time.

    The host holds one part and the shards of its local devices.

    Args:
      shape: the shape of the parameter.
      dtype: the dtype of the parameter; None for that of its first part.
      sharding: the sharding of the parameter; None for the default device, uncommitted.
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
    """Copies the part of `value` that lies within `bounds` into `buffer`, with a cast."""
    region = tuple(slice(*pair) for pair in bounds)
    if index is ...:
        buffer[...] = value[region]
        return
    start, stop = bounds[0]
    if start <= index < stop:
        buffer[index - start] = value[region[1:]]
