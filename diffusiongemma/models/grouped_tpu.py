"""The grouped matmuls of TPUs: JAX's own kernels, with tiles and layouts for any widths.

The kernels are those of `jax.experimental.pallas.ops.tpu.megablox`. XLA has a kernel of its own for
`jax.lax.ragged_dot`, but none for the gradient by the weights: that it expands to a matmul of all
rows for every group. And XLA's kernel takes weights [E, D, F] in this order only, so that weights
stored the other way round, as TPUs store a width that is not a multiple of their 128 lanes, are
copied for it in every pass.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffusiongemma.models.arrays import ArrayOrShape

LANES = 128
# Rows of a tile. A systolic array of 128 x 128 takes as long to load weights as to multiply 128
# rows, so that fewer rows save nothing, and with more the tiles in which groups meet cost more.
TILE_ROWS = 128
# Bytes of a tile of weights and of a tile of their gradient in float32: the compiler keeps two of
# each, and what they are multiplied with, in 16 MB.
WEIGHT_TILE_BYTES = 4 << 20
GRADIENT_TILE_BYTES = 2 << 20
LEAST = 8  # of a width: a register holds 8 x 128 float32


def fits(x: ArrayOrShape, kernels: ArrayOrShape) -> bool:
    """Whether x [N, D] and kernels [E, D, F] are of dtypes and widths that the kernels take."""
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
      group_sizes: [E] int32, rows of each group; rows after their sum are not written.
      dtype: of the result, summed in float32.
      interpret: runs the kernel on any platform, slowly.

    Returns:
      [N, F] in `dtype`.
    """
    turned = stored_turned(kernels.shape[1:])
    rhs = kernels.swapaxes(1, 2) if turned else kernels
    inner = _side(kernels.shape[1], 4096)
    outer = _side(kernels.shape[2], WEIGHT_TILE_BYTES // (inner * kernels.dtype.itemsize))
    gmm = _megablox('gmm')
    tiling = (TILE_ROWS, inner, outer)
    out = gmm(
        _whole_tiles(x), rhs, group_sizes, dtype, tiling, transpose_rhs=turned, interpret=interpret
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
      group_sizes: [E] int32, rows of each group; rows after their sum count nowhere.
      dtype: of the result, summed in float32.
      interpret: runs the kernel on any platform, slowly.

    Returns:
      [E, D, F] in `dtype`; zeros for empty groups.
    """
    turned = stored_turned((x.shape[1], y.shape[1]))
    left, right = (y, x) if turned else (x, y)
    inner = _side(left.shape[1], 1024)
    outer = _side(right.shape[1], GRADIENT_TILE_BYTES // (inner * 4))
    tgmm = _megablox('tgmm')
    tiling = (TILE_ROWS, inner, outer)
    left, right = _whole_tiles(left).swapaxes(0, 1), _whole_tiles(right)
    out = tgmm(left, right, group_sizes, dtype, tiling, interpret=interpret)
    return out.swapaxes(1, 2) if turned else out


def stored_turned(widths: tuple[int, ...]) -> bool:
    """Whether TPUs store [.., D, F] as [.., F, D]: F is padded to whole lanes and D is not."""
    return widths[1] % LANES != 0 and widths[0] % LANES == 0


def _whole_tiles(rows: jax.Array) -> jax.Array:
    missing = -rows.shape[0] % TILE_ROWS
    return jnp.pad(rows, ((0, missing), (0, 0))) if missing else rows


def _side(size: int, limit: int) -> int:
    """The side of a tile along a dimension: all of it, or whole lanes that divide it if any do."""
    if size <= limit:
        return size
    sides = range(max(limit // LANES, 1) * LANES, 0, -LANES)
    return next((side for side in sides if size % side == 0), sides[0])


@functools.cache
def _megablox(name: str) -> Callable[..., jax.Array]:
    # Here, so that only those who run it wait for its import; the package hides the module's name.
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

    return {'gmm': gmm, 'tgmm': tgmm}[name]
