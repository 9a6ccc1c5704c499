"""Tests the server with OpenAI's client, invalid bodies, many clients, broken connections."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.evaluation.scoring import response_log_probs
from diffusiongemma.models import for_inference
from diffusiongemma.sampling import Sampler, SamplingConfig, generate_text
from diffusiongemma.sampling.engine import Engine
from diffusiongemma.serving.prompts import conversation_tokens
from diffusiongemma.serving.service import Service, Settings

_NEEDS = {'reason': "needs pip install -e '.[test]'"}
httpx = pytest.importorskip('httpx', **_NEEDS)
openai = pytest.importorskip('openai', **_NEEDS)
server = pytest.importorskip('diffusiongemma.serving.server', **_NEEDS)

ROOT = Path(__file__).parents[1]
PAUL = 'Paul is 17 years old. Omar is 4 years older than Paul. How old is Omar?'
QUESTIONS = (PAUL, 'Mia has 12 apples. She buys 3 more. How many apples does Mia have now?')
MODES = ('lossless', 'diffusion', 'autoregressive')
CHAT, COMPLETIONS = '/v1/chat/completions', '/v1/completions'


@pytest.fixture(scope='module')
def builtin():
    model, params, tokenizer = load_model('builtin')
    return *for_inference(model, params), tokenizer


@pytest.fixture(scope='module')
def service(builtin):
    model, params, tokenizer = builtin
    config = SamplingConfig.for_tokenizer(tokenizer, max_new_tokens=64, max_denoising_steps=4)
    engine = Engine(Sampler(model, config, 'lossless'), params, tokenizer, slots=4)
    service = Service(engine, params, tokenizer, Settings('builtin', max_body_bytes=20_000))
    yield service
    service.worker.stop()


@pytest.fixture(scope='module')
def url(service):
    sock = server.listen('127.0.0.1', 0)
    port = sock.getsockname()[1]
    running = server.Server(service)
    thread = threading.Thread(target=running.run, kwargs={'sockets': [sock]})
    thread.start()
    yield f'http://127.0.0.1:{port}'
    running.end()
    thread.join()


@pytest.fixture(scope='module')
def client(url):
    return openai.OpenAI(base_url=f'{url}/v1', api_key='any', max_retries=0, timeout=600)


@pytest.fixture(scope='module')
def http(url):
    with httpx.Client(base_url=url, timeout=600) as session:
        yield session


def user(text):
    return [{'role': 'user', 'content': text}]


def answer_to(url, request):
    """Returns the body of the answer to a chat request without its id and time."""
    body = {'model': 'builtin'} | request
    response = httpx.post(url + CHAT, json=body, timeout=600)
    assert response.status_code == 200, response.text
    return {k: v for k, v in response.json().items() if k not in ('id', 'created')}


def until(condition):
    """Waits until the condition holds; the only time limit is that of the test run."""
    while not condition():
        time.sleep(0.02)


def test_a_chat_answer_is_what_the_sampler_writes(client, builtin):
    model, params, tokenizer = builtin
    answer = client.chat.completions.create(model='builtin', messages=user(PAUL), seed=5)
    config = SamplingConfig.for_tokenizer(tokenizer, max_new_tokens=64, temperature=0.0)
    sampler = Sampler(model, config, 'autoregressive')
    key = jax.random.key(5)[None]
    (text,), output = generate_text(sampler, params, tokenizer, [PAUL], rng=key)
    assert answer.choices[0].message.content == text and 'The answer is 21.' in text
    assert answer.choices[0].finish_reason == 'stop' and answer.model == 'builtin'
    assert answer.usage.completion_tokens == int(output.lengths[0])
    assert answer.usage.prompt_tokens == len(tokenizer.format_prompt(PAUL))
    assert answer.diffusiongemma['seed'] == 5 and answer.diffusiongemma['accepted_length'] > 2


def test_a_stream_joins_to_the_answer_and_ends_with_its_cost(client):
    request = {'model': 'builtin', 'messages': user(PAUL), 'seed': 5, 'max_tokens': 60}
    request |= {'extra_body': {'mode': 'autoregressive'}}  # other modes only need 1 or 2 canvases
    whole = client.chat.completions.create(**request)
    parts = list(
        client.chat.completions.create(
            **request, stream=True, stream_options={'include_usage': True}
        )
    )
    texts = [part.choices[0].delta.content or '' for part in parts if part.choices]
    assert ''.join(texts) == whole.choices[0].message.content and len([t for t in texts if t]) > 2
    assert parts[0].choices[0].delta.role == 'assistant'
    assert parts[-2].choices[0].finish_reason == 'stop'
    assert parts[-1].usage == whole.usage and not parts[-1].choices


def test_a_completion_continues_text_up_to_a_stop_text_or_its_limit(client, builtin):
    _, _, tokenizer = builtin
    prompt = tokenizer.format_prompt(PAUL)
    request = {'model': 'builtin', 'prompt': prompt, 'seed': 0, 'temperature': 0}
    whole = client.completions.create(**request)
    cut = client.completions.create(**request, stop=[' is'])
    assert cut.choices[0].text == whole.choices[0].text.partition(' is')[0]
    assert cut.choices[0].finish_reason == 'stop'
    short = client.completions.create(**request, max_tokens=3)
    assert short.choices[0].finish_reason == 'length' and short.usage.completion_tokens == 3
    assert whole.choices[0].text.startswith(short.choices[0].text)
    streamed = client.completions.create(**request, stop=[' is'], stream=True)
    assert ''.join(p.choices[0].text for p in streamed if p.choices) == cut.choices[0].text


def test_lossless_text_is_autoregressive_text_of_the_same_seed(url):
    request = {'messages': user(PAUL), 'temperature': 5.0, 'max_tokens': 16}
    texts = {
        (mode, seed): answer_to(url, request | {'mode': mode, 'seed': seed})['choices']
        for mode in ('lossless', 'autoregressive')
        for seed in (1, 2)
    }
    for seed in (1, 2):
        assert texts['lossless', seed] == texts['autoregressive', seed]
    assert texts['lossless', 1] != texts['lossless', 2]


@pytest.mark.slow  # compiles another program
def test_a_narrow_top_p_gives_the_greedy_text(url):
    request = {'messages': user(PAUL), 'seed': 1, 'max_tokens': 40, 'mode': 'autoregressive'}
    narrow = answer_to(url, request | {'temperature': 1.0, 'top_p': 1e-6})
    assert narrow['choices'] == answer_to(url, request | {'temperature': 0})['choices']


@pytest.mark.parametrize(
    'mode', [pytest.param('lossless', marks=pytest.mark.slow), 'autoregressive']
)
def test_log_probabilities_are_those_of_the_tokens_of_the_answer(client, builtin, mode):
    model, params, tokenizer = builtin
    request = {'model': 'builtin', 'messages': user(PAUL), 'seed': 5, 'max_tokens': 60}
    request |= {'extra_body': {'mode': mode}, 'logprobs': True, 'top_logprobs': 2}
    choice = client.chat.completions.create(**request).choices[0]
    entries = choice.logprobs.content
    assert b''.join(bytes(entry.bytes) for entry in entries).decode() == choice.message.content
    assert all(entry.top_logprobs[0].token == entry.token for entry in entries)  # greedy
    assert all(entry.top_logprobs[0].logprob == entry.logprob for entry in entries)
    assert all(len(entry.top_logprobs) == 2 for entry in entries)
    prompt = tokenizer.format_prompt(PAUL)
    answer = tokenizer.encode(choice.message.content)
    (expected,) = response_log_probs(model, params, [prompt], [answer], batch_size=1)
    np.testing.assert_allclose([entry.logprob for entry in entries], expected, atol=2e-4)
    streamed = client.chat.completions.create(**request, stream=True)
    parts = [part.choices[0].logprobs for part in streamed if part.choices]
    assert [entry for part in parts if part for entry in part.content] == entries


@pytest.mark.slow
def test_log_probabilities_of_a_completion_end_where_a_stop_text_begins(client, builtin):
    _, _, tokenizer = builtin
    request = {'model': 'builtin', 'prompt': tokenizer.format_prompt(PAUL), 'seed': 0}
    request |= {'logprobs': 3, 'stop': [' is']}
    choice = client.completions.create(**request).choices[0]
    told = choice.logprobs
    assert ''.join(told.tokens) == choice.text and told.text_offset[0] == 0
    starts = [choice.text[place:] for place in told.text_offset]
    assert all(map(str.startswith, starts, told.tokens))
    assert len(told.token_logprobs) == len(told.tokens) == len(told.top_logprobs)
    assert all(len(top) == 3 and max(top.values()) <= 0 for top in told.top_logprobs)
    parts = [p.choices[0].logprobs for p in client.completions.create(**request, stream=True)]
    assert [token for part in parts if part for token in part.tokens] == told.tokens
    bare = client.completions.create(**request | {'logprobs': 0}).choices[0].logprobs
    assert bare.tokens == told.tokens and bare.top_logprobs is None
    assert client.completions.create(**request | {'logprobs': None}).choices[0].logprobs is None


def test_a_response_format_makes_json_of_the_schema(client):
    schema = {
        'type': 'object',
        'properties': {'age': {'type': 'integer', 'minimum': 0, 'maximum': 99}},
        'required': ['age'],
        'additionalProperties': False,
    }
    answer = client.chat.completions.create(
        model='builtin',
        messages=user(PAUL),
        seed=0,
        response_format={'type': 'json_schema', 'json_schema': {'name': 'a', 'schema': schema}},
    )
    value = json.loads(answer.choices[0].message.content)
    assert set(value) == {'age'} and 0 <= value['age'] <= 99


@pytest.mark.slow  # compiles another program
def test_a_suffix_is_kept_and_what_comes_before_it_is_filled_in(client, builtin):
    _, _, tokenizer = builtin
    prompt, suffix = tokenizer.format_prompt(PAUL), ' The answer is 21.'
    request = {'model': 'builtin', 'prompt': prompt, 'suffix': suffix, 'seed': 0}
    filled = client.completions.create(**request, max_tokens=9, extra_body={'mode': 'diffusion'})
    choice = filled.choices[0]
    assert choice.text and suffix not in choice.text and choice.finish_reason == 'stop'
    assert filled.usage.completion_tokens == 9
    with pytest.raises(openai.BadRequestError, match="suffix needs mode='diffusion'"):
        client.completions.create(**request)
    with pytest.raises(openai.BadRequestError, match=r'max_tokens must lie in \[1, '):
        client.completions.create(**request, max_tokens=40, extra_body={'mode': 'diffusion'})


def test_a_decision_gives_each_answer_a_probability(http):
    body = {
        'messages': user(PAUL), 'answers': ['20', '21'], 'before': 'Omar is ', 'after': '.',
    }  # fmt: skip
    answers = http.post('/v1/decisions', json=body).json()['answers']
    assert [answer['text'] for answer in answers] == ['20', '21']
    assert sum(answer['probability'] for answer in answers) == pytest.approx(1)
    response = http.post('/v1/decisions', json=body | {'answers': ['x' * 200]})
    assert response.status_code == 400 and 'a canvas has 32' in response.json()['error']['message']
    response = http.post('/v1/decisions', json=body | {'answers': ['20', '20']})
    assert response.status_code == 400 and 'must differ' in response.json()['error']['message']


def test_the_model_says_what_it_can(client, http):
    (model,) = client.models.list().data
    assert model.id == 'builtin' and sorted(model.modes) == sorted(MODES)
    assert client.models.retrieve('builtin') == model
    with pytest.raises(openai.NotFoundError, match="no model 'gpt' here, only 'builtin'"):
        client.chat.completions.create(model='gpt', messages=user(PAUL))
    assert http.get('/health').json() == {'status': 'ok'}


def test_a_conversation_is_written_turn_by_turn():
    tokenizer = Tokenizer.load()
    ids = conversation_tokens(tokenizer, ['One', 'Two', 'Three'], 'Four')
    written = ''.join(
        tokenizer.piece(i) if i in tokenizer.special_ids else tokenizer.decode([i]) for i in ids
    )
    assert written == (
        '<bos><|turn>system\nFour<turn|>\n<|turn>user\nOne<turn|>\n<|turn>model\nTwo<turn|>\n'
        '<|turn>user\nThree<turn|>\n<|turn>model\n'
    )
    assert conversation_tokens(tokenizer, ['One'], None) == tokenizer.format_prompt('One')


BAD_CHATS = {
    'prompt': ({'prompt': 'x'}, 'prompt is not known here'),
    'no messages': ({'messages': []}, 'messages must hold at least one message'),
    'null messages': ({'messages': None}, 'messages must hold at least one message'),
    'messages of text': ({'messages': 'hi'}, 'messages must be an array, got a string'),
    'a message of text': ({'messages': ['hi']}, r'messages\[0\] must be an object'),
    'a role': ({'messages': [{'role': 'cat', 'content': ''}]}, r'messages\[0\].role must be'),
    'no content': ({'messages': [{'role': 'user'}]}, r'messages\[0\].content must be text'),
    'a picture': (
        {'messages': [{'role': 'user', 'content': [{'type': 'image_url', 'image_url': 'x'}]}]},
        r'messages\[0\].content must be text',
    ),
    'two users': ({'messages': user('a') * 2}, 'user and assistant in turns'),
    'half a surrogate': ({'messages': user('\ud800')}, 'not valid Unicode'),
    'a message field': ({'messages': [{'role': 'user', 'content': '', 'x': 1}]}, r'\[0\].x is not'),
    'temperature': ({'temperature': -1}, r'temperature must lie in \[0, 100\], got -1'),
    'temperature type': ({'temperature': '1'}, 'temperature must be a number, got a string'),
    'temperature flag': ({'temperature': True}, 'temperature must be a number, got a boolean'),
    'top_p': ({'top_p': 0}, r'top_p must lie in \(0, 1\], got 0'),
    'seed': ({'seed': -1}, 'seed must lie in'),
    'large seed': ({'seed': 10**400}, 'seed must lie in'),
    'seed type': ({'seed': 1.5}, 'seed must be an integer, got a number'),
    'max_tokens': ({'max_tokens': 0}, r'max_tokens must lie in \[1, 64\], got 0'),
    'large max_tokens': ({'max_completion_tokens': 65}, r'must lie in \[1, 64\], got 65'),
    'stop': ({'stop': ['']}, 'stop must be a text or at most 4 texts'),
    'stops': ({'stop': ['a'] * 5}, 'stop must be a text or at most 4 texts'),
    'mode': ({'mode': 'fast'}, "mode must be one of .*got 'fast'"),
    'stream': ({'stream': 'yes'}, 'stream must be true or false'),
    'stream_options': ({'stream_options': {}}, 'stream_options needs stream=true'),
    'logprobs': ({'logprobs': True, 'mode': 'diffusion'}, 'logprobs come from a causal pass'),
    'logprobs type': ({'logprobs': 2}, 'logprobs must be true or false, got a number'),
    'top_logprobs': ({'top_logprobs': 2}, 'top_logprobs needs logprobs=true'),
    'large top_logprobs': ({'logprobs': True, 'top_logprobs': 21}, r'must lie in \[0, 20\]'),
    'n': ({'n': 2}, 'n is not supported'),
    'tools': ({'tools': [{'type': 'function'}]}, 'tools is not supported'),
    'penalty': ({'presence_penalty': 0.5}, 'presence_penalty is not supported'),
    'suffix': ({'suffix': 'x'}, 'suffix is not known here'),
    'format': ({'response_format': {'type': 'xml'}}, 'response_format.type must be'),
    'no schema': ({'response_format': {'type': 'json_schema'}}, 'schema is missing'),
    'a schema': (
        {'response_format': {'type': 'json_schema', 'json_schema': {'schema': {'type': 'x'}}}},
        "'x'|\"x\"",
    ),
    'an empty message': ({'messages': user(' ')}, 'the last message is empty'),
    'too long': ({'messages': user('apple ' * 300)}, 'capacity of 256'),
}  # fmt: skip


@pytest.mark.parametrize('name', BAD_CHATS)
def test_a_chat_request_that_is_wrong_is_one_clear_400(http, name):
    changes, message = BAD_CHATS[name]
    body = json.dumps({'model': 'builtin', 'messages': user(PAUL)} | changes)
    response = http.post(CHAT, content=body, headers={'content-type': 'application/json'})
    error = response.json()['error']
    assert response.status_code == 400 and re.search(message, error['message']), response.text
    assert '\n' not in error['message'] and error['type'] == 'invalid_request_error'


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'prompt': None}, 'prompt must be one text or one array'),
        ({'prompt': []}, 'prompt must be one text or one array'),
        ({'prompt': ''}, 'prompt is empty; give a text to continue, or a suffix'),
        ({'prompt': ['']}, 'prompt is empty; give a text to continue, or a suffix'),
        ({'prompt': ['a', 'b']}, 'send one request per prompt'),
        ({'prompt': [1024]}, 'token id 1024, outside of the vocabulary of 1024'),
        ({'prompt': [True]}, 'prompt must be one text or one array'),
        ({'messages': []}, 'messages is not known here'),
        (
            {'suffix': 'x' * 300, 'mode': 'diffusion'},
            'it and the answer must fit into 32 tokens; shorten it',
        ),
        ({'suffix': 'x', 'mode': 'diffusion', 'stop': 'a'}, 'suffix cannot be combined with stop'),
        ({'echo': True}, 'echo is not supported'),
        ({'logprobs': True}, 'logprobs must be an integer, got a boolean'),
    ],
)
def test_a_completion_request_that_is_wrong_is_one_clear_400(http, changes, message):
    response = http.post(COMPLETIONS, json={'model': 'builtin', 'prompt': 'x'} | changes)
    assert response.status_code == 400
    assert message in response.json()['error']['message']


def test_half_a_surrogate_in_a_suffix_is_one_clear_400(http):
    body = json.dumps({'prompt': 'x', 'suffix': '\ud800', 'mode': 'diffusion'})
    response = http.post(COMPLETIONS, content=body, headers={'content-type': 'application/json'})
    message = response.json()['error']['message']
    assert response.status_code == 400 and message.startswith('suffix: ')


@pytest.mark.parametrize(
    'content, kind, status, message',
    [
        (b'{"prompt": ', 'application/json', 400, 'not valid JSON'),
        (b'\xff\xfe{}', 'application/json', 400, 'not valid JSON'),
        (b'{"prompt": NaN}', 'application/json', 400, 'NaN is not JSON'),
        (b'[1]', 'application/json', 400, 'must be a JSON object, got an array'),
        (b'', 'application/json', 400, 'not valid JSON'),
        (b'[' * 15_000, 'application/json', 400, 'nested too deeply|not valid JSON'),
        (b'{"prompt": "' + b'x' * 30_000 + b'"}', 'application/json', 413, 'longer than 20000'),
        (b'{"prompt": "x"}', 'text/plain', 415, "send 'Content-Type: application/json'"),
    ],
)
def test_a_body_that_is_wrong_is_one_clear_error(http, content, kind, status, message):
    response = http.post(COMPLETIONS, content=content, headers={'content-type': kind})
    assert response.status_code == status
    assert re.search(message, response.json()['error']['message'])


def test_a_long_body_of_unknown_length_is_refused_too(http):
    def chunks():
        for _ in range(50):
            yield b' ' * 1000

    headers = {'content-type': 'application/json'}
    response = http.post(COMPLETIONS, content=chunks(), headers=headers)
    assert response.status_code == 413


def test_paths_and_methods_that_do_not_exist_are_one_clear_error(http):
    assert http.get('/v1/embeddings').json()['error']['message'] == 'GET /v1/embeddings: Not Found.'
    response = http.get(CHAT)
    assert response.status_code == 405 and 'Method Not Allowed' in response.text


def test_an_api_key_is_asked_for(http, service, monkeypatch):
    monkeypatch.setattr(service, 'settings', dataclasses.replace(service.settings, api_key='é1'))
    for headers in ({}, {'authorization': 'Bearer 1'}, {'authorization': 'Basic é1'.encode()}):
        assert http.get('/v1/models', headers=headers).status_code == 401
        assert http.get('/metrics', headers=headers).status_code == 401
    headers = {'authorization': 'Bearer é1'.encode('latin-1')}
    assert http.get('/v1/models', headers=headers).status_code == 200
    assert http.get('/health').status_code == 200


def test_more_requests_than_may_wait_are_refused_until_some_are_answered(http, service):
    service.open_calls += 4 + service.settings.max_queue
    try:
        for path, body in ((CHAT, {'messages': user('x')}), (COMPLETIONS, {'prompt': 'x'})):
            response = http.post(path, json=body)
            assert response.status_code == 429 and response.headers['retry-after'] == '1'
            assert 'may wait for a slot' in response.json()['error']['message']
    finally:
        service.open_calls -= 4 + service.settings.max_queue


def test_a_server_that_ends_refuses_what_is_new(http, service, monkeypatch):
    monkeypatch.setattr(service, 'draining', True)
    response = http.post(CHAT, json={'messages': user('x')})
    assert response.status_code == 503 and 'shutting down' in response.text
    assert http.get('/health').status_code == 503


def test_a_broken_connection_cancels_its_request(url, http, service):
    body = {'messages': user(PAUL), 'mode': 'autoregressive', 'seed': 0}
    answer_to(url, body)  # compiles
    # Its passes are causal ones.
    totals = metrics(http)
    assert totals['denoise_passes_total{mode="autoregressive"}'] == 0
    assert totals['causal_passes_total{mode="autoregressive"}'] > 0
    answered = totals['answers_total{mode="autoregressive",reason="stop"}']
    for path, changes in (
        (CHAT, {'stream': True}), (CHAT, {'stream': False}), ('/v1/frames', {'mode': 'lossless'}),
    ):  # fmt: skip
        gate = threading.Event()
        service.worker.call(lambda gate=gate: gate.wait(60))  # delays all steps
        with httpx.Client(base_url=url) as leaving:
            with pytest.raises(httpx.ReadTimeout):
                timeout = httpx.Timeout(600, read=0.3)
                leaving.post(path, json=body | changes, timeout=timeout)
        gate.set()
        until(lambda: service.open_calls == 0)
        service.worker.call(lambda: None).result()
        assert service.worker.engine.running == service.worker.engine.waiting == 0
    assert metrics(http)['answers_total{mode="autoregressive",reason="stop"}'] == answered


def frames_of(lines):
    """Returns the frames of a live view from the lines of its stream."""
    events = [line.removeprefix('data: ') for line in lines if line]
    assert events.pop() == '[DONE]'
    return [json.loads(event) for event in events]


def test_a_live_view_goes_on_beside_other_requests_and_shows_its_own_answer(url, http, service):
    request = {'messages': user(PAUL), 'seed': 4, 'mode': 'lossless', 'temperature': 1.0}
    alone = answer_to(url, request)['choices'][0]['message']['content']
    other = answer_to(url, request | {'seed': 5})
    with http.stream('POST', '/v1/frames', json=request) as view:
        lines = view.iter_lines()
        first = next(lines)
        with ThreadPoolExecutor(2) as pool:
            others = pool.map(lambda _: answer_to(url, request | {'seed': 5}), range(2))
            shown = frames_of([first, *lines])
            assert list(others) == [other] * 2
    assert {state for frame in shown for _, state, _ in frame['cells']} >= {'noise', 'open'}
    text = ''.join(text for text, _, _ in shown[-1]['cells'])
    assert text.rstrip('·') == alone and shown[-1]['caption'].startswith('canvas ')
    assert service.worker.engine.running == service.worker.engine.waiting == 0


def test_a_live_view_is_cancelled_in_the_midst_of_a_canvas(url, http, service, monkeypatch):
    gate, engine = threading.Event(), service.worker.engine
    step, all_events = engine.step, []

    def delayed_step():
        if all_events:
            gate.wait(60)  # until the client has disconnected
        events = step()
        all_events.extend(events)
        return events

    monkeypatch.setattr(engine, 'step', delayed_step)
    answers = 'answers_total{mode="lossless",reason="stop"}'
    answered = metrics(http).get(answers, 0)
    body = {'messages': user(PAUL), 'mode': 'lossless', 'seed': 0}
    with httpx.Client(base_url=url, timeout=600) as leaving:
        with leaving.stream('POST', '/v1/frames', json=body) as view:
            assert next(view.iter_lines()).startswith('data: {"cells"')
    until(lambda: service.open_calls == 0)
    gate.set()
    service.worker.call(lambda: None).result()
    assert engine.running == engine.waiting == 0
    assert metrics(http).get(answers, 0) == answered and len(all_events) < 4


def metrics(http):
    """Returns the samples of /metrics by name, without the prefix of the names."""
    response = http.get('/metrics')
    assert response.headers['content-type'].startswith('text/plain; version=0.0.4')
    lines = [line for line in response.text.splitlines() if not line.startswith('#')]
    for line in lines:
        assert re.fullmatch(r'diffusiongemma_\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? [0-9.e+-]+', line)
    pairs = (line.removeprefix('diffusiongemma_').rsplit(' ', 1) for line in lines)
    return {name: float(value) for name, value in pairs}


def test_metrics_count_tokens_passes_and_accepted_lengths(url, http):
    before = metrics(http)
    answer = answer_to(url, {'messages': user(PAUL), 'seed': 3})
    after = metrics(http)

    def gained(name):
        return after[name] - before.get(name, 0)

    costs = answer['diffusiongemma']
    tokens = answer['usage']['completion_tokens']
    assert gained('tokens_total{mode="lossless"}') == tokens
    assert gained('prompt_tokens_total') == answer['usage']['prompt_tokens']
    assert gained('denoise_passes_total{mode="lossless"}') == costs['denoise_passes']
    verifications = gained('causal_passes_total{mode="lossless"}')
    assert gained('accepted_length_count') == costs['causal_passes'] == verifications
    assert gained('accepted_length_sum') == tokens
    assert after['accepted_length_bucket{le="+Inf"}'] == after['accepted_length_count']
    assert gained('requests_total{endpoint="chat",status="200"}') == 1
    assert after['requests_running'] == 0 and after['slots'] == 4 and after['tokens_per_second'] > 0


def clients(url, count, each):
    """Checks that many concurrent clients get the answers of single requests."""
    requests = [
        {
            'messages': user(question), 'mode': mode, 'seed': seed, 'temperature': temperature,
            'max_tokens': 8 + 2 * seed,
        }
        for seed, (question, (mode, temperature)) in enumerate(
            (question, kind)
            for question in QUESTIONS
            for kind in (('lossless', 0), ('lossless', 1.0), ('autoregressive', 1.0))
        )
    ]  # fmt: skip
    alone = [answer_to(url, request) for request in requests]

    def ask(place):
        number = place % len(requests)
        return number, answer_to(url, requests[number])

    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(ask, range(count * each)))
    assert len(answers) == count * each
    for number, answer in answers:
        assert answer == alone[number]


def test_eight_clients_get_the_answers_of_requests_alone(url):
    clients(url, 8, 2)


@pytest.mark.slow
def test_thirty_two_clients_get_the_answers_of_requests_alone(url):
    clients(url, 32, 20)


def test_the_page_needs_nothing_from_elsewhere(http):
    page = http.get('/').text
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and '://' not in page
    assert '@' not in page and all(f'>{mode}</option>' in page for mode in MODES)


# A minimal browser for the script of the page: elements, and a server with one answer in two parts.
BROWSER = """
const element = () => ({style: {}, kids: [], replaceChildren(...kids) { this.kids = kids; }});
const page = {mode: {value: 'lossless'}, temperature: {value: '0'}, seed: {value: '1'},
  key: {value: 'k'}, prompt: {value: 'hi'}, colors: {value: 'runs'}};
