"""Tests that unrolled layers and transposed kernels do not change the function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from test_model import random_params

from diffusiongemma.models import (
    DiffusionGemma,
    for_inference,
    init_params,
    output_major_kernels,
    unroll_layers,
)
from diffusiongemma.models.inference import with_execution
from diffusiongemma.models.layers import FEW_ROWS
from diffusiongemma.parallel import make_mesh, on_mesh, param_shardings
from diffusiongemma.sampling import Sampler, SamplingConfig


@pytest.fixture(
    params=[
        pytest.param('tiny_moe_config', marks=pytest.mark.slow),
        pytest.param('tiny_e2b_config', marks=pytest.mark.slow),
        'separate',
    ]
)
def model(request):
    if request.param == 'separate':
        config = request.getfixturevalue('tiny_config').replace(kind='separate')
        return DiffusionGemma(config.replace(layer_types=('full', 'full', 'sliding')))
    config = request.getfixturevalue(request.param)
    if not config.num_kv_shared_layers:
        config = config.replace(layer_types=('sliding', 'full') * 2 + ('sliding',))
    return DiffusionGemma(config)


@pytest.mark.parametrize('mode', ['diffusion', pytest.param('lossless', marks=pytest.mark.slow)])
def test_the_layout_of_inference_is_the_same_function(model, mode):
    params = random_params(model)
    unrolled, own = for_inference(model, params)
    assert unrolled.execution.output_major and not unrolled.execution.scan_layers
    stacks = [name for name in params['backbone'] if name.endswith('layers')]
    assert stacks and not set(stacks) & set(own['backbone'])
    prompts = np.array([[3, 4, 5, 6, 7, 8, 9], [9, 3, 8, 4, 0, 0, 0]], np.int32)
    config = SamplingConfig(max_new_tokens=9, max_denoising_steps=3, stop_ids=(1,))
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


def test_turned_kernels_have_the_shapes_that_the_model_declares(model):
    turned, params = output_major_kernels(model, random_params(model))
    declared = jax.eval_shape(lambda key: init_params(turned, key), jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, declared)


@pytest.mark.slow
@pytest.mark.parametrize('rows', [1, FEW_ROWS, FEW_ROWS + 1])
def test_turned_kernels_serve_many_rows_and_few(tiny_config, rows):
    model = DiffusionGemma(tiny_config.replace(canvas_length=rows))
    params = random_params(model)
    turned, own = output_major_kernels(model, params)
    tokens = jnp.arange(rows)[None] % model.config.vocab_size
    found, expected = (
        jax.jit(m.apply)({'params': p}, tokens) for m, p in ((turned, own), (model, params))
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_only_once(tiny_config):
    model = DiffusionGemma(tiny_config)
    with pytest.raises(ValueError, match='unrolled already'):
        unroll_layers(*unroll_layers(model, random_params(model)))
    with pytest.raises(ValueError, match='already have the transposed layout'):
        output_major_kernels(*output_major_kernels(model, random_params(model)))


def test_a_model_on_a_mesh_keeps_its_layout(tiny_config):
    model = on_mesh(DiffusionGemma(tiny_config), make_mesh({'data': 8}))
    assert for_inference(model, random_params(model))[0] == model


@pytest.mark.slow
def test_on_tpus_models_with_experts_leave_the_loop_and_keep_their_shardings(
    tiny_config, tiny_moe_config
):
    mesh = make_mesh({'fsdp': 2, 'tensor': 2, 'expert': 2})

    def on_tpus(config):
        return with_execution(on_mesh(DiffusionGemma(config), mesh), platform='tpu')

    dense = on_tpus(tiny_config)
    assert for_inference(dense, random_params(dense))[0].execution.scan_layers
    model = on_tpus(tiny_moe_config)
    params = jax.device_put(random_params(model), param_shardings(model, mesh))
    unrolled, own = for_inference(model, params)
    assert not unrolled.execution.scan_layers

    def has_its_sharding(leaf, sharding):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)

    jax.tree.map(has_its_sharding, own, param_shardings(unrolled, mesh))
