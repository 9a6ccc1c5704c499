"""Tests that the lossless mode writes the text of autoregressive decoding."""

import dataclasses
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from toy_model import ToyConfig, ToyModel, toy

from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.data.pipeline import eval_examples
from diffusiongemma.data.sources import DataSpec
from diffusiongemma.sampling import (
    Controls,
    PromptLookup,
    Sampler,
    SamplingConfig,
    pad_prompts,
)
from diffusiongemma.sampling.epilogue import gumbel_noise
from diffusiongemma.sampling.lossless import verify

DATA = pathlib.Path(__file__).parent / 'data'


def both(model, params, config, tokens, lengths, rng):
    """Returns the outputs of the autoregressive and the lossless mode as numpy arrays."""
    # Draft settings are removed, so that tests share one autoregressive program.
    nothing = {'drafts': None, 'lookup_ngram': 0, 'model_draft_length': None}
    plain = dataclasses.replace(config, **nothing, max_draft_steps=1)
    outputs = (
        Sampler(model, settings, mode)(params, tokens, lengths, rng=rng)
        for settings, mode in ((plain, 'autoregressive'), (config, 'lossless'))
    )
    return (jax.tree.map(np.asarray, output) for output in outputs)


def greedy(**fields):
    return SamplingConfig(**({'temperature': 0, 'stop_ids': (), 'pad_id': 22} | fields))


@pytest.mark.parametrize('max_draft_steps', [1, 3])
def test_greedy_text_is_that_of_autoregression_on_many_prompts(max_draft_steps):
    model, params = toy(4)
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 500)
    tokens = rng.integers(0, 22, (500, 8))
    config = greedy(max_new_tokens=21, stop_ids=(3, 11), max_draft_steps=max_draft_steps)
    expected, found = both(model, params, config, tokens, lengths, jax.random.key(0))
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    assert (found.denoising_steps <= max_draft_steps * found.canvases).all()


@pytest.mark.slow
@pytest.mark.parametrize('name', ['tiny_moe', 'tiny_heldout'])
def test_greedy_text_is_that_of_autoregression_on_a_random_network(name):
    model, params, _ = load_model(DATA / name)
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 15, 24)
    tokens = rng.integers(3, 190, (24, 14))  # longer than the window
    config = greedy(max_new_tokens=20, pad_id=0)
    expected, found = both(model, params, config, tokens, lengths, jax.random.key(0))
    np.testing.assert_array_equal(found.tokens, expected.tokens)


@pytest.mark.slow
def test_a_draft_that_is_right_costs_one_pass_for_many_tokens():
    """The shipped student drafts the text that its encode pass, the teacher, would write."""
    model, params, tokenizer = load_model('builtin')
    examples = eval_examples(DataSpec(kind='wordmath', split='test', size=16))
    prompts = [tokenizer.format_prompt(example['prompt']) for example in examples]
    config = SamplingConfig.for_tokenizer(tokenizer, temperature=0, max_new_tokens=96)
    tokens, lengths = pad_prompts(prompts, tokenizer.pad_id)
    expected, found = both(model, params, config, tokens, lengths, jax.random.key(0))
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    passes = found.denoising_steps + found.canvases
    assert found.lengths.sum() > 3 * passes.sum()


@pytest.mark.slow
def test_greedy_text_is_the_teachers_on_the_built_in_test_set():
    model, params, tokenizer = load_model('builtin')
    teacher, teacher_params, _ = load_model('builtin-teacher')
    config = SamplingConfig.for_tokenizer(tokenizer, temperature=0, max_new_tokens=96)
    examples = eval_examples(DataSpec(kind='wordmath', split='test', size=512))
    for first in range(0, 512, 64):
        prompts = [tokenizer.format_prompt(e['prompt']) for e in examples[first : first + 64]]
        tokens, lengths = pad_prompts(prompts, tokenizer.pad_id, width=96)
        rng = jax.random.key(first)
        found = Sampler(model, config, 'lossless')(params, tokens, lengths, rng=rng)
        expected = Sampler(teacher, config, 'autoregressive')(
            teacher_params, tokens, lengths, rng=rng
        )
        np.testing.assert_array_equal(found.tokens, expected.tokens)


def autoregressive_distribution(model, params, prompt, count, temperature):
    """Returns the probability of each of the V^count responses by enumeration."""
    size = model.config.vocab_size
    responses = np.array(list(itertools.product(range(size), repeat=count)))
    tokens = np.concatenate([np.tile(prompt, (len(responses), 1)), responses], axis=1)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    variables = {'params': params}
    hidden, _ = model.apply(
        variables, jnp.asarray(tokens), positions, jnp.ones_like(positions), method='encode'
    )
    logits = model.apply(variables, hidden, method='unembed') / temperature
    log_probs = np.asarray(jax.nn.log_softmax(logits[:, len(prompt) - 1 : -1]))
    chosen = np.take_along_axis(log_probs, responses[..., None], axis=-1)[..., 0]
    return np.exp(chosen.sum(axis=-1))


