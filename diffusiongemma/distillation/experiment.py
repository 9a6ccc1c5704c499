"""The typed configs of a run: every key of a distillation or a teacher training."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from diffusiongemma import configuration
from diffusiongemma.checkpoints.fields import read_model_config
from diffusiongemma.checkpoints.store import CHECKPOINTS_DIR
from diffusiongemma.data.sources import MAX_SEED, DataSpec
from diffusiongemma.distillation.anchors import check_count
from diffusiongemma.distillation.answers import TargetsConfig
from diffusiongemma.distillation.compute import ComputeConfig
from diffusiongemma.distillation.drafting import DraftingConfig
from diffusiongemma.distillation.loop import LoopConfig
from diffusiongemma.distillation.lora import LoraSettings
from diffusiongemma.distillation.stage1 import Stage1Config
from diffusiongemma.distillation.stage2 import Stage2Config
from diffusiongemma.distillation.state import OptimizerConfig
from diffusiongemma.errors import check_range
from diffusiongemma.evaluation.compare import EvalConfig
from diffusiongemma.evaluation.sweep import Grid
from diffusiongemma.models.config import SHARED, LightConfig, ModelConfig
from diffusiongemma.models.denoiser_config import KINDS
from diffusiongemma.models.execution import compute_dtype
from diffusiongemma.parallel import MeshConfig, processes
from diffusiongemma.sampling import SamplingConfig

CORRUPTIONS = ('uniform', 'masked')


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """The shape of a training batch.

    Attributes:
      batch_size: the number of rows over all processes.
      row_length: the number of tokens per row.
      canvases_per_row: the number of canvas slots per row; ignored with `config.drafting`, which
        draws new canvases in each step.
      random_offset_rate: the share of documents whose canvases start inside the response.
      one_canvas: whether a document gets one random canvas instead of all.
      workers: the number of processes per host that make batches; 0 for a thread. It affects the
        order of the data.
    """

    batch_size: int
    row_length: int
    canvases_per_row: int = 0
    random_offset_rate: float = 0.0
    one_canvas: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        for name, least in (('batch_size', 1), ('row_length', 1), ('canvases_per_row', 0)):
            check_range(name, getattr(self, name), least)
        check_range('random_offset_rate', self.random_offset_rate, 0, 1)
        check_range('workers', self.workers, 0)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(EvalConfig):
    """The settings of an evaluation (`config.eval`): an `EvalConfig` with examples and a grid.

    Attributes:
      source: the evaluated examples.
      sweep: the grid of settings for `--sweep`.
    """

    source: DataSpec | None = None
    sweep: Grid | None = None


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The config of a distillation, from the teacher to the evaluated student.

    Attributes:
      canvas_length: C, the number of tokens of a canvas.
      targets: the teacher's answers (stage 0).
      data: the shape of the training batches.
      train: the number of steps, and the intervals of reports and checkpoints.
      teacher: the model to distill: a checkpoint that `load_model` opens, or 'builtin-teacher'.
      init: a student to continue from; empty starts from the teacher's weights.
      seed: the seed of noise, data order and initial parameters.
      dtype: the dtype of the computation: 'float32' or 'bfloat16'; the training state is float32.
      denoise_dtype: the dtype of a separate or light denoiser, see `Execution.denoise_dtype`.
      mesh: the number of devices along each mesh axis.
      compute: trade-offs between memory and time.
      denoiser: 'shared', 'separate' or 'light', see `DenoiserConfig`.
      light: the layers and the head of a 'light' denoiser.
      predict_next: whether a canvas token is predicted at the position before it, as the teacher
        has learned to do. In the released models it is not.
      self_conditioning: whether a denoise step gets the soft embeddings of the previous step.
      lora: trains only adapters.
      corruption: the forward process: 'uniform' or 'masked'.
      ar_weight: the weight of KL(teacher || encode pass); only used with 'shared'.
      drafting: trains the denoiser to draft, instead of the two stages.
      stage1: stage 1, single denoise steps.
      stage2: stage 2, few steps on the sampler's trajectories.
      optimizer: the optimizer and the parameter average.
      sampling: the sampling settings of the student in its evaluation: fields of `SamplingConfig`;
        others come from the tokenizer or have their default.
      eval: the settings of the comparison of student and teacher.
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
        compute_dtype(self.dtype)
        if not 1 <= self.canvas_length <= self.data.row_length:
            raise ValueError(
                f'config.canvas_length={self.canvas_length} must be at least 1 and at most '
                f'config.data.row_length={self.data.row_length}, the tokens of a row.'
            )
        if self.denoiser not in KINDS:
            raise ValueError(f'denoiser must be one of {KINDS}, got {self.denoiser!r}.')
        if self.corruption not in CORRUPTIONS:
            raise ValueError(f'corruption must be one of {CORRUPTIONS}, got {self.corruption!r}.')
        _ = self.execution  # checks denoise_dtype
        if self.drafting is not None:
            check_count(self.drafting.anchors_per_row, self.data.row_length)
            if self.stage1.token_loss is not None:
                raise ValueError(
                    f'config.stage1.token_loss={self.stage1.token_loss} has no effect with '
                    'config.drafting, which replaces the stages; leave one of them out.'
                )
        check_range('ar_weight', self.ar_weight, 0)
        check_range('seed', self.seed, 0, MAX_SEED)

    @classmethod
    def of(cls, config: ConfigDict) -> 'Experiment':
        """Returns the experiment of a config.

        Raises:
          ValueError: if a key is unknown (the message names the nearest known one), missing or has
            an invalid value.
        """
        return configuration.build(cls, config)

    @property
    def execution(self) -> ComputeConfig:
        """Returns `compute` with the dtype of the denoiser."""
        dtype = self.denoise_dtype or self.compute.denoise_dtype
        return dataclasses.replace(self.compute, denoise_dtype=dtype)


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """The examples and batches of a teacher training.

    Attributes:
      sources: the sources of examples, each with its `weight`.
      batch_size: the number of rows over all processes.
      row_length: the number of tokens per row.
    """

    sources: tuple[DataSpec, ...]
    batch_size: int
    row_length: int

    def __post_init__(self) -> None:
        specs = (s if isinstance(s, DataSpec) else DataSpec.from_config(s) for s in self.sources)
        object.__setattr__(self, 'sources', tuple(specs))


@dataclasses.dataclass(frozen=True)
class TeacherTraining:
    """The config of the training of an autoregressive Gemma, the teacher.

    Attributes:
      model: the architecture of the model.
      data: the training data.
      train: the number of steps, and the intervals of reports and checkpoints.
      seed: the seed of data order and initial parameters.
      init: a model to continue from; empty starts from random parameters.
      tokenizer: the path of a sentencepiece model, or 'builtin'.
      dtype: the dtype of the computation: 'float32' or 'bfloat16'.
      mesh: the number of devices along each mesh axis.
      compute: trade-offs between memory and time.
      optimizer: the optimizer and the parameter average.
    """

    model: ModelConfig = dataclasses.field(metadata={configuration.READER: read_model_config})
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
        compute_dtype(self.dtype)
        check_range('seed', self.seed, 0, MAX_SEED)

    @classmethod
    def of(cls, config: ConfigDict) -> 'TeacherTraining':
        """Returns the teacher training of a config, see `Experiment.of`."""
        return configuration.build(cls, config)


def teacher_config(values: Mapping[str, Any]) -> ConfigDict:
    """Returns the config of a teacher's recipe, with defaults for all other keys."""
    return configuration.complete(ConfigDict(values), TeacherTraining)


def experiment_config(values: Mapping[str, Any]) -> ConfigDict:
    """Returns the config of a distillation recipe, with defaults for all other keys."""
    return configuration.complete(ConfigDict(values), Experiment)


def write_resolved(
    config: Experiment | TeacherTraining, workdir: Path, *, fits: bool = False
) -> None:
    """Writes the complete config of a run, including defaults, to `workdir`/config.json.

    Args:
      config: the config of the run.
      workdir: the workdir of the run; it is created if it does not exist.
      fits: whether the run has read the checkpoints in `workdir`, if any. If it has not, the
        config of the run that wrote them is kept, because they may not fit this config.

    Raises:
      ValueError: if the processes of the run do not share `workdir`.
    """
    processes.check_shared(workdir)
    has_checkpoints = any((workdir / CHECKPOINTS_DIR).glob('*'))
    if processes.is_writer() and (fits or not has_checkpoints):
        text = json.dumps(configuration.json_values(config), indent=2)
        (workdir / 'config.json').write_text(text + '\n')
