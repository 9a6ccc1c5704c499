"""Tests that sampling with arrays sharded over eight devices equals sampling on one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_shapes import meshes
from test_model import random_params

from diffusiongemma.models import DiffusionGemma
from diffusiongemma.parallel import (
    MESH_AXES,
    batch_sharding,
    make_mesh,
    on_mesh,
    param_shardings,
)
from diffusiongemma.sampling import (
    Controls,
    Sampler,
    SamplingConfig,
    diffusion,
    pad_prompts,
    passes,
)
from diffusiongemma.sampling.sampler import MODES, prefilled

PROMPTS = [[5, 17, 20, 31, 8, 9, 3, 4, 6, 12, 7], [9, 14], [3, 3, 3], [1]] * 2
FEW = ({'fsdp': 2, 'tensor': 2, 'expert': 2}, {'data': 2, 'tensor': 2, 'sequence': 2})
IN_DEFAULT_SUITE = dict.fromkeys(MESH_AXES, 1) | {'data': 2, 'expert': 2, 'sequence': 2}
# Prompts of width 16 and 16 new tokens give slots that the sequence axis divides.
CONFIG = SamplingConfig(
    max_new_tokens=16, max_denoising_steps=2, temperature=0, stop_ids=(), entropy_bound=2.0
)


@pytest.fixture
def model(tiny_moe_config):
    # Every mesh divides this vocabulary, these canvases and experts.
    moe = dataclasses.replace(tiny_moe_config.moe, num_experts=8)
    return DiffusionGemma(
        tiny_moe_config.replace(
            vocab_size=40, canvas_length=8, moe=moe, layer_types=('sliding', 'full')
        )
    )


def spread(model, axes):
    """Returns the model on a mesh, and sharded parameters, prompt tokens, lengths and keys."""
    mesh = make_mesh(axes, jax.devices()[:8])
    model = on_mesh(model, mesh)
    params = jax.device_put(random_params(model), param_shardings(model, mesh))
    tokens, lengths = pad_prompts(PROMPTS, width=16)
    rows = batch_sharding(mesh, len(PROMPTS))
    keys = jax.random.split(jax.random.key(0), len(PROMPTS))
    return model, params, *jax.device_put((jnp.asarray(tokens), jnp.asarray(lengths), keys), rows)


def alone(model):
    tokens, lengths = pad_prompts(PROMPTS, width=16)
    keys = jax.random.split(jax.random.key(0), len(PROMPTS))
    return model, random_params(model), jnp.asarray(tokens), jnp.asarray(lengths), keys


def first_step(model, params, tokens, lengths, keys):
    """Returns logits, soft embeddings and canvas of the first denoise step, and its cache."""
    state, _ = prefilled(model, CONFIG, params, tokens, lengths, keys, Controls())
    task = diffusion.canvas_task(model, state)
    noisy = diffusion.first_noise(model, CONFIG, params, task)
    logits = passes.denoise(
        model, params, state.cache, noisy.canvas, noisy.soft_embeddings, task.last_token
    )
    after = diffusion.denoise_step(model, CONFIG, params, state.cache, task, noisy)
    return logits, after.soft_embeddings, after.canvas, state.cache.kv


@pytest.fixture(scope='module')
def cached():
    """Returns results on one device, computed once for all meshes."""
    return functools.cache(lambda function, *args: function(*args))


def step_alone(model):
    return jax.jit(first_step, static_argnums=0)(*alone(model))


@pytest.mark.slow
@pytest.mark.parametrize('axes', meshes(*FEW))
def test_logits_soft_embeddings_and_canvas_of_a_step_are_those_of_one_device(axes, model, cached):
    expected = cached(step_alone, model)
    found = jax.jit(first_step, static_argnums=0)(*spread(model, axes))
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert np.isfinite(np.asarray(other)).all()
        np.testing.assert_allclose(one, other, atol=1e-5)
    # The cache is sharded, not replicated: its rows along the axes of the batch, its slots along
    # `sequence`.
    full = found[3][0][1][0]
    split = axes['data'] * axes['fsdp'] * axes['expert'] * axes['sequence']
    assert len(full.sharding.device_set) == 8
    assert full.addressable_shards[0].data.size * split <= full.size


def sample(mode, model, *arguments):
    params, tokens, lengths, keys = arguments
    return Sampler(model, CONFIG, mode)(params, tokens, lengths, rng=keys)


def sampled_alone(mode, model):
    return sample(mode, *alone(model))


@pytest.mark.parametrize('axes', meshes(IN_DEFAULT_SUITE))
def test_sampled_tokens_are_those_of_one_device(axes, model, cached):
    if axes == IN_DEFAULT_SUITE:  # which compiles one layer only
        model = model.clone(config=model.config.replace(layer_types=('full',)))
    one, other = (
        cached(sampled_alone, 'diffusion', model),
        sample('diffusion', *spread(model, axes)),
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.slow
@pytest.mark.parametrize('mode', [mode for mode in MODES if mode != 'diffusion'])
def test_tokens_of_other_modes_are_those_of_one_device(mode, model):
    one, other = sampled_alone(mode, model), sample(mode, *spread(model, {'data': 2, 'tensor': 4}))
    jax.tree.map(np.testing.assert_array_equal, one, other)
