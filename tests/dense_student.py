"""Makes a dense denoiser with one set of layers from the shipped teacher."""

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from diffusiongemma.checkpoints.bundle import save_bundle
from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.checkpoints.placement import param_shapes
from diffusiongemma.models import DiffusionGemma
from diffusiongemma.models.lora import base_params


def save_dense_student(directory):
    """Writes the bundle of the student; its self-conditioning is random."""
    teacher, params, tokenizer = load_model('builtin-teacher')
    config = teacher.config.replace(canvas_length=32)
    flat = flatten_dict(base_params(config, params), sep='/')
    rng = np.random.default_rng(0)
    for name, shape in param_shapes(DiffusionGemma(config)).items():
        if name not in flat:
            value = 0.05 * rng.standard_normal(shape) + name.endswith('scale')
            flat[name] = jnp.asarray(value, jnp.float32)
    save_bundle(directory, config, unflatten_dict(flat, sep='/'), tokenizer)
    return directory
