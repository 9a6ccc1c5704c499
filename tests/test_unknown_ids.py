"""Tests that no mode draws ids of the model that its tokenizer does not have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import random_params

from diffusiongemma.models import DiffusionGemma
from diffusiongemma.sampling import Controls, Sampler, SamplingConfig
from diffusiongemma.sampling.controls import allow, without_unknown

KNOWN = 30  # out of 37 rows of the tiny model
PROMPTS = jnp.ones((8, 4), jnp.int32), jnp.full((8,), 4, jnp.int32)


@pytest.fixture
def drawn_to_unknown(tiny_config):
    """Returns a model whose argmax tokens are ids that its tokenizer does not have."""
    model = DiffusionGemma(tiny_config.replace(layer_types=('sliding',)))
    params = random_params(model)
    rows = jnp.asarray(params['embedder']['embedding'])
    return model, params | {'embedder': {'embedding': rows.at[KNOWN:].multiply(8.0)}}


def tokens(model, params, mode, vocab_size, **controls):
    """Returns greedy and sampled rows [8, 6]."""
    config = SamplingConfig(
        max_new_tokens=6, max_denoising_steps=2, stop_ids=(), vocab_size=vocab_size
    )
    controls = Controls(temperature=jnp.repeat(jnp.array([0.0, 2.0]), 4), **controls)
    sampler = Sampler(model, config, mode)
    output = sampler(params, *PROMPTS, rng=jax.random.key(0), controls=controls)
    return np.asarray(output.tokens)


@pytest.mark.parametrize(
    'mode',
    [pytest.param('autoregressive', marks=pytest.mark.slow), 'lossless', 'diffusion'],
)
def test_an_id_beyond_the_tokenizer_is_never_drawn(drawn_to_unknown, mode):
    if mode == 'autoregressive':
        assert (tokens(*drawn_to_unknown, mode, None) >= KNOWN).mean() > 0.5
    assert (tokens(*drawn_to_unknown, mode, KNOWN) < KNOWN).all()


def test_an_allowed_set_does_not_bring_an_unknown_id_back(drawn_to_unknown):
    allowed = allow([5, KNOWN, KNOWN + 1], 37)[None]
    assert (tokens(*drawn_to_unknown, 'diffusion', KNOWN, allowed_sets=allowed) == 5).all()


def test_a_tokenizer_as_large_as_the_model_changes_no_logits():
    logits = jnp.arange(6.0)
    for vocab_size in (None, 6):
        assert without_unknown(logits, vocab_size) is logits
    np.testing.assert_array_equal(without_unknown(logits, 4), [0, 1, 2, 3, -jnp.inf, -jnp.inf])
