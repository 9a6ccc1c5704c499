"""Tests that operations on a vocabulary in blocks equal those on the whole vocabulary."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import random_params

from diffusiongemma.models import DiffusionGemma, output_major_kernels
from diffusiongemma.models.layers import contract
from diffusiongemma.models.vocabulary import (
    LARGE_VOCABULARY,
    VOCABULARY_PART,
    _largest_in_one_pass,
    _largest_of_each,
    expected_rows_by_parts,
    log_partition_and_entropy,
    logits_by_parts,
    most_likely_tokens,
)

PARTLY = 3 * VOCABULARY_PART + 5
LARGE = LARGE_VOCABULARY + 64  # a multiple of 64, but not of a block


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize('vocabulary', [4 * VOCABULARY_PART, PARTLY])
def test_products_by_parts_are_the_products(vocabulary):
    logits, table, hidden = normal(0, 3, vocabulary), normal(1, vocabulary, 8), normal(2, 3, 8)
    product = functools.partial(contract, 'tv,vd->td')
    found = jax.jit(functools.partial(expected_rows_by_parts, product=product))(
        10 * logits, table=table
    )
    np.testing.assert_allclose(found, jax.nn.softmax(10 * logits) @ table, atol=1e-5)
    product = functools.partial(contract, 'td,vd->tv')
    found = jax.jit(functools.partial(logits_by_parts, product=product))(hidden, table=table)
    np.testing.assert_allclose(found, hidden @ table.T, atol=1e-5)


@pytest.mark.parametrize('vocabulary', [LARGE, LARGE_VOCABULARY + 1, 300])
def test_reductions_of_a_large_vocabulary_are_those_of_the_whole(vocabulary):
    logits = 5 * normal(0, 2, 3, vocabulary)
    logits = logits.at[0, 0, ::2].set(-jnp.inf).at[0, 1].set(-jnp.inf).at[0, 1, 7].set(2.0)
    log_z, entropies = jax.jit(log_partition_and_entropy)(logits)
    np.testing.assert_allclose(log_z, jax.nn.logsumexp(logits, axis=-1), rtol=1e-6)
    known = jax.jit(log_partition_and_entropy)(logits, jnp.max(logits, axis=-1))
    np.testing.assert_array_equal(known, (log_z, entropies))
    log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)
    terms = np.where(np.isfinite(log_probs), np.exp(log_probs) * log_probs, 0.0)
    np.testing.assert_allclose(entropies, -terms.sum(axis=-1), atol=1e-4)
    assert entropies[0, 1] == 0 and np.all(entropies >= 0)


def test_the_gradient_of_the_entropy_is_the_same_by_parts():
    def by_large(logits):  # the added logits have probability 0
        padded = jnp.pad(logits, [(0, 0), (0, LARGE)], constant_values=-1e9)
        return jnp.sum(log_partition_and_entropy(padded)[1])

    logits = normal(0, 2, 9)
    found = jax.grad(by_large)(logits)
    expected = jax.grad(lambda x: jnp.sum(log_partition_and_entropy(x)[1]))(logits)
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize('vocabulary', [23, 1_024, LARGE, LARGE_VOCABULARY + 1])
def test_the_likeliest_token_is_the_first_of_the_largest(vocabulary):
    rounded = jnp.round(normal(0, 4, vocabulary))  # the maximum occurs at many positions
    rounded = rounded.at[1].set(-jnp.inf)
    found = jax.jit(most_likely_tokens)(rounded)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, np.argmax(rounded, axis=-1))


@pytest.mark.parametrize('function', [_largest_in_one_pass, _largest_of_each])
def test_maxima_of_several_arrays_and_their_first_tokens(function):
    rounded, other = jnp.round(normal(0, 3, 4, 300)), normal(1, 3, 4, 300)
    rounded = rounded.at[0, 1].set(-jnp.inf).at[1, 2, 7].set(jnp.nan).at[1, 2, 9].set(jnp.nan)
    found = jax.jit(function)(rounded, other)
    for (largest, token), array in zip(found, (rounded, other), strict=True):
        assert token.dtype == jnp.int32
        np.testing.assert_array_equal(largest, np.max(array, axis=-1))
        np.testing.assert_array_equal(token, np.argmax(array, axis=-1))


@pytest.mark.parametrize('rows', [pytest.param(1, marks=pytest.mark.slow), 64])
def test_a_model_with_a_large_vocabulary_is_the_same_in_the_layout_of_inference(tiny_config, rows):
    config = tiny_config.replace(vocab_size=LARGE, canvas_length=rows, final_logit_softcap=30.0)
    model = DiffusionGemma(config)
    params = random_params(model)
    tokens = jnp.arange(rows)[None] * 7
    found = []
    for m, p in (output_major_kernels(model, params), (model, params)):
        logits = jax.jit(m.apply)({'params': p}, tokens)
        log_z = jax.nn.logsumexp(5 * logits, axis=-1)
        for known in ((), (log_z,)):
            found.append((logits, m.apply({'params': p}, 5 * logits, *known, method='soft_embed')))
    for other in found[1:]:
        for by_parts, whole in zip(found[0], other, strict=True):
            np.testing.assert_allclose(by_parts, whole, atol=1e-4)
