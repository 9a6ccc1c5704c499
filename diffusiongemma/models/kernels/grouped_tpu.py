"""Grouped matmuls on TPUs by JAX's kernels, with tiles and layouts for any widths.

The kernels are those of `jax.experimental.pallas.ops.tpu.megablox`. XLA also has a kernel for
`jax.lax.ragged_dot`, but not for the gradient of the weights, which it expands to a matmul of all
rows for every group. And XLA's kernel only supports weights in the order [E, D, F], so transposed
weights (TPUs transpose a width that is not a multiple of their 128 lanes) are copied for it in
every pass.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffusiongemma.models.arrays import ArrayOrShape

LANES = 128
# Rows of a tile. A systolic array of 128 x 128 takes as long to load weights as to multiply 128
# rows, so fewer rows do not save time, and more rows make tiles that contain two groups slower.
TILE_ROWS = 128
# Bytes of a tile of weights and of a float32 tile of their gradient: the compiler keeps two of
# each, and their operands, in 16 MB.
WEIGHT_TILE_BYTES = 4 << 20
GRADIENT_TILE_BYTES = 2 << 20
LEAST = 8  # widths must be multiples of this: a register holds 8 x 128 float32


def fits(x: ArrayOrShape, kernels: ArrayOrShape) -> bool:
    """Returns whether the kernels support the dtypes and widths of x [N, D], kernels [E, D, F]."""
    dtypes = (jnp.bfloat16, jnp.float32)
    widths = kernels.shape[1:]
    return kernels.dtype in dtypes and x.dtype in dtypes and not any(w % LEAST for w in widths)


def grouped_matmul_tpu(
    x: jax.Array,
    kernels: jax.Array,
    group_sizes: jax.Array,
    dtype: Any = jnp.float32,
    interpret: bool = False,
) -> jax.Array:
    """Computes x[rows of group e] @ kernels[e] for every group.

    Args:
      x: [N, D], rows sorted by group.
      kernels: [E, D, F] in the dtype of x.
      group_sizes: [E] int32, the number of rows of each group; rows after their sum are not
        written.
      dtype: the dtype of the result, which is summed in float32.
      interpret: whether to interpret the kernel, which works on any platform but is slow.

    Returns:
      [N, F] in `dtype`.
    """
    transposed = is_stored_transposed(kernels.shape[1:])
    rhs = kernels.swapaxes(1, 2) if transposed else kernels  # [E, F, D] or [E, D, F]
    inner = _side(kernels.shape[1], 4096)
    outer = _side(kernels.shape[2], WEIGHT_TILE_BYTES // (inner * kernels.dtype.itemsize))
    gmm = _megablox('gmm')
    tiling = (TILE_ROWS, inner, outer)
    out = gmm(
        _whole_tiles(x),
        rhs,
        group_sizes,
        dtype,
        tiling,
        transpose_rhs=transposed,
        interpret=interpret,
    )
    return out[: x.shape[0]]


def grouped_outer_tpu(
    x: jax.Array,
    y: jax.Array,
    group_sizes: jax.Array,
    dtype: Any = jnp.float32,
    interpret: bool = False,
) -> jax.Array:
    """Computes x[rows of group e]^T @ y[rows of group e] for every group.

    Args:
      x: [N, D], rows sorted by group.
      y: [N, F] in the dtype of x.
      group_sizes: [E] int32, the number of rows of each group; rows after their sum are ignored.
      dtype: the dtype of the result, which is summed in float32.
      interpret: whether to interpret the kernel, which works on any platform but is slow.

    Returns:
      [E, D, F] in `dtype`; zeros for empty groups.
    """
    transposed = is_stored_transposed((x.shape[1], y.shape[1]))
    left, right = (y, x) if transposed else (x, y)
    inner = _side(left.shape[1], 1024)
    outer = _side(right.shape[1], GRADIENT_TILE_BYTES // (inner * 4))
    tgmm = _megablox('tgmm')
    tiling = (TILE_ROWS, inner, outer)
    left, right = _whole_tiles(left).swapaxes(0, 1), _whole_tiles(right)
    out = tgmm(left, right, group_sizes, dtype, tiling, interpret=interpret)
    return out.swapaxes(1, 2) if transposed else out


def is_stored_transposed(widths: tuple[int, ...]) -> bool:
    """Returns whether TPUs store [.., D, F] transposed: if only F would need padding to lanes."""
    return widths[1] % LANES != 0 and widths[0] % LANES == 0


def _whole_tiles(rows: jax.Array) -> jax.Array:
    missing = -rows.shape[0] % TILE_ROWS
    return jnp.pad(rows, ((0, missing), (0, 0))) if missing else rows


def _side(size: int, limit: int) -> int:
    """Returns the tile size along a dimension.

    It is the whole `size` up to `limit`, else a multiple of LANES, if possible one that divides
    `size`.
    """
    if size <= limit:
        return size
    sides = range(max(limit // LANES, 1) * LANES, 0, -LANES)
    return next((side for side in sides if size % side == 0), sides[0])


@functools.cache
def _megablox(name: str) -> Callable[..., jax.Array]:
    # Imported here because the import is slow; the package hides the name of the module.
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

    return {'gmm': gmm, 'tgmm': tgmm}[name]
