"""Scores positions with the output head; on a mesh its embedding is gathered once per pass.

Left to the compiler, a loop over chunks of logits gathers the embedding for every chunk, and sums
its gradient over the devices for every chunk. With the vocabulary of Gemma, these are most of the
bytes that a training step sends.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffusiongemma.distillation.losses import over_positions
from diffusiongemma.models.arrays import Params
from diffusiongemma.models.denoiser import DiffusionGemma
from diffusiongemma.models.execution import Execution, partition_spec, product
from diffusiongemma.models.transformer import Gemma
from diffusiongemma.models.weights import WEIGHTS

MeshAxes = tuple[tuple[str, ...], ...]  # the mesh axes that split each dimension of an array


def score_positions(
    score: Callable[..., Any],
    model: Gemma,
    params: Sequence[Params],
    shape: Sequence[int],
    *trees: Any,
) -> Any:
    """Applies `score` to `Execution.logits_chunk` positions of each row at a time.

    If there are several chunks on a mesh that only splits rows, each device runs all chunks of its
    own rows by itself. It gathers the embedding once before them, in the compute dtype, and sums
    the gradients of its chunks in float32, which the devices then sum and split once. The backward
    pass gathers again, so that no gathered embedding is kept from the forward pass. If the mesh
    also splits the vocabulary or the positions (`tensor`, `sequence`), the compiler gathers and
    sums for every chunk, because in jax 0.10 it aborts if `shard_map` maps only some axes.

    Args:
      score: a pure function from `params` and trees with leaves [B, c, ...] to a tree with leaves
        [B, c, ...], which handles each position independently.
      model: the model whose logits are scored, with the chunk size, the mesh and the rules.
      params: the parameters of each model that `score` reads, whose embeddings are sharded by the
        rules. An empty dict stands for a model without parameters.
      shape: the axes of rows and positions, [B, L] or [B, N, C].
      *trees: trees with leaves [*shape, ...]. The first are the hidden states that the first
        parameters are applied to.

    Returns:
      The results of `score`, leaves [*shape, ...].
    """
    execution = model.execution
    chunk, rows = execution.logits_chunk, _row_axes(execution, shape[0])
    if not rows or not 0 < chunk < math.prod(shape[1:]):
        return over_positions(functools.partial(score, *params), chunk, shape, *trees)
    # Two models may share a table, which is then gathered once.
    tables = list({id(_table(part)): _table(part) for part in params if part}.values())
    number = {id(table): i for i, table in enumerate(tables)}
    axes = WEIGHTS['embedder/embedding'].axes
    split = [
        tuple(
            tuple(axis for axis in of_dimension if axis in rows)
            for of_dimension in execution.mesh_axes(table.shape, axes)
        )
        for table in tables
    ]

    @jax.checkpoint
    def local(shards: list[jax.Array], trees: tuple[Any, ...]) -> Any:
        gathered = []
        for i, shard in enumerate(shards):
            hidden = trees[0] if i == 0 else ()
            table, zeros, hidden = _gather(split[i], _compute_dtype(model), shard, hidden)
            gathered.append((jax.lax.stop_gradient(table), zeros))
            trees = (hidden, *trees[1:]) if i == 0 else trees

        def score_chunk(*trees: Any) -> Any:
            parts = (
                _with_table(part, _use(*gathered[number[id(_table(part))]])) if part else part
                for part in params
            )
            return score(*parts, *trees)

        num_rows = len(jax.tree.leaves(trees)[0])
        return over_positions(score_chunk, chunk, (num_rows, *shape[1:]), *trees)

    specs = [partition_spec(axes) for axes in split]
    by_rows = partition_spec([rows])
    on_devices = jax.shard_map(
        local,
        mesh=execution.mesh,
        in_specs=(specs, by_rows),
        out_specs=by_rows,
        axis_names=set(rows),
        check_vma=False,  # so that gradients are summed over the devices after the loop, not in it
    )
    return on_devices(tables, trees)


def _row_axes(execution: Execution, num_rows: int) -> tuple[str, ...]:
    """Returns the mesh axes that split rows, or none if other axes split something else."""
    if execution.mesh is None:
        return ()
    rows = execution.mesh_axes((num_rows,), ('batch',))[0]
    return rows if product(rows, execution.mesh) == execution.mesh.size else ()


def _table(params: Params) -> jax.Array:
    table: jax.Array = params['embedder']['embedding']
    return table


def _with_table(params: Params, table: jax.Array) -> Params:
    return params | {'embedder': params['embedder'] | {'embedding': table}}


def _compute_dtype(model: Gemma) -> jnp.dtype:
    """Returns the dtype that holds the embedding of both passes without a loss."""
    if isinstance(model, DiffusionGemma):
        return jnp.promote_types(model.dtype, model.denoise_dtype)
    dtype: jnp.dtype = jnp.dtype(model.dtype)
    return dtype


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(
    split: MeshAxes, dtype: jnp.dtype, shard: jax.Array, hidden: Any
) -> tuple[jax.Array, jax.Array, Any]:
    """Returns the whole table [V, D], float32 zeros whose gradient becomes the shard's, and hidden.

    The gradient of `_use` is that of the zeros, because JAX sums the gradients of all iterations of
    a loop in the dtype of the value, which is too coarse if it is bfloat16. The gradient of the
    hidden states waits for that of the shard: otherwise the compiler would keep the gradients of
    whole tables while the backward pass goes on through the layers.

    Args:
      split: the mesh axes that split each dimension of the table, the outermost first.
      dtype: the compute dtype.
      shard: the part of the table on this device.
      hidden: the hidden states that the table is multiplied with, a tree of floating-point arrays.
    """
    table = shard.astype(dtype) if dtype.itemsize < shard.dtype.itemsize else shard
    for dimension, axes in enumerate(split):
        for axis in reversed(axes):
            # The innermost axis first, so that the parts are in order.
            table = jax.lax.all_gather(table, axis, axis=dimension, tiled=True)
    return table, jnp.zeros(table.shape, jnp.float32), hidden


def _gather_forward(
    split: MeshAxes, dtype: jnp.dtype, shard: jax.Array, hidden: Any
) -> tuple[tuple[jax.Array, jax.Array, Any], jax.Array]:
    return _gather(split, dtype, shard, hidden), jnp.zeros((), shard.dtype)


def _gather_backward(
    split: MeshAxes, dtype: jnp.dtype, like: jax.Array, gradients: tuple[jax.Array, jax.Array, Any]
) -> tuple[jax.Array, Any]:
    del dtype
    _, gradient, by_hidden = gradients
    for dimension, axes in enumerate(split):
        for axis in axes:
            gradient = jax.lax.psum_scatter(gradient, axis, scatter_dimension=dimension, tiled=True)
    by_shard = gradient.astype(like.dtype)
    by_shard, by_hidden = jax.lax.optimization_barrier((by_shard, by_hidden))
    return by_shard, by_hidden


_gather.defvjp(_gather_forward, _gather_backward)


@jax.custom_vjp
def _use(table: jax.Array, zeros: jax.Array) -> jax.Array:
    """Returns the table; its gradient becomes that of `zeros`, in float32."""
    del zeros
    return table


def _use_forward(table: jax.Array, zeros: jax.Array) -> tuple[jax.Array, None]:
    return _use(table, zeros), None


def _use_backward(_: None, gradient: jax.Array) -> tuple[None, jax.Array]:
    return None, gradient.astype(jnp.float32)


_use.defvjp(_use_forward, _use_backward)
