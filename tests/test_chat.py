"""Tests that conversations with a kept cache equal conversations that are encoded every turn."""

import jax
import numpy as np
import pytest
import test_tokenizer
from test_light import light_student
from test_model import random_params

from diffusiongemma.data.tokenizer import THINK_PIECES, Tokenizer
from diffusiongemma.models import DiffusionGemma
from diffusiongemma.sampling import Sampler, SamplingConfig, pad_prompts
from diffusiongemma.sampling.chat import ChatSampler

KEY = jax.random.key(0)
TURNS = ['Mia has 3 apples.', 'Why?', 'And then, what did she do with all of them after that?']
EVERY_MODE = pytest.mark.parametrize('mode', ['diffusion', 'autoregressive', 'lossless'])


@pytest.fixture(scope='module')
def tokenizer():
    return Tokenizer(test_tokenizer._train(['<mask>', '<|turn>', '<turn|>', *THINK_PIECES]))


@pytest.fixture
def model(tiny_config, tokenizer):
    """Returns a denoiser with one sliding layer, which is enough for what a chat keeps."""
    one_layer = tiny_config.replace(layer_types=('sliding',))
    return DiffusionGemma(one_layer.replace(vocab_size=tokenizer.vocab_size))


def make_chat(model, tokenizer, mode='diffusion', chat=None, **fields):
    chat = {'capacity': 400} | (chat or {})
    fields = {'max_new_tokens': 10, 'max_denoising_steps': 2, 'temperature': 0} | fields
    config = SamplingConfig.for_tokenizer(tokenizer, **fields)
    sampler = Sampler(model, config, mode)
    return ChatSampler(sampler, random_params(model), tokenizer, rng=KEY, **chat)


@pytest.mark.slow
@EVERY_MODE
def test_every_turn_answers_as_if_the_conversation_were_encoded_anew(model, tokenizer, mode):
    """The windows are shorter than the turns; responses end at their limit or at a stop token."""
    if mode != 'diffusion':  # the prompts of 'diffusion' end in an empty thought channel
        tokenizer = Tokenizer(tokenizer._model, empty_thought=False)
    first = make_chat(model, tokenizer, mode).send(TURNS[0]).tokens
    stop_ids = (*tokenizer.stop_ids, first[6])
    chat = make_chat(model, tokenizer, mode, {'system': 'Be kind.'}, stop_ids=stop_ids)
    history = []
    for turn, text in enumerate(TURNS):
        before = chat.tokens
        prompt = tokenizer.format_turn(text) if turn else tokenizer.format_prompt(text, 'Be kind.')
        cached, encoded = chat.cached, chat._cache.encoded
        reply = chat.send(text)
        assert chat._cache.encoded - encoded == len(before + prompt) - cached
        prompts = pad_prompts([before + prompt], width=300)
        rng = jax.random.fold_in(KEY, turn)[None]
        alone = chat.sampler(random_params(model), *prompts, rng=rng)
        assert reply.tokens == alone.tokens[0, : int(alone.lengths[0])].tolist()
        if mode == 'diffusion':  # tokens after an empty thought channel are encoded again
            assert cached == len(history)
        else:  # at most the last canvas and the end of the turn are not cached
            assert cached >= len(before) - model.config.canvas_length - 3
        history = before + prompt[: len(prompt) - len(tokenizer.response_prefix())]
        assert chat.tokens == history + tokenizer.end_turn(reply.tokens)
    assert cached > 0


@pytest.mark.slow
def test_a_light_denoisers_lossless_chat_is_the_autoregressive_one(tiny_config, tokenizer):
    """Drafts read the hidden state of the last token, which every turn encodes again."""
    tokenizer = Tokenizer(tokenizer._model, empty_thought=False)
    config = tiny_config.replace(predict_next=True, vocab_size=tokenizer.vocab_size)
    model, params = light_student(config, serial_rank=2, teacher_state=True)
    sampling = SamplingConfig.for_tokenizer(tokenizer, max_new_tokens=10, temperature=1.0)
    replies = []
    for mode in ('lossless', 'autoregressive'):
        chat = ChatSampler(Sampler(model, sampling, mode), params, tokenizer, rng=KEY, capacity=400)
        replies.append([chat.send(text).tokens for text in TURNS])
        assert chat._cache.reused > 0
    assert replies[0] == replies[1]


def test_streaming_shows_the_reply_grow_and_an_abandoned_turn_leaves_no_trace(model, tokenizer):
    chat = make_chat(model, tokenizer)
    chat.send(TURNS[0])
    tokens, cached = chat.tokens, chat.cached
    abandoned = chat.stream(TURNS[1])
    first = next(abandoned)
    assert 0 < len(first.tokens) < 10 and not first.finished
    abandoned.close()
    assert (chat.tokens, chat.cached) == (tokens, cached)
    encoded = chat._cache.encoded
    parts = list(chat.stream(TURNS[1]))
    prompt = tokens + tokenizer.format_turn(TURNS[1])
    assert chat._cache.encoded - encoded == len(prompt) - cached and cached > 0
    assert parts[0].tokens == first.tokens and len(parts) == 3
    for one, other in zip(parts, parts[1:], strict=False):
        assert other.tokens[: len(one.tokens)] == one.tokens
        assert other.denoising_steps > one.denoising_steps
    chat.reset()
    assert not chat.tokens
    assert chat.send(TURNS[0]).tokens == make_chat(model, tokenizer).send(TURNS[0]).tokens


