"""Initializes the student's parameters from the teacher's, and selects which are trained."""

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
    """Returns a freshly initialized student with the teacher's weights copied into it.

    Parameters that the teacher does not have keep their initial values, except that the denoise
    scalar of each layer starts at its encode scalar, a separate denoiser starts at the teacher's
    layers, and each layer of a light one at the dense part of the teacher layer that the config
    names.

    Args:
      student_params: initial parameters of the student.
      teacher_params: parameters of the teacher, with layers stacked as in training.
      config: the config of the student; required for a light one.

    Raises:
      ValueError: if a weight of the teacher is missing in the student or has another shape.
    """
    light = None if config is None else config.light
    if 'denoise_backbone' in student_params and light is None:
        teacher_params = teacher_params | {'denoise_backbone': teacher_params['backbone']}
    student, teacher = flatten_dict(student_params), flatten_dict(teacher_params)
    for path, value in teacher.items():
        shape = student[path].shape if path in student else None
        if shape != value.shape:
            raise ValueError(
                f'the teacher parameter {"/".join(path)} has shape {value.shape}, the student '
                f'{"has none" if shape is None else f"has {shape}"}: teacher and student need '
                'the same backbone.'
            )
    merged = student | teacher
    for path in student:
        encode_path = (*path[:-1], 'encode_scalar')
        if path[-1] == 'denoise_scalar' and encode_path in teacher:
            merged[path] = teacher[encode_path]
    if config is not None and light is not None:
        fresh = student_params['denoise_backbone']
        layers = _light_backbone(config, light, fresh, teacher_params['backbone'])
        merged |= flatten_dict({'denoise_backbone': layers})
    params: Params = unflatten_dict({path: jnp.array(value) for path, value in merged.items()})
    return params


def _light_backbone(
    config: ModelConfig, light: LightConfig, fresh: Params, backbone: Params
) -> Params:
    """Returns the draft layers with the weights of the teacher layers that they start from.

    A draft layer has no routed experts. If its teacher layer shares the keys and values of an
    earlier layer, it starts with the key and value projections of that layer.
    """
    result = {'final_norm': backbone['final_norm']}
    for number, layer in enumerate(light.layers):
        weights = flatten_dict(layer_params(config, backbone, layer))
        kv_weights = flatten_dict(layer_params(config, backbone, config.kv_source(layer)))
        name = f'layer_{number}'
        result[name] = {}
        for path, value in flatten_dict(fresh[name]).items():
            is_kv = path[0] == 'attention' and path[1] in _KEYS_AND_VALUES
            start = (kv_weights if is_kv else weights).get(path, value)
            if start.shape != value.shape:
                raise ValueError(
                    f'draft layer {number} has {"/".join(path)} of shape {value.shape}, layer '
                    f'{layer} of the teacher has {start.shape}: they need the same backbone.'
                )
            result[name][path] = start
        result[name] = unflatten_dict(result[name])
    return result


def layer_params(config: ModelConfig, backbone: Params, layer: int) -> Params:
    """Returns the parameters of one layer of a backbone with layers stacked as in training."""
    stacks = (config.kv_layers, config.kv_shared_layers)
    stack = stacks[layer >= stacks[1].first] if stacks[1].types else stacks[0]
    prefix = 'shared_' if stack.shares_kv else ''
    if layer >= stack.tail_first:
        params: Params = backbone[f'{prefix}tail'][f'layer_{layer - stack.tail_first}']
        return params
    group, place = divmod(layer - stack.first, len(stack.pattern))
    stacked = backbone[f'{prefix}layers'][f'layer_{place}']
    params = jax.tree.map(lambda leaf: leaf[group], stacked)
    return params


def trained_params(config: ModelConfig, params: Params) -> Params:
    """Returns the trained part of a student's parameters (or of a tree with their structure).

    With a separate or light denoiser only the denoiser is trained; the encode pass and the
    embedding remain the teacher's. Otherwise all parameters are trained.
    """
    if not config.has_frozen_encoder:
        return params
    return {name: params[name] for name in DENOISER_ALONE if name in params}


def frozen_params(config: ModelConfig, teacher_params: Params, draft_ids: Any = None) -> Params:
    """Returns the frozen part of a student's parameters: the teacher's, or {} if all are trained.

    `draft_ids` are the tokens [Vd] int32 of a light denoiser's draft vocabulary, if it has one.
    """
    if not config.has_frozen_encoder:
        return {}
    return teacher_params | ({} if draft_ids is None else {DRAFT_IDS: draft_ids})
