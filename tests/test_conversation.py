"""Tests the chat in a terminal: scripted input, commands, and Ctrl-C at any time."""

import pytest
from test_chat import TURNS, make_chat, model, tokenizer  # noqa: F401  fixtures

from diffusiongemma.view.conversation import HELP, Conversation

INTERRUPT = KeyboardInterrupt()


def talk(chat, *lines):
    """Returns the output for these input lines; exceptions among them are raised when read."""
    script, written = iter(lines), []

    def read():
        line = next(script, None)
        if line is None:
            raise EOFError
        if isinstance(line, BaseException):
            raise line
        return line

    Conversation(chat, read, written.append).run()
    assert next(script, None) is None  # it has read all lines
    return ''.join(written)


@pytest.fixture
def chat(model, tokenizer):  # noqa: F811
    return make_chat(model, tokenizer)


def test_it_answers_remembers_and_forgets(chat, model, tokenizer):  # noqa: F811
    alone = make_chat(model, tokenizer)
    replies = [alone.send(text).text for text in TURNS[:2]]
    out = talk(chat, *TURNS[:2], '', '/reset', TURNS[0], '/quit')
    first, second = (''.join(c if c.isprintable() else '·' for c in text) for text in replies)
    assert out.count(first) >= 2 and second in out
    assert out.count('denoise passes, ') == 3 and '[the conversation starts anew]' in out


@pytest.mark.slow
def test_commands_change_how_the_next_turn_is_decoded(chat):
    out = talk(
        chat, TURNS[0], '/mode', '/mode lossless', '/steps 3', TURNS[1], '/mode autoregressive',
        TURNS[0], '/steps', '/help', '//said',
    )  # fmt: skip
    for part in ('[mode diffusion]', '[mode lossless]', '[max_draft_steps 3]', HELP):
        assert part in out
    assert '[max_denoising_steps 2]' in out and 'error' not in out
    assert chat.sampler.mode == 'autoregressive' and chat.sampler.config.max_draft_steps == 3
    assert ' passes, ' in out and chat.tokens.count(chat._tokenizer.turn_start_id) == 8


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ('/mode fast', "no mode 'fast'; there are diffusion, autoregressive, lossless."),
        ('/steps many', "/steps takes a number, got 'many'."),
        ('/steps 0', 'max_denoising_steps must be >= 1'),
        ('/stop', 'no command /stop; /help names them.'),
        ('/', 'no command /'),
        ('apples ' * 400, 'more than the capacity of 400'),
    ],
)
def test_an_error_is_told_and_the_conversation_goes_on(chat, line, message):
    out = talk(chat, line, '/mode')
    assert f'error: {message}' in out or message in out
    assert out.endswith('[mode diffusion]\n') and not chat.tokens


def test_turns_that_the_model_no_longer_sees_are_told_once(model, tokenizer):  # noqa: F811
    chat = make_chat(model, tokenizer, chat={'max_turns': 2})
    out = talk(chat, TURNS[0], TURNS[1], '/mode', TURNS[0], '/reset', TURNS[1])
    before, after = out.split('[mode diffusion]')
    assert 'no longer sees' not in before
    assert after.count('[the model no longer sees the first turn of this conversation]') == 1


def test_a_chat_of_single_questions_does_not_repeat_that_it_is_one(model, tokenizer):  # noqa: F811
    chat = make_chat(model, tokenizer, chat={'max_turns': 1})
    assert 'no longer sees' not in talk(chat, TURNS[0], TURNS[1])
    with pytest.raises(ValueError, match='The message is empty'):
        chat.send(' ')


def test_ctrl_c_stops_the_answer_and_not_the_conversation(chat, monkeypatch):
    talk(chat, TURNS[0])
    tokens, cached, stream = chat.tokens, chat.cached, chat.stream

    def interrupted(text):
        parts = stream(text)
        yield next(parts)
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, 'stream', interrupted)
    out = talk(chat, TURNS[1], INTERRUPT, '/mode')
    assert '[stopped; the conversation is as it was before]' in out
    assert '/quit ends the conversation.' in out and out.endswith('[mode diffusion]\n')
    assert (chat.tokens, chat.cached) == (tokens, cached)
    monkeypatch.undo()
    assert 'denoise passes' in talk(chat, TURNS[1])
