"""Causal attention of whole rows by one TPU kernel, which keeps neither scores nor masks in memory.

The kernel is JAX's splash attention. It skips blocks of keys that no query of a block may see by
their places in the row, multiplies in float32 accumulators and takes the softmax in float32; its
backward pass computes the scores again from the queries, the keys and one number for each query.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from diffusiongemma.models.execution import Execution, partition_spec, product
from diffusiongemma.models.masks import CausalMask

LENGTHS, WIDTHS = 128, 64  # rows and heads have a multiple of these
BLOCKS = (512, 256, 128)  # tokens of a block of queries or of keys; 1024 are too many for 512 wide
LONGEST = 32_768  # tokens of a row: which blocks are skipped is kept in scalar memory

Kernel = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def fits(
    query_shape: Sequence[int], num_kv_heads: int, prefix_length: int, execution: Execution
) -> bool:
    """Whether `attend_fused` may take the place of `attention.attend` for a `CausalMask`.

    It may on TPUs, for one block a row without a prefix, if a device has whole rows and its query
    heads find their key/value heads on it.

    Args:
      query_shape: [B, M, T, N, H].
      num_kv_heads: K.
      prefix_length: S.
      execution: what the model runs on. Without a mesh it can't be told whether rows are spread
        over devices, which a kernel does not bear: then there must be one device in all.
    """
    _, blocks, length, _, head_dim = query_shape
    if blocks != 1 or prefix_length or length % LENGTHS or length > LONGEST or head_dim % WIDTHS:
        return False
    if execution.platform is None:
        return jax.default_backend() == 'tpu' and jax.device_count() == 1
    if execution.platform != 'tpu' or execution.mesh is None:
        return execution.platform == 'tpu'
    of_query, of_keys = _layout(query_shape, num_kv_heads, execution)
    return not of_query[2] and (of_keys[1] == of_query[1] or num_kv_heads == 1)


def attend_fused(
    query: jax.Array,
    block_kv: tuple[jax.Array, jax.Array],
    mask: CausalMask,
    execution: Execution,
    interpret: bool = False,
) -> jax.Array:
    """What `attention.attend` computes of rows without a prefix, where `fits` says so.

    The tokens of a document must stand side by side in order of their positions, since the kernel
    compares places in the row. What padding attends to is then not the same; nothing reads it.

    Args:
      query: [B, 1, T, N, H], scaled: the kernel does not scale scores.
      block_kv: [B, K, 1, T, H] each.
      mask: who sees whom; its prefix has no tokens.
      execution: mesh and rules.
      interpret: run the kernel's operations one by one, on any platform (for tests).

    Returns:
      [B, 1, T, N, H] in the query's dtype.
    """
    key, value = (array[:, :, 0] for array in block_kv)
    length, heads = query.shape[2:4]
    if execution.mesh is None:
        attend = jax.vmap(_kernel(length, heads, mask.window, interpret))
    else:
        of_query, of_keys = _layout(query.shape, key.shape[1], execution)
        heads //= product(of_query[1], execution.mesh)
        specs = [partition_spec(axes) for axes in (of_query, of_keys, of_keys, of_query[:1])]
        attend = jax.shard_map(
            jax.vmap(_kernel(length, heads, mask.window, interpret)),
            mesh=execution.mesh,
            in_specs=tuple(specs),
            out_specs=specs[0],
            check_vma=False,  # the kernel does not say over which axes its results differ
        )
    context = attend(query[:, 0].swapaxes(1, 2), key, value, mask.segment_ids)  # [B, N, T, H]
    return context.swapaxes(1, 2)[:, None]


def _layout(
    query_shape: Sequence[int], num_kv_heads: int, execution: Execution
) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Mesh axes of queries [B, N, T, H], and of keys and values [B, K, T, H]."""
    batch, _, length, heads, head_dim = query_shape
    return (
        execution.mesh_axes((batch, heads, length, head_dim), ('batch', 'heads', 'length', None)),
        execution.mesh_axes(
            (batch, num_kv_heads, length, head_dim), ('batch', 'kv_heads', 'length', None)
        ),
    )


@functools.lru_cache(maxsize=64)
def _kernel(length: int, heads: int, window: int | None, interpret: bool) -> Kernel:
    """Of one row: queries [N, T, H], keys and values [K, T, H], segments [T] -> [N, T, H]."""
    # Here, so that only those who run it wait for its import.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    if window is None or window >= length:
        mask: Any = splash.CausalMask((length, length))
    else:
        mask = splash.LocalMask((length, length), window_size=(window - 1, 0), offset=0)
    block = next(size for size in BLOCKS if length % size == 0)
    names = ('block_q', 'block_kv', 'block_q_dkv', 'block_kv_dkv', 'block_q_dq', 'block_kv_dq')
    sizes: dict[str, Any] = dict.fromkeys(names, block)
    with jax.core.eval_context():  # arrays and not what is traced here: it is kept for later
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * heads),
            block_sizes=splash.BlockSizes(**sizes),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        kernel = jax.tree.map(np.asarray, kernel)  # constants of any devices

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array):
        return kernel(query, key, value, splash.SegmentIds(segments, segments))

    return attend
