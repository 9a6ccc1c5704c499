"""Makes the parameters of a new model without compiling their initialization, which is slow."""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from diffusiongemma.checkpoints.placement import param_shapes
from diffusiongemma.models.arrays import Params
from diffusiongemma.models.weights import weight_at

ZEROS = ('self_conditioning/mlp/down', 'teacher_state/kernel', 'serial/following', 'draft_head')
UNSCALED = ('router/kernel', 'per_layer_embedder/projection')


def new_params(model: nn.Module, seed: int = 0) -> Params:
    """Returns parameters with the distribution of those of `init_params`, drawn by numpy.

    `test_weights.py` compares the two.
    """
    rng = np.random.default_rng(seed)
    flat = {name: _draw(model, rng, name, shape) for name, shape in param_shapes(model).items()}
    return unflatten_dict({name: jnp.asarray(value) for name, value in flat.items()}, sep='/')


def _draw(model: nn.Module, rng: np.random.Generator, name: str, shape: tuple[int, ...]):
    config, path = model.config, name.split('/')
    if name == 'draft_ids':
        return np.arange(math.prod(shape), dtype=np.int32)
    if name.endswith(('query_norm/scale', 'key_norm/scale')):
        scale = (shape[-1] * config.query_scale**2) ** -0.25 - config.norm_scale_offset
        return np.full(shape, scale, np.float32)
    if path[-1] == 'scale' and path[-2] != 'router':
        return np.full(shape, 1 - config.norm_scale_offset, np.float32)
    if path[-1].endswith(('scale', 'scalar')):
        return np.ones(shape, np.float32)
    if name.endswith(ZEROS):
        return np.zeros(shape, np.float32)
    axes = weight_at(path).input_axes(len(shape)) or (-1,)  # tables are scaled by their width
    inputs = 1 if name.endswith(UNSCALED) else math.prod(shape[axis] for axis in axes)
    return rng.standard_normal(shape, np.float32) * np.float32(inputs**-0.5)
