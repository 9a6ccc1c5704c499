"""The student's parameters: how they start from the teacher's, and which of them are trained."""

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from diffusiongemma.models.config import ModelConfig
from diffusiongemma.models.denoiser import DENOISER_ALONE


def student_params_from_teacher(student_params: dict, teacher_params: dict) -> dict:
    """Copies the teacher's weights into a freshly initialised student.

    The student's additions keep their initial values, except that each layer's denoise
    scalar starts at its encode scalar, and a separate denoiser at the teacher's layers.

    Raises:
      ValueError: a weight of the teacher is missing in the student or has another shape.
    """
    if 'denoise_backbone' in student_params:
        teacher_params = teacher_params | {'denoise_backbone': teacher_params['backbone']}
    student, teacher = flatten_dict(student_params), flatten_dict(teacher_params)
    for path, value in teacher.items():
        have = student[path].shape if path in student else None
        if have != value.shape:
            raise ValueError(
                f'the teacher parameter {"/".join(path)} has shape {value.shape}, the student '
                f'{"has none" if have is None else f"has {have}"}: teacher and student need '
                'the same backbone.'
            )
    merged = student | teacher
    for path in student:
        encode_path = (*path[:-1], 'encode_scalar')
        if path[-1] == 'denoise_scalar' and encode_path in teacher:
            merged[path] = teacher[encode_path]
    return unflatten_dict({path: jnp.array(value) for path, value in merged.items()})


def trained_params(config: ModelConfig, params: dict) -> dict:
    """The part of a student's parameters (or of a tree like them) that distillation trains.

    A separate denoiser is trained alone: the encode pass and the embedding stay the teacher's.
    Otherwise all parameters are trained.
    """
    if not config.separate_denoiser:
        return params
    return {name: params[name] for name in DENOISER_ALONE}


def frozen_params(config: ModelConfig, teacher_params: dict) -> dict:
    """The rest of a student's parameters: the teacher's, or none where all are trained."""
    return teacher_params if config.separate_denoiser else {}
