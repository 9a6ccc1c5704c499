"""Distillation that only trains LoRA adapters on frozen parameters (`config.lora`)."""

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
    """The LoRA settings of a run (`config.lora`): a `LoraConfig` with defaults for rank and passes.

    Attributes:
      rank: r, the number of columns of A and rows of B; 0 trains all layers without adapters.
      passes: 'both', or 'denoise' to adapt only the denoise pass; '' chooses by the kind of
        denoiser.
    """

    rank: int = 0
    passes: str = ''

    def __post_init__(self) -> None:
        self.of_denoiser(SHARED)

    def of_denoiser(self, kind: str) -> LoraConfig | None:
        """Returns the adapter config for a kind of denoiser, or None without adapters.

        Raises:
          ValueError: if a value is out of range.
        """
        if not self.rank:
            return None
        passes = self.passes or (BOTH if kind == SHARED else DENOISE)
        return LoraConfig(**{**vars(self), 'passes': passes})


@dataclasses.dataclass(frozen=True)
class LoraStudent:
    """A student whose adapters are trained.

    Attributes:
      config: the config of the adapters.
      model: the student.
      seed: the seed of the run, for the adapters and parameters that the teacher does not have.
    """

    config: LoraConfig
    model: DiffusionGemma
    seed: int

    def base(self, teacher_params: Params, mesh: jax.sharding.Mesh) -> Params:
        """Returns the frozen parameters: the sharded initial student."""
        make = jax.jit(self._start, out_shardings=param_shardings(self.model, mesh))
        params: Params = make(teacher_params)
        return params

    def constants(self, teacher_params: Params, mesh: jax.sharding.Mesh) -> Constants:
        """Returns the parameters that the step reads and never changes."""
        frozen_encode = self.config.passes == DENOISE
        return Constants(
            teacher=None if frozen_encode else teacher_params,
            student=self.base(teacher_params, mesh),
        )

    def init(self, teacher_params: Params) -> Params:
        """Returns initial adapters, which do not change the model yet."""
        key = jax.random.fold_in(jax.random.key(self.seed), 1)
        return init_lora(self.config, self._start(teacher_params), key)

    def shardings(self, teacher_params: Params, mesh: jax.sharding.Mesh) -> dict[str, Any]:
        """Returns the shardings of the adapters."""
        shapes = jax.eval_shape(self.init, teacher_params)
        return adapter_shardings(shapes, param_shardings(self.model, mesh))

    def combine(self, base: Params, adapters: Params) -> Params:
        """Returns all parameters: the frozen ones with the adapters merged in."""
        return merge_lora(base, adapters, self.config)

    def save(
        self, workdir: Path, adapters: Any, teacher_params: Params, base: str, about: dict[str, Any]
    ) -> None:
        """Writes only the adapters; `base` is the path or alias of the teacher."""
        save_adapters(
            workdir / ADAPTERS_DIR,
            self.config,
            adapters,
            self.model.config,
            base=base,
            base_fingerprint=fingerprint(teacher_params),
            about=about,
        )

    def _start(self, teacher_params: Params) -> Params:
        fresh = init_params(self.model, jax.random.key(self.seed))
        return student_params_from_teacher(fresh, teacher_params)


def lora_student(settings: LoraSettings, model: DiffusionGemma, seed: int) -> LoraStudent | None:
    """Returns the student whose adapters are trained, or None if all layers are trained.

    Args:
      settings: the settings of `config.lora`.
      model: the student.
      seed: the seed of the run.

    Raises:
      ValueError: if adapters of these passes are not possible with this kind of denoiser.
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
            f'{kind!r}: adapters of only the denoise pass form a separate denoiser, and a light '
            'denoiser has no adapters.'
        )
    return LoraStudent(lora, model, seed)
