"""The student's parameters: how they start from the teacher's, and which of them are trained."""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from diffusiongemma.models.arrays import Params
from diffusiongemma.models.config import LightConfig, ModelConfig
from diffusiongemma.models.denoiser import DENOISER_ALONE, DRAFT_IDS

_KEYS_AND_VALUES = ('key', 'value', 'key_norm')


def student_params_from_teacher(
    student_params: Params, teacher_params: Params, config: ModelConfig | None = None
) -> Params:
    """Copies the teacher's weights into a freshly initialized student.

    The student's additions keep their initial values, except that each layer's denoise scalar
    starts at its encode scalar, a separate denoiser at the teacher's layers, and each layer of a
    light one at the dense part of the teacher's layer that the config names.

    Args:
      student_params: of the student.
      teacher_params: of the teacher, layers stacked as in training.
      config: of the student; needed for a light one, whose layers it names.

    Raises:
      ValueError: a weight of the teacher is missing in the student or has another shape.
    """
    light = None if config is None else config.light
    if 'denoise_backbone' in student_params and light is None:
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
    if config is not None and light is not None:
        fresh = student_params['denoise_backbone']
        started = _light_backbone(config, light, fresh, teacher_params['backbone'])
        merged |= flatten_dict({'denoise_backbone': started})
    return unflatten_dict({path: jnp.array(value) for path, value in merged.items()})


def _light_backbone(config: ModelConfig, light: LightConfig, fresh: dict, backbone: dict) -> Params:
    """The draft layers as the teacher's layers that they start from.

    A draft layer has no routed experts, and where its teacher layer shares keys and values with a
    layer that is none of the draft's, it starts with the projections of that layer.
    """
    started = {'final_norm': backbone['final_norm']}
    for number, layer in enumerate(light.layers):
        own = flatten_dict(layer_params(config, backbone, layer))
        source = flatten_dict(layer_params(config, backbone, config.kv_source(layer)))
        name = f'layer_{number}'
        started[name] = {}
        for path, value in flatten_dict(fresh[name]).items():
            borrowed = path[0] == 'attention' and path[1] in _KEYS_AND_VALUES
            start = (source if borrowed else own).get(path, value)
            if start.shape != value.shape:
                raise ValueError(
                    f'draft layer {number} has {"/".join(path)} of shape {value.shape}, layer '
                    f'{layer} of the teacher has {start.shape}: they need the same backbone.'
                )
            started[name][path] = start
        started[name] = unflatten_dict(started[name])
    return started


def layer_params(config: ModelConfig, backbone: dict, layer: int) -> Params:
    """Parameters of one layer out of a backbone's, whose layers are stacked as in training."""
    stacks = (config.kv_layers, config.kv_shared_layers)
    stack = stacks[layer >= stacks[1].first] if stacks[1].types else stacks[0]
    prefix = 'shared_' if stack.shares_kv else ''
    if layer >= stack.tail_first:
        return backbone[f'{prefix}tail'][f'layer_{layer - stack.tail_first}']
    group, place = divmod(layer - stack.first, len(stack.pattern))
    return jax.tree.map(lambda leaf: leaf[group], backbone[f'{prefix}layers'][f'layer_{place}'])


def trained_params(config: ModelConfig, params: Params) -> Params:
    """The part of a student's parameters (or of a tree like them) that distillation trains.

    A denoiser with layers of its own is trained alone: the encode pass and the embedding stay the
    teacher's. Otherwise all parameters are trained.
    """
    if not config.has_frozen_encoder:
        return params
    return {name: params[name] for name in DENOISER_ALONE if name in params}


def frozen_params(config: ModelConfig, teacher_params: Params, draft_ids: Any = None) -> Params:
    """The rest of a student's parameters: the teacher's, or none where all are trained.

    `draft_ids` are the tokens [Vd] int32 of a light denoiser's draft vocabulary, if it has one.
    """
    if not config.has_frozen_encoder:
        return {}
    return teacher_params | ({} if draft_ids is None else {DRAFT_IDS: draft_ids})
