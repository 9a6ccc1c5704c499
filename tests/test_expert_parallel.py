"""Tests that sharded experts give the outputs and gradients of one device and drop no token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma.models import DiffusionGemma, MoEConfig
from diffusiongemma.models.execution import Execution
from diffusiongemma.models.kernels import grouped, grouped_tpu
from diffusiongemma.models.moe import Experts
from diffusiongemma.parallel import make_mesh, on_mesh
from diffusiongemma.parallel.sharding import LOGICAL_AXIS_RULES

WIDTH, ROWS, LENGTH = 12, 8, 6
MESHES = [
    {'expert': 4, 'tensor': 2},
    {'data': 2, 'expert': 2, 'sequence': 2},
    {'fsdp': 2, 'tensor': 2, 'sequence': 2},
    # The meshes above have all of their axes.
    pytest.param({'expert': 8}, marks=pytest.mark.slow),
    pytest.param({'fsdp': 4, 'expert': 2}, marks=pytest.mark.slow),
]


def problem(routing, rows=ROWS, dtype=jnp.float32):
    """Returns experts, kernels, tokens, and a routing: 'random', or 'one' device for all."""
    config = MoEConfig(num_experts=8, top_k=3, expert_width=10)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, 1, LENGTH, WIDTH), np.float32)
    weights = rng.random((rows, 1, LENGTH, 3), np.float32)
    scores = rng.random((rows, 1, LENGTH, 8))
    if routing == 'one':
        scores[..., 5:] += 1  # always the last three experts
    experts = np.argsort(-scores, axis=-1)[..., :3].astype(np.int32)
    kernels = {
        name: 0.3 * rng.standard_normal(shape, np.float32)
        for name, shape in (('gate', (8, 12, 10)), ('up', (8, 12, 10)), ('down', (8, 10, 12)))
    }
    return config, kernels, x.astype(dtype), weights, experts


def value_and_gradients(execution, config, kernels, x, weights, experts, dtype=jnp.float32):
    module = Experts(WIDTH, config, dtype, execution=execution)

    def loss(kernels, x, weights):
        outputs = module.apply({'params': kernels}, x, weights, experts)
        return jnp.sum(jnp.sin(outputs.astype(jnp.float32))), outputs

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(kernels, x, weights)


@functools.cache
def on_one_device(routing, rows=ROWS):
    return value_and_gradients(Execution(), *problem(routing, rows))


@pytest.mark.parametrize('routing', ['random', pytest.param('one', marks=pytest.mark.slow)])
@pytest.mark.parametrize('axes', MESHES, ids=str)
def test_outputs_and_gradients_are_those_of_one_device(axes, routing):
    arguments = problem(routing)
    mesh, expected = make_mesh(axes), on_one_device(routing)
    found = value_and_gradients(Execution(mesh, LOGICAL_AXIS_RULES), *arguments)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


def test_the_kernels_of_tpus_give_the_same_on_every_axis(monkeypatch):
    arguments, expected = problem('random'), on_one_device('random')
    for name, kernel in (
        ('_multiply', grouped_tpu.grouped_matmul_tpu),
        ('_outer', grouped_tpu.grouped_outer_tpu),
    ):
        monkeypatch.setattr(grouped, name, functools.partial(kernel, interpret=True))
    mesh = make_mesh({'fsdp': 2, 'expert': 2, 'tensor': 2})
    found = value_and_gradients(Execution(mesh, LOGICAL_AXIS_RULES), *arguments)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


def test_tokens_that_cannot_be_split_are_computed_where_their_experts_are():
    arguments, expected = problem('random', rows=3), on_one_device('random', rows=3)
    execution = Execution(make_mesh({'expert': 4, 'tensor': 2}), LOGICAL_AXIS_RULES)
    found = value_and_gradients(execution, *arguments)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('axes', [None, {'expert': 4, 'tensor': 2}], ids=str)
def test_kernels_with_their_outputs_in_front_are_the_same_experts(axes):
    config, kernels, *given = problem('one')
    turned = {name: kernel.swapaxes(1, 2) for name, kernel in kernels.items()}
    execution = Execution(make_mesh(axes), LOGICAL_AXIS_RULES) if axes else Execution()
    execution = dataclasses.replace(execution, output_major=True)
    module = Experts(WIDTH, config, jnp.float32, execution)
    found = jax.jit(module.apply)({'params': turned}, *given)
    expected = jax.jit(Experts(WIDTH, config, jnp.float32).apply)({'params': kernels}, *given)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


def compiled_text(axes):
    config, kernels, x, weights, experts = problem('random')
    execution = Execution(make_mesh(axes), LOGICAL_AXIS_RULES)
    module = Experts(WIDTH, config, jnp.float32, execution=execution)
    apply = jax.jit(lambda k, *args: module.apply({'params': k}, *args))
    return apply.lower(kernels, x, weights, experts).compile().as_text()


def test_tokens_are_exchanged_along_the_expert_axis_alone():
    assert 'all-to-all' in compiled_text({'data': 2, 'expert': 4})
    assert 'all-to-all' not in compiled_text({'data': 4, 'tensor': 2})


def test_experts_that_no_axis_size_divides_are_refused(tiny_moe_config):
    with pytest.raises(ValueError, match='num_experts=4 is not divisible by expert = 8'):
        on_mesh(DiffusionGemma(tiny_moe_config), make_mesh({'expert': 8}))
