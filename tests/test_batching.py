"""Tests `generate_many`, `watch` and `decide`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_model import ToyConfig, ToyModel, toy

from diffusiongemma.sampling import (
    Controls,
    PromptLookup,
    Sampler,
    SamplingConfig,
    allow,
    pad_prompts,
    pin,
)
from diffusiongemma.sampling.batching import generate_many
from diffusiongemma.sampling.decide import decide
from diffusiongemma.sampling.watch import watch

C, PAD, V = 4, 22, 23
KEY = jax.random.key(0)
EVERY_MODE = pytest.mark.parametrize('mode', ['diffusion', 'autoregressive', 'lossless'])
CONFIG = SamplingConfig(
    max_new_tokens=14, max_denoising_steps=3, stop_ids=(3, 11), pad_id=PAD, vocab_size=PAD
)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 22, length).tolist() for length in RNG.integers(1, 9, 9)]
CONTROLS = Controls(
    temperature=jnp.asarray(RNG.random(9), jnp.float32),
    max_new_tokens=jnp.array([14, 0, 3, 14, 14, 1, 14, 9, 14]),
    pinned=pin([[None, 2], [], [], [7], [], [], [], [], [None] * 5 + [9]]),
    allowed_sets=allow(range(20), V)[None],
)


@functools.cache
def together(mode):
    """Returns the outputs of all prompts in one batch."""
    model, params = toy(C)
    tokens, lengths = pad_prompts(PROMPTS, PAD, width=8)
    output = Sampler(model, CONFIG, mode)(params, tokens, lengths, rng=KEY, controls=CONTROLS)
    return jax.tree.map(np.asarray, output)


@EVERY_MODE
@pytest.mark.parametrize(
    'batch_size',
    [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(20, marks=pytest.mark.slow)],
)
def test_every_prompt_has_the_response_of_one_large_batch_in_order(mode, batch_size):
    model, params = toy(C)
    output = generate_many(
        Sampler(model, CONFIG, mode),
        params,
        PROMPTS,
        rng=KEY,
        batch_size=batch_size,
        controls=CONTROLS,
        multiple=8,
    )
    jax.tree.map(np.testing.assert_array_equal, output, together(mode))
    assert len(set(output.lengths.tolist())) > 3  # rows were refilled at different times


def test_what_cannot_be_batched_is_one_clear_error():
    model, params = toy(C)
    sampler = Sampler(model, CONFIG)
    with pytest.raises(ValueError, match='batch_size must be >= 1 row, got 0'):
        generate_many(sampler, params, PROMPTS, rng=KEY, batch_size=0)
    with pytest.raises(ValueError, match='No prompts'):
        generate_many(sampler, params, [], rng=KEY)
    with pytest.raises(ValueError, match='Prompt 1 is empty'):
        generate_many(sampler, params, [[1], []], rng=KEY)


@pytest.mark.slow
@pytest.mark.parametrize('mode', ['diffusion', 'lossless'])
def test_watching_shows_every_step_and_changes_nothing(mode):
    model, params = toy(C)
    tokens, lengths = pad_prompts(PROMPTS[:3], PAD, width=8)
    sampler = Sampler(model, dataclasses.replace(CONFIG, max_draft_steps=2), mode)
    *drafts, output = watch(sampler, params, tokens, lengths, rng=KEY)
    jax.tree.map(np.testing.assert_array_equal, output, sampler(params, tokens, lengths, rng=KEY))
    steps = np.sum([draft.changing for draft in drafts], axis=0)
    np.testing.assert_array_equal(steps, output.denoising_steps)
    last = {int(draft.output.canvases.max()): draft for draft in drafts}[0]
    if mode == 'diffusion':
        np.testing.assert_array_equal(last.argmax, output.tokens[:, :C])
    noise, first = drafts[:2]
    assert noise.step == 0 and first.step == 1 and not first.output.lengths.any()
    assert np.isinf(noise.entropies).all() and np.isfinite(first.entropies).all()


@pytest.mark.parametrize(
    'changes', [{'drafts': PromptLookup(length=3)}, {'lookup_ngram': 1}], ids=['source', 'lookup']
)
def test_watching_shows_the_drafts_that_are_verified_wherever_they_come_from(changes):
    model, params = toy(C)
    tokens, lengths = pad_prompts(PROMPTS[:2], PAD, width=8)
    sampler = Sampler(model, dataclasses.replace(CONFIG, **changes), 'lossless')
    *drafts, output = watch(sampler, params, tokens, lengths, rng=KEY)
    expected = sampler(params, tokens, lengths, rng=KEY)
    jax.tree.map(np.testing.assert_array_equal, output, expected)
    if 'drafts' in changes:
        assert not output.denoising_steps.any()
        assert {draft.argmax.shape[1] for draft in drafts} == {4}  # the pending token and 3 more


def test_watching_shows_drafts_of_both_lengths():
    model, params = toy(C)
    tokens, lengths = pad_prompts(PROMPTS[:1], PAD, width=8)
    config = dataclasses.replace(CONFIG, lookup_ngram=1, model_draft_length=2)
    sampler = Sampler(model, config, 'lossless')
    *drafts, output = watch(sampler, params, tokens, lengths, rng=KEY)
    jax.tree.map(np.testing.assert_array_equal, output, sampler(params, tokens, lengths, rng=KEY))
    assert {draft.argmax.shape[1] for draft in drafts} == {2, C}


def test_a_mode_without_a_canvas_cannot_be_watched():
    model, params = toy(C)
    tokens, lengths = pad_prompts(PROMPTS[:1], PAD)
    with pytest.raises(ValueError, match='has no canvas to watch'):
        watch(Sampler(model, CONFIG, 'autoregressive'), params, tokens, lengths, rng=KEY)


def test_probabilities_of_answers_are_those_of_their_tokens_made_to_sum_to_one():
    model = ToyModel(ToyConfig(canvas_length=C))
    params = model.init(jax.random.key(7))['params']
    tokens, lengths = pad_prompts(PROMPTS[:3], PAD, width=8)
    sampler = Sampler(model, CONFIG)
    everything = decide(sampler, params, tokens, lengths, [[v] for v in range(V)], rng=KEY)
    np.testing.assert_allclose(everything.sum(axis=-1), 1, rtol=1e-5)
    some = decide(sampler, params, tokens, lengths, [[5], [9]], rng=KEY)
    expected = everything[:, jnp.array([5, 9])]
    np.testing.assert_allclose(some, expected / expected.sum(-1, keepdims=True), rtol=1e-4)


def test_the_toys_own_text_is_the_most_probable_answer():
    """The toy's target at a position is a function of the tokens before the canvas."""
    model, params = toy(C)
    config = SamplingConfig(max_new_tokens=C, temperature=0, stop_ids=(), pad_id=PAD)
    tokens, lengths = pad_prompts(PROMPTS[:1], PAD, width=8)
    text = Sampler(model, config)(params, tokens, lengths, rng=KEY).tokens[0].tolist()
    others = [[(t + 1) % V for t in text[1:3]], [text[1]], [0, 0]]
    chances = decide(
        Sampler(model, config),
        params,
        tokens,
        lengths,
        [text[1:3], *others],
        rng=KEY,
        before=text[:1],
        after=text[3:],
        num_draws=4,
    )
    assert np.argmax(chances[0]) == 0


@pytest.mark.parametrize(
    'answers, fields, message',
    [
        ([], {}, 'answers must be token ids'),
        ([[1], []], {}, 'answers must be token ids'),
        ([[1], [1, 2]], {}, 'answers differ in length'),
        ([[1, 2, 3]], {'before': [1], 'after': [2]}, 'a canvas has 4'),
        ([[1]], {'num_draws': 0}, 'num_draws must be >= 1'),
    ],
)
def test_answers_that_are_unfit_are_one_clear_error(answers, fields, message):
    model, params = toy(C)
    tokens, lengths = pad_prompts(PROMPTS[:1], PAD)
    with pytest.raises(ValueError, match=message):
        decide(Sampler(model, CONFIG), params, tokens, lengths, answers, rng=KEY, **fields)
