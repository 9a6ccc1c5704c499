"""Grouped matmul: rows sorted by group are multiplied by the kernel of their group."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import logging

from diffusiongemma.models.arrays import ArrayOrShape
from diffusiongemma.models.kernels import grouped_gpu, grouped_tpu
from diffusiongemma.models.layers import is_quantized

LARGEST_BLOCK = 32  # the maximum rows of a block on CPUs
LARGEST_BLOCK_OF_MLPS = 16  # the number of float32 values in an AVX512 register


def grouped_product(
    x: jax.Array, kernels: Any, group_sizes: jax.Array, dtype: Any = jnp.float32
) -> jax.Array:
    """Returns `grouped_matmul` for kernels that may be quantized with one scale per output."""
    if not is_quantized(kernels):
        return grouped_matmul(x, kernels, group_sizes, dtype)
    sums = grouped_matmul(x, kernels.qvalue, group_sizes)
    group = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(x.shape[0]), side='right')  # [N]
    scale: jax.Array = kernels.scale[:, 0].at[group].get(mode='clip')  # [N, F]
    return (sums * scale).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(
    x: jax.Array, kernels: jax.Array, group_sizes: jax.Array, dtype: Any = jnp.float32
) -> jax.Array:
    """Returns x[rows of group e] @ kernels[e] for every group, without padding or dropped rows.

    Each platform has its own implementation of the forward pass and both gradients: CPUs loop over
    blocks of rows of one group, TPUs use JAX's kernels (`grouped_tpu`), and NVIDIA GPUs a Triton
    kernel (`grouped_gpu`). On other platforms, and for widths that a kernel does not support
    (`runs_kernel`), the fallback is `jax.lax.ragged_dot`.

    Args:
      x: [N, D], rows sorted by group.
      kernels: [E, D, F] in the dtype of x, or (without gradients) int8 or fp8; the matmul is
        computed in the dtype of x.
      group_sizes: [E] int32, the number of rows of each group; results for rows after their sum
        are undefined.
      dtype: the dtype of the result.

    Returns:
      [N, F] in `dtype`, summed in float32.
    """
    return _multiply(x, kernels, group_sizes, dtype)


def runs_kernel(x: ArrayOrShape, kernels: ArrayOrShape, platform: str | None) -> bool:
    """Returns whether a platform multiplies x [N, D] by kernels [E, D, F] without the fallback.

    On GPUs, XLA expands the fallback to a matmul of all rows with the weights of every group; on
    TPUs it does so for the gradient of the weights.
    """
    if platform == 'tpu':
        return grouped_tpu.fits(x, kernels)
    return platform not in ('gpu', 'cuda') or grouped_gpu.fits(x, kernels)


@functools.cache
def warn_of_fallback(
    rows: jax.ShapeDtypeStruct, kernels: jax.ShapeDtypeStruct, platform: str | None
) -> None:
    """Logs, once per shape, a warning if experts on a GPU or TPU run without a kernel."""
    if not runs_kernel(rows, kernels, platform):
        logging.warning(
            'experts of %d x %d in %s have no kernel on a %s: jax.lax.ragged_dot is the fallback, '
            'which multiplies each row by the weights of every expert (on TPUs in the backward '
            'pass). Widths must be multiples of %d.',
            *kernels.shape[1:], kernels.dtype, platform,
            grouped_tpu.LEAST if platform == 'tpu' else grouped_gpu.INNER,
        )  # fmt: skip


def _multiply(x: jax.Array, kernels: jax.Array, group_sizes: jax.Array, dtype: Any) -> jax.Array:
    """Returns the result of `grouped_matmul` in `dtype`."""
    by_platform = {'cpu': _by_blocks, 'cuda': grouped_gpu.grouped_matmul_gpu, 'default': _ragged}
    by_platform = _supported(x, kernels, dtype, by_platform, grouped_tpu.grouped_matmul_tpu)
    product: jax.Array = jax.lax.platform_dependent(x, kernels, group_sizes, **by_platform)
    return product


def _outer(x: jax.Array, y: jax.Array, group_sizes: jax.Array, dtype: Any) -> jax.Array:
    """Returns x[rows of e]^T @ y[rows of e]: [N, D], [N, F] -> [E, D, F] in `dtype`."""
    kernels = jax.ShapeDtypeStruct((group_sizes.shape[0], x.shape[1], y.shape[1]), x.dtype)
    by_platform = {
        'cpu': _outer_by_blocks,
        'cuda': grouped_gpu.grouped_outer_gpu,
        'default': _ragged_outer,
    }
    by_platform = _supported(x, kernels, dtype, by_platform, grouped_tpu.grouped_outer_tpu)
    product: jax.Array = jax.lax.platform_dependent(x, y, group_sizes, **by_platform)
    return product


def _supported(
    x: ArrayOrShape,
    kernels: ArrayOrShape,
    dtype: Any,
    by_platform: dict[str, Callable[..., Any]],
    tpu_function: Callable[..., jax.Array],
) -> dict[str, Callable[..., Any]]:
    """Returns the implementations by platform that support x [N, D] and kernels [E, D, F]."""
    supported = {
        name: _cast(function, dtype)
        for name, function in by_platform.items()
        if name != 'cuda' or grouped_gpu.fits(x, kernels)
    }
    if grouped_tpu.fits(x, kernels):  # these kernels themselves return any dtype
        supported['tpu'] = functools.partial(tpu_function, dtype=dtype)
    return supported


def _cast(function: Callable[..., jax.Array], dtype: Any) -> Callable[..., jax.Array]:
    return lambda *arguments: function(*arguments).astype(dtype)


def _forward(
    x: jax.Array, kernels: jax.Array, group_sizes: jax.Array, dtype: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return _multiply(x, kernels, group_sizes, dtype), (x, kernels, group_sizes)


def _backward(
    dtype: Any, residuals: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, kernels, group_sizes = residuals
    gradient = gradient.astype(x.dtype)
    by_x = _multiply(gradient, kernels.swapaxes(1, 2), group_sizes, x.dtype)  # [N, D]
    return by_x, _outer(x, gradient, group_sizes, kernels.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def _ragged(x: jax.Array, kernels: jax.Array, group_sizes: jax.Array) -> jax.Array:
    kernels = kernels.astype(x.dtype)
    return jax.lax.ragged_dot(x, kernels, group_sizes, preferred_element_type=jnp.float32)


def _ragged_outer(x: jax.Array, y: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Returns x[rows of e]^T @ y[rows of e]: [N, D], [N, F] -> [E, D, F] float32."""
    dimensions = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    return jax.lax.ragged_dot_general(
        x, y, group_sizes, dimensions, preferred_element_type=jnp.float32
    )


