"""How a run computes its steps (`config.compute`); none of it changes what they compute."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax

from diffusiongemma.models.execution import Execution
from diffusiongemma.models.transformer import Gemma
from diffusiongemma.parallel import batch_sharding, batch_ways, on_mesh, rules_with

M = TypeVar('M', bound=Gemma)


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """Memory against time; docs/scaling.md says how to choose.

    Attributes:
      remat: 'none', 'dots' or 'full', see `Execution`.
      logits_chunk: positions of each row that have logits at the same time; 0 for all.
      query_block: queries of each block that have attention scores at the same time; 0 for all.
      denoise_dtype: of a denoiser with layers of its own, see `Execution`.
      microbatches: equal parts that a batch is computed in, one after another.
      rules: rows of the table in `parallel.sharding` that this run replaces: mesh axes of a
        logical axis.
    """

    remat: str = 'none'
    logits_chunk: int = 0
    query_block: int = 0
    denoise_dtype: str | None = None
    microbatches: int = 1
    rules: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.microbatches < 1:
            raise ValueError(f'compute.microbatches must be >= 1, got {self.microbatches}.')
        self.execution()
        rules_with(self.rules)

    def execution(self) -> Execution:
        """What a model is told of it, but for the mesh."""
        return Execution(
            remat=self.remat,
            logits_chunk=self.logits_chunk,
            query_block=self.query_block,
            denoise_dtype=self.denoise_dtype,
        )

    def place(self, model: M, mesh: jax.sharding.Mesh) -> M:
        """The model, computed like this on a mesh."""
        return on_mesh(model.clone(execution=self.execution()), mesh, rules_with(self.rules))

    def batch_multiple(self, mesh: jax.sharding.Mesh) -> int:
        """What the rows of a batch have to be a multiple of."""
        return self.microbatches * batch_ways(mesh, rules_with(self.rules))

    def batch_sharding(self, mesh: jax.sharding.Mesh, batch_size: int) -> Any:
        """Where batches are put; raises ValueError when a part is not divisible by the mesh."""
        if batch_size % self.microbatches:
            raise ValueError(
                f'batch_size={batch_size} is not divisible by '
                f'compute.microbatches={self.microbatches}; use a divisor of it.'
            )
        try:
            part = batch_size // self.microbatches
            return batch_sharding(mesh, part, rules_with(self.rules))
        except ValueError as error:
            if self.microbatches == 1:
                raise
            raise ValueError(f'a microbatch is too small: {error}') from error
