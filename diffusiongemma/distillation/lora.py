"""Distillation that trains adapters alone, over frozen parameters (`config.lora`)."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from diffusiongemma import configuration
from diffusiongemma.checkpoints.adapters import fingerprint, save_adapters
from diffusiongemma.distillation.step import Constants
from diffusiongemma.distillation.student import student_params_from_teacher
from diffusiongemma.models.config import SEPARATE, SHARED
from diffusiongemma.models.denoiser import DiffusionGemma
from diffusiongemma.models.lora import (
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

    def base(self, teacher_params: dict, mesh: jax.sharding.Mesh) -> dict:
        """The frozen parameters: the student as it starts, in its shards."""
        make = jax.jit(self._start, out_shardings=param_shardings(self.model, mesh))
        return make(teacher_params)

    def constants(self, teacher_params: dict, mesh: jax.sharding.Mesh) -> Constants:
        """What the step reads and never changes."""
        frozen_encode = self.config.passes == DENOISE
        return Constants(
            teacher=None if frozen_encode else teacher_params,
            student=self.base(teacher_params, mesh),
        )

    def init(self, teacher_params: dict) -> dict:
        """Adapters that change nothing yet."""
        key = jax.random.fold_in(jax.random.key(self.seed), 1)
        return init_lora(self.config, self._start(teacher_params), key)

    def shardings(self, teacher_params: dict, mesh: jax.sharding.Mesh) -> dict:
        """Of the adapters."""
        shapes = jax.eval_shape(self.init, teacher_params)
        return adapter_shardings(shapes, param_shardings(self.model, mesh))

    def combine(self, base: dict, adapters: dict) -> dict:
        """All parameters, from the frozen ones and the adapters."""
        return merge_lora(base, adapters, self.config)

    def save(
        self, workdir: Path, adapters: Any, teacher_params: dict, base: str, about: dict
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

    def _start(self, teacher_params: dict) -> dict:
        fresh = init_params(self.model, jax.random.key(self.seed))
        return student_params_from_teacher(fresh, teacher_params)


def lora_student(config: ConfigDict, model: DiffusionGemma) -> LoraStudent | None:
    """The student of `config.lora`, or None where its rank is 0: all is trained.

    Raises:
      ValueError: a key is unknown, or the pass cannot be adapted alone.
    """
    values = config.lora.to_dict()
    if not values.get('rank'):
        return None
    if config.init:
        raise ValueError(
            f'config.init={config.init} and config.lora.rank={values["rank"]}: adapters start from '
            'the teacher; set one of them to nothing.'
        )
    lora = configuration.build(LoraConfig, values, 'lora')
    needed = SEPARATE if lora.passes == DENOISE else SHARED
    if model.config.kind != needed:
        raise ValueError(
            f'config.lora.passes={lora.passes!r} needs config.denoiser={needed!r}, got '
            f'{model.config.kind!r}: adapters of the denoise pass alone are a separate '
            'denoiser, and a light one is trained whole.'
        )
    return LoraStudent(lora, model, config.seed)