@pytest.mark.parametrize('temperature', [1.0, pytest.param(2.0, marks=pytest.mark.slow)])
def test_sampled_text_has_the_distribution_of_autoregression(temperature):
    model = ToyModel(ToyConfig(vocab_size=4, canvas_length=3))
    params = model.init(jax.random.key(7))['params']
    prompt, count, draws = [2, 1, 3], 4, 60_000  # more than one canvas
    expected = autoregressive_distribution(model, params, prompt, count, temperature)
    config = SamplingConfig(
        max_new_tokens=count, temperature=temperature, stop_ids=(), max_draft_steps=2
    )
    tokens, lengths = np.tile([prompt], (draws, 1)), np.full(draws, 3)
    output = Sampler(model, config, 'lossless')(params, tokens, lengths, rng=jax.random.key(3))
    places = 4 ** np.arange(count)[::-1]
    observed = np.bincount(np.asarray(output.tokens) @ places, minlength=4**count)
    np.testing.assert_allclose(expected.sum(), 1, rtol=1e-5)
    common = expected * draws >= 5  # the others are one cell
    cells = [np.append(x[common], x[~common].sum()) for x in (observed, expected * draws)]
    cells = [x[cells[1] > 0] for x in cells]
    assert scipy.stats.chisquare(*cells, sum_check=False).pvalue > 1e-3
    assert np.mean(np.asarray(output.canvases)) < count  # some drafts were accepted


def test_the_test_of_the_distribution_can_fail():
    """It detects that the tokens after a rejection are drawn with other noise."""
    logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    drafted, draws = 0, 60_000
    keys = jax.random.split(jax.random.key(0), (draws, 2))
    stacked = jnp.broadcast_to(logits, (draws, 2, 3))
    blocks = jnp.full((draws, 2), drafted)
    counts, following, _ = verify(stacked, blocks, 1.0, gumbel_noise(keys, 3))
    second = np.where(counts == 2, drafted, following)
    expected = np.array([0.5, 0.3, 0.2]) * draws
    right = scipy.stats.chisquare(np.bincount(second, minlength=3), expected)
    assert right.pvalue > 1e-3
    careless = np.where(
        counts == 2, drafted, jax.random.categorical(jax.random.key(1), stacked[:, 0])
    )
    wrong = scipy.stats.chisquare(np.bincount(careless, minlength=3), expected)
    assert wrong.pvalue < 1e-12


def test_what_is_refused_is_not_drawn_again():
    logits = jnp.zeros((2000, 4, 5))
    block = jnp.tile(jnp.array([1, 2, 3, 4]), (2000, 1))
    keys = jax.random.split(jax.random.key(0), (2000, 4))
    counts, following, _ = verify(logits, block, 1.0, gumbel_noise(keys, 5))
    assert set(np.unique(counts)) == {1, 2, 3, 4}
    refused = np.asarray(counts) < 4
    assert (following[refused] != block[refused, counts[refused]]).all()


@pytest.mark.parametrize(
    'fields',
    [
        {},
        pytest.param({'top_k': 5}, marks=pytest.mark.slow),
        {'top_p': 0.8, 'temperature': 0.7},
        pytest.param({'max_draft_steps': 3}, marks=pytest.mark.slow),
        {'drafts': PromptLookup(length=3, max_ngram=2)},
        pytest.param({'lookup_ngram': 1}, marks=pytest.mark.slow),
        {'lookup_ngram': 2, 'max_draft_steps': 2},
    ],
)
def test_sampled_text_is_that_of_autoregression_with_the_same_keys(fields):
    model, params = toy(4)
    rng = np.random.default_rng(2)
    lengths, tokens = rng.integers(1, 9, 500), rng.integers(0, 22, (500, 8))
    config = SamplingConfig(
        **({'max_new_tokens': 21, 'stop_ids': (3, 11), 'pad_id': 22, 'temperature': 1.0} | fields)
    )
    expected, found = both(model, params, config, tokens, lengths, jax.random.key(5))
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    assert len(np.unique(found.tokens)) > 5  # the text is sampled


def test_rows_with_temperatures_and_keys_of_their_own_are_written_as_by_autoregression():
    model, params = toy(4)
    rng = np.random.default_rng(3)
    lengths, tokens = rng.integers(1, 9, 64), rng.integers(0, 22, (64, 8))
    keys = jax.random.split(jax.random.key(9), 64)
    controls = Controls(temperature=jnp.asarray(rng.choice([0.0, 0.5, 1.5], 64), jnp.float32))
    config = SamplingConfig(max_new_tokens=17, stop_ids=(3,), pad_id=22)
    expected, found = (
        Sampler(model, config, mode)(params, tokens, lengths, rng=keys, controls=controls)
        for mode in ('autoregressive', 'lossless')
    )
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    hot = Controls(temperature=controls.temperature[7:8])
    alone = Sampler(model, config, 'lossless')(
        params, tokens[7:8], lengths[7:8], rng=keys[7:8], controls=hot
    )
    np.testing.assert_array_equal(alone.tokens[0], found.tokens[7])


