"""Grouped matmuls as Triton kernels for GPUs.

On a GPU, XLA would expand `jax.lax.ragged_dot` to a matmul of all rows with the kernels of all
groups. Here one program multiplies some rows of one group with some columns of its kernel, so that
every kernel is read about once, and kernels of empty groups are not read. For the gradient of the
kernels, a program computes one tile of one kernel by summing over the rows of its group.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from diffusiongemma.models.arrays import ArrayOrShape

# The tile size along the contracted axis, and the minimum size of any side, 16 in Triton.
INNER = 64
LEAST = 16


def fits(x: ArrayOrShape, kernels: ArrayOrShape) -> bool:
    """Returns whether x [N, D] and kernels [E, D, F] can be divided into tiles."""
    return x.shape[1] % INNER == 0 and kernels.shape[2] % INNER == 0


def grouped_matmul_gpu(
    x: jax.Array, kernels: jax.Array, group_sizes: jax.Array, interpret: bool = False
) -> jax.Array:
    """Returns x[rows of group e] @ kernels[e] for every group.

    Args:
      x: [N, D], rows sorted by group, of a size that `fits`.
      kernels: [E, D, F] in the dtype of x, or int8 or fp8: each tile is converted when loaded.
      group_sizes: [E] int32, the number of rows of each group; rows after their sum are not
        written.
      interpret: whether to interpret the kernel, which works on any platform but is slow.

    Returns:
      [N, F] float32, summed in float32.
    """
    num_rows, (num_groups, _, outputs) = x.shape[0], kernels.shape
    rows, columns = _tile(num_rows // num_groups, num_rows, outputs)
    blocks = -(-group_sizes // rows)  # [E]
    last_block, last_row = jnp.cumsum(blocks), jnp.cumsum(group_sizes)
    count = num_rows // rows + min(num_groups, num_rows)  # the maximum number of blocks
    block = jnp.arange(count, dtype=jnp.int32)  # [blocks]
    group = jnp.searchsorted(last_block, block, side='right').astype(jnp.int32)
    group = jnp.minimum(group, num_groups - 1)
    first = (last_row - group_sizes)[group] + rows * (block - (last_block - blocks)[group])
    first = jnp.where(block < last_block[-1], first, num_rows).astype(jnp.int32)
    last = jnp.minimum(last_row[group], first + rows).astype(jnp.int32)
    out: jax.Array = pl.pallas_call(
        functools.partial(_kernel, rows=rows, columns=columns),
        out_shape=jax.ShapeDtypeStruct((num_rows + rows, outputs), jnp.float32),
        grid=(count, outputs // columns),
        compiler_params=plgpu.CompilerParams(num_warps=8 if rows > 64 else 4, num_stages=4),
        interpret=interpret,
        name='grouped_matmul',
    )(group, first, last, jnp.pad(x, ((0, rows), (0, 0))), kernels)
    return out[:num_rows]


def grouped_outer_gpu(
    x: jax.Array, y: jax.Array, group_sizes: jax.Array, interpret: bool = False
) -> jax.Array:
    """Returns x[rows of group e]^T @ y[rows of group e] for every group.

    Args:
      x: [N, D], rows sorted by group; D and F must be multiples of `INNER`.
      y: [N, F] in the dtype of x.
      group_sizes: [E] int32, the number of rows of each group; rows after their sum are ignored.
      interpret: whether to interpret the kernel, which works on any platform but is slow.

    Returns:
      [E, D, F] float32, summed in float32; zeros for empty groups.
    """
    widths = (x.shape[1], y.shape[1])
    last = jnp.cumsum(group_sizes).astype(jnp.int32)
    first = last - group_sizes.astype(jnp.int32)
    out: jax.Array = pl.pallas_call(
        _outer_kernel,
        out_shape=jax.ShapeDtypeStruct((group_sizes.shape[0], *widths), jnp.float32),
        grid=(group_sizes.shape[0], widths[0] // INNER, widths[1] // INNER),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name='grouped_outer',
    )(first, last, *(jnp.pad(rows, ((0, INNER), (0, 0))) for rows in (x, y)))
    return out


def _tile(rows_per_group: int, num_rows: int, outputs: int) -> tuple[int, int]:
    """Returns the rows and columns of the tile of one program.

    Groups have different sizes: with twice the mean as tile size, most fit in one block. Few rows
    need narrow tiles, because otherwise most of the GPU is idle.
    """
    rows = min(max(LEAST, 1 << max(0, 2 * rows_per_group - 1).bit_length()), 128)
    columns = 128 if rows > 64 and outputs % 128 == 0 else INNER
    return rows, columns if num_rows > LEAST else columns // 2


def _dot(left: jax.Array, right: jax.Array) -> jax.Array:
    """Returns the matmul, summed in float32; float32 operands are not rounded to TF32."""
    precise = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jnp.dot(left, right, precision=precise, preferred_element_type=jnp.float32)


def _kernel(
    group: 'jax.Ref',
    first: 'jax.Ref',
    last: 'jax.Ref',
    x: 'jax.Ref',
    kernels: 'jax.Ref',
    out: 'jax.Ref',
    *,
    rows: int,
    columns: int,
) -> None:
    """Computes one tile of the result: rows first[b] to last[b] and the columns of the program."""
    block = pl.program_id(0)
    start, end, expert = first[block], last[block], group[block]
    tile = pl.ds(pl.program_id(1) * columns, columns)

    @pl.when(start < end)
    def _() -> None:
        inside = start + jnp.arange(rows) < end  # [rows]

        def add(step: jax.Array, total: jax.Array) -> jax.Array:
            inner = pl.ds(step * INNER, INNER)
            left = plgpu.load(
                x.at[pl.ds(start, rows), inner],
                mask=jnp.broadcast_to(inside[:, None], (rows, INNER)),
                other=0,
            )
            right = plgpu.load(kernels.at[expert, inner, tile]).astype(left.dtype)
            return total + _dot(left, right)  # [rows, columns]

        zeros = jnp.zeros((rows, columns), jnp.float32)
        total = jax.lax.fori_loop(0, x.shape[1] // INNER, add, zeros)
        written = jnp.broadcast_to(inside[:, None], (rows, columns))
        plgpu.store(out.at[pl.ds(start, rows), tile], total, mask=written)


def _outer_kernel(
    first: 'jax.Ref', last: 'jax.Ref', x: 'jax.Ref', y: 'jax.Ref', out: 'jax.Ref'
) -> None:
    """Computes one square tile of the result of one group."""
    group = pl.program_id(0)
    start, end = first[group], last[group]
    inputs, outputs = (pl.ds(pl.program_id(axis) * INNER, INNER) for axis in (1, 2))

    def add(step: jax.Array, total: jax.Array) -> jax.Array:
        at = start + step * INNER
        inside = jnp.broadcast_to((at + jnp.arange(INNER) < end)[:, None], (INNER, INNER))
        left, right = (
            plgpu.load(rows.at[pl.ds(at, INNER), columns], mask=inside, other=0)
            for rows, columns in ((x, inputs), (y, outputs))
        )
        return total + _dot(left.T, right)

    steps = (end - start + INNER - 1) // INNER
    zeros = jnp.zeros((INNER, INNER), jnp.float32)
    plgpu.store(out.at[group, inputs, outputs], jax.lax.fori_loop(0, steps, add, zeros))