@pytest.mark.slow
def test_thoughts_are_told_apart_and_later_turns_do_not_see_them(model, tokenizer):
    think, opens, closes = tokenizer.think_ids
    prompt = tokenizer.format_prompt('Why?', thinking=True)
    assert prompt[1:] == [
        tokenizer.turn_start_id,
        *tokenizer.encode('system\n'),
        think,
        *tokenizer.encode('\n'),
        tokenizer.turn_end_id,
        *tokenizer.encode('\n'),
        *tokenizer.format_turn('Why?', thinking=True),
    ]
    thought, answer = tokenizer.encode('thought\nhm'), tokenizer.encode('Yes.')
    response = [opens, *thought, closes, *answer, tokenizer.turn_end_id]
    assert tokenizer.split_thoughts(response) == (thought, [*answer, tokenizer.turn_end_id])
    expected = [*answer, tokenizer.turn_end_id, *tokenizer.encode('\n')]
    assert tokenizer.end_turn(response) == expected

    chat = make_chat(model, tokenizer, chat={'thinking': True})
    reply = chat._reply(response, 3)
    assert (reply.text, reply.thoughts, reply.finished) == ('Yes.', 'hm', True)
    # With thoughts, only the tokens before the response remain in the cache.
    chat._tokenizer = ThinkingOutLoud(tokenizer)
    reply = chat.send('Why?')
    assert reply.thoughts and chat.cached == len(tokenizer.format_prompt('Why?', thinking=True))
    following = chat.tokens + tokenizer.format_turn('And?', thinking=True)
    second = chat.send('And?')
    alone = chat.sampler(
        random_params(model),
        *pad_prompts([following], width=300),
        rng=jax.random.fold_in(KEY, 1)[None],
    )
    assert second.tokens == np.asarray(alone.tokens)[0, : int(alone.lengths[0])].tolist()


class ThinkingOutLoud:
    """A tokenizer that treats the first half of a response as thoughts."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def split_thoughts(self, response):
        half = len(response) // 2
        return response[:half], response[half:]

    def end_turn(self, response):
        return self._tokenizer.end_turn(self.split_thoughts(response)[1])


def test_what_cannot_be_is_one_clear_error(model, tokenizer):
    chat = make_chat(model, tokenizer)
    with pytest.raises(ValueError, match='more than the capacity of 400'):
        chat.send('apples ' * 400)
    with pytest.raises(ValueError, match='lack .* with which this tokenizer ends a turn'):
        make_chat(model, tokenizer, stop_ids=())
    with pytest.raises(ValueError, match='its model does not think'):
        Tokenizer.load().format_prompt('Why?', thinking=True)


@pytest.mark.parametrize(
    'limit',
    [
        pytest.param('max_turns', marks=pytest.mark.slow),
        'capacity',
        pytest.param('max_positions', marks=pytest.mark.slow),
    ],
)
def test_a_full_conversation_forgets_its_oldest_turns_as_a_whole(model, tokenizer, limit):
    """The third turn gets the answer of a conversation that starts with the second turn."""
    long = make_chat(model, tokenizer)
    for text in TURNS[:2]:
        long.send(text)
    three = len(long.tokens) + len(tokenizer.format_turn(TURNS[2])) + 10
    if limit == 'max_positions':
        model = model.clone(config=model.config.replace(max_positions=three - 1))
    chat = make_chat(
        model,
        tokenizer,
        chat={'max_turns': {'max_turns': 2}, 'capacity': {'capacity': three - 1}}.get(limit),
    )
    assert chat.send(TURNS[0]).forgotten == chat.send(TURNS[1]).forgotten == 0
    (_, _), (_, second) = chat._history
    unseen = len(tokenizer.response_prefix())
    prompt = tokenizer.format_prompt(TURNS[1])
    prompt = prompt[: len(prompt) - unseen] + second + tokenizer.format_turn(TURNS[2])
    rng = jax.random.fold_in(KEY, 2)[None]
    alone = chat.sampler(random_params(model), *pad_prompts([prompt]), rng=rng)
    abandoned = chat.stream(TURNS[2])
    next(abandoned)
    abandoned.close()
    assert len(chat._history) == 2  # an abandoned answer does not forget any turns
    reply = chat.send(TURNS[2])
    assert reply.forgotten == 1
    assert reply.tokens == alone.tokens[0, : int(alone.lengths[0])].tolist()
    assert chat.send(TURNS[0]).forgotten >= 1


def test_a_model_of_single_questions_starts_anew_with_each(model, tokenizer):
    chat = make_chat(model, tokenizer, chat={'max_turns': 1})
    chat.send(TURNS[0])
    reply = chat.send(TURNS[1])
    prompt = pad_prompts([tokenizer.format_prompt(TURNS[1])])
    alone = chat.sampler(random_params(model), *prompt, rng=jax.random.fold_in(KEY, 1)[None])
    assert reply.tokens == alone.tokens[0, : int(alone.lengths[0])].tolist()
    with pytest.raises(ValueError, match='max_turns must be >= 1 turn, got 0'):
        make_chat(model, tokenizer, chat={'max_turns': 0})