def test_accepted_lengths_count_what_each_verification_emitted():
    model, params = toy(4)
    rng = np.random.default_rng(4)
    tokens, lengths = rng.integers(0, 22, (50, 8)), np.full(50, 8)
    config = greedy(max_new_tokens=21, stop_ids=(3,))
    _, found = both(model, params, config, tokens, lengths, jax.random.key(0))
    bins = np.arange(found.accepted_lengths.shape[1])
    np.testing.assert_array_equal(found.accepted_lengths.sum(axis=1), found.canvases)
    np.testing.assert_array_equal(found.accepted_lengths @ bins, found.lengths)
    np.testing.assert_allclose(
        found.tokens_per_pass, found.lengths / (found.denoising_steps + found.canvases), rtol=1e-6
    )


def test_a_looked_up_draft_is_what_followed_the_longest_latest_match():
    history = jnp.asarray(
        [[5, 6, 7, 9, 6, 7, 8, 6, 7, 0, 0, 0], [4, 4, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0]]
    )
    lookup = PromptLookup(length=4, max_ngram=3)
    drafts = lookup.draft(history, jnp.asarray([9, 3]))
    np.testing.assert_array_equal(drafts[0], [8, 6, 7, 8])
    np.testing.assert_array_equal(drafts[1], [4, 4, 4, 4])
    longer = PromptLookup(length=2, max_ngram=3).draft(
        jnp.asarray([[1, 2, 3, 7, 9, 2, 3, 8, 1, 2, 3, 0]]), jnp.asarray([11])
    )
    np.testing.assert_array_equal(longer[0], [7, 9])


def test_a_lookup_takes_the_place_of_a_draft_only_where_enough_tokens_match():
    history = jnp.asarray([[1, 2, 3, 4, 1, 2], [5, 1, 6, 1, 7, 1], [9, 8, 7, 6, 5, 4]])
    tokens, matched = PromptLookup(length=2).find(history, jnp.asarray([6, 6, 6]))
    np.testing.assert_array_equal(matched, [2, 1, 0])
    np.testing.assert_array_equal(tokens[:2], [[3, 4], [7, 1]])


def test_a_text_that_repeats_itself_needs_fewer_passes_with_lookups():
    model, params = toy(4)
    rng = np.random.default_rng(8)
    lengths, tokens = np.full(30, 8), np.tile(rng.integers(0, 22, (30, 4)), (1, 2))
    alone, helped = (
        Sampler(model, greedy(max_new_tokens=30, lookup_ngram=n), 'lossless')(
            params, tokens, lengths, rng=jax.random.key(0)
        )
        for n in (0, 1)
    )
    np.testing.assert_array_equal(alone.tokens, helped.tokens)
    assert helped.denoising_steps.sum() < alone.denoising_steps.sum()
    with pytest.raises(ValueError, match='drafts and lookup_ngram are both set'):
        greedy(lookup_ngram=1, drafts=PromptLookup())
    with pytest.raises(ValueError, match='lookup_ngram must be 0 to 64 tokens, got -1'):
        greedy(lookup_ngram=-1)


@pytest.mark.parametrize('temperature', [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_the_models_drafts_may_be_shorter_than_those_of_lookups(temperature):
    model, params = toy(6)
    rng = np.random.default_rng(3)
    lengths = {'draft_length': 6, 'model_draft_length': 3}
    config = greedy(max_new_tokens=30, lookup_ngram=1, temperature=temperature, **lengths)
    drafted_by_model, verifications = 0, 0
    for seed in range(12):
        tokens = np.tile(rng.integers(0, 22, (1, 5)), (1, 2))
        arguments = (model, params, config, tokens, np.array([10]), jax.random.key(seed))
        expected, found = both(*arguments)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        assert found.accepted_lengths.sum() == found.canvases.sum()
        drafted_by_model += int(found.denoising_steps[0])
        verifications += int(found.canvases[0])
    assert 0 < drafted_by_model < verifications
    alone = dataclasses.replace(config, lookup_ngram=5)  # five tokens seldom occur again
    _, found = both(*arguments[:2], alone, *arguments[3:])
    assert not found.accepted_lengths[0, 4:].any()
    for wrong, match in (
        ({'lookup_ngram': 0}, 'model_draft_length=3 needs lookup_ngram > 0'),
        ({'draft_length': 2}, 'model_draft_length=3 is more than draft_length=2'),
        ({'model_draft_length': 1}, 'model_draft_length must be a whole number >= 2'),
    ):
        with pytest.raises(ValueError, match=match):
            dataclasses.replace(config, **wrong)
    with pytest.raises(ValueError, match='model_draft_length=9 is longer than the canvas of 6'):
        Sampler(model, greedy(lookup_ngram=2, model_draft_length=9), 'lossless')


def test_an_autoregressive_model_can_be_drafted_for_by_looking_up():
    model, params = toy(0)
    rng = np.random.default_rng(6)
    tokens, lengths = rng.integers(0, 22, (20, 8)), np.full(20, 8)
    config = greedy(max_new_tokens=30, drafts=PromptLookup(length=4))
    expected, found = both(model, params, config, tokens, lengths, jax.random.key(0))
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert (found.denoising_steps == 0).all() and found.canvases.sum() < found.lengths.sum()
