"""Tests that concurrent requests get the same answers as alone, and that text is streamed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_model import toy

from diffusiongemma.constraints.automaton import TokenAutomaton
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.sampling import (
    Controls,
    PromptLookup,
    Sampler,
    SamplingConfig,
    ban,
    pad_prompts,
    pin,
)
from diffusiongemma.sampling.engine import Delta, Engine, Failed, Finished
from diffusiongemma.sampling.prefixes import ConversationCache
from diffusiongemma.sampling.text import TextStream

C, PAD, V = 4, 22, 23
MODES = ('diffusion', 'autoregressive', 'lossless')
CONFIG = SamplingConfig(
    max_new_tokens=10, max_denoising_steps=3, stop_ids=(3, 11), pad_id=PAD, vocab_size=PAD
)
RNG = np.random.default_rng(0)
NO_STOPS = ban(CONFIG.stop_ids, V)[None]
REQUESTS = [
    {
        'prompt': RNG.integers(0, 22, length).tolist(),
        'rng': n,
        'mode': MODES[n % 3],
        'temperature': (0.0, 0.7)[n // 3 % 2],
        'max_new_tokens': int(RNG.integers(1, 11)),
    }
    for n, length in enumerate(RNG.integers(1, 9, 12))
]
REQUESTS[0] |= {'controls': Controls(pinned=pin([[None, 2]]), allowed_sets=NO_STOPS)}
TOKENIZER = Tokenizer.load()


@functools.cache
def sampler():
    return Sampler(toy(C)[0], CONFIG)


def new_engine(**changes):
    return Engine(sampler(), toy(C)[1], **({'slots': 2, 'capacity': 24, 'multiple': 8} | changes))


def results(engine, submitted):
    """Runs the engine and returns the results by the values of `submitted`, {id: value}."""
    by_id = {event.id: event.result for event in engine.run() if isinstance(event, Finished)}
    return {n: by_id[id] for id, n in submitted.items() if id in by_id}


@functools.cache
def alone(n):
    engine = new_engine()
    return results(engine, {engine.submit(**REQUESTS[n]): n})[n]


def assert_as_alone(answers):
    for n, result in answers.items():
        expected = alone(n)
        assert result.tokens == expected.tokens
        assert result.passes == expected.passes and result.reason == expected.reason


@pytest.mark.parametrize('mode', MODES)
def test_a_request_has_the_response_of_a_call_of_the_sampler(mode):
    model, params = toy(C)
    for n, request in enumerate(REQUESTS):
        if request['mode'] == mode and request['temperature'] and n:
            config = dataclasses.replace(CONFIG, temperature=0.7)
            tokens, lengths = pad_prompts([request['prompt']], PAD, width=8)
            limit = jnp.array([request['max_new_tokens']])
            output = Sampler(model, config, mode)(
                params, tokens, lengths, rng=jax.random.key(n)[None],
                controls=Controls(max_new_tokens=limit),
            )  # fmt: skip
            length = int(output.lengths[0])
            assert alone(n).tokens == output.tokens[0, :length].tolist()
            assert alone(n).denoising_steps == int(output.denoising_steps[0])


@settings(max_examples=8)
@given(order=st.permutations(range(len(REQUESTS))), slots=st.sampled_from([2, 3]))
def test_neither_order_nor_neighbors_change_a_response(order, slots):
    engine = new_engine(slots=slots)
    answers = results(engine, {engine.submit(**REQUESTS[n]): n for n in order})
    assert sorted(answers) == list(range(len(REQUESTS)))
    assert_as_alone(answers)


@settings(max_examples=8)
@given(
    arrivals=st.lists(st.integers(0, len(REQUESTS) - 1), min_size=4, max_size=10),
    dropped=st.sets(st.integers(0, 9), min_size=1, max_size=5),
)
def test_cancelled_requests_leave_no_trace_in_those_that_come_between_steps(arrivals, dropped):
    engine, submitted, events = new_engine(), {}, []
    for place, n in enumerate(arrivals):
        submitted[engine.submit(**REQUESTS[n])] = place
        events += engine.step()
    over = {event.id for event in events if isinstance(event, Finished)}
    gone = set()
    for id, place in submitted.items():
        if place in dropped:
            assert engine.cancel(id) == (id not in over)
            gone |= {id} - over
    later = list(engine.run())
    assert not {event.id for event in later} & gone
    by_id = {e.id: e.result for e in events + later if isinstance(e, Finished)}
    assert sorted(by_id) == sorted(set(submitted) - gone)
    for id, result in by_id.items():
        assert_as_alone({arrivals[submitted[id]]: result})


def test_a_request_beside_many_groups_waits_for_its_turn_and_not_for_ever():
    engine = new_engine(max_groups=1, slots=1)
    submitted = {engine.submit(**request): n for n, request in enumerate(REQUESTS)}
    answers = results(engine, submitted)
    assert sorted(answers) == list(range(len(REQUESTS)))
    assert_as_alone(answers)


def test_deltas_join_to_the_response_and_its_text():
    model, params = toy(C)
    config = dataclasses.replace(CONFIG, stop_ids=())
    engine = Engine(Sampler(model, config), params, slots=2, capacity=24, multiple=8)
    ids = [engine.submit([n, 5], rng=n) for n in range(3)]
    events = list(engine.run())
    for id in ids:
        deltas = [event.tokens for event in events if isinstance(event, Delta) and event.id == id]
        (result,) = (e.result for e in events if isinstance(e, Finished) and e.id == id)
        assert sum(deltas, []) == result.tokens and len(deltas) == 3  # canvases of 4, 4, 2
        assert result.reason == 'length' and len(result.tokens) == 10


def test_a_program_that_fails_fails_its_requests_and_no_others(monkeypatch):
    engine = new_engine()
    broken = engine.submit(**REQUESTS[1])
    (group,) = engine._groups.values()
    fine = engine.submit(**REQUESTS[2])

    def fail():
        raise RuntimeError('out of memory')

    monkeypatch.setattr(group.slots, 'advance', fail)
    events = {e.id: e for e in engine.run() if not isinstance(e, Delta)}
    assert isinstance(events[broken], Failed) and 'out of memory' in str(events[broken].error)
    assert_as_alone({2: events[fine].result})


def test_an_automaton_of_the_caller_survives_its_requests():
    """The engine donates the buffers of its state to the next program."""
    table = np.tile(np.arange(5)[:, None], (1, 2))
    table[3], table[4] = [4, 0], [0, 2]  # one token of class 0, then a stop token
    classes = np.where(np.isin(np.arange(V), CONFIG.stop_ids), 1, 0)
    automaton = TokenAutomaton.create(classes, table, multiple=8)
    engine = new_engine(slots=1)
    ids = [engine.submit([4], rng=n, controls=Controls(automaton=automaton)) for n in range(2)]
    by_id = results(engine, {id: id for id in ids})
    assert all(len(by_id[id].tokens) == 2 for id in ids)
    assert int(automaton.distances[3]) == 2


@pytest.mark.parametrize(
    'request_, message',
    [
        ({'prompt': []}, 'The prompt is empty'),
        ({'prompt': [99]}, "outside the model's vocabulary of 23"),
        ({'prompt': [1] * 24}, 'capacity of 24'),
        ({'prompt': [1] * 20, 'max_new_tokens': 5}, 'has 20 tokens, which with max_new_tokens=5'),
        ({'prompt': [1], 'max_new_tokens': 11}, r'max_new_tokens must lie in \[0, 10\], got 11'),
        ({'prompt': [1], 'mode': 'fast'}, "mode must be one of .*got 'fast'"),
        ({'prompt': [1], 'temperature': -1.0}, 'temperature'),
        ({'prompt': [1], 'temperature': 1.0, 'top_p': 0.0}, 'top_p'),
        ({'prompt': [1], 'top_p': 2.0}, r'top_p must lie in \(0, 1\], got 2.0'),
        ({'prompt': [1], 'stop': ['.']}, 'need an engine with a tokenizer'),
        ({'prompt': [1], 'stop': 'end'}, "must be a list of texts that are not empty, got 'end'"),
        ({'prompt': [1], 'stop': ['end', '']}, 'must be a list of texts that are not empty'),
        ({'prompt': [1], 'stop': [3]}, 'must be a list of texts that are not empty'),
        (
            {'prompt': [1], 'temperature': 1.0, 'controls': Controls(temperature=jnp.ones(1))},
            'or controls.temperature, not both',
        ),
    ],
)
def test_an_unfit_request_is_one_clear_error_and_leaves_nothing_behind(request_, message):
    engine = new_engine()
    with pytest.raises(ValueError, match=message):
        engine.submit(**request_)
    assert engine.waiting == 0


@pytest.mark.parametrize('field', ['slots', 'multiple', 'max_groups', 'prefill_together'])
def test_an_engine_of_no_slots_is_one_clear_error(field):
    with pytest.raises(ValueError, match=f'{field} must be >= 1, got 0'):
        new_engine(**{field: 0})
    with pytest.raises(ValueError, match=f'{field} must be >= 1, got 2.5; it is a whole number'):
        new_engine(**{field: 2.5})


TEXT = st.text(st.characters(codec='utf-8'), max_size=12) | st.sampled_from(['a😀b', 'né', '日本'])


@given(text=TEXT, cuts=st.lists(st.integers(0, 40)), junk=st.lists(st.binary(max_size=3)))
def test_parts_of_a_text_join_to_what_the_tokenizer_decodes(text, cuts, junk):
    ids = TOKENIZER.encode(text)
    byte_ids = {TOKENIZER.token_bytes(i): i for i in range(TOKENIZER.vocab_size)}
    for place, broken in enumerate(junk):  # bytes that are not valid UTF-8, and special tokens
        ids[place:place] = [byte_ids.get(bytes([b]), TOKENIZER.eos_id) for b in broken]
    stream, parts, before = TextStream(TOKENIZER), [], 0
    for cut in sorted({min(cut, len(ids)) for cut in cuts} | {len(ids)}):
        parts.append(stream.push(ids[before:cut]))
        before = cut
    assert ''.join([*parts, stream.finish()]) == TOKENIZER.decode(ids)
    if not junk:
        assert all('\ufffd' not in part for part in parts) or '\ufffd' in text


@given(
    text=st.text('ab. ', max_size=14),
    stop=st.lists(st.text('ab. ', min_size=1, max_size=3), max_size=2),
)
def test_a_text_ends_where_a_stop_text_begins_however_it_comes(text, stop):
    whole = TextStream(TOKENIZER, stop)
    ids = TOKENIZER.encode(text)
    expected = min([text.find(s) for s in stop if s in text], default=len(text))
    assert whole.push(ids) + whole.finish() == text[:expected]
    by_token = TextStream(TOKENIZER, stop[:1])
    joined = ''
    for token in ids:
        joined += by_token.push([token])
        assert not any(s in joined for s in stop[:1])
    joined += by_token.finish()
    assert joined == text.partition(stop[0])[0] if stop else joined == text
    assert by_token.stopped == any(s in text for s in stop[:1])


def shared_prompts():
    """Returns nine prompts; some share a prefix of 8 or of 13 tokens."""
    tokens = np.random.default_rng(5).integers(0, 22, (6, 16)).tolist()
    long, short = tokens[0][:13], tokens[0][:8]
    return [
        long + [1], long + [2, 3], short + [9], tokens[1], long + [1, 4], short + tokens[2][:5],
        [7], short, long + [2, 3, 5],
    ]  # fmt: skip


def answers_to(prompts, mode, **options):
    engine = new_engine(**options)
    submitted = {
        engine.submit(prompt, rng=n, mode=mode, temperature=0.7, max_new_tokens=7): n
        for n, prompt in enumerate(prompts)
    }
    return engine, results(engine, submitted)


@pytest.mark.parametrize('mode', MODES)
def test_what_prompts_begin_with_alike_is_encoded_once_and_changes_no_response(mode):
    prompts = shared_prompts()
    _, expected = answers_to(prompts, mode)
    engine, answers = answers_to(prompts, mode, prefixes=2, prefix_block=4)
    for n in range(len(prompts)):
        assert answers[n].tokens == expected[n].tokens and answers[n].passes == expected[n].passes
    whole = sum((len(prompt) - 1) // 4 * 4 for prompt in prompts)
    assert engine.prefixes.encoded + engine.prefixes.reused == whole
    # The fifth prompt reuses 12 tokens and the sixth 8. The eighth one then stores 4 tokens, which
    # removes the entry of 12, so the last one reuses 8.
    assert engine.prefixes.reused == 12 + 8 + 8


def test_of_too_many_beginnings_the_one_unused_for_longest_is_encoded_again():
    first, second = ([token] * 9 for token in (1, 2))
    engine = new_engine(prefixes=1, prefix_block=4)
    reused = []
    for prompt in (first, first, first, second, second, first, second):
        engine.submit(prompt, mode='autoregressive', max_new_tokens=1)
        list(engine.run())
        reused.append(engine.prefixes.reused)
    # A prefix is stored when it occurs for the second time, until another one replaces it.
    assert np.diff([0, *reused]).tolist() == [0, 0, 8, 0, 0, 0, 0]
    assert len(engine.prefixes._caches) == 1


def test_a_lookup_sees_what_a_kept_beginning_holds():
    """Drafts are copied from the whole prompt, so the number of passes does not change."""
    model, params = toy(C)
    config = dataclasses.replace(CONFIG, drafts=PromptLookup(length=3), stop_ids=())
    sampler, prompt = Sampler(model, config, 'lossless'), [5, 6, 7, 8] * 3 + [5]
    passes = []
    for options in ({}, {'prefixes': 1, 'prefix_block': 4}):
        engine = Engine(sampler, params, slots=1, capacity=24, multiple=8, **options)
        for _ in range(3):
            engine.submit(prompt)
        found = [e.result for e in engine.run() if isinstance(e, Finished)]
        passes.append([(result.tokens, result.passes) for result in found])
    assert passes[0] == passes[1]


def test_kept_beginnings_and_prompts_that_are_encoded_together_exclude_each_other():
    with pytest.raises(ValueError, match='prefixes=1 needs prompts that are encoded one by one'):
        new_engine(prefixes=1, prefill_together=2)


def new_conversation(engine, **options):
    model, params = toy(C)
    return ConversationCache(model, params, capacity=engine.capacity, multiple=8, **options)


@pytest.mark.parametrize('unseen', [0, 2])
@pytest.mark.parametrize('mode', MODES)
def test_a_prompt_goes_on_from_its_conversation_beside_others_and_changes_no_response(mode, unseen):
    """With `unseen`, each prompt ends in tokens that the next one does not contain."""
    engine = new_engine()
    caches = [new_conversation(engine, unseen=unseen) for _ in range(2)]
    texts = [[5, 9, 2], [7, 1]]
    for turn in range(3):
        settings = {'mode': mode, 'temperature': 0.7, 'max_new_tokens': 4}
        prompts = [[*text, *[4] * unseen] for text in texts]
        before = [
            (cache.encoded, cache.held(text)) for cache, text in zip(caches, texts, strict=True)
        ]
        ids = [
            engine.submit(prompt, rng=turn, conversation=cache, **settings)
            for prompt, cache in zip(prompts, caches, strict=True)
        ]
        engine.submit(**REQUESTS[turn])
        answers = results(engine, {id: n for n, id in enumerate(ids)})
        for n, prompt in enumerate(prompts):
            lone = new_engine()
            expected = results(lone, {lone.submit(prompt, rng=turn, **settings): 0})[0]
            assert answers[n].tokens == expected.tokens and answers[n].passes == expected.passes
            encoded, held = before[n]
            assert caches[n].encoded - encoded == len(prompt) - held
            whole = prompt + expected.tokens
            # The cache contains everything except for the last canvas or token.
            short = {'diffusion': C, 'autoregressive': 1, 'lossless': 0}[mode]
            assert caches[n].held(whole) >= len(whole) - short
            texts[n] = (prompt if not unseen else texts[n]) + expected.tokens + [8]
            assert caches[n].held(texts[n]) >= len(prompt) - unseen
            caches[n].forget_but(texts[n])
            assert len(caches[n]._caches) == 1


def test_a_cancelled_request_leaves_no_more_than_its_prompt_in_its_conversation():
    engine = new_engine()
    cache = new_conversation(engine)
    id = engine.submit([5, 9, 2], conversation=cache, mode='autoregressive')
    engine.step()
    assert engine.cancel(id) and cache.held([5, 9, 2]) == 3 and len(cache._caches) == 1
    cache.forget_but([])
    assert cache.held([5, 9, 2]) == 0 and not cache._caches


def test_a_conversation_that_the_engine_cannot_go_on_from_is_one_clear_error():
    engine = new_engine()
    other = ConversationCache(*toy(C), capacity=12)
    with pytest.raises(ValueError, match='has room for 12 tokens and the engine for 24'):
        engine.submit([1], conversation=other)
    together = new_engine(prefill_together=2)
    with pytest.raises(ValueError, match='encoded one by one; make the engine without'):
        together.submit([1], conversation=new_conversation(engine))
    assert engine.waiting == together.waiting == 0
