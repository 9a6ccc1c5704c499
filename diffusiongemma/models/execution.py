"""Execution settings of a model: devices, layout, memory and dtype, and the mesh axes of arrays."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusiongemma.errors import check_range

# Logical axis -> mesh axes over which it is sharded, the outermost first; () for none.
AxisRules = tuple[tuple[str, tuple[str, ...]], ...]

REMAT = ('none', 'dots', 'full')
_CPU_FLAGS = {'avx512_bf16', 'amx_bf16', 'bf16'}  # the last one is for Arm


@dataclasses.dataclass(frozen=True)
class Execution:
    """The execution settings of a model, a hashable static attribute of the module.

    Attributes:
      mesh: the mesh of devices; None lets the compiler decide from the shardings of the inputs.
      rules: the table of `parallel.sharding`; empty without a mesh.
      remat: the values of each layer that are kept for the backward pass: 'none' keeps all values,
        'dots' keeps matmuls with weights and recomputes others (attention, norms, experts), 'full'
        keeps only the input of the layer.
      logits_chunk: the number of positions per row whose logits exist at the same time in a loss;
        0 for all.
      query_block: the number of queries per block of tokens whose attention scores exist at the
        same time; 0 for all.
      platform: the platform of the devices, such as 'tpu'; None if it is not known.
      scan_layers: whether layers are one compiled loop over stacked parameters; otherwise each
        repetition of the pattern has separate parameters and code (see `unroll_layers`).
      output_major: whether kernels of layers have the transposed weight layout, [out, in] (see
        `output_major_kernels`).
      denoise_dtype: the compute dtype of a separate or light denoiser, 'float32' or 'bfloat16';
        None for that of the model, which shared weights always have. In bfloat16 a denoise step is
        up to 1.7 times faster on a CPU with AVX512-BF16, while a float32 encode pass remains
        exactly the teacher's. A CPU without native bfloat16 matmuls computes in float32 anyway.
      gather_draft_head: whether the embedding rows of a draft vocabulary are a separate parameter,
        so that passes need not gather them.
    """

    mesh: Mesh | None = None
    rules: AxisRules = ()
    remat: str = 'none'
    logits_chunk: int = 0
    query_block: int = 0
    platform: str | None = None
    scan_layers: bool = True
    output_major: bool = False
    denoise_dtype: str | None = None
    gather_draft_head: bool = False

    def __post_init__(self) -> None:
        if self.remat not in REMAT:
            raise ValueError(f'remat must be one of {REMAT}, got {self.remat!r}.')
        if self.denoise_dtype not in (None, 'float32', 'bfloat16'):
            raise ValueError(
                f"denoise_dtype must be 'float32', 'bfloat16' or None, got {self.denoise_dtype!r}."
            )
        for name in ('logits_chunk', 'query_block'):
            check_range(name, getattr(self, name), 0)

    def mesh_axes(self, shape: Sequence[int], names: Sequence[str | None]) -> list[tuple[str, ...]]:
        """Returns the mesh axes (of size > 1) over which each dimension of an array is sharded.

        The arguments are those of `spread`. Without a mesh there are none.
        """
        if self.mesh is None:
            return [()] * len(shape)
        return spread(shape, names, self.rules, self.mesh)

    def constrain(self, x: jax.Array, *names: str | None) -> jax.Array:
        """Returns x with a sharding constraint by logical axis names; x itself without a mesh."""
        if self.mesh is None:
            return x
        return self._laid_out(x, self.mesh_axes(x.shape, names))

    def gathered_in_stages(self, kernel: jax.Array, *names: str | None) -> jax.Array:
        """Gathers a kernel along all but the first of the mesh axes that split a dimension.

        The matmul that uses the kernel gathers it along the first axis, and the gradient is summed
        and split in the same stages. In one stage XLA's TPU compiler would send twice as much:
        along more than 32 devices it gathers by an all-reduce, and along all devices of a slice it
        splits no gradient while it sums it.

        Args:
          kernel: an array that is sharded by the axis rules.
          *names: the logical name of each dimension.
        """
        axes = self.mesh_axes(kernel.shape, names)
        if all(len(of_dimension) < 2 for of_dimension in axes):
            return kernel
        return self._laid_out(kernel, [of_dimension[:1] for of_dimension in axes])

    def _laid_out(self, x: jax.Array, axes: Sequence[tuple[str, ...]]) -> jax.Array:
        assert self.mesh is not None  # without one no dimension has mesh axes
        # Inside a `jax.shard_map` along some axes, x is one device's part along these.
        manual = jax.sharding.get_abstract_mesh().manual_axes
        axes = [tuple(axis for axis in names if axis not in manual) for names in axes]
        sharding = NamedSharding(self.mesh, partition_spec(axes))
        array: jax.Array = jax.lax.with_sharding_constraint(x, sharding)
        return array


def spread(
    shape: Sequence[int], names: Sequence[str | None], rules: AxisRules, mesh: Mesh
) -> list[tuple[str, ...]]:
    """Returns the mesh axes over which each dimension of an array is sharded.

    A mesh axis shards only one dimension of an array: the first one whose rule names it and whose
    size it divides. A dimension is replicated along an axis that does not divide it (e.g. one
    key/value head under tensor parallelism).

    Args:
      shape: the shape of the array.
      names: the logical axis of each dimension; None for no axis.
      rules: the table from logical axes to mesh axes.
      mesh: the mesh of devices.

    Raises:
      ValueError: if the table does not have a logical axis.
    """
    table, used, result = dict(rules), set(), []
    for size, name in zip(shape, names, strict=True):
        if name is not None and name not in table:
            raise ValueError(f'no rule for the logical axis {name!r}; there are {sorted(table)}.')
        axes: tuple[str, ...] = ()
        for axis in table[name] if name is not None else ():
            ways = mesh.shape[axis]
            if ways > 1 and axis not in used and size % (product(axes, mesh) * ways) == 0:
                axes += (axis,)
                used.add(axis)
        result.append(axes)
    return result


def product(axes: Sequence[str], mesh: Mesh) -> int:
    """Returns the number of devices along all of the axes together."""
    return math.prod(mesh.shape[axis] for axis in axes)


def partition_spec(axes: Sequence[tuple[str, ...]]) -> PartitionSpec:
    """Returns the PartitionSpec of dimensions that are sharded over these mesh axes."""
    return PartitionSpec(*(names[0] if len(names) == 1 else names or None for names in axes))


@functools.cache
def cpu_has_bfloat16(cpuinfo: str = '/proc/cpuinfo') -> bool:
    """Returns whether this CPU has native bfloat16 matmuls; False if the file is missing."""
    try:
        lines = Path(cpuinfo).read_text().splitlines()
    except OSError:
        return False
    return any(
        _CPU_FLAGS & set(line.split(':', 1)[1].split())
        for line in lines
        if line.lower().startswith(('flags', 'features'))
    )


def native_dtype(name: str, platform: str | None = None) -> jnp.dtype:
    """Returns the dtype to compute in if `name` is requested.

    It is float32 instead of bfloat16 on a CPU without native bfloat16 matmuls, which would convert
    every operand first and be slower than in float32.

    Args:
      name: the name of a float dtype.
      platform: the platform of the devices; None for that of the default backend.
    """
    on_cpu = (platform or jax.default_backend()) == 'cpu'
    emulated = on_cpu and name == 'bfloat16' and not cpu_has_bfloat16()
    return jnp.dtype('float32' if emulated else name)


def compute_dtype(name: str) -> jnp.dtype:
    """Returns the dtype for a value of `config.dtype`: 'float32' or 'bfloat16'."""
    if name not in ('float32', 'bfloat16'):
        raise ValueError(f"config.dtype must be 'float32' or 'bfloat16', got {name!r}.")
    return jnp.dtype(name)
