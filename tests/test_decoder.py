"""Tests the single steps of each decode mode in a custom program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_model import toy

from diffusiongemma.sampling import Decoder, Sampler, SamplingConfig, pad_prompts

PAD = 22
CONFIG = SamplingConfig(
    max_new_tokens=10, max_denoising_steps=3, stop_ids=(3, 11), pad_id=PAD, vocab_size=PAD
)
TOKENS, LENGTHS = pad_prompts([[2, 5, 7], [4]], PAD, width=4)
KEY = jax.random.key(1)
STEPS = {
    'diffusion': lambda decoder, state: decoder.commit(state, decoder.denoise(state)),
    'lossless': lambda decoder, state: decoder.verify(state, *decoder.draft(state)),
    'autoregressive': lambda decoder, state: decoder.next_token(state),
}


def decoder_of(mode):
    model, params = toy(4)
    return Decoder.of(Sampler(model, CONFIG, mode), params)


@jax.jit
def generate(decoder, tokens, lengths, rng):
    """Generates as user code would: the decoder is an argument like any other pytree."""
    step = functools.partial(STEPS[decoder.sampler.mode], decoder)
    state = decoder.prefill(tokens, lengths, rng)
    return jax.lax.while_loop(lambda state: state.running, step, state).output()


@pytest.mark.parametrize('mode', STEPS)
def test_a_loop_over_the_steps_is_a_call_of_the_sampler(mode):
    decoder = decoder_of(mode)
    output = generate(decoder, TOKENS, LENGTHS, KEY)
    expected = decoder.sampler(decoder.params, TOKENS, LENGTHS, rng=KEY)
    jax.tree.map(np.testing.assert_array_equal, output, expected)


@jax.jit
def with_drafts_from(decoder, tokens, lengths, rng, text):
    """Decodes with `text` [B, L] as drafts, which may be wrong."""

    def step(state):
        places = state.generation.lengths[:, None] + 1 + jnp.arange(3)  # after the pending token
        drafted = jnp.take_along_axis(text, places, axis=1, mode='clip')
        return decoder.verify(state, drafted, jnp.zeros_like(lengths))

    state = decoder.prefill(tokens, lengths, rng)
    return jax.lax.while_loop(lambda state: state.running, step, state).output()


def test_any_draft_gives_the_same_text_and_a_right_one_takes_fewer_passes():
    arguments = decoder_of('lossless'), jnp.asarray(TOKENS), jnp.asarray(LENGTHS), KEY
    wrong = with_drafts_from(*arguments, jnp.full((2, 14), PAD))
    right = with_drafts_from(*arguments, jnp.pad(wrong.tokens, ((0, 0), (0, 4))))
    np.testing.assert_array_equal(wrong.tokens, right.tokens)
    np.testing.assert_array_equal(wrong.causal_passes, wrong.lengths)
    np.testing.assert_array_equal(right.causal_passes, -(-right.lengths // 4))
