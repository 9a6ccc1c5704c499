"""Tests that splash attention equals `attend` in interpret mode, and compiles for TPUs."""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import random_params

from diffusiongemma.accounting.flops import count_flops
from diffusiongemma.models import AttentionConfig, Gemma
from diffusiongemma.models import attention as attention_module
from diffusiongemma.models.attention import attend
from diffusiongemma.models.execution import Execution
from diffusiongemma.models.kernels.fused_attention import LONGEST, attend_fused, fits
from diffusiongemma.models.masks import CausalMask, KeyTokens
from diffusiongemma.parallel import LOGICAL_AXIS_RULES, make_mesh

ROOT = Path(__file__).parents[1]
ROWS, LENGTH, HEADS, WIDTH = 2, 384, 4, 8  # three blocks of 128
interpreted = functools.partial(attend_fused, interpret=True)


def causal_mask(rows, window):
    """Returns the mask of two documents and padding, with other borders in every row."""
    index = np.arange(LENGTH)
    first = 100 + 70 * np.arange(rows)[:, None] % 250
    last = np.minimum(first + 200, LENGTH - 20 * (np.arange(rows)[:, None] % 2))
    segments = 1 + (index >= first) - 2 * (index >= last)
    positions = index - np.where(segments == 2, first, np.where(segments == 0, last, 0))
    nothing = jnp.zeros((rows, 0), jnp.int32)
    of_rows = (jnp.asarray(positions), jnp.asarray(segments))
    return CausalMask(*of_rows, KeyTokens(nothing, nothing), window)


def arrays(rows, kv_heads):
    keys = jax.random.split(jax.random.key(0), 4)
    query, out = (jax.random.normal(k, (rows, 1, LENGTH, HEADS, WIDTH)) for k in keys[:2])
    kv = tuple(jax.random.normal(k, (rows, kv_heads, 1, LENGTH, WIDTH)) for k in keys[2:])
    return query * WIDTH**-0.5, kv, out


@functools.partial(jax.jit, static_argnames=('execution',))
def outputs_and_gradients(query, kv, out, mask, execution=None):
    """Returns outputs and gradients, fused if there is an execution, else of `attend`."""

    def loss(query, kv):
        if execution is not None:
            context = interpreted(query, kv, mask, execution)
        else:
            empty = jnp.zeros((*kv[0].shape[:2], 0, WIDTH))
            context = attend(query, kv, (empty, empty), mask.all_rows())
        return jnp.sum(context * out), context

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(query, kv)


def assert_same(one, other, tolerance=1e-5):
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(('kv_heads', 'window'), [(1, 150), (2, 150), (2, None), (4, 1000)])
def test_the_kernel_attends_as_scores_in_memory_do(kv_heads, window):
    mask = causal_mask(ROWS, window)
    assert {0, 1, 2} == set(np.unique(mask.segment_ids))
    (_, fused), by_fused = outputs_and_gradients(*arrays(ROWS, kv_heads), mask, Execution())
    (_, plain), by_plain = outputs_and_gradients(*arrays(ROWS, kv_heads), mask)
    assert_same(fused, plain)
    assert_same(by_fused, by_plain)


@pytest.mark.parametrize(
    ('axes', 'kv_heads'),
    [
        ({'data': 2, 'fsdp': 2, 'tensor': 2}, 2),
        ({'data': 2, 'tensor': 4}, 1),  # all query heads share the one of every device
        ({'expert': 8}, 2),  # more devices than it has rows: they are on all devices
    ],
)
def test_rows_and_heads_on_eight_devices_are_those_on_one(axes, kv_heads):
    rows = 4
    on_mesh = Execution(mesh=make_mesh(axes), rules=LOGICAL_AXIS_RULES, platform='tpu')
    given = (*arrays(rows, kv_heads), causal_mask(rows, 150))
    shape = given[0].shape[:4] + (128,)
    assert fits(shape, kv_heads, 0, on_mesh)
    (_, ours), by_ours = outputs_and_gradients(*given, on_mesh)
    (_, theirs), by_theirs = outputs_and_gradients(*given)
    assert_same(ours, theirs)
    assert_same(by_ours, by_theirs)


@pytest.mark.parametrize(
    ('shape', 'kv_heads', 'prefix', 'axes', 'expected'),
    [
        ((8, 1, 256, 4, 128), 2, 0, {'data': 8}, True),
        ((8, 1, 256, 4, 128), 2, 0, {'data': 4, 'tensor': 2}, True),
        (
            (8, 1, 256, 4, 128),
            2,
            0,
            {'data': 2, 'tensor': 4},
            False,
        ),  # which kernel is the forward one
        ((8, 1, 256, 4, 128), 1, 0, {'data': 2, 'tensor': 4}, True),
        ((8, 1, 256, 4, 128), 2, 0, {'data': 4, 'sequence': 2}, False),
        ((8, 2, 256, 4, 128), 2, 0, {'data': 8}, False),  # canvases
        ((8, 1, 256, 4, 128), 2, 8, {'data': 8}, False),
        ((8, 1, 192, 4, 128), 2, 0, {'data': 8}, False),
        ((8, 1, 256, 4, 16), 2, 0, {'data': 8}, False),
        ((8, 1, 2 * LONGEST, 4, 128), 2, 0, {'data': 8}, False),
    ],
)
def test_only_what_the_kernel_can_do_is_given_to_it(shape, kv_heads, prefix, axes, expected):
    execution = Execution(mesh=make_mesh(axes), rules=LOGICAL_AXIS_RULES, platform='tpu')
    assert fits(shape, kv_heads, prefix, execution) is expected


