"""Tests that the log-probabilities of a response equal those of one causal pass over it."""

import dataclasses

import jax
import numpy as np
import pytest
from toy_model import toy

from diffusiongemma.evaluation.scoring import response_log_probs
from diffusiongemma.sampling import Controls, Sampler, SamplingConfig, pad_prompts, pin
from diffusiongemma.sampling.batching import generate_many
from diffusiongemma.sampling.engine import Delta, Engine, Finished

MODEL, PARAMS = toy(4)
CONFIG = SamplingConfig(max_new_tokens=9, stop_ids=(3,), pad_id=22, temperature=0.7, logprobs=3)
PROMPTS = [[5, 2, 9], [1], [7, 7, 7, 7, 4], [12, 20]]
CAUSAL = ('autoregressive', 'lossless')


def judged(responses):
    """Returns log-probabilities of responses from one pass over the text, as in the evaluation."""
    return response_log_probs(MODEL, PARAMS, PROMPTS, responses, batch_size=2, multiple=16)


def cut(array, lengths):
    return [np.asarray(row)[:n] for row, n in zip(array, lengths, strict=True)]


@pytest.mark.parametrize('mode', CAUSAL)
@pytest.mark.parametrize('temperature', [0.0, 0.7])
def test_a_token_has_the_log_probability_of_the_causal_pass(mode, temperature):
    """It is computed at temperature 1, also if the token was drawn at another temperature."""
    config = dataclasses.replace(CONFIG, temperature=temperature)
    output = Sampler(MODEL, config, mode)(
        PARAMS, *pad_prompts(PROMPTS, 22, multiple=8), rng=jax.random.key(1)
    )
    responses = [row.tolist() for row in cut(output.tokens, output.lengths)]
    assert max(map(len, responses)) == 9
    scores = output.scores
    for own, expected in zip(cut(scores.chosen, output.lengths), judged(responses), strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-5, atol=1e-5)
    for tokens, chosen, top, log_probs in zip(
        responses,
        cut(scores.chosen, output.lengths),
        cut(scores.top_tokens, output.lengths),
        cut(scores.top, output.lengths),
        strict=True,
    ):
        assert top.shape == (len(tokens), 3) and (np.diff(log_probs) <= 0).all()
        among = top == np.array(tokens)[:, None]
        np.testing.assert_allclose(log_probs[among], chosen[among.any(1)])
        assert (among.any(1) | (chosen <= log_probs[:, -1])).all()
        if temperature == 0:
            assert among[:, 0].all()


def test_what_a_constraint_bans_counts_all_the_same():
    """A pinned token has the probability of the model, not 1."""
    controls = Controls(pinned=pin([[None, 6]] * len(PROMPTS)))
    output = Sampler(MODEL, CONFIG, 'lossless')(
        PARAMS, *pad_prompts(PROMPTS, 22), rng=jax.random.key(1), controls=controls
    )
    responses = [row.tolist() for row in cut(output.tokens, output.lengths)]
    expected = judged(responses)
    assert any(len(row) > 1 and row[1] < -0.5 for row in expected)
    for own, row in zip(cut(output.scores.chosen, output.lengths), expected, strict=True):
        np.testing.assert_allclose(own, row, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    'mode', [pytest.param('autoregressive', marks=pytest.mark.slow), 'lossless']
)
def test_streamed_scores_join_to_those_of_a_call(mode):
    sampler = Sampler(MODEL, CONFIG, mode)
    arguments = (PARAMS, *pad_prompts(PROMPTS, 22))
    whole = sampler(*arguments, rng=jax.random.key(1))
    parts = [[] for _ in PROMPTS]
    for block in sampler.stream(*arguments, rng=jax.random.key(1)):
        for row, part in enumerate(cut(block.scores.chosen, block.lengths)):
            parts[row] += part.tolist()
    for row, part in zip(cut(whole.scores.chosen, whole.lengths), parts, strict=True):
        np.testing.assert_allclose(part, row, rtol=1e-5, atol=1e-5)


def test_many_prompts_have_the_scores_of_one_batch():
    sampler = Sampler(MODEL, CONFIG, 'lossless')
    keys = jax.random.split(jax.random.key(1), len(PROMPTS))
    whole = sampler(PARAMS, *pad_prompts(PROMPTS, 22), rng=keys)
    output = generate_many(sampler, PARAMS, PROMPTS, rng=keys, batch_size=2)
    for name in ('chosen', 'top', 'top_tokens'):
        found, expected = (getattr(each.scores, name) for each in (output, whole))
        for own, row in zip(cut(found, output.lengths), cut(expected, whole.lengths), strict=True):
            np.testing.assert_allclose(own, row, rtol=1e-5, atol=1e-5)


def test_an_engine_gives_scores_to_the_requests_that_ask_and_changes_no_text():
    plain = Sampler(MODEL, dataclasses.replace(CONFIG, logprobs=None), 'lossless')
    engine = Engine(plain, PARAMS, slots=2, capacity=24, multiple=8)
    ids = [
        engine.submit(prompt, rng=n, logprobs=logprobs)
        for n, prompt in enumerate(PROMPTS)
        for logprobs in (None, 0, 2)
    ]
    events = list(engine.run())
    results = {event.id: event.result for event in events if isinstance(event, Finished)}
    for n in range(len(PROMPTS)):
        without, alone, with_two = (results[id] for id in ids[3 * n : 3 * n + 3])
        assert without.scores is None and without.tokens == alone.tokens == with_two.tokens
        assert alone.scores.top.shape == (len(alone.tokens), 0)
        assert with_two.scores.top_tokens.shape == (len(alone.tokens), 2)
        np.testing.assert_allclose(alone.scores.chosen, with_two.scores.chosen, rtol=1e-6)
        deltas = [e for e in events if isinstance(e, Delta) and e.id == ids[3 * n + 2]]
        joined = np.concatenate([delta.scores.chosen for delta in deltas])
        np.testing.assert_array_equal(joined, with_two.scores.chosen)


def test_nobody_pays_for_scores_that_are_not_asked_for():
    sampler = Sampler(MODEL, dataclasses.replace(CONFIG, logprobs=None), 'autoregressive')
    output = sampler(PARAMS, *pad_prompts(PROMPTS, 22), rng=jax.random.key(1))
    assert output.scores is None and len(jax.tree.leaves(output)) == 6


def test_the_diffusion_mode_refuses_them_in_one_line():
    with pytest.raises(ValueError, match="logprobs need a causal pass .* Use mode='lossless'") as e:
        Sampler(MODEL, CONFIG, 'diffusion')
    assert len(str(e.value).splitlines()) == 1
    engine = Engine(Sampler(MODEL, dataclasses.replace(CONFIG, logprobs=None)), PARAMS)
    with pytest.raises(ValueError, match='logprobs need a causal pass'):
        engine.submit([1, 2], logprobs=0)
    with pytest.raises(ValueError, match='logprobs=24 asks for more tokens .* than the 23 of'):
        Sampler(MODEL, dataclasses.replace(CONFIG, logprobs=24), 'lossless')
    with pytest.raises(ValueError, match='logprobs must be >= 0 most likely tokens, got -1'):
        SamplingConfig(logprobs=-1)
