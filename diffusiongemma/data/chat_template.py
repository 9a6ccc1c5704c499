"""Formats conversations with the jinja2 chat template of a checkpoint.

A template is rendered once for each kind of conversation, with marks in place of the messages.
The result, literal text with a `Slot` per message, is then filled in without jinja2.

    >>> template = ChatTemplate(default_template('<|turn>', '<turn|>'), {'bos_token': '<bos>'})
    >>> template.prompt(has_system=False, thinking=False)[0]
    '<bos><|turn>user\\n'
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

TEMPLATE_FILE = 'chat_template.jinja'
# transformers looks for a template in these files if there is no separate template file.
_JSON_FILES = ('chat_template.json', 'tokenizer_config.json')
# A mark is a message number between private-use characters. The em spaces around it show whether
# the template trims the message.
_SPACE = '\u2003'
_MARK = re.compile(f'({_SPACE}?)\ue000([0-9]+)\ue001({_SPACE}?)')


# Templates for checkpoints without one; <START> and <END> stand for the tokens around a turn.
# This one is for the models that ship with the library; it keeps messages unchanged.
_PLAIN = r"""{{ bos_token }}
{%- for message in messages %}
  {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
  {{- '<START>' + role + '\n' + message['content'] + '<END>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<START>model\n' }}{% endif %}"""
# This one follows Google's template of Gemma 3: there is no system turn (the system text opens the
# first user turn), and messages are stripped of leading and trailing whitespace.
_GEMMA3 = r"""{{ bos_token }}
{%- set has_system = messages[0]['role'] == 'system' %}
{%- for message in (messages[1:] if has_system else messages) %}
  {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
  {%- set before = messages[0]['content'] + '\n\n' if has_system and loop.first else '' %}
  {{- '<START>' + role + '\n' + before + message['content'] | trim + '<END>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<START>model\n' }}{% endif %}"""
# This one follows Google's templates of Gemma 4: the system turn requests thoughts, and thoughts
# of past responses are left out. For the larger models, an empty thought channel disables them.
_EMPTY_THOUGHT = r"""{% if not enable_thinking %}{{ '<|channel>thought\n<channel|>' }}{% endif %}"""
_GEMMA4 = r"""{%- macro without_thoughts(text) %}
  {%- set kept = namespace(text='') %}
  {%- for part in text.split('<channel|>') %}
    {%- set kept.text = kept.text + part.split('<|channel>')[0] %}
  {%- endfor %}
  {{- kept.text }}
{%- endmacro %}
{{- bos_token }}
{%- set has_system = messages[0]['role'] == 'system' %}
{%- if enable_thinking or has_system %}
  {{- '<START>system\n' }}
  {%- if enable_thinking %}{{ '<|think|>\n' }}{% endif %}
  {%- if has_system %}{{ messages[0]['content'] | trim }}{% endif %}
  {{- '<END>\n' }}
{%- endif %}
{%- for message in (messages[1:] if has_system else messages) %}
  {%- if message['role'] == 'assistant' %}
    {{- '<START>model\n' + without_thoughts(message['content']) | trim + '<END>\n' }}
  {%- else %}
    {{- '<START>' + message['role'] + '\n' + message['content'] | trim + '<END>\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<START>model\n' }}<EMPTY>
{%- endif %}""".replace('<EMPTY>', _EMPTY_THOUGHT)


@dataclasses.dataclass(frozen=True)
class Slot:
    """A placeholder for a message in a rendered conversation.

    Attributes:
      role: 'system', 'user' or 'assistant'.
      trims_start, trims_end: whether the template strips whitespace at each end of the message.
    """

    role: str
    trims_start: bool = False
    trims_end: bool = False

    def trim(self, text: str) -> str:
        """Returns the message as the template writes it."""
        text = text.lstrip() if self.trims_start else text
        return text.rstrip() if self.trims_end else text


Parts = tuple[str | Slot, ...]


class ChatTemplate:
    """A jinja2 chat template, split into literal text and message slots.

    Attributes:
      source: the text of the template.
    """

    def __init__(
        self, source: str, tokens: Mapping[str, str], where: str = 'the chat template'
    ) -> None:
        """Stores the template; the first use of a method renders it and reports its errors.

        Args:
          source: the template. It is rendered with the same variables as in transformers:
            `messages`, `add_generation_prompt`, `enable_thinking`, no tools, and `tokens`.
          tokens: values of variables such as `bos_token`.
          where: the file of the template, for error messages.
        """
        self.source = source
        self._tokens = dict(tokens)
        self._where = where
        self._known: dict[tuple[tuple[str, ...], bool, bool], Parts] = {}

    def prompt(self, has_system: bool, thinking: bool) -> Parts:
        """Returns the parts of a conversation with one user turn, up to the start of the response.

        Raises:
          ValueError: if the template is not valid jinja2, or refuses or drops a message.
        """
        roles = ('system', 'user') if has_system else ('user',)
        return self._rendered(roles, thinking, True)

    def next_turn(self, thinking: bool) -> Parts:
        """Returns the parts of a later user turn, starting after the end of the previous response.

        Raises:
          ValueError: in the cases of `prompt`, or if the template renders a past turn differently
            from the prompt that opened it.
        """
        after = _after(self._rendered(('user', 'assistant', 'user'), thinking, True), 'assistant')
        return (_without_prefix(after[0], self.turn_end(), self._where), *after[1:])

    def turn_end(self) -> str:
        """Returns the text that closes a response in a continued conversation."""
        parts = self._rendered(('user', 'assistant'), False, False)
        return _literal(_after(parts, 'assistant'))

    def response_prefix(self, thinking: bool) -> str:
        """Returns the end of a prompt that later turns leave out, such as an empty thought."""
        opening = _literal(_after(self.prompt(False, thinking), 'user'))
        parts = self._rendered(('user', 'assistant'), thinking, False)
        return _without_prefix(opening, _literal(_after(parts, 'user')[:1]), self._where)

    def response_slot(self) -> Slot:
        """Returns the slot of a response in a continued conversation."""
        parts = self._rendered(('user', 'assistant'), False, False)
        return next(p for p in parts if isinstance(p, Slot) and p.role == 'assistant')

    def _rendered(self, roles: tuple[str, ...], thinking: bool, add_prompt: bool) -> Parts:
        kind = (roles, thinking, add_prompt)
        if kind not in self._known:
            self._known[kind] = self._render(roles, thinking, add_prompt)
        return self._known[kind]

    def _render(self, roles: tuple[str, ...], thinking: bool, add_prompt: bool) -> Parts:
        messages = [
            {'role': role, 'content': f'{_SPACE}\ue000{number}\ue001{_SPACE}'}
            for number, role in enumerate(roles)
        ]
        try:
            text = (
                _environment()
                .from_string(self.source)
                .render(
                    messages=messages,
                    add_generation_prompt=add_prompt,
                    enable_thinking=thinking,
                    tools=None,
                    documents=None,
                    **self._tokens,
                )
            )
        except Exception as error:  # a third-party template can raise anything
            raise ValueError(
                f'{self._where} cannot write a conversation of {", ".join(roles)}: '
                f'{type(error).__name__}: {error}. Repair it, or remove it for the built-in format.'
            ) from error
        parts = tuple(_split(text, roles))
        written = {part.role for part in parts if isinstance(part, Slot)}
        for role in roles:
            if role not in written:
                raise ValueError(
                    f'{self._where} does not write the text of the {role}, or changes it. Repair '
                    'it, or remove it for the built-in format.'
                )
        return parts


def find_template(directory: epath.PathLike) -> tuple[str, str] | None:
    """Returns the chat template of a checkpoint and the path of its file, or None.

    The search order is that of transformers: chat_template.jinja, chat_template.json, then the
    key `chat_template` of tokenizer_config.json (if it lists several, the one named "default").

    Raises:
      ValueError: if a file is not valid JSON, or holds something other than a template.
    """
    directory = epath.Path(directory)
    if (directory / TEMPLATE_FILE).is_file():
        path = directory / TEMPLATE_FILE
        try:
            return path.read_bytes().decode('utf-8'), str(path)
        except UnicodeDecodeError as error:
            raise ValueError(f'{path} is not UTF-8 text: {error}. Copy it again.') from error
    for name in _JSON_FILES:
        path = directory / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f'{path} is not valid JSON: {error}. Copy it again.') from error
        if not isinstance(content, dict):
            raise ValueError(f'{path} is not a JSON object, but {type(content).__name__}.')
        template = _named_default(content.get('chat_template'), path)
        if template is not None:
            return template, str(path)
    return None


def default_template(
    turn_start: str,
    turn_end: str,
    *,
    has_system_turn: bool = True,
    thinks: bool = False,
    empty_thought: bool = False,
) -> str:
    """Returns a chat template for a checkpoint without one.

    Args:
      turn_start, turn_end: tokens that open and close a turn.
      has_system_turn: whether a system text has its own turn; in Gemma 3 it does not.
      thinks: whether the vocabulary has Gemma 4's thought channel.
      empty_thought: whether a prompt without thinking ends in an empty thought channel.
    """
    template = _GEMMA4 if thinks else _PLAIN if has_system_turn else _GEMMA3
    if not empty_thought:
        template = template.replace(_EMPTY_THOUGHT, '')
    return template.replace('<START>', turn_start).replace('<END>', turn_end)


def _named_default(value: Any, path: epath.Path) -> str | None:
    """Returns the template in the value of the JSON key `chat_template`, or None."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):  # several templates for different uses
        value = {t.get('name'): t.get('template') for t in value if isinstance(t, dict)}
    if isinstance(value, dict) and isinstance(value.get('default'), str):
        template: str = value['default']
        return template
    raise ValueError(
        f'{path}: chat_template must be a template or a list with one named "default", got '
        f'{type(value).__name__}.'
    )


def _environment() -> Any:
    """Returns a jinja2 environment with the settings that transformers uses for templates."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    class Generation(jinja2.ext.Extension):
        """A jinja2 extension that renders the content of `{% generation %}` unchanged.

        Templates mark responses for training with this tag.
        """

        tags = {'generation'}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(('name:endgeneration',), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.globals['raise_exception'] = raise_exception
    return environment


def _split(text: str, roles: tuple[str, ...]) -> Iterator[str | Slot]:
    """Yields literal texts and slots in turn; the first and the last are (possibly empty) texts."""
    start = 0
    for match in _MARK.finditer(text):
        yield text[start : match.start()]
        yield Slot(roles[int(match[2])], not match[1], not match[3])
        start = match.end()
    yield text[start:]


def _after(parts: Parts, role: str) -> Parts:
    """Returns the parts that follow the first slot of a role."""
    index = next(i for i, part in enumerate(parts) if isinstance(part, Slot) and part.role == role)
    return parts[index + 1 :]


def _literal(parts: Parts) -> str:
    return ''.join(part for part in parts if isinstance(part, str))


def _without_prefix(text: str | Slot, prefix: str, where: str) -> str:
    if not isinstance(text, str) or not text.startswith(prefix):
        raise ValueError(
            f'{where} renders a past turn differently from the prompt that opened it ({text!r} '
            f'does not start with {prefix!r}), so a conversation cannot continue: ask in one turn.'
        )
    return text[len(prefix) :]
