"""Sampling with parameters, rows and cache spread over eight devices equals sampling on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import random_params

from diffusiongemma.models import DiffusionGemma
from diffusiongemma.parallel import batch_sharding, make_mesh, param_shardings
from diffusiongemma.sampling import (
    Controls,
    Sampler,
    SamplingConfig,
    diffusion,
    pad_prompts,
    passes,
)
from diffusiongemma.sampling.sampler import MODES, prefilled

PROMPTS = [[5, 17, 20, 31, 8, 9, 3, 4, 6, 12, 7], [9, 14], [3, 3, 3], [1]]
MESHES = [
    {'data': 2, 'tensor': 4},
    {'fsdp': 2, 'tensor': 2, 'expert': 2},
    {'data': 1, 'fsdp': 4, 'tensor': 2},
]
CONFIG = SamplingConfig(
    max_new_tokens=10, max_denoising_steps=2, temperature=0, stop_ids=(), entropy_bound=2.0
)


@pytest.fixture
def model(tiny_moe_config):
    # A vocabulary and heads that every mesh below divides.
    sliding = tiny_moe_config.sliding
    return DiffusionGemma(tiny_moe_config.replace(vocab_size=40, sliding=sliding))


def spread(model, axes):
    """Parameters and the prompts' tokens, lengths and keys in their shards."""
    mesh = make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1, 'expert': 1} | axes, jax.devices()[:8])
    params = jax.device_put(random_params(model), param_shardings(model, mesh))
    tokens, lengths = pad_prompts(PROMPTS, width=12)
    rows = batch_sharding(mesh, len(PROMPTS))
    keys = jax.random.split(jax.random.key(0), len(PROMPTS))
    return params, *jax.device_put((jnp.asarray(tokens), jnp.asarray(lengths), keys), rows)


def alone(model):
    tokens, lengths = pad_prompts(PROMPTS, width=12)
    keys = jax.random.split(jax.random.key(0), len(PROMPTS))
    return random_params(model), jnp.asarray(tokens), jnp.asarray(lengths), keys


def first_step(model, params, tokens, lengths, keys):
    """Logits, soft embeddings and canvas of the first denoise step, and the cache it reads."""
    state, _ = prefilled(model, CONFIG, params, tokens, lengths, keys, Controls())
    task = diffusion.canvas_task(model, state)
    noisy = diffusion.first_noise(model, CONFIG, params, task)
    logits = passes.denoise(
        model, params, state.cache, noisy.canvas, noisy.soft_embeddings, task.last_token
    )
    after = diffusion.denoise_step(model, CONFIG, params, state.cache, task, noisy)
    return logits, after.soft_embeddings, after.canvas, state.cache.kv


@pytest.mark.parametrize('axes', MESHES, ids=str)
def test_logits_soft_embeddings_and_canvas_of_a_step_are_those_of_one_device(model, axes):
    step = jax.jit(first_step, static_argnums=0)
    expected, found = step(model, *alone(model)), step(model, *spread(model, axes))
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert np.isfinite(np.asarray(other)).all()
        np.testing.assert_allclose(one, other, atol=2e-5)
    # The cache is spread and not copied: its rows lie on the axes of the batch.
    for leaf in jax.tree.leaves(found[3]):
        assert len(leaf.sharding.device_set) == 8
        assert leaf.addressable_shards[0].data.size < leaf.size


@pytest.mark.parametrize('mode', MODES)
def test_tokens_are_those_of_one_device(model, mode):
    sampler = Sampler(model, CONFIG, mode)
    one, other = (
        sampler(params, tokens, lengths, rng=keys)
        for params, tokens, lengths, keys in (alone(model), spread(model, MESHES[0]))
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)
