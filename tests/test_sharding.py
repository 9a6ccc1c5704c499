"""Tests that the distillation step on a mesh of eight devices equals the step on one."""

import functools

import jax
import numpy as np
import optax
import pytest
from mesh_shapes import ALL, meshes
from test_model import random_params

from diffusiongemma.data.pipeline import make_train_iterator
from diffusiongemma.data.sources import DataSpec
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.diffusion import UniformCorruption
from diffusiongemma.distillation.compute import ComputeConfig
from diffusiongemma.distillation.stage1 import Stage1
from diffusiongemma.distillation.state import create_state
from diffusiongemma.distillation.step import Constants, make_distillation_step
from diffusiongemma.models import DiffusionGemma, Gemma, MoEConfig
from diffusiongemma.parallel import (
    MESH_AXES,
    batch_sharding,
    init_sharded,
    make_mesh,
    on_mesh,
    param_shardings,
    rules_with,
)
from diffusiongemma.sampling import TemperatureSchedule

TOKENIZER = Tokenizer.load('builtin')
ROWS = 8


@pytest.fixture(scope='module')
def batch():
    return next(
        make_train_iterator(
            DataSpec(kind='wordmath', size=50),
            TOKENIZER,
            batch_size=ROWS,
            row_length=128,
            canvases_per_row=8,
            canvas_length=8,
            seed=0,
        )
    )


@pytest.fixture
def config(tiny_config):
    return tiny_config.replace(
        vocab_size=TOKENIZER.vocab_size,
        canvas_length=8,
        layer_types=('sliding', 'full'),
        moe=MoEConfig(num_experts=8, top_k=2, expert_width=16),
    )


@functools.cache
def optimizer():
    return optax.sgd(1.0, momentum=0.5)  # the first update is the gradient


def step_on(config, axes, batch, compute=None):
    """Returns the state and metrics after one step of stage 1 on a mesh of `axes`."""
    devices = jax.devices()[: np.prod(list(axes.values()))]
    mesh, compute = make_mesh(axes, devices), compute or ComputeConfig()
    model = compute.place(DiffusionGemma(config), mesh)
    teacher = compute.place(Gemma(config.autoregressive), mesh)
    params, teacher_params = random_params(model), random_params(teacher, 1)
    step = make_distillation_step(
        model,
        teacher,
        Stage1(corruption=UniformCorruption(config.vocab_size), schedule=TemperatureSchedule()),
        optimizer(),
        ar_weight=0.1,
        ema_decay=0.9,
        seed=0,
        microbatches=compute.microbatches,
    )
    state, shardings = init_sharded(
        lambda params: create_state(params, optimizer()), param_shardings(model, mesh), mesh, params
    )
    state, metrics = jax.jit(step, out_shardings=(shardings, None))(
        state,
        Constants(jax.device_put(teacher_params, param_shardings(teacher, mesh)), {}),
        jax.device_put(batch, compute.batch_sharding(mesh, ROWS)),
    )
    return state, metrics


@pytest.fixture(scope='module')
def alone(batch):
    """Returns the step on one device, computed once for all meshes."""
    return functools.cache(lambda config: step_on(config, {'data': 1}, batch))


def assert_same(one, other):
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


FEW = dict.fromkeys(MESH_AXES, 1) | {'fsdp': 2, 'tensor': 2, 'expert': 2}


@pytest.mark.parametrize('axes', meshes(FEW))
def test_a_step_is_the_same_on_one_device_and_on_eight(axes, config, batch, alone):
    if axes == FEW:  # in the default suite, which compiles one layer only
        config = config.replace(layer_types=('full',))
    found = step_on(config, axes, batch)
    assert_same(found, alone(config))
    experts = found[0].params['backbone']['layers']['layer_0']['moe']['experts']['up']
    assert len(experts.sharding.device_set) == 8
    split = axes['expert'] * axes['fsdp'] * axes['tensor']
    for leaf in (experts, found[0].opt_state[0].trace['backbone']['layers']['layer_0']['moe'][
        'experts']['up']):  # fmt: skip
        assert leaf.addressable_shards[0].data.size * split == leaf.size  # sharded, not replicated


@pytest.mark.slow
@pytest.mark.parametrize(
    'axes',
    [{'data': 2, 'tensor': 2, 'sequence': 2}, {'fsdp': 2, 'expert': 2}],
    ids=['by the compiler', 'with one gather per pass'],
)
def test_microbatches_chunks_and_blocks_are_the_same_on_a_mesh(axes, config, batch, alone):
    compute = ComputeConfig('full', logits_chunk=10, query_block=48, microbatches=2)
    assert_same(step_on(config, axes, batch, compute), alone(config))


def test_all_meshes_of_eight_devices_are_listed():
    assert len(ALL) == 35


def test_a_preset_may_lay_out_an_axis_differently(config):
    mesh = make_mesh({'fsdp': 2, 'sequence': 4})
    model = on_mesh(DiffusionGemma(config), mesh, rules_with({'embed': ('fsdp', 'sequence')}))
    up = param_shardings(model, mesh)['backbone']['layers']['layer_0']['mlp']['up']
    assert up.spec[1] == ('fsdp', 'sequence')
    with pytest.raises(ValueError, match="no logical axes \\['embd'\\] .* did you mean 'embed'"):
        rules_with({'embd': ('fsdp',)})
    for row in (3, None, 'tensor', ('fsdp', 1), ('fsdp', 'fsdp')):
        with pytest.raises(ValueError, match=r"compute.rules\['mlp'\] must be a tuple"):
            rules_with({'mlp': row})
    with pytest.raises(ValueError, match='unknown|use mesh axes'):
        on_mesh(DiffusionGemma(config), mesh, rules_with({'embed': ('pipeline',)}))


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    mesh = make_mesh({'data': 2, 'expert': 4})
    with pytest.raises(ValueError, match='batch_size=12 is not divisible by data x fsdp x expert'):
        batch_sharding(mesh, 12)
    with pytest.raises(ValueError, match='microbatch is too small: batch_size=4'):
        ComputeConfig(microbatches=2).batch_sharding(mesh, 8)
    with pytest.raises(ValueError, match='batch_size=8 is not divisible by .*microbatches=3'):
        ComputeConfig(microbatches=3).batch_sharding(mesh, 8)
