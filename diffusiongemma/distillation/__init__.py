"""Training of teachers, and distillation of a teacher into a student."""

from diffusiongemma.distillation.drafting import Drafting, DraftingConfig
from diffusiongemma.distillation.experiment import (
    Experiment,
    TeacherTraining,
    experiment_config,
    teacher_config,
)
from diffusiongemma.distillation.loading import Teacher, load_student, load_teacher
from diffusiongemma.distillation.run import distill, train_student
from diffusiongemma.distillation.setup import Setup
from diffusiongemma.distillation.stage1 import Stage1, Stage1Config
from diffusiongemma.distillation.stage2 import Stage2, Stage2Config
from diffusiongemma.distillation.state import (
    OptimizerConfig,
    TrainState,
    create_state,
    make_optimizer,
)
from diffusiongemma.distillation.step import Objective, distillation_loss, make_distillation_step
from diffusiongemma.distillation.targets import write_targets
from diffusiongemma.distillation.teacher import (
    FullDistribution,
    TeacherDistribution,
    TopKDistribution,
)

__all__ = [
    'Drafting',
    'DraftingConfig',
    'Experiment',
    'FullDistribution',
    'Objective',
    'OptimizerConfig',
    'Setup',
    'Stage1',
    'Stage1Config',
    'Stage2',
    'Stage2Config',
    'Teacher',
    'TeacherDistribution',
    'TeacherTraining',
    'TopKDistribution',
    'TrainState',
    'create_state',
    'distill',
    'distillation_loss',
    'experiment_config',
    'load_student',
    'load_teacher',
    'make_distillation_step',
    'make_optimizer',
    'teacher_config',
    'train_student',
    'write_targets',
]
