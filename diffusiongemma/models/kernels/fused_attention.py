"""Causal attention of whole rows by a TPU kernel, which stores neither scores nor masks in memory.

The kernel is JAX's splash attention. It skips key blocks that are not visible to any query of a
block, accumulates matmuls in float32 and computes the softmax in float32. Its backward pass
recomputes the scores from the queries, the keys and one number per query.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from diffusiongemma.models.execution import Execution, partition_spec, product
from diffusiongemma.models.masks import CausalMask

LENGTHS, WIDTHS = 128, 64  # row lengths and head widths must be multiples of these
BLOCKS = (512, 256, 128)  # tokens of a query or key block; 1024 does not fit for a width of 512
LONGEST = 32_768  # maximum tokens of a row: the skipped blocks are listed in scalar memory

Kernel = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def fits(
    query_shape: Sequence[int], num_kv_heads: int, prefix_length: int, execution: Execution
) -> bool:
    """Returns whether `attend_fused` can replace `attention.attend` for a `CausalMask`.

    It can on TPUs, for one block per row without a prefix, if each device has whole rows and the
    key/value heads of its query heads.

    Args:
      query_shape: [B, M, T, N, H].
      num_kv_heads: the number of key/value heads K.
      prefix_length: the number of prefix tokens S.
      execution: the execution settings of the model. Without a platform (`parallel.on_mesh` sets
        it) it is not known whether rows are sharded, which the kernel does not support; then there
        must be only one device.
    """
    _, blocks, length, _, head_dim = query_shape
    if blocks != 1 or prefix_length or length % LENGTHS or length > LONGEST or head_dim % WIDTHS:
        return False
    if execution.platform is None:
        return jax.default_backend() == 'tpu' and jax.device_count() == 1
    if execution.platform != 'tpu' or execution.mesh is None:
        return execution.platform == 'tpu'
    query_axes, key_axes = _layout(query_shape, num_kv_heads, execution)
    return not query_axes[2] and (key_axes[1] == query_axes[1] or num_kv_heads == 1)


def attend_fused(
    query: jax.Array,
    block_kv: tuple[jax.Array, jax.Array],
    mask: CausalMask,
    execution: Execution,
    interpret: bool = False,
) -> jax.Array:
    """Returns the result of `attention.attend` for rows without a prefix, if `fits` is true.

    The tokens of a document must be contiguous and ordered by position, because the kernel compares
    indices in the row. Only the outputs of padding tokens differ, which are not used.

    Args:
      query: [B, 1, T, N, H], already scaled, because the kernel does not scale scores.
      block_kv: keys and values [B, K, 1, T, H] each.
      mask: the causal mask, with an empty prefix.
      execution: the execution settings with mesh and rules.
      interpret: whether to interpret the kernel, which works on any platform (for tests).

    Returns:
      [B, 1, T, N, H] in the dtype of the query.
    """
    key, value = (array[:, :, 0] for array in block_kv)  # [B, K, T, H]
    length, heads = query.shape[2:4]
    if execution.mesh is None:
        attend = jax.vmap(_kernel(length, heads, mask.window, interpret))
    else:
        query_axes, key_axes = _layout(query.shape, key.shape[1], execution)
        heads //= product(query_axes[1], execution.mesh)
        specs = [partition_spec(axes) for axes in (query_axes, key_axes, key_axes, query_axes[:1])]
        attend = jax.shard_map(
            jax.vmap(_kernel(length, heads, mask.window, interpret)),
            mesh=execution.mesh,
            in_specs=tuple(specs),
            out_specs=specs[0],
            check_vma=False,  # the kernel does not declare over which axes its results vary
        )
    context = attend(query[:, 0].swapaxes(1, 2), key, value, mask.segment_ids)  # [B, N, T, H]
    return context.swapaxes(1, 2)[:, None]


def _layout(
    query_shape: Sequence[int], num_kv_heads: int, execution: Execution
) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Returns the mesh axes of queries [B, N, T, H], and of keys and values [B, K, T, H]."""
    batch, _, length, heads, head_dim = query_shape
    return (
        execution.mesh_axes((batch, heads, length, head_dim), ('batch', 'heads', 'length', None)),
        execution.mesh_axes(
            (batch, num_kv_heads, length, head_dim), ('batch', 'kv_heads', 'length', None)
        ),
    )


@functools.lru_cache(maxsize=64)
def _kernel(length: int, heads: int, window: int | None, interpret: bool) -> Kernel:
    """Returns a kernel for one row: queries [N, T, H], keys and values [K, T, H], segments [T]."""
    # Imported here because the import is slow and only this function needs it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    if window is None or window >= length:
        mask: Any = splash.CausalMask((length, length))
    else:
        # The window counts the keys before and after a query, without its own.
        mask = splash.LocalMask((length, length), window_size=(window - 1, 0), offset=0)
    block = next(size for size in BLOCKS if length % size == 0)
    names = ('block_q', 'block_kv', 'block_q_dkv', 'block_kv_dkv', 'block_q_dq', 'block_kv_dq')
    sizes: dict[str, Any] = dict.fromkeys(names, block)
    with jax.core.eval_context():  # concrete arrays and not tracers, because the result is cached
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * heads),
            block_sizes=splash.BlockSizes(**sizes),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        kernel = jax.tree.map(np.asarray, kernel)  # constants that are not bound to a device

    def attend(
        query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array
    ) -> jax.Array:
        output: jax.Array = kernel(query, key, value, splash.SegmentIds(segments, segments))
        return output

    return attend
