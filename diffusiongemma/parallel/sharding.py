"""Sharding of parameters, training state and batches.

Each kernel names its logical axes where it is created (`models/`); the table below says
on which mesh axes they lie. Everything else follows from it.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusiongemma.models.transformer import init_boxed_params

# Logical axis -> mesh axis (None: replicated). A kernel may use a mesh axis only once.
LOGICAL_AXIS_RULES: tuple[tuple[str, str | None], ...] = (
    ('vocab', 'tensor'),
    ('embed', 'fsdp'),
    ('mlp', 'tensor'),
    ('heads', 'tensor'),
    ('kv_heads', 'tensor'),
    ('head_dim', None),
    ('experts', 'expert'),
    ('expert_mlp', 'tensor'),
    ('router_experts', None),
    ('norm', None),
    ('layers', None),
)

BATCH_AXES = ('data', 'fsdp')


def param_shardings(model: nn.Module, mesh: Mesh) -> Any:
    """NamedSharding of every parameter of `model`, from its logical axes.

    A dimension that its mesh axes do not divide is replicated (e.g. one key/value head
    under tensor parallelism).
    """
    boxed = jax.eval_shape(lambda key: init_boxed_params(model, key), jax.random.key(0))
    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), LOGICAL_AXIS_RULES)
    shapes = nn.meta.unbox(boxed)

    def sharding(shape: jax.ShapeDtypeStruct, spec: PartitionSpec) -> NamedSharding:
        names = tuple(spec) + (None,) * (len(shape.shape) - len(spec))
        kept = (
            name if name is not None and size % mesh.shape[name] == 0 else None
            for size, name in zip(shape.shape, names, strict=True)
        )
        return NamedSharding(mesh, PartitionSpec(*kept))

    return jax.tree.map(sharding, shapes, specs)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, batch_size: int) -> NamedSharding:
    """Rows spread over the data and fsdp axes.

    Raises:
      ValueError: the batch is not divisible by these axes.
    """
    ways = mesh.shape['data'] * mesh.shape['fsdp']
    if batch_size % ways:
        raise ValueError(
            f'batch_size={batch_size} is not divisible by data x fsdp = {ways} of the mesh; '
            f'use a multiple of {ways} or a smaller mesh axis.'
        )
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def state_shardings(abstract_state: Any, params_sharding: Any, mesh: Mesh) -> Any:
    """Shardings for a training state: whatever mirrors the parameters is sharded like them.

    A subtree with the structure of the parameters (masters, EMA, Adam moments) takes their
    shardings; every other leaf (step counters) is replicated.
    """
    structure = jax.tree.structure(params_sharding)

    def mirrors_params(node: Any) -> bool:
        return jax.tree.structure(node) == structure

    return jax.tree.map(
        lambda node: params_sharding if mirrors_params(node) else replicated(mesh),
        abstract_state,
        is_leaf=mirrors_params,
    )


def init_sharded(
    init: Callable[..., Any], params_sharding: Any, mesh: Mesh, *args: Any
) -> tuple[Any, Any]:
    """Runs `init(*args)` with its outputs created in their shards; returns (state, shardings).

    Large arrays belong in `args`: what `init` closes over becomes part of the program.
    """
    shardings = state_shardings(jax.eval_shape(init, *args), params_sharding, mesh)
    return jax.jit(init, out_shardings=shardings)(*args), shardings
