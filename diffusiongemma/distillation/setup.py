"""Derives models, objectives, optimizer and shardings from an experiment and its teacher.

The run (`run.py`) uses them with arrays; the planner (`planning.programs`) compiles the same
programs with shapes.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any, Protocol

import jax
import optax

from diffusiongemma import configuration
from diffusiongemma.checkpoints.store import describe_model
from diffusiongemma.diffusion.corruption import Corruption, MaskedCorruption, UniformCorruption
from diffusiongemma.distillation.compute import ComputeConfig
from diffusiongemma.distillation.drafting import Drafting
from diffusiongemma.distillation.experiment import Experiment
from diffusiongemma.distillation.lora import LoraStudent, lora_student
from diffusiongemma.distillation.stage1 import Stage1
from diffusiongemma.distillation.stage2 import Stage2
from diffusiongemma.distillation.state import TrainState, create_state, make_optimizer
from diffusiongemma.distillation.step import (
    Constants,
    Objective,
    join_parts,
    make_distillation_step,
)
from diffusiongemma.distillation.student import student_params_from_teacher, trained_params
from diffusiongemma.models.arrays import Params
from diffusiongemma.models.config import LIGHT, DenoiserConfig
from diffusiongemma.models.denoiser import DiffusionGemma
from diffusiongemma.models.transformer import Gemma, init_params
from diffusiongemma.parallel import param_shardings
from diffusiongemma.sampling import SamplingConfig


class TokenIds(Protocol):
    """The part of a `Tokenizer` that a setup needs."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def mask_id(self) -> int: ...
    @property
    def stop_ids(self) -> tuple[int, ...]: ...
    @property
    def pad_id(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Setup:
    """The models and objectives of an experiment on a mesh.

    Attributes:
      experiment: the config of the distillation.
      mesh: the mesh of devices.
      compute: trade-offs between memory and time.
      teacher: the AR Gemma.
      student: the DiffusionGemma to train.
      objectives: the objectives in order, each with the step at which it ends.
      optimizer: the optimizer for the number of steps of the experiment.
      lora: the adapters to train, or None if layers are trained.
    """

    experiment: Experiment
    mesh: jax.sharding.Mesh
    compute: ComputeConfig
    teacher: Gemma
    student: DiffusionGemma
    objectives: tuple[tuple[Objective, int], ...]
    optimizer: optax.GradientTransformation
    lora: LoraStudent | None

    @classmethod
    def of(
        cls, experiment: Experiment, teacher: Gemma, token_ids: TokenIds, mesh: jax.sharding.Mesh
    ) -> 'Setup':
        """Returns the setup of an experiment for its teacher.

        Raises:
          ValueError: if the experiment is not possible with this teacher.
        """
        compute, stages = experiment.execution, objectives(experiment, token_ids)
        student = compute.place(student_model(experiment, teacher, token_ids), mesh)
        if experiment.init and experiment.lora.rank:
            raise ValueError(
                f'config.init={experiment.init} and config.lora.rank={experiment.lora.rank}: '
                "adapters start from the teacher; set config.init='' or config.lora.rank=0."
            )
        if experiment.drafting is None and not experiment.data.canvases_per_row:
            raise ValueError(
                'config.data.canvases_per_row is missing; set the canvas slots of a row, >= 1.'
            )
        return cls(
            experiment,
            mesh,
            compute,
            compute.place(teacher, mesh),
            student,
            stages,
            make_optimizer(experiment.optimizer, experiment.train.num_steps),
            lora_student(experiment.lora, student, experiment.seed),
        )

    @property
    def canvases_per_row(self) -> int:
        """Returns the canvas slots of a packed row; 0 if the objective itself draws canvases."""
        return self.experiment.data.canvases_per_row if self.experiment.drafting is None else 0

    @property
    def rows(self) -> Any:
        """Returns the sharding of a batch."""
        return self.compute.batch_sharding(self.mesh, self.experiment.data.batch_size)

    def constants(self, teacher: Params, frozen: Params) -> Constants:
        """Returns the constant parameters of the steps; `frozen` is the frozen part of the student.

        The teacher is left out if the student's frozen encode pass serves as the teacher, or if
        the batches contain the teacher's distributions.
        """
        is_needed = not (
            self.student.config.has_frozen_encoder or self.experiment.targets.top_k_logits
        )
        return Constants(teacher=teacher if is_needed else None, student=frozen)

    def trained_shardings(self, teacher: Params) -> dict[str, Any]:
        """Returns the shardings of the trained parameters, given the teacher's parameters."""
        if self.lora is not None:
            return self.lora.shardings(teacher, self.mesh)
        return trained_params(self.student.config, param_shardings(self.student, self.mesh))

    def initial_state(self, source: Params) -> TrainState:
        """Returns the state at step 0 from the parameters of the teacher or of a whole student."""
        average = self.experiment.optimizer.average
        if self.lora is not None:
            return create_state(self.lora.init(source), self.optimizer, average=average)
        if not self.experiment.init:
            fresh = init_params(self.student, jax.random.key(self.experiment.seed))
            source = student_params_from_teacher(fresh, source, self.student.config)
        return create_state(
            trained_params(self.student.config, source), self.optimizer, average=average
        )

    def step(self, objective: Objective) -> Callable[..., Any]:
        """Returns the training step of one objective, see `make_distillation_step`."""
        return make_distillation_step(
            self.student,
            self.teacher,
            objective,
            self.optimizer,
            ar_weight=self.experiment.ar_weight,
            ema_decay=self.experiment.optimizer.ema_decay,
            seed=self.experiment.seed,
            microbatches=self.compute.microbatches,
            combine=join_parts if self.lora is None else self.lora.combine,
        )

    def describe(self, tokenizer_hash: str) -> dict[str, Any]:
        """Returns the `about` entry of checkpoints, which describes the student in JSON values."""
        about = describe_model(self.student.config, tokenizer_hash)
        if self.lora is not None:
            about['lora'] = json.loads(json.dumps(dataclasses.asdict(self.lora.config)))
        return about


def corruption_process(name: str, token_ids: TokenIds) -> Corruption:
    """Returns the forward process of `config.corruption`: 'uniform' or 'masked'."""
    if name == 'masked':
        return MaskedCorruption(token_ids.mask_id)
    return UniformCorruption(token_ids.vocab_size)


def objectives(experiment: Experiment, token_ids: TokenIds) -> tuple[tuple[Objective, int], ...]:
    """Returns the objectives in order, each with the step at which it ends."""
    corruption = corruption_process(experiment.corruption, token_ids)
    last_step = experiment.train.num_steps
    if experiment.drafting is not None:
        fields = vars(experiment.drafting)
        drafting = Drafting(**fields, corruption=corruption, canvas_length=experiment.canvas_length)
        return ((drafting, last_step),)
    if experiment.denoiser == LIGHT:
        raise ValueError(
            "config.denoiser='light' is trained to draft: give it a section config.drafting, as "
            'configs/tiny.py has.'
        )
    sampling = sampling_config(experiment, token_ids)
    shared: dict[str, Any] = {'corruption': corruption, 'schedule': sampling.schedule}
    stage1 = Stage1(**vars(experiment.stage1), **shared)
    stage2 = Stage2(**vars(experiment.stage2), **shared, acceptance=sampling.acceptance_rule)
    first_step = last_step if stage2.first_step is None else stage2.first_step
    return ((stage1, min(first_step, last_step)), (stage2, last_step))


def student_model(experiment: Experiment, teacher: Gemma, token_ids: TokenIds) -> DiffusionGemma:
    """Returns the student of an experiment for an AR Gemma as its teacher."""
    corruption = corruption_process(experiment.corruption, token_ids)
    denoiser = DenoiserConfig(
        canvas_length=experiment.canvas_length,
        kind=experiment.denoiser,
        predict_next=experiment.predict_next,
        self_conditioning=experiment.self_conditioning,
        mask_id=corruption.mask_id if isinstance(corruption, MaskedCorruption) else None,
        light=experiment.light if experiment.denoiser == LIGHT else None,
    )
    return DiffusionGemma(teacher.config.replace(denoiser=denoiser), teacher.dtype)


def sampling_config(experiment: Experiment, token_ids: TokenIds) -> SamplingConfig:
    """Returns the `SamplingConfig` of `config.sampling` for a tokenizer."""
    fields = SamplingConfig.tokenizer_fields(token_ids) | dict(experiment.sampling)
    return configuration.build(SamplingConfig, fields, 'sampling')
