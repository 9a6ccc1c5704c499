"""Distillation that trains adapters alone, over frozen parameters (`config.lora`)."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from diffusiongemma.checkpoints.adapters import fingerprint, save_adapters
from diffusiongemma.distillation.step import Constants
from diffusiongemma.distillation.student import student_params_from_teacher
from diffusiongemma.models.arrays import Params
from diffusiongemma.models.config import SEPARATE, SHARED
from diffusiongemma.models.denoiser import DiffusionGemma
from diffusiongemma.models.lora import (
    BOTH,
    DENOISE,
    LoraConfig,
    adapter_shardings,
    init_lora,
    merge_lora,
)
from diffusiongemma.models.transformer import init_params
from diffusiongemma.parallel import param_shardings

ADAPTERS_DIR = 'adapters'  # in a workdir: the adapters that the run exports


@dataclasses.dataclass(frozen=True)
class LoraSettings(LoraConfig):
    """What `config.lora` may say: a `LoraConfig` with two values that mean a choice of the run.

    Attributes:
      rank: r, columns of A and rows of B; 0 trains all layers.
      passes: 'both', or 'denoise' for the denoise pass alone; '' for what the denoiser allows.
    """

    rank: int = 0
    passes: str = ''

    def __post_init__(self) -> None:
        self.of_denoiser(SHARED)

    def of_denoiser(self, kind: str) -> LoraConfig | None:
        """Returns the adapters of a student with this kind of denoiser; None where there are none.

        Raises:
          ValueError: a value is out of range.
        """
        if not self.rank:
            return None
        passes = self.passes or (BOTH if kind == SHARED else DENOISE)
        return LoraConfig(**{**vars(self), 'passes': passes})


@dataclasses.dataclass(frozen=True)
class LoraStudent:
    """A student of which adapters are trained.

    Attributes:
      config: of the adapters.
      model: the student.
      seed: of the run; what the teacher does not have starts from it.
    """

    config: LoraConfig
    model: DiffusionGemma
    seed: int

    def base(self, teacher_params: Params, mesh: jax.sharding.Mesh) -> dict:
        """The frozen parameters: the student as it starts, in its shards."""
        make = jax.jit(self._start, out_shardings=param_shardings(self.model, mesh))
        return make(teacher_params)

    def constants(self, teacher_params: Params, mesh: jax.sharding.Mesh) -> Constants:
        """What the step reads and never changes."""
        frozen_encode = self.config.passes == DENOISE
        return Constants(
            teacher=None if frozen_encode else teacher_params,
            student=self.base(teacher_params, mesh),
        )

    def init(self, teacher_params: Params) -> dict:
        """Adapters that change nothing yet."""
        key = jax.random.fold_in(jax.random.key(self.seed), 1)
        return init_lora(self.config, self._start(teacher_params), key)

    def shardings(self, teacher_params: Params, mesh: jax.sharding.Mesh) -> dict:
        """Of the adapters."""
        shapes = jax.eval_shape(self.init, teacher_params)
        return adapter_shardings(shapes, param_shardings(self.model, mesh))

    def combine(self, base: dict, adapters: dict) -> dict:
        """All parameters, from the frozen ones and the adapters."""
        return merge_lora(base, adapters, self.config)

    def save(
        self, workdir: Path, adapters: Any, teacher_params: Params, base: str, about: dict
    ) -> None:
        """Writes the adapters alone; `base` is the path or alias of the teacher."""
        save_adapters(
            workdir / ADAPTERS_DIR,
            self.config,
            adapters,
            self.model.config,
            base=base,
            base_fingerprint=fingerprint(teacher_params),
            about=about,
        )

    def _start(self, teacher_params: Params) -> dict:
        fresh = init_params(self.model, jax.random.key(self.seed))
        return student_params_from_teacher(fresh, teacher_params)


def lora_student(settings: LoraSettings, model: DiffusionGemma, seed: int) -> LoraStudent | None:
    """Returns the student of which adapters are trained; None where all layers are.

    Args:
      settings: `config.lora`.
      model: the student.
      seed: of the run.

    Raises:
      ValueError: the pass cannot be adapted alone.
    """
    kind = model.config.kind
    assert kind is not None  # a DiffusionGemma has a denoiser
    lora = settings.of_denoiser(kind)
    if lora is None:
        return None
    needed = SEPARATE if lora.passes == DENOISE else SHARED
    if kind != needed:
        raise ValueError(
            f'config.lora.passes={lora.passes!r} needs config.denoiser={needed!r}, got '
            f'{kind!r}: adapters of the denoise pass alone are a separate denoiser, and a light '
            'one is trained whole.'
        )
    return LoraStudent(lora, model, seed)
