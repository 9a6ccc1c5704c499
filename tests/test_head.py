"""Tests that scores in chunks and their gradients are the same on a mesh as on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_shapes import meshes
from test_model import random_params

from diffusiongemma.distillation.compute import ComputeConfig
from diffusiongemma.distillation.head import score_positions
from diffusiongemma.models import Gemma
from diffusiongemma.parallel import make_mesh, param_shardings

ROWS, LENGTH = 8, 24


@pytest.fixture(scope='module')
def gemma(tiny_config):
    return Gemma(tiny_config.autoregressive.replace(vocab_size=64))


def values_and_gradients(gemma, axes, chunk):
    """Returns losses [ROWS, LENGTH], and gradients by the parameters and the hidden states."""
    mesh = make_mesh(axes, jax.devices()[: np.prod(list(axes.values()))])
    model = ComputeConfig(logits_chunk=chunk).place(gemma, mesh)
    params, rng = random_params(gemma), np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, gemma.config.vocab_size, (ROWS, LENGTH)))
    hidden = rng.normal(size=(ROWS, LENGTH, gemma.config.width)).astype(np.float32)
    weights = jnp.linspace(0, 1, ROWS * LENGTH).reshape(ROWS, LENGTH)

    def score(params, teacher, hidden, tokens):
        logits = model.apply({'params': params}, hidden, method='unembed')
        others = model.apply({'params': teacher}, hidden, method='unembed')
        at = functools.partial(jnp.take_along_axis, indices=tokens[..., None], axis=-1)
        return jax.nn.logsumexp(logits, -1) - (at(logits) * at(others))[..., 0]

    def loss(params, hidden, teacher):
        shape = tokens.shape
        scores = score_positions(score, model, (params, teacher), shape, hidden, tokens)
        return jnp.sum(scores * weights), scores

    by_params = param_shardings(model, mesh)
    params, teacher = (
        jax.device_put(each, by_params) for each in (params, random_params(gemma, 1))
    )
    gradients = jax.jit(
        jax.grad(loss, argnums=(0, 1), has_aux=True), out_shardings=((by_params, None), None)
    )
    return gradients(params, hidden, teacher)


@pytest.mark.parametrize('axes', meshes({'data': 2, 'fsdp': 2, 'expert': 2}))
def test_scores_in_chunks_are_the_same_on_one_device_and_on_eight(axes, gemma):
    expected = values_and_gradients(gemma, {'data': 1}, 0)
    assert np.any(jax.tree.leaves(expected[0][0]['embedder'])[0])
    found = values_and_gradients(gemma, axes, 7)  # chunks of 6 tokens
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


def test_gradients_of_chunks_are_summed_in_float32_on_a_mesh(gemma):
    gemma = gemma.clone(dtype=jnp.bfloat16)
    exact, _ = values_and_gradients(gemma, {'data': 1}, 0)
    found, _ = values_and_gradients(gemma, {'fsdp': 8}, 1)
    ours, theirs = (np.asarray(each[0]['embedder']['embedding']) for each in (found, exact))
    # The error of rounding each gradient to bfloat16 is 0.0022; in bfloat16 the sum adds 0.0035.
    assert np.linalg.norm(ours - theirs) < 2**-8 * np.linalg.norm(theirs)
