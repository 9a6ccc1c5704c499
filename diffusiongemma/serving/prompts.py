"""Converts the fields `prompt` and `messages` of a request body to token ids."""

import json
from typing import Any

from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.serving.fields import Fields, brief, name_of


def read_prompt(fields: Fields, tokenizer: Tokenizer) -> list[int]:
    """Returns the token ids of the field `prompt`, a text or ids."""
    prompt = fields.any('prompt')
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]  # a batch of one
    if isinstance(prompt, str):
        return [tokenizer.bos_id, *encode(fields, 'prompt', prompt, tokenizer)]
    if isinstance(prompt, list) and prompt and all(type(i) is int for i in prompt):
        wrong = [i for i in prompt if not 0 <= i < tokenizer.vocab_size]
        if wrong:
            raise fields.error(
                'prompt',
                f'prompt holds the token id {brief(wrong[0])}, outside of the vocabulary of '
                f'{tokenizer.vocab_size}.',
            )
        return prompt
    raise fields.error(
        'prompt', 'prompt must be one text or one array of token ids; send one request per prompt.'
    )


def encode(fields: Fields, name: str, text: str, tokenizer: Tokenizer) -> list[int]:
    """Returns the token ids of the text in the field `name`."""
    try:
        return tokenizer.encode(text)
    except ValueError as error:
        raise fields.error(name, f'{name}: {error}') from None


def read_conversation(fields: Fields, tokenizer: Tokenizer) -> list[int]:
    """Returns the token ids of the field `messages`, up to the start of the answer."""
    messages = fields.array('messages')
    if not messages:
        raise fields.error('messages', 'messages must hold at least one message.')
    turns = [_message(fields, n, message) for n, message in enumerate(messages)]
    system = turns.pop(0)[1] if turns[0][0] in ('system', 'developer') else None
    roles = [role for role, _ in turns]
    if roles != ['user', 'assistant'] * (len(turns) // 2) + ['user']:
        raise fields.error(
            'messages',
            'messages must be an optional system text, then user and assistant in turns, starting '
            f'and ending with the user; got {", ".join(roles) or "no user"}.'[:300],
        )
    texts = [text for _, text in turns]
    if not texts[-1].strip():
        raise fields.error('messages', 'the content of the last message is empty.')
    try:
        return conversation_tokens(tokenizer, texts, system)
    except ValueError as error:
        raise fields.error('messages', f'messages: {error}') from None


def _message(fields: Fields, number: int, message: Any) -> tuple[str, str]:
    """Returns the role and the text of a message."""
    where = f'messages[{number}]'
    if not isinstance(message, dict):
        raise fields.error(where, f'{where} must be an object, got {name_of(message)}.')
    parts = Fields(message, f'{where}.')
    role, content = parts.text('role'), parts.any('content')
    parts.text('name')
    parts.end()
    if role not in ('system', 'developer', 'user', 'assistant'):
        raise parts.error(
            'role', f"{where}.role must be 'system', 'user' or 'assistant', got "
            f'{json.dumps(role)[:40]}.'
        )  # fmt: skip
    if isinstance(content, list):
        content = _joined(content)
    if not isinstance(content, str):
        raise parts.error('content', f'{where}.content must be text.')
    return role, content


def _joined(parts: list[Any]) -> str | None:
    """Returns the joined text of the parts of a message; None if a part is not text."""
    texts: list[str] = []
    for part in parts:
        text = part.get('text') if isinstance(part, dict) and part.get('type') == 'text' else None
        if not isinstance(text, str):
            return None
        texts.append(text)
    return ''.join(texts)


def conversation_tokens(tokenizer: Tokenizer, texts: list[str], system: str | None) -> list[int]:
    """Returns the token ids of a conversation, up to the start of the next answer.

    They equal those of a `ChatSampler` whose answers are the texts of the assistant.

    Args:
      tokenizer: the tokenizer of the model.
      texts: the texts of the user and the assistant in turns; the first and last are the user's.
      system: the system text, or None.
    """
    question, *others = texts
    tokens = tokenizer.format_prompt(question, system)
    unseen = len(tokenizer.response_prefix()) if others else 0
    for answer, question in zip(others[::2], others[1::2], strict=True):
        tokens = tokens[: len(tokens) - unseen] + tokenizer.end_turn(tokenizer.encode(answer))
        tokens += tokenizer.format_turn(question)
    return tokens
