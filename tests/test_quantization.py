"""Tests that eight-bit weights are close to the float weights and equal in every layout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from test_model import random_params

from diffusiongemma.models import (
    DiffusionGemma,
    for_inference,
    output_major_kernels,
    quantize_weights,
)
from diffusiongemma.models.kernels.grouped import grouped_matmul, grouped_product
from diffusiongemma.models.kernels.grouped_gpu import grouped_matmul_gpu
from diffusiongemma.parallel import make_mesh, on_mesh


def dequantized(params):
    is_leaf = lambda leaf: isinstance(leaf, qwix.QArray)  # noqa: E731
    return jax.tree.map(
        lambda leaf: qwix.dequantize(leaf) if is_leaf(leaf) else leaf, params, is_leaf=is_leaf
    )


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params):
    tokens = jnp.arange(4)[None] * 7 % model.config.vocab_size
    return model.apply({'params': params}, tokens)


@pytest.mark.parametrize('weights', ['int8', pytest.param('fp8', marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    'layout', [pytest.param(lambda *given: given, marks=pytest.mark.slow), for_inference]
)
def test_products_are_those_of_the_rounded_weights(tiny_moe_config, layout, weights):
    model = DiffusionGemma(tiny_moe_config.replace(kind='separate'))
    model, params = layout(model, random_params(model))
    quantized = quantize_weights(model, params, weights)
    found = logits(model, quantized)
    np.testing.assert_allclose(found, logits(model, dequantized(quantized)), atol=1e-4)
    assert 0 < jnp.max(jnp.abs(found - logits(model, params))) < 1.0


def test_every_kernel_of_a_layer_is_quantized_with_a_scale_per_output(tiny_moe_config):
    model = DiffusionGemma(tiny_moe_config)
    params = quantize_weights(model, random_params(model), 'int8')
    layer = params['backbone']['layers']['layer_0']
    groups, width, heads = 1, 32, (4, 8)
    assert layer['attention']['query'].qvalue.dtype == jnp.int8
    assert layer['attention']['query'].scale.shape == (groups, 1, *heads)
    assert layer['attention']['output'].scale.shape == (groups, 1, 1, width)
    assert layer['mlp']['down'].scale.shape == (groups, 1, width)
    assert layer['moe']['experts']['up'].scale.shape == (groups, 4, 1, 16)
    assert isinstance(params['self_conditioning']['mlp']['gate'], qwix.QArray)
    assert params['embedder']['embedding'].dtype == jnp.float32


def test_the_layouts_of_a_kernel_have_the_same_scales(tiny_config):
    model = DiffusionGemma(tiny_config)
    params = random_params(model)
    turned, own = output_major_kernels(model, params)
    one, other = (quantize_weights(*given, 'int8') for given in ((model, params), (turned, own)))
    for name in ('query', 'output'):
        one_kernel, other_kernel = (
            p['backbone']['layers']['layer_0']['attention'][name] for p in (one, other)
        )
        np.testing.assert_array_equal(
            np.sort(one_kernel.scale, None), np.sort(other_kernel.scale, None)
        )


def test_rows_of_a_group_take_its_scales():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((10, 8)), jnp.float32)
    kernels = jnp.asarray(rng.standard_normal((3, 8, 5)), jnp.float32)
    sizes = jnp.array([4, 0, 6], jnp.int32)
    quantized = qwix.quantize(kernels, jnp.int8, channelwise_axes=(0, 2))
    expected = grouped_matmul(x, qwix.dequantize(quantized), sizes)
    np.testing.assert_allclose(grouped_product(x, quantized, sizes), expected, atol=1e-5)


def test_the_kernel_for_gpus_converts_what_it_reads():
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((20, 64)), jnp.bfloat16)
    kernels = jnp.asarray(rng.integers(-127, 128, (3, 64, 64)), jnp.int8)
    sizes = jnp.array([7, 13, 0], jnp.int32)
    found = grouped_matmul_gpu(x, kernels, sizes, interpret=True)
    expected = grouped_matmul(x, kernels.astype(jnp.bfloat16), sizes)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-3)


def test_what_cannot_be_quantized_is_refused(tiny_config):
    model = DiffusionGemma(tiny_config)
    params = random_params(model)
    with pytest.raises(ValueError, match="must be one of .*'fp8', 'int8'.*got 'int3'"):
        quantize_weights(model, params, 'int3')
    with pytest.raises(ValueError, match='quantized already'):
        quantize_weights(model, quantize_weights(model, params, 'int8'), 'int8')
    with pytest.raises(ValueError, match='for one device'):
        quantize_weights(on_mesh(model, make_mesh({'data': 8})), params, 'int8')
