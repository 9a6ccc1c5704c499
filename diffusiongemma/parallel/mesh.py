"""The device mesh: five named axes, any of which may have size one."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np

MESH_AXES = ('data', 'fsdp', 'tensor', 'expert', 'sequence')


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1, which takes what the others leave.

    Attributes:
      data: copies of the parameters, each with its part of the batch.
      fsdp: parameters and batch are split.
      tensor: heads and FFN widths are split.
      expert: experts are split.
      sequence: tokens of a row are split.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    sequence: int = 1

    def make(self, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
        """Returns the mesh over `devices`, see `make_mesh`."""
        return make_mesh(dataclasses.asdict(self), devices)


def make_mesh(
    axes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """A mesh over all devices.

    Args:
      axes: size of each axis of `MESH_AXES`; left out means 1. One axis may be -1: it takes
        the devices that the others leave. Default: {'data': -1}.
      devices: defaults to `jax.devices()`.

    Raises:
      ValueError: an unknown axis, or sizes whose product is not the number of devices.
    """
    axes = dict(axes or {'data': -1})
    devices = list(jax.devices() if devices is None else devices)
    unknown = sorted(set(axes) - set(MESH_AXES))
    if unknown:
        raise ValueError(f'unknown mesh axes {unknown}; the mesh has {list(MESH_AXES)}.')
    sizes = [int(axes.get(name, 1)) for name in MESH_AXES]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f'mesh sizes must be >= 1, with at most one -1, got {axes}.')
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f'the mesh {axes} does not cover the {len(devices)} devices exactly: '
            'make the product of the axis sizes equal to the number of devices, '
            'or set one axis to -1.'
        )
    return jax.sharding.Mesh(np.asarray(devices).reshape(sizes), MESH_AXES)
