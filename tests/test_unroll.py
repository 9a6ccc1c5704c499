"""Layers as a loop and layers one by one are the same function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from test_model import random_params

from diffusiongemma.models import DiffusionGemma, unroll_layers
from diffusiongemma.parallel import make_mesh, param_shardings
from diffusiongemma.sampling import Sampler, SamplingConfig


@pytest.fixture(params=['tiny_moe_config', 'tiny_e2b_config', 'separate'])
def model(request):
    if request.param == 'separate':
        config = request.getfixturevalue('tiny_config').replace(separate_denoiser=True)
    else:
        config = request.getfixturevalue(request.param)
    if not config.num_kv_shared_layers:
        config = config.replace(layer_types=('sliding', 'full') * 3 + ('sliding',))
    return DiffusionGemma(config)


def test_unrolled_layers_are_the_same_function(model):
    params = random_params(model)
    unrolled, own = unroll_layers(model, params)
    stacks = [name for name in params['backbone'] if name.endswith('layers')]
    assert stacks and not set(stacks) & set(own['backbone'])
    prompts = np.array([[3, 4, 5, 6, 7, 8, 9], [9, 3, 8, 4, 0, 0, 0]], np.int32)
    config = SamplingConfig(max_new_tokens=9, max_denoising_steps=3, stop_ids=(1,))
    for mode in ('diffusion', 'lossless'):
        one, other = (
            Sampler(m, config, mode)(p, prompts, np.array([7, 4]), rng=jax.random.key(0))
            for m, p in ((model, params), (unrolled, own))
        )
        np.testing.assert_array_equal(one.tokens, other.tokens)
    tokens = jnp.asarray(prompts[:, : model.config.canvas_length])
    found, expected = (
        jax.jit(m.apply)({'params': p}, tokens) for m, p in ((unrolled, own), (model, params))
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_unrolled_parameters_have_shardings_of_their_own(tiny_moe_config):
    model = DiffusionGemma(tiny_moe_config)
    unrolled, params = unroll_layers(model, random_params(model))
    shardings = param_shardings(unrolled, make_mesh({'fsdp': 2, 'tensor': 2, 'expert': 2}))
    assert jax.tree.structure(shardings) == jax.tree.structure(params)
    gate = shardings['backbone']['layers_0']['layer_0']['moe']['experts']['gate'].spec
    assert gate == PartitionSpec('expert', 'fsdp', 'tensor')


def test_only_once(tiny_config):
    model = DiffusionGemma(tiny_config)
    with pytest.raises(ValueError, match='unrolled already'):
        unroll_layers(*unroll_layers(model, random_params(model)))