class _Blocks:
    """A layout of rows in blocks of one group each; every group is padded to whole blocks.

    If there are at least as many rows as groups, the first blocks of all groups come first, so that
    they can be one batched matmul. Otherwise most groups have no rows and no block.

    Attributes:
      size: R, the rows of a block.
      count: the number of blocks for which there is memory.
      first: the number of first blocks of groups at the start: E or 0.
      used: the number of blocks in use, including these.
      group: [count], the group of each later block.
      place: [N], the slot of each row in the blocks; out of range for rows without a group.
    """

    def __init__(self, num_rows: int, group_sizes: jax.Array, largest: int = LARGEST_BLOCK) -> None:
        num_groups = group_sizes.shape[0]
        # Twice the mean, as in `grouped_gpu._tile`, so that most groups have one block.
        rows_per_group = max(1, 2 * num_rows // num_groups)
        self.size = min(1 << (rows_per_group - 1).bit_length(), largest)
        self.count = -(-num_rows // self.size) + num_groups  # the maximum number of blocks
        leading = int(num_rows >= num_groups)
        self.first = leading * num_groups
        others = jnp.maximum(-(-group_sizes // self.size) - leading, 0)  # [E], later blocks
        last_other, last_row = jnp.cumsum(others), jnp.cumsum(group_sizes)  # [E]
        self.used = self.first + last_other[-1]
        index = jnp.arange(self.count) - self.first
        self.group = jnp.searchsorted(last_other, index, side='right')  # [blocks], for later blocks
        rows = jnp.arange(num_rows)
        group = jnp.searchsorted(last_row, rows, side='right')
        inside = rows - (last_row - group_sizes)[group]  # [N], the index in the group
        block = inside // self.size - leading
        block = jnp.where(block < 0, group, self.first + (last_other - others)[group] + block)
        # Rows without a group have no slot: `fill` drops them, and `rows` returns zeros for them.
        place = block * self.size + inside % self.size  # [N], the slot of each row
        self.place = jnp.where(rows < last_row[-1], place, self.count * self.size)

    def fill(self, x: jax.Array) -> jax.Array:
        """Returns rows [N, D] as blocks [blocks, rows of a block, D], padded with zeros."""
        empty = jnp.zeros((self.count * self.size, x.shape[1]), x.dtype)
        filled = empty.at[self.place].set(x, mode='drop', unique_indices=True)
        return filled.reshape(self.count, self.size, -1)

    def rows(self, blocks: jax.Array) -> jax.Array:
        """Returns the rows of blocks, the inverse of `fill`."""
        flat = blocks.reshape(self.count * self.size, -1)  # [slots, D]
        return flat.at[self.place].get(mode='fill', fill_value=0)


_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _by_blocks(x: jax.Array, kernels: jax.Array, group_sizes: jax.Array) -> jax.Array:
    kernels = jnp.asarray(kernels, x.dtype)  # numpy arrays do not support the traced index below
    blocks = _Blocks(x.shape[0], group_sizes)
    filled = blocks.fill(x)

    def multiply(i: jax.Array, out: jax.Array) -> jax.Array:
        return out.at[i].set(_dot('rd,df->rf', filled[i], kernels[blocks.group[i]]))

    out = jnp.zeros((blocks.count, blocks.size, kernels.shape[2]), jnp.float32)
    if blocks.first:
        out = out.at[: blocks.first].set(_dot('erd,edf->erf', filled[: blocks.first], kernels))
    return blocks.rows(jax.lax.fori_loop(blocks.first, blocks.used, multiply, out))


def _outer_by_blocks(x: jax.Array, y: jax.Array, group_sizes: jax.Array) -> jax.Array:
    blocks = _Blocks(x.shape[0], group_sizes)
    left, right = blocks.fill(x), blocks.fill(y)  # [blocks, R, D], [blocks, R, F]

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        return total.at[blocks.group[i]].add(_dot('rd,rf->df', left[i], right[i]))

    if blocks.first:
        total = _dot('erd,erf->edf', left[: blocks.first], right[: blocks.first])
    else:
        total = jnp.zeros((group_sizes.shape[0], x.shape[1], y.shape[1]), jnp.float32)
    result: jax.Array = jax.lax.fori_loop(blocks.first, blocks.used, add, total)
    return result


def mlps_by_blocks(
    x: jax.Array, token: jax.Array, expert: jax.Array, kernels: tuple[Any, Any, Any]
) -> jax.Array:
    """Returns `expert_parallel.grouped_mlps` for sampling on CPUs, without a gradient.

    All three matmuls use the same blocks, so rows are arranged only once, by gathers.

    Args:
      x: [t, D], the inputs of the tokens.
      token: [n] int32, the row of x of each token-expert pair.
      expert: [n] int32 in [0, E), the expert of each pair.
      kernels: gate and up [E, F, D], down [E, D, F] in the transposed weight layout
        (`Execution.output_major`), in the dtype of x or quantized.

    Returns:
      [n, D] in the dtype of x, in the order of the pairs.
    """
    kernels = jax.tree.map(jnp.asarray, kernels)  # numpy arrays do not support a traced index
    num_experts = jax.tree.leaves(kernels)[0].shape[0]
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=num_experts).astype(jnp.int32)
    blocks = _Blocks(expert.size, sizes, LARGEST_BLOCK_OF_MLPS)
    place = jnp.zeros_like(blocks.place).at[order].set(blocks.place, unique_indices=True)  # [n]
    no_row = jnp.full((blocks.count * blocks.size,), x.shape[0], token.dtype)
    source = no_row.at[place].set(token, unique_indices=True)  # [slots], the row of x
    filled = x.at[source].get(mode='fill', fill_value=0)
    filled = filled.reshape(blocks.count, blocks.size, -1)  # [blocks, R, D]

    def add_block(i: jax.Array, outputs: jax.Array) -> jax.Array:
        expert_kernels = jax.tree.map(lambda leaf: leaf[blocks.group[i]], kernels)
        return outputs.at[i - blocks.first].set(_gated_mlp(filled[i], expert_kernels))

    outputs = jnp.zeros((blocks.count - blocks.first, *filled.shape[1:]), jnp.float32)
    outputs = jax.lax.fori_loop(blocks.first, blocks.used, add_block, outputs)
    if blocks.first:
        leading = _gated_mlp(filled[: blocks.first], kernels)
        outputs = jnp.concatenate([leading, outputs])
    return outputs.reshape(-1, x.shape[1])[place].astype(x.dtype)


def _gated_mlp(x: jax.Array, kernels: tuple[Any, Any, Any]) -> jax.Array:
    """Returns [..., R, D] float32 for x [..., R, D], gate and up [..., F, D], down [..., D, F]."""
    gate, up, down = kernels
    x = x.swapaxes(-1, -2)  # [..., D, R]: rows are the last axis from here on
    hidden = nn.gelu(_times(gate, x), approximate=True) * _times(up, x)  # [..., F, R]
    return _times(down, hidden.astype(x.dtype)).swapaxes(-1, -2)


def _times(kernel: Any, x: jax.Array) -> jax.Array:
    """Returns [..., O, I] @ [..., I, R] -> [..., O, R] float32; the kernel may be quantized."""
    if is_quantized(kernel):
        scale: jax.Array = kernel.scale
        return _times(kernel.qvalue.astype(x.dtype), x) * scale
    product = _dot('...oi,...ir->...or', kernel, x)
    # Without the barrier XLA swaps the operands for several rows, which is slower here.
    return jax.lax.optimization_barrier(product) if x.shape[-1] > 1 else product
