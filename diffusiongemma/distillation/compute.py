"""Settings for how a run computes its steps (`config.compute`); results change only by rounding."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax

from diffusiongemma.errors import check_range
from diffusiongemma.models.execution import Execution
from diffusiongemma.models.transformer import Gemma
from diffusiongemma.parallel import batch_sharding, batch_ways, on_mesh, rules_with

M = TypeVar('M', bound=Gemma)


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """Trade-offs between memory and time; docs/scaling.md explains how to choose them.

    Attributes:
      remat: 'none', 'dots' or 'full', see `Execution`.
      logits_chunk: the number of positions per row whose logits exist at the same time; 0 for all.
      query_block: the number of queries per block whose attention scores exist at the same time; 0
        for all.
      denoise_dtype: the dtype of a separate or light denoiser, see `Execution`.
      microbatches: the number of equal parts of a batch that are computed one after another.
      rules: the mesh axes that split each logical axis named here; they replace its row in the
        table of `parallel.sharding`.
    """

    remat: str = 'none'
    logits_chunk: int = 0
    query_block: int = 0
    denoise_dtype: str | None = None
    microbatches: int = 1
    rules: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_range('microbatches', self.microbatches, 1)
        self.execution()
        rules_with(self.rules)

    def execution(self) -> Execution:
        """Returns the execution settings of a model, without the mesh."""
        return Execution(
            remat=self.remat,
            logits_chunk=self.logits_chunk,
            query_block=self.query_block,
            denoise_dtype=self.denoise_dtype,
        )

    def place(self, model: M, mesh: jax.sharding.Mesh) -> M:
        """Returns the model with these settings on a mesh."""
        return on_mesh(model.clone(execution=self.execution()), mesh, rules_with(self.rules))

    def batch_multiple(self, mesh: jax.sharding.Mesh) -> int:
        """Returns the number that the rows of a batch must be a multiple of."""
        return self.microbatches * batch_ways(mesh, rules_with(self.rules))

    def batch_sharding(self, mesh: jax.sharding.Mesh, batch_size: int) -> Any:
        """Returns the sharding of batches.

        Raises:
          ValueError: if the batch can't be divided into microbatches, or one of them over the mesh.
        """
        if batch_size % self.microbatches:
            raise ValueError(
                f'config.data.batch_size={batch_size} is not divisible by '
                f'config.compute.microbatches={self.microbatches}; use a divisor of {batch_size}.'
            )
        try:
            part = batch_size // self.microbatches
            return batch_sharding(mesh, part, rules_with(self.rules))
        except ValueError as error:
            if self.microbatches == 1:
                raise
            raise ValueError(f'a microbatch is too small: {error}') from error
