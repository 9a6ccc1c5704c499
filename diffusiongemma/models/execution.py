"""How a model is computed: on which devices, and what is kept in memory; never what it computes."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Logical axis -> mesh axes that it is spread over, the first the slowest; () for none.
AxisRules = tuple[tuple[str, tuple[str, ...]], ...]

REMAT = ('none', 'dots', 'full')


@dataclasses.dataclass(frozen=True)
class Execution:
    """Hashable, a static attribute of a model.

    Attributes:
      mesh: the devices; None leaves it to the compiler, from where the inputs lie.
      rules: the table of `parallel.sharding`; empty without a mesh.
      remat: what the backward pass keeps of each layer: 'none' rematerializes nothing
        and keeps all, 'dots' keeps products with weights and recomputes the rest (attention,
        norms, experts), 'full' keeps the layer's input alone.
      logits_chunk: positions of each row that have logits at the same time in a loss; 0 for all.
      query_block: queries of each block of tokens that have attention scores at the same time; 0
        for all.
      platform: of the devices, such as 'tpu'; None where nobody has said which they are.
      scan_layers: the layers are one compiled loop over stacked parameters; else each repetition
        of the pattern has parameters and code of its own (see `unroll_layers`).
      output_major: kernels of layers are stored in the transposed layout, [out, in] (see
        `output_major_kernels`).
      denoise_dtype: compute dtype of a denoiser with layers of its own, 'float32' or 'bfloat16';
        None for that of the model, which shared weights always have. In bfloat16 a denoise step
        is up to 1.7 times faster on a CPU with AVX512-BF16, while a float32 encode pass stays
        exactly the teacher's; a CPU without native bfloat16 matmuls computes in float32 anyway.
      gather_draft_head: the rows of the embedding that a draft vocabulary scores are a parameter
        of their own, so that no pass gathers them.
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
            if getattr(self, name) < 0:
                raise ValueError(f'{name} must be >= 0 (0: all), got {getattr(self, name)}.')

    def mesh_axes(self, shape: Sequence[int], names: Sequence[str | None]) -> list[tuple[str, ...]]:
        """Mesh axes of more than one device that each dimension of an array is spread over.

        See `spread`, which takes the same arguments; none without a mesh.
        """
        if self.mesh is None:
            return [()] * len(shape)
        return spread(shape, names, self.rules, self.mesh)

    def constrain(self, x: jax.Array, *names: str | None) -> jax.Array:
        """Lays the dimensions of x, by their logical names, on the mesh; without one, x."""
        if self.mesh is None:
            return x
        return self._laid_out(x, self.mesh_axes(x.shape, names))

    def gathered_in_stages(self, kernel: jax.Array, *names: str | None) -> jax.Array:
        """Gathers a kernel along the last mesh axes of dimensions that several axes split.

        A matmul gathers the rest, and the gradient is summed and split in the same stages. In one
        stage XLA's TPU compiler would send twice as much: along more than 32 devices it gathers by
        an all-reduce, and along all devices of a slice it splits no gradient while it sums it.

        Args:
          kernel: laid out as the table says.
          *names: the logical name of each dimension.
        """
        axes = self.mesh_axes(kernel.shape, names)
        if all(len(of_dimension) < 2 for of_dimension in axes):
            return kernel
        return self._laid_out(kernel, [of_dimension[:1] for of_dimension in axes])

    def _laid_out(self, x: jax.Array, axes: Sequence[tuple[str, ...]]) -> jax.Array:
        assert self.mesh is not None  # without one no dimension has mesh axes
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, partition_spec(axes)))


def spread(
    shape: Sequence[int], names: Sequence[str | None], rules: AxisRules, mesh: Mesh
) -> list[tuple[str, ...]]:
    """Mesh axes that each dimension is spread over.

    A mesh axis serves one dimension of an array, the first that asks for it. An axis that would
    not divide its dimension is left out: the dimension is then repeated along it (e.g. one
    key/value head under tensor parallelism).

    Args:
      shape: of the array.
      names: logical axis of each dimension; None for no axis.
      rules: the table.
      mesh: the devices.

    Raises:
      ValueError: the table has no such axis.
    """
    table, used, result = dict(rules), set(), []
    for size, name in zip(shape, names, strict=True):
        if name is not None and name not in table:
            raise ValueError(f'no rule for the logical axis {name!r}; there are {sorted(table)}.')
        taken: tuple[str, ...] = ()
        for axis in table[name] if name is not None else ():
            ways = mesh.shape[axis]
            if ways > 1 and axis not in used and size % (product(taken, mesh) * ways) == 0:
                taken += (axis,)
                used.add(axis)
        result.append(taken)
    return result


def product(axes: Sequence[str], mesh: Mesh) -> int:
    """Devices along all of the axes."""
    return math.prod(mesh.shape[axis] for axis in axes)


def partition_spec(axes: Sequence[tuple[str, ...]]) -> PartitionSpec:
    """The PartitionSpec of dimensions spread over these mesh axes."""
    return PartitionSpec(*(names[0] if len(names) == 1 else names or None for names in axes))
