"""The device mesh with five named axes, any of which may have size one."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np

MESH_AXES = ('data', 'fsdp', 'tensor', 'expert', 'sequence')


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The number of devices along each mesh axis; one may be -1 to take all remaining devices.

    Attributes:
      data: copies of the parameters, each with a part of the batch.
      fsdp: ways to split both the parameters and the batch.
      tensor: ways to split heads and FFN widths.
      expert: ways to split experts.
      sequence: ways to split the tokens of a row.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    sequence: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.astuple(self)
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise ValueError(f'mesh sizes must be >= 1, with at most one -1, got {vars(self)}.')

    def make(self, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
        """Returns the mesh over `devices`, see `make_mesh`."""
        return make_mesh(dataclasses.asdict(self), devices)


def make_mesh(
    axes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """Returns a mesh over all devices.

    Args:
      axes: the size of each axis of `MESH_AXES`; a missing axis has size 1. One axis may be -1 to
        take all remaining devices. The default is {'data': -1}.
      devices: the devices, by default `jax.devices()`.

    Raises:
      ValueError: if an axis is unknown, or the product of the sizes is not the number of devices.
    """
    axes = dict(axes or {'data': -1})
    devices = list(jax.devices() if devices is None else devices)
    unknown = sorted(set(axes) - set(MESH_AXES))
    if unknown:
        raise ValueError(f'unknown mesh axes {unknown}; the mesh has {list(MESH_AXES)}.')
    sizes = list(
        dataclasses.astuple(MeshConfig(**{name: int(size) for name, size in axes.items()}))
    )
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
