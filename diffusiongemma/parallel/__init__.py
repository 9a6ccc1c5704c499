"""The device mesh, and the table that maps logical axes to mesh axes."""

from diffusiongemma.parallel.mesh import MESH_AXES, MeshConfig, make_mesh
from diffusiongemma.parallel.sharding import (
    LOGICAL_AXIS_RULES,
    batch_sharding,
    batch_ways,
    init_sharded,
    on_mesh,
    param_shardings,
    replicated,
    rules_with,
    state_shardings,
)

__all__ = [
    'LOGICAL_AXIS_RULES',
    'MESH_AXES',
    'MeshConfig',
    'batch_sharding',
    'batch_ways',
    'init_sharded',
    'make_mesh',
    'on_mesh',
    'param_shardings',
    'replicated',
    'rules_with',
    'state_shardings',
]