def test_other_platforms_and_unknown_devices_go_on_as_before():
    shape = (8, 1, 256, 4, 128)
    assert fits(shape, 2, 0, Execution(platform='tpu'))
    assert not fits(shape, 2, 0, Execution(platform='gpu'))
    assert not fits(shape, 2, 0, Execution())


@pytest.mark.slow
@pytest.mark.parametrize('remat', ['dots', 'full'])
def test_a_model_with_the_kernel_is_the_model_without(remat, tiny_config, monkeypatch):
    monkeypatch.setattr(attention_module, 'attend_fused', interpreted)
    kinds = {'sliding': AttentionConfig(2, 128, window=50), 'full': AttentionConfig(1, 128)}
    config = tiny_config.replace(
        layer_types=('sliding', 'full'), query_scale=128**-0.5, **kinds
    ).autoregressive
    tokens = jnp.arange(256).reshape(2, 128) % 37
    segments = jnp.asarray([[1] * 60 + [2] * 68, [1] * 100 + [0] * 28])
    positions = jnp.asarray([[*range(60), *range(68)], [*range(100), *[0] * 28]])

    def loss(params, model):
        hidden, _ = model.apply({'params': params}, tokens, positions, segments, method='encode')
        return jnp.sum(jnp.where(segments[..., None] > 0, jnp.sin(hidden), 0))

    plain = Gemma(config)
    params = jax.tree.map(jnp.asarray, random_params(plain))
    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    fused = Gemma(config, execution=Execution(remat=remat, platform='tpu'))
    assert 'splash' in str(jax.make_jaxpr(gradient, static_argnums=1)(params, fused))
    assert_same(gradient(params, fused), gradient(params, plain), 1e-4)


@pytest.mark.parametrize('remat', [False, True])
def test_the_products_of_the_kernel_count_as_those_of_the_pass(remat):
    query, kv, out = arrays(ROWS, 2)
    mask = causal_mask(ROWS, None)
    once = 2 * 2 * ROWS * HEADS * LENGTH**2 * WIDTH

    def loss(query, kv):
        return jnp.sum(interpreted(query, kv, mask, Execution()) * out)

    loss = jax.checkpoint(loss) if remat else loss
    assert count_flops(loss, query, kv) == (once, 0)
    counted = count_flops(jax.grad(loss, argnums=(0, 1)), query, kv)
    again = 1.5 + remat  # three products in the backward kernels, and the repeated forward kernel
    assert counted == pytest.approx((3 * once, again * once), rel=1e-3)  # and sums over width


COMPILE = """
import re
import jax, jax.numpy as jnp
from diffusiongemma.accounting.executed import executed_flops
from diffusiongemma.accounting.flops import flops_of, kernel_flops
from diffusiongemma.accounting.hlo import Program
from diffusiongemma.models import AttentionConfig, Gemma, ModelConfig
from diffusiongemma.models.execution import Execution
from diffusiongemma.models.transformer import init_params
from diffusiongemma.parallel import batch_sharding, make_mesh, on_mesh, param_shardings
from diffusiongemma.planning.compiler import topology_devices

config = ModelConfig(
    vocab_size=128, width=128, num_heads=4, ffn_width=128, layer_types=('sliding', 'full'),
    sliding=AttentionConfig(2, 128, window=200), full=AttentionConfig(1, 128),
)
devices, _ = topology_devices('v5e:2x4')
mesh = make_mesh({'fsdp': 4, 'tensor': 2}, devices)
model = on_mesh(Gemma(config, jnp.bfloat16), mesh)
shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
params = jax.tree.map(
    lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
    shapes, param_shardings(model, mesh),
)
rows = jax.ShapeDtypeStruct((4, 384), jnp.int32, sharding=batch_sharding(mesh, 4))

def loss(params, *rows):
    hidden, _ = model.apply({'params': params}, *rows, method='encode')
    return jnp.sum(jnp.square(hidden.astype(jnp.float32)))

traced = jax.jit(jax.grad(loss)).trace(params, rows, rows, rows)
text = traced.lower().compile().as_text()
calls = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
print(len(calls), 'kernels', sorted(set(re.findall('splash_mha_[a-z]+', ' '.join(calls)))))
print('scores', bool(re.search(r'\\[[^\\]]*384,384\\]', text)))
for kernels in ({}, kernel_flops(traced.jaxpr)):
    executed = executed_flops(Program(text), kernels=kernels) * mesh.size
    print(executed / sum(flops_of(traced.jaxpr)))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None, reason="needs libtpu: pip install -e '.[plan]'"
)
def test_the_causal_pass_is_compiled_with_the_kernel_for_tpus():
    done = subprocess.run(
        [sys.executable, '-c', COMPILE],
        cwd=ROOT,
        env=os.environ | {'XLA_FLAGS': ''},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kernels = ['splash_mha_dkv', 'splash_mha_dq', 'splash_mha_fwd']
    *found, without, executed = done.stdout.splitlines()
    assert found == [f'6 kernels {kernels}', 'scores False']
    # The kernels have no estimate of their FLOPs, so those of the trace are used.
    assert float(without) < 0.9 < 0.95 < float(executed) < 1.05
