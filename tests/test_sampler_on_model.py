"""Tests the sampler on a real network with random weights; other files use the toy model."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.sampling import Sampler, SamplingConfig, pad_prompts
from diffusiongemma.sampling.randomness import row_keys

CHECKPOINT = pathlib.Path(__file__).parent / 'data' / 'tiny_moe'
PROMPTS = [[5, 17, 200, 31, 8, 90, 3, 44, 61, 12, 7], [9, 140, 77]]  # the window is 8 tokens


@pytest.fixture(scope='module')
def loaded():
    model, params, _ = load_model(CHECKPOINT)
    return model, params


def test_greedy_autoregression_equals_a_loop_without_cache(loaded):
    model, params = loaded
    count = 12
    config = SamplingConfig(temperature=0, max_new_tokens=count, stop_ids=())
    tokens, lengths = pad_prompts(PROMPTS, width=14)
    output = Sampler(model, config, 'autoregressive')(
        params, tokens, lengths, rng=jax.random.key(0)
    )

    @jax.jit
    def next_tokens(tokens, lengths):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
        hidden, _ = model.apply({'params': params}, tokens, positions, segment_ids, method='encode')
        last = hidden[jnp.arange(len(lengths)), lengths - 1]
        return jnp.argmax(model.apply({'params': params}, last, method='unembed'), axis=-1)

    whole, known = pad_prompts(PROMPTS, width=14 + count)
    rows = np.arange(len(known))
    for i in range(count):
        whole[rows, known + i] = next_tokens(whole, known + i)
    for row, start in enumerate(known):
        assert output.tokens[row].tolist() == whole[row, start : start + count].tolist()


@pytest.mark.slow
def test_canvases_of_a_ragged_batch_equal_those_of_single_runs(loaded):
    model, params = loaded
    # Few steps: with random weights each step multiplies rounding errors by about ten.
    config = SamplingConfig(
        max_new_tokens=40, max_denoising_steps=2, entropy_bound=20.0, stop_ids=()
    )
    sampler = Sampler(model, config)
    keys = row_keys(jax.random.key(1), 2)
    batch = sampler(params, *pad_prompts(PROMPTS, width=14), rng=keys)
    assert batch.canvases.tolist() == [3, 3]
    assert batch.denoising_steps.tolist() == [6, 6]
    for row, prompt in enumerate(PROMPTS):
        single = sampler(params, *pad_prompts([prompt], width=14), rng=keys[row : row + 1])
        np.testing.assert_array_equal(batch.tokens[row], single.tokens[0])
