"""Tests the optimizers of a config: their updates, their state and its sharding."""

import jax
import numpy as np
import optax
import pytest

from diffusiongemma.distillation.state import NAMES, OptimizerConfig, create_state, make_optimizer
from diffusiongemma.models import DiffusionGemma, MoEConfig
from diffusiongemma.models.transformer import init_params
from diffusiongemma.parallel import make_mesh, on_mesh, param_shardings, state_shardings


def drawn(shapes):
    """Returns parameters by the names of their modules, and gradients."""
    keys = iter(jax.random.split(jax.random.key(0), 64))
    draw = lambda shape: jax.random.normal(next(keys), shape)  # noqa: E731
    is_shape = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    return tuple(jax.tree.map(draw, shapes, is_leaf=is_shape) for _ in range(2))


SHAPES = {
    'layer_0': {
        'mlp': {'gate': (2, 16, 8)},
        'experts': {'down': (2, 3, 8, 16)},
        'attention': {'query': (2, 16, 4, 2), 'output': (2, 4, 2, 16)},
        'router': {'kernel': (2, 16, 3), 'scale': (2, 16)},
        'norm': {'scale': (2, 16)},
    },
    'embedder': {'embedding': (32, 16)},
}


def updates_of(config, params, gradients, steps=3):
    optimizer = make_optimizer(config, num_steps=10)
    state = optimizer.init(params)
    for _ in range(steps):
        updates, state = optimizer.update(gradients, state, params)
    return updates


@pytest.mark.parametrize('name', [pytest.param('adamw', marks=pytest.mark.slow), *NAMES[1:]])
def test_every_optimizer_moves_all_parameters_by_about_the_learning_rate(name):
    params, gradients = drawn(SHAPES)
    config = OptimizerConfig(name=name, learning_rate=1e-2, warmup_steps=1, weight_decay=0.0)
    for update in jax.tree.leaves(updates_of(config, params, gradients)):
        size = np.sqrt(np.mean(np.square(update)))
        assert 1e-3 < size < 2e-2, update.shape


def test_muon_orthogonalizes_the_kernel_of_each_layer_and_expert_alone():
    params, gradients = drawn(SHAPES)
    config = OptimizerConfig(name='muon', warmup_steps=1, weight_decay=0.0)
    layer = updates_of(config, params, gradients)['layer_0']
    kernels = {
        'gate': layer['mlp']['gate'],
        'down': layer['experts']['down'],
        'query': layer['attention']['query'].reshape(2, 16, 8),
        'output': layer['attention']['output'].reshape(2, 8, 16),
    }
    for name, update in kernels.items():
        values = np.linalg.svd(np.asarray(update), compute_uv=False)
        assert values.min() > 0.4 * values.max(), name
    values = np.linalg.svd(np.asarray(layer['router']['kernel']), compute_uv=False)
    assert values.min() < 0.9 * values.max()  # Adam's


@pytest.mark.parametrize('name', NAMES)
def test_a_frozen_router_keeps_its_weights_and_has_no_moments(name):
    params, gradients = drawn(SHAPES)
    config = OptimizerConfig(name=name, warmup_steps=1, freeze_router=True)
    updates = updates_of(config, params, gradients)
    for update in jax.tree.leaves(updates['layer_0'].pop('router')):
        assert not update.any()
    assert all(update.any() for update in jax.tree.leaves(updates))
    state = make_optimizer(config, 10).init(params)
    paths = [str(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert any('gate' in path for path in paths)
    assert not any('router' in path for path in paths)


@pytest.mark.parametrize(
    'name', [n if n == 'muon' else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_moments_lie_as_their_parameters_do(name, tiny_config):
    moe = MoEConfig(num_experts=4, top_k=2, expert_width=128)
    mesh = make_mesh({'fsdp': 4, 'tensor': 2})
    model = on_mesh(DiffusionGemma(tiny_config.replace(moe=moe, width=128)), mesh)
    optimizer = make_optimizer(OptimizerConfig(name=name), 10)
    state = jax.eval_shape(
        lambda key: create_state(init_params(model, key), optimizer), jax.random.key(0)
    )
    shardings = param_shardings(model, mesh)
    found = state_shardings(state, shardings, mesh)
    gates = [
        (leaf.shape, sharding.spec)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(found), strict=True
        )
        if all(f"'{part}'" in str(path) for part in ('layers', 'layer_0', 'experts', 'gate'))
    ]
    kernel = state.params['backbone']['layers']['layer_0']['moe']['experts']['gate'].shape
    spec = shardings['backbone']['layers']['layer_0']['moe']['experts']['gate'].spec
    whole = [found for shape, found in gates if shape == kernel]
    assert whole == [spec] * {'adamw': 4, 'adafactor': 2, 'muon': 3}[name]
    assert all(not any(found) for shape, found in gates if shape != kernel)


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match="one of .*'muon'.*'sgd'"):
        OptimizerConfig(name='sgd')


def test_the_update_of_adamw_has_not_changed():
    params, gradients = drawn(SHAPES)
    config = OptimizerConfig(learning_rate=1e-2, warmup_steps=1)
    is_scale = lambda path: 'scale' in path[-1].key  # noqa: E731
    expected = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            optax.warmup_cosine_decay_schedule(0.0, 1e-2, 1, 10, 5e-4),
            b1=0.9,
            b2=0.95,
            weight_decay=0.1,
            mask=lambda tree: jax.tree_util.tree_map_with_path(
                lambda path, leaf: not is_scale(path), tree
            ),
        ),
    )
    state = expected.init(params)
    for _ in range(3):
        updates, state = expected.update(gradients, state, params)
    found = updates_of(config, params, gradients)
    jax.tree.map(np.testing.assert_array_equal, found, updates)
