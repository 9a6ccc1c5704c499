"""The distillation step on a mesh of eight devices equals the step on one."""

import jax
import numpy as np
import pytest

from diffusiongemma.data.pipeline import make_train_iterator
from diffusiongemma.data.sources import DataSpec
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.diffusion import UniformCorruption
from diffusiongemma.distillation.stage1 import Stage1
from diffusiongemma.distillation.state import OptimizerConfig, create_state, make_optimizer
from diffusiongemma.distillation.step import Constants, make_distillation_step
from diffusiongemma.distillation.student import student_params_from_teacher
from diffusiongemma.models import DiffusionGemma, Gemma, init_params
from diffusiongemma.parallel import (
    batch_sharding,
    make_mesh,
    param_shardings,
    state_shardings,
)
from diffusiongemma.sampling import TemperatureSchedule

TOKENIZER = Tokenizer.load('builtin')


@pytest.fixture(scope='module')
def batch():
    return next(
        make_train_iterator(
            DataSpec(kind='wordmath', size=50),
            TOKENIZER,
            batch_size=4,
            row_length=128,
            canvases_per_row=8,
            canvas_length=8,
            seed=0,
        )
    )


def run_step(config, axes, batch):
    """State and metrics after one step of stage 1 on a mesh of `axes`."""
    devices = jax.devices()[: np.prod(list(axes.values()))]
    mesh = make_mesh(axes, devices)
    model, teacher = DiffusionGemma(config), Gemma(config.replace(canvas_length=0))
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=1), 10)
    make_params = jax.jit(init_params, static_argnums=0)
    teacher_params = make_params(teacher, jax.random.key(0))
    student_params = student_params_from_teacher(
        make_params(model, jax.random.key(1)), teacher_params
    )
    state = create_state(student_params, optimizer)
    shardings = state_shardings(state, param_shardings(model, mesh), mesh)
    step = make_distillation_step(
        model,
        teacher,
        Stage1(UniformCorruption(config.vocab_size), TemperatureSchedule()),
        optimizer,
        ar_weight=0.1,
        ema_decay=0.9,
        seed=0,
    )
    state, metrics = jax.jit(step, out_shardings=(shardings, None))(
        jax.device_put(state, shardings),
        Constants(jax.device_put(teacher_params, param_shardings(teacher, mesh)), {}),
        jax.device_put(batch, batch_sharding(mesh, 4)),
    )
    return state, metrics


def test_a_step_is_the_same_on_one_device_and_on_eight(tiny_moe_config, batch):
    config = tiny_moe_config.replace(
        vocab_size=TOKENIZER.vocab_size, canvas_length=8, layer_types=('sliding', 'full')
    )
    alone, alone_metrics = run_step(config, {'data': 1}, batch)
    spread, spread_metrics = run_step(config, {'fsdp': 2, 'tensor': 2, 'expert': 2}, batch)
    assert len(jax.tree.leaves(spread.params)[0].sharding.device_set) == 8
    some = spread.params['backbone']['layers']['layer_0']['mlp']['up']
    assert some.addressable_shards[0].data.size < some.size  # really spread, not copied
    for name in alone_metrics:
        np.testing.assert_allclose(alone_metrics[name], spread_metrics[name], rtol=2e-4, atol=1e-6)
    # Adam's first step has the size of the learning rate whatever the gradient's, so tiny
    # gradients may differ in sign; the moments compare the gradients themselves.
    for ours, theirs in zip(
        jax.tree.leaves(alone.opt_state), jax.tree.leaves(spread.opt_state), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-3)
