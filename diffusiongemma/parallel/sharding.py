"""Shardings of parameters, training state and batches.

Each weight (`models/weights.py`) and each activation (where it is created) names its logical axes.
The table below maps them to mesh axes and determines all shardings.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusiongemma.models.execution import AxisRules, partition_spec, product, spread
from diffusiongemma.models.expert_parallel import check_experts
from diffusiongemma.models.transformer import Gemma, init_boxed_params

M = TypeVar('M', bound=Gemma)

# Logical axis -> mesh axes over which it is sharded, in this order; () for none. An array uses a
# mesh axis only once, and a dimension that a mesh axis does not divide is replicated along it.
LOGICAL_AXIS_RULES: AxisRules = (
    # Parameters; optimizer state, EMA and teacher follow them.
    ('vocab', ('tensor',)),
    ('embed', ('fsdp', 'expert')),  # the model width D, in the embedding; below, in each kernel
    ('qkv_embed', ('fsdp', 'expert')),
    ('o_embed', ('fsdp', 'expert')),
    ('mlp_embed', ('fsdp', 'expert')),
    ('expert_embed', ('fsdp', 'expert')),  # in kernels whose 'experts' use 'expert', only fsdp
    ('router_embed', ('fsdp', 'expert')),
    ('per_layer_embed', ('fsdp', 'expert')),
    ('table_embed', ('fsdp', 'expert')),  # in the per-layer embedding
    ('state_embed', ('fsdp', 'expert')),
    ('mlp', ('tensor',)),
    ('heads', ('tensor',)),
    ('kv_heads', ('tensor',)),
    ('head_dim', ()),
    ('experts', ('expert',)),
    ('expert_mlp', ('tensor',)),
    ('router_experts', ()),
    ('per_layer', ('tensor',)),
    ('draft_input', ('tensor',)),
    ('serial_rank', ()),
    ('norm', ()),
    ('layers', ()),
    # Batches and activations. The expert axis also splits rows: each of its devices has separate
    # tokens, which the devices exchange for the expert layers.
    ('batch', ('data', 'fsdp', 'expert')),
    ('length', ('sequence',)),  # tokens of a row or of a canvas
    ('slots', ('sequence',)),  # slots of the K/V cache
)


def on_mesh(model: M, mesh: Mesh, rules: AxisRules = LOGICAL_AXIS_RULES) -> M:
    """Returns the model with activations, K/V cache and experts sharded on a mesh by the table.

    Without this, the compiler chooses the shardings of activations from those of its inputs, and
    devices gather expert weights instead of exchanging tokens.

    Raises:
      ValueError: if the experts can't be divided evenly, or `rules` names an unknown axis.
    """
    unknown = sorted({axis for _, axes in rules for axis in axes} - set(mesh.axis_names))
    if unknown:
        raise ValueError(
            f'config.compute.rules use mesh axes {unknown}; the mesh has {list(mesh.axis_names)}.'
        )
    used = mesh if mesh.size > 1 else None  # one device needs no shardings
    platform = mesh.devices.flat[0].platform
    execution = dataclasses.replace(
        model.execution, mesh=used, rules=tuple(rules), platform=platform
    )
    if used is not None and model.config.moe is not None:
        check_experts(model.config.moe.num_experts, execution)
    return model.clone(execution=execution)


def rules_with(overrides: Mapping[str, Sequence[str]]) -> AxisRules:
    """Returns the table with the rows of some logical axes replaced (`config.compute.rules`).

    A row for 'embed' applies to every axis of the model width ('qkv_embed', 'mlp_embed'...) that
    has no row of its own in `overrides`.

    Raises:
      ValueError: if the table has no such axis, or a row is not a tuple of different names.
    """
    table = dict(LOGICAL_AXIS_RULES)
    unknown = sorted(map(str, set(overrides) - set(table)))
    if unknown:
        near = difflib.get_close_matches(unknown[0], table, n=1)
        hint = f'did you mean {near[0]!r}?' if near else f'there are {sorted(table)}.'
        raise ValueError(f'config.compute.rules: no logical axes {unknown} in the table; {hint}')
    replaced = {name: _mesh_axes(name, axes) for name, axes in overrides.items()}
    if 'embed' in replaced:
        widths = [name for name in table if name.endswith('_embed')]
        replaced = dict.fromkeys(widths, replaced['embed']) | replaced
    return tuple((table | replaced).items())


def _mesh_axes(name: str, axes: Any) -> tuple[str, ...]:
    """Returns the mesh axes of one logical axis; raises ValueError if they are invalid."""
    is_row = isinstance(axes, list | tuple) and all(isinstance(axis, str) for axis in axes)
    if not is_row or len(set(axes)) < len(axes):
        raise ValueError(
            f'config.compute.rules[{name!r}] must be a tuple of different mesh axes, such as '
            f"('tensor',) or (), got {axes!r}."
        )
    return tuple(axes)


def rules_of(model: nn.Module) -> AxisRules:
    """Returns the table with which `on_mesh` sharded a model, or the default one."""
    execution = getattr(model, 'execution', None)
    return (execution and execution.rules) or LOGICAL_AXIS_RULES


def param_shardings(model: nn.Module, mesh: Mesh) -> Any:
    """Returns the NamedSharding of every parameter of `model`, from its logical axes."""
    boxed = jax.eval_shape(lambda key: init_boxed_params(model, key), jax.random.key(0))
    rules = rules_of(model)

    def sharding(shape: jax.ShapeDtypeStruct, names: PartitionSpec) -> NamedSharding:
        axes = (*names, *(None,) * (len(shape.shape) - len(names)))
        return NamedSharding(mesh, partition_spec(spread(shape.shape, axes, rules, mesh)))

    return jax.tree.map(sharding, nn.meta.unbox(boxed), nn.get_partition_spec(boxed))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding with the whole value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_ways(mesh: Mesh, rules: AxisRules = LOGICAL_AXIS_RULES) -> int:
    """Returns the number of parts that the rows of a batch are split into."""
    return product(dict(rules)['batch'], mesh)


def batch_sharding(
    mesh: Mesh, batch_size: int, rules: AxisRules = LOGICAL_AXIS_RULES
) -> NamedSharding:
    """Returns the sharding of rows over the mesh axes of 'batch', by default data, fsdp, expert.

    Raises:
      ValueError: if the batch size is not divisible by these axes.
    """
    axes, ways = dict(rules)['batch'], batch_ways(mesh, rules)
    if batch_size % ways:
        raise ValueError(
            f'batch_size={batch_size} is not divisible by {" x ".join(axes)} = {ways} of the mesh; '
            f'use a multiple of {ways} or a smaller mesh axis.'
        )
    return NamedSharding(mesh, PartitionSpec(axes))


def state_shardings(abstract_state: Any, params_sharding: Any, mesh: Mesh) -> Any:
    """Returns shardings for a training state: copies of a parameter are sharded like it.

    A leaf whose path ends in the path of a parameter, and which has at least its rank, gets the
    sharding of that parameter (master weights, EMA, optimizer moments). All other leaves (step
    counters, rows and columns of factored moments) are replicated.
    """
    by_path: dict[tuple[Any, ...], NamedSharding] = dict(
        jax.tree_util.tree_leaves_with_path(params_sharding)
    )

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for start in range(len(path) + 1):
            candidate = by_path.get(path[start:])
            if candidate is not None and len(candidate.spec) <= len(leaf.shape):
                return candidate
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, abstract_state)


def init_sharded(
    init: Callable[..., Any], params_sharding: Any, mesh: Mesh, *args: Any
) -> tuple[Any, Any]:
    """Runs `init(*args)` with its outputs created in their shards; returns (state, shardings).

    Pass large arrays in `args`, because arrays that `init` closes over become constants of the
    compiled program.
    """
    shardings = state_shardings(jax.eval_shape(init, *args), params_sharding, mesh)
    return jax.jit(init, out_shardings=shardings)(*args), shardings
