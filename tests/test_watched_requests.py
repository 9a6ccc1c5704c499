"""Tests that a watched request shows every denoise step and changes nothing else."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from test_light import light_student
from toy_model import toy

from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.sampling import Controls, PromptLookup, Sampler, SamplingConfig, pad_prompts
from diffusiongemma.sampling.engine import DenoiseStep, Engine, Failed, Finished
from diffusiongemma.sampling.watch import watch
from diffusiongemma.view.frames import EventFrames, frames

C, PAD = 4, 22
CONFIG = SamplingConfig(
    max_new_tokens=10, max_denoising_steps=3, max_draft_steps=2, stop_ids=(3,), pad_id=PAD,
    vocab_size=PAD, temperature=0.7,
)  # fmt: skip
PROMPTS = [[5, 2, 9], [1, 2, 1, 2, 1], [7, 7, 7, 7, 4], [12, 20]]
KINDS = {
    'diffusion': ('diffusion', {}),
    'lossless': ('lossless', {}),
    'lookups': ('lossless', {'lookup_ngram': 1}),
    'a source of drafts': ('lossless', {'drafts': PromptLookup(length=3)}),
}


@functools.cache
def sampler_of(kind):
    mode, changes = KINDS[kind]
    return Sampler(toy(C)[0], dataclasses.replace(CONFIG, **changes), mode)


def new_engine(sampler, params=None, **changes):
    options = {'slots': 2, 'capacity': 24, 'multiple': 8} | changes
    return Engine(sampler, toy(C)[1] if params is None else params, **options)


def steps_of(events, id):
    return [e.draft for e in events if isinstance(e, DenoiseStep) and e.id == id]


def result_of(events, id):
    (result,) = [e.result for e in events if isinstance(e, Finished) and e.id == id]
    return result


def answered(engine, prompt):
    """Returns the events of an unwatched request."""
    engine.submit(prompt, rng=3)
    return list(engine.run())


def same_drafts(shown, alone):
    """Checks that two views show the same canvases after the same tokens."""
    assert len(shown) == len(alone)
    for one, other in zip(shown, alone, strict=True):
        for name in ('step', 'argmax', 'canvas', 'changing'):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        np.testing.assert_allclose(one.entropies, other.entropies, rtol=1e-5, atol=1e-6)
        for name in ('lengths', 'canvases', 'denoising_steps'):
            np.testing.assert_array_equal(getattr(one.output, name), getattr(other.output, name))
        count = int(one.output.lengths[0])
        np.testing.assert_array_equal(one.output.tokens[0, :count], other.output.tokens[0, :count])


@pytest.mark.parametrize(
    'kind',
    [
        'diffusion',
        'lossless',
        pytest.param('lookups', marks=pytest.mark.slow),
        pytest.param('a source of drafts', marks=pytest.mark.slow),
    ],
)
def test_a_watched_request_shows_what_a_view_of_it_alone_shows_and_changes_no_response(kind):
    """Other watched and unwatched requests run concurrently and start and end at other times."""
    sampler = sampler_of(kind)
    engine, plain = new_engine(sampler), new_engine(sampler)
    ids, expected = [], []
    for n, prompt in enumerate(PROMPTS):
        ids.append(engine.submit(prompt, rng=n, watch=True))
        ids.append(engine.submit(prompt, rng=n))
        expected.append(plain.submit(prompt, rng=n))
    events, alone = list(engine.run()), list(plain.run())
    for n, prompt in enumerate(PROMPTS):
        watched, unwatched = ids[2 * n : 2 * n + 2]
        for id in (watched, unwatched):
            result, other = result_of(events, id), result_of(alone, expected[n])
            assert result.tokens == other.tokens and result.reason == other.reason
            assert result.passes == other.passes and result.canvases == other.canvases
        tokens, lengths = pad_prompts([prompt], PAD, width=8)
        *drafts, _ = watch(sampler, toy(C)[1], tokens, lengths, rng=jax.random.key(n)[None])
        same_drafts(steps_of(events, watched), drafts)
        assert not steps_of(events, unwatched)


@pytest.mark.slow  # compiles the programs of a model
def test_a_light_denoiser_is_watched_in_its_one_pass(tiny_config):
    model, params = light_student(tiny_config.replace(predict_next=True), serial_rank=2)
    config = SamplingConfig(max_new_tokens=6, stop_ids=(), temperature=0.0)
    engine = new_engine(Sampler(model, config, 'lossless'), params)
    ids = [engine.submit([5, 2, 9], watch=watch) for watch in (True, False)]
    events = list(engine.run())
    shown, unshown = (result_of(events, id) for id in ids)
    assert shown.tokens == unshown.tokens and shown.passes == unshown.passes
    assert [int(draft.step) for draft in steps_of(events, ids[0])] == [0, 1] * shown.canvases


def test_other_requests_take_a_block_while_a_watched_one_takes_a_step():
    engine = new_engine(sampler_of('diffusion'))
    watched = engine.submit(PROMPTS[0], watch=True)
    other = engine.submit(PROMPTS[1], rng=1)
    steps = []
    while not any(isinstance(event, Finished) for event in steps):
        steps += engine.step()
    assert {type(event) for event in steps if event.id == watched} == {DenoiseStep}
    assert len(steps_of(steps, watched)) == result_of(steps, other).canvases > 1
    result_of(list(engine.run()), watched)


@pytest.mark.parametrize('kind', ['diffusion', 'lossless'])
@pytest.mark.parametrize('steps', [1, 2, 3, 4])
def test_cancelled_in_the_midst_of_a_canvas_it_is_not_seen_again(kind, steps):
    """A concurrent request continues, and a waiting one takes the slot after the canvas."""
    sampler, key = sampler_of(kind), {'rng': 3, 'watch': True}
    engine = new_engine(sampler)
    gone = engine.submit(PROMPTS[0], rng=1, watch=True)
    ids = [engine.submit(prompt, **key) for prompt in PROMPTS[1:]]
    events = [event for _ in range(steps) for event in engine.step()]
    assert steps_of(events, gone)
    assert engine.cancel(gone) and not engine.cancel(gone)
    later = list(engine.run())
    assert not [event for event in later if event.id == gone]
    for id, prompt in zip(ids, PROMPTS[1:], strict=True):
        plain = new_engine(sampler)
        expected = result_of(answered(plain, prompt), 0)
        assert result_of(events + later, id).tokens == expected.tokens


def test_after_the_last_watched_request_is_cancelled_its_canvas_is_dropped():
    sampler = sampler_of('diffusion')
    engine = new_engine(sampler)
    gone = engine.submit(PROMPTS[0], watch=True)
    assert len(engine.step()) == 1  # the noise
    assert engine.cancel(gone) and engine.running == engine.waiting == 0
    id = engine.submit(PROMPTS[1], rng=3, watch=True)
    events = list(engine.run())
    assert {event.id for event in events} == {id}
    assert [int(draft.step) for draft in steps_of(events, id)][:2] == [0, 1]
    expected = result_of(answered(new_engine(sampler), PROMPTS[1]), 0)
    assert result_of(events, id).tokens == expected.tokens


def test_a_step_that_fails_fails_the_watched_requests_and_no_others(monkeypatch):
    engine = new_engine(sampler_of('diffusion'))
    broken, fine = (engine.submit(PROMPTS[0], rng=3, watch=watch) for watch in (True, False))
    (group,) = (group for group in engine._groups.values() if group.waiting[0].id == broken)
    steps = group.slots.steps

    def fail():
        yield next(steps())
        raise RuntimeError('out of memory')

    monkeypatch.setattr(group.slots, 'steps', fail)
    events = list(engine.run())
    (failed,) = (event for event in events if isinstance(event, Failed))
    assert failed.id == broken and 'out of memory' in str(failed.error)
    expected = result_of(answered(new_engine(sampler_of('diffusion')), PROMPTS[0]), 0).tokens
    assert result_of(events, fine).tokens == expected
    monkeypatch.undo()
    again = engine.submit(PROMPTS[0], rng=3, watch=True)
    assert result_of(list(engine.run()), again).tokens == expected


@pytest.mark.parametrize('kind', ['diffusion', 'lossless'])
def test_frames_of_its_events_are_those_of_a_view(kind):
    sampler, tokenizer = sampler_of(kind), Tokenizer.load()
    tokens, lengths = pad_prompts(PROMPTS[:1], PAD, width=8)
    drafts = watch(sampler, toy(C)[1], tokens, lengths, rng=jax.random.key(3)[None])
    expected = list(frames(drafts, tokenizer, CONFIG.stop_ids))
    engine = new_engine(sampler)
    engine.submit(PROMPTS[0], rng=3, watch=True)
    engine.submit(PROMPTS[1], rng=3, watch=True)
    shown = EventFrames(tokenizer, CONFIG.stop_ids)
    found = [frame for event in engine.run() if event.id == 0 for frame in shown.of(event)]
    assert [frame.caption for frame in found] == [frame.caption for frame in expected]
    for one, other in zip(found, expected, strict=True):
        assert [(c.text, c.state) for c in one.cells] == [(c.text, c.state) for c in other.cells]


def test_without_a_canvas_there_is_nothing_to_watch_but_a_frame_for_every_token():
    engine = new_engine(sampler_of('diffusion'))
    with pytest.raises(ValueError, match="'autoregressive' has no canvas to watch"):
        engine.submit([1], mode='autoregressive', watch=True)
    assert engine.waiting == 0
    engine.submit([1, 2], mode='autoregressive', controls=Controls(max_new_tokens=np.array([3])))
    shown = EventFrames(Tokenizer.load(), CONFIG.stop_ids)
    found = [frame for event in engine.run() for frame in shown.of(event)]
    captions = ['1 token, 1 pass', '2 tokens, 2 passes', '3 tokens, 3 passes']
    assert [frame.caption for frame in found] == captions
    assert [len(frame.cells) for frame in found] == [1, 2, 3]
