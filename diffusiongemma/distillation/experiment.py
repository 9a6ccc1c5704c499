"""A distillation as a value: every key of its config, with a type and a default."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from diffusiongemma import configuration
from diffusiongemma.data.sources import DataSpec
from diffusiongemma.distillation.answers import TargetsConfig
from diffusiongemma.distillation.compute import ComputeConfig
from diffusiongemma.distillation.drafting import DraftingConfig
from diffusiongemma.distillation.loop import LoopConfig
from diffusiongemma.distillation.lora import LoraSettings
from diffusiongemma.distillation.stage1 import Stage1Config
from diffusiongemma.distillation.stage2 import Stage2Config
from diffusiongemma.distillation.state import OptimizerConfig
from diffusiongemma.evaluation.compare import EvalConfig
from diffusiongemma.evaluation.sweep import Grid
from diffusiongemma.models.config import SHARED, LightConfig, ModelConfig
from diffusiongemma.parallel import MeshConfig
from diffusiongemma.sampling import SamplingConfig


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """Shape of a training batch.

    Attributes:
      batch_size: rows, over all processes.
      row_length: tokens of a row.
      canvases_per_row: canvas slots of a row; of no use with `config.drafting`, whose canvases
        are drawn anew in each step.
      random_offset_rate: share of the documents whose canvases start inside the response.
      one_canvas: a document has one canvas, drawn at random, instead of all.
      workers: processes that make batches, on each host; 0 for a thread. The order of the data
        depends on it.
    """

    batch_size: int
    row_length: int
    canvases_per_row: int = 0
    random_offset_rate: float = 0.0
    one_canvas: bool = False
    workers: int = 0


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(EvalConfig):
    """What `config.eval` may say: an `EvalConfig`, on which examples and at which settings.

    Attributes:
      source: the examples.
      sweep: the grid of `--sweep`.
    """

    source: DataSpec | None = None
    sweep: Grid | None = None


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A distillation from teacher to evaluated student.

    Attributes:
      canvas_length: C, tokens of a canvas.
      targets: stage 0, what the teacher answers.
      data: shape of the training batches.
      train: number of steps and how often they are reported and saved.
      teacher: what is distilled: a checkpoint that `load_model` opens, or 'builtin-teacher'.
      init: a student to go on from; empty starts from the teacher's weights.
      seed: of everything random: noise, order of the data, first parameters.
      dtype: of the computation: 'float32' or 'bfloat16'; the state of training is float32.
      denoise_dtype: of a denoiser with layers of its own, see `Execution.denoise_dtype`.
      mesh: devices along each axis.
      compute: memory against time.
      denoiser: 'shared', 'separate' or 'light', see `DenoiserConfig`.
      light: layers and head of a 'light' denoiser.
      predict_next: a canvas token is predicted at the position before its own: what the teacher
        has learned holds from the first step on. The released models do not.
      self_conditioning: a denoise step sees the soft embeddings of the step before.
      lora: adapters alone.
      corruption: the forward process: 'uniform' or 'masked'.
      ar_weight: weight of KL(teacher || encode pass); no effect but with 'shared'.
      drafting: trains the denoiser to draft, in place of the two stages.
      stage1: single steps.
      stage2: few steps, on the sampler's own trajectories.
      optimizer: AdamW and the parameter average.
      sampling: how the student is sampled when it is evaluated: fields of `SamplingConfig`; the
        others are the tokenizer's or have their default.
      eval: how student and teacher are compared.
    """

    canvas_length: int
    targets: TargetsConfig
    data: BatchConfig
    train: LoopConfig
    teacher: str = ''
    init: str = ''
    seed: int = 0
    dtype: str = 'float32'
    denoise_dtype: str | None = None
    mesh: MeshConfig = MeshConfig(data=-1)
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)
    denoiser: str = SHARED
    light: LightConfig | None = None
    predict_next: bool = True
    self_conditioning: bool = True
    lora: LoraSettings = LoraSettings()
    corruption: str = 'uniform'
    ar_weight: float = 0.1
    drafting: DraftingConfig | None = None
    stage1: Stage1Config = Stage1Config()
    stage2: Stage2Config = Stage2Config()
    optimizer: OptimizerConfig = OptimizerConfig()
    sampling: Mapping[str, Any] = dataclasses.field(
        default_factory=dict, metadata={configuration.SECTION: SamplingConfig}
    )
    eval: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        configuration.compute_dtype(self.dtype)

    @classmethod
    def of(cls, config: ConfigDict) -> 'Experiment':
        """Returns the experiment of a config.

        Raises:
          ValueError: a key is unknown (the nearest known one is named) or missing, or has a value
            that can't be.
        """
        return configuration.build(cls, config)

    @property
    def execution(self) -> ComputeConfig:
        """How the run computes: `compute`, with the dtype of the denoiser."""
        dtype = self.denoise_dtype or self.compute.denoise_dtype
        return dataclasses.replace(self.compute, denoise_dtype=dtype)


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """Examples and batches of a teacher's training.

    Attributes:
      sources: where the examples come from, each with its `weight`.
      batch_size: rows, over all processes.
      row_length: tokens of a row.
    """

    sources: tuple[DataSpec, ...]
    batch_size: int
    row_length: int

    def __post_init__(self) -> None:
        specs = (s if isinstance(s, DataSpec) else DataSpec.from_config(s) for s in self.sources)
        object.__setattr__(self, 'sources', tuple(specs))


@dataclasses.dataclass(frozen=True)
class TeacherTraining:
    """The training of an autoregressive Gemma, the teacher.

    Attributes:
      model: its architecture.
      data: what it is trained on.
      train: number of steps and how often they are reported and saved.
      seed: of everything random: order of the data, first parameters.
      init: a model to go on from; empty starts from random parameters.
      tokenizer: path of a sentencepiece model, or 'builtin'.
      dtype: of the computation: 'float32' or 'bfloat16'.
      mesh: devices along each axis.
      compute: memory against time.
      optimizer: AdamW and the parameter average.
    """

    model: ModelConfig
    data: MixtureConfig
    train: LoopConfig
    seed: int = 0
    init: str = ''
    tokenizer: str = 'builtin'
    dtype: str = 'float32'
    mesh: MeshConfig = MeshConfig(data=-1)
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)
    optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self) -> None:
        configuration.compute_dtype(self.dtype)

    @classmethod
    def of(cls, config: ConfigDict) -> 'TeacherTraining':
        """Returns the training of a config, see `Experiment.of`."""
        return configuration.build(cls, config)


def teacher_config(values: Mapping[str, Any]) -> ConfigDict:
    """Returns the config of a teacher's recipe: what it says, and defaults for all other keys."""
    return configuration.complete(ConfigDict(values), TeacherTraining)


def experiment_config(values: Mapping[str, Any]) -> ConfigDict:
    """Returns the config of a recipe: what it says, and defaults for all other keys."""
    return configuration.complete(ConfigDict(values), Experiment)