for (const id of ['form', 'text', 'caption', 'go']) page[id] = element();
globalThis.document = {getElementById: (id) => page[id], createElement: element};
globalThis.location = {search: ''};
let request;
globalThis.fetch = async (url, options) => {
  request = {url, key: options.headers.Authorization, body: JSON.parse(options.body)};
  const bytes = new TextEncoder().encode(EVENTS);
  return new Response(new ReadableStream({start(stream) {
    stream.enqueue(bytes.slice(0, 50));
    stream.enqueue(bytes.slice(50));
    stream.close();
  }}));
};
SCRIPT
page.form.onsubmit({preventDefault() {}}).then(() => console.log(JSON.stringify({request,
  caption: page.caption.textContent, cells: page.text.kids.map((kid) => kid.style.color)})));
"""


def test_the_script_of_the_page_draws_the_frames_of_a_stream(http):
    node = shutil.which('node')
    if node is None:
        pytest.skip('needs node, to run the script without a browser')
    script = re.search('<script>(.*)</script>', http.get('/').text, re.DOTALL)[1]
    runs = [['a'], ['a', 'b', 'c']]
    frames = [
        {'cells': [[t, 'settled', '#fff'] for t in run], 'caption': f'{len(run)}', 'rate': 'fast'}
        for run in runs
    ]
    events = ''.join(f'data: {json.dumps(frame)}\n\n' for frame in frames) + 'data: [DONE]\n\n'
    program = BROWSER.replace('EVENTS', json.dumps(events)).replace('SCRIPT', script)
    done = subprocess.run([node, '-e', program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    drawn = json.loads(done.stdout)
    assert drawn['caption'] == '3, fast'
    assert drawn['cells'] == ['#79c0ff', '#d2a8ff', '#d2a8ff']  # a color for each accepted run
    body = {'messages': user('hi'), 'mode': 'lossless', 'temperature': 0, 'seed': 1}
    assert drawn['request'] == {'url': 'v1/frames', 'key': 'Bearer k', 'body': body}


@pytest.fixture(scope='module')
def browser():
    """Yields a headless Chromium."""
    playwright = pytest.importorskip('playwright.sync_api', reason='needs pip install playwright')
    program = shutil.which('chromium') or shutil.which('google-chrome')
    if program is None:
        pytest.skip('needs Chromium, such as from apt-get install chromium')
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=program, args=['--no-sandbox'])


@pytest.fixture
def tab(browser, url):
    """Yields a tab with the page; the test fails if the script of the page raises an error."""
    tab = browser.new_page()
    tab.set_default_timeout(300_000)  # the first answer of a mode waits for the compilation
    errors: list = []
    tab.on('pageerror', lambda error: errors.append(error))
    tab.goto(url)
    yield tab
    tab.close()
    assert not errors


def answer_in(tab):
    tab.wait_for_selector('#text span')
    tab.wait_for_function("document.getElementById('go').textContent === 'run'")
    return tab.inner_text('#text')


def colors_in(tab):
    script = 'spans => [...new Set(spans.map((span) => span.style.color))]'
    return tab.eval_on_selector_all('#text span.settled', script)


def test_a_browser_shows_the_answer_of_the_api(tab, client):
    for mode in ('lossless', 'diffusion'):
        tab.fill('#prompt', PAUL)
        tab.select_option('#mode', mode)
        tab.click('#go')
        more = {'seed': 0, 'temperature': 0, 'extra_body': {'mode': mode}}
        answer = client.chat.completions.create(model='builtin', messages=user(PAUL), **more)
        assert answer_in(tab) == answer.choices[0].message.content
        assert tab.inner_text('#caption').startswith('canvas ')
        by_entropy = colors_in(tab)
        tab.select_option('#colors', 'runs')
        assert colors_in(tab) != by_entropy
        tab.select_option('#colors', 'entropy')
        assert colors_in(tab) == by_entropy


def test_a_link_asks_and_what_is_wrong_is_said_in_red(tab, url):
    tab.goto(f'{url}/?mode=lossless&prompt={QUESTIONS[1].replace(" ", "+")}')
    assert 'The answer is' in answer_in(tab)
    assert tab.input_value('#prompt') == QUESTIONS[1]
    tab.goto(f'{url}/?prompt=Hi&mode=foo&temperature=9&promt=x')
    error = tab.wait_for_selector('#caption.error').inner_text()
    assert error.endswith('mode=foo, temperature=9, promt=x')
    assert tab.input_value('#mode') in MODES
    tab.set_default_timeout(30_000)
    tab.fill('#prompt', 'x' * 30_000)
    tab.click('#go')
    assert '20000 bytes' in tab.wait_for_selector('#caption.error').inner_text().replace(',', '')


@pytest.mark.slow
def test_frames_show_token_after_token_where_there_is_no_canvas(http):
    body = {'messages': user(PAUL), 'seed': 0, 'mode': 'autoregressive', 'max_tokens': 3}
    frames = frames_of(http.post('/v1/frames', json=body).text.split('\n'))
    assert [len(frame['cells']) for frame in frames] == [1, 2, 3]
    assert frames[-1]['caption'] == '3 tokens, 3 passes'


def test_the_examples_of_the_page_on_serving_run(url, builtin):
    blocks = re.findall(
        r'```(\w+)\n(.*?)```', (ROOT / 'docs' / 'serving.md').read_text(), re.DOTALL
    )
    (_, start), (python, client), (bash, curl), (_, measures) = blocks
    assert 'benchmarks/serving.py' in measures  # slow; another test runs it
    assert (python, bash) == ('python', 'bash') and start.count('\n') == 2
    shown = [([sys.executable, '-c'], client)]
    if shutil.which('curl'):  # not installed on every machine
        shown.append((['bash', '-c'], curl))
    for command, block in shown:
        text = block.replace('http://127.0.0.1:8000', url)
        done = subprocess.run([*command, text], capture_output=True, text=True)
        assert done.returncode == 0 and '21' in done.stdout, done.stderr + done.stdout


@pytest.mark.slow
def test_frames_show_the_steps_of_a_canvas(http):
    body = {'messages': user(PAUL), 'seed': 0, 'mode': 'diffusion'}
    frames = frames_of(http.post('/v1/frames', json=body).text.split('\n'))
    assert {state for frame in frames for _, state, _ in frame['cells']} >= {'noise', 'open'}
    assert 'The answer is' in ''.join(text for text, _, _ in frames[-1]['cells'])
    response = http.post('/v1/frames', json=body | {'messages': user('apple ' * 300)})
    assert response.status_code == 400 and 'capacity of 256' in response.text


@pytest.mark.slow
@pytest.mark.parametrize('grace', [60, 0])
def test_sigterm_under_load_finishes_or_refuses_every_request(grace):
    process = subprocess.Popen(
        [
            sys.executable, '-m', 'diffusiongemma.serve', '--port=0', '--slots=2',
            '--max_denoising_steps=4', '--mode=lossless', f'--grace_seconds={grace}',
        ],
        cwd=ROOT, env=os.environ | {'XLA_FLAGS': ''}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    url = process.stdout.readline().split()[-1]
    request = {'messages': user(PAUL), 'seed': 1}
    expected = answer_to(url, request)
    begun = threading.Semaphore(0)

    def ask(number):
        answered = 0
        while True:
            begun.release()
            try:
                body = {'model': 'builtin'} | request
                response = httpx.post(url + CHAT, json=body, timeout=600)
            except httpx.ConnectError:
                return answered, 'closed'
            if response.status_code != 200:
                return answered, response.status_code
            assert response.json()['choices'] == expected['choices']
            answered += 1

    with ThreadPoolExecutor(6) as pool:
        outcomes = pool.map(ask, range(6))
        for _ in range(12):
            begun.acquire()
        process.send_signal(signal.SIGTERM)
        outcomes = list(outcomes)
    assert {end for _, end in outcomes} <= {503, 'closed'}
    assert sum(answered for answered, _ in outcomes) >= 6
    assert process.wait() == 0


@pytest.mark.slow
def test_a_server_under_load_answers_each_request_as_if_it_were_alone():
    """The load includes malformed bodies and clients that disconnect; it ends with SIGTERM."""
    command = [sys.executable, 'benchmarks/serving.py', '--clients=32', '--requests=20']
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {'XLA_FLAGS': ''}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_serve_cannot_do_is_one_line():
    with server.listen('127.0.0.1', 0) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, '-m', 'diffusiongemma.serve', f'--port={port}'],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ''
    assert f'Cannot listen on 127.0.0.1:{port}' in done.stderr.splitlines()[-1]
