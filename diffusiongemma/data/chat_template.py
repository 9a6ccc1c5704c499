"""How a conversation becomes text: the jinja2 chat template that comes with a checkpoint.

A template is rendered once for each kind of conversation, with marks in the places of the messages.
What results, literal text around `Slot`s, is then filled in without jinja2.

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
# Where transformers looks for a template when there is no file of its own for it.
_JSON_FILES = ('chat_template.json', 'tokenizer_config.json')
# Private-use characters around a message's number. The em spaces show what the template trims.
_SPACE = '\u2003'
_MARK = re.compile(f'({_SPACE}?)\ue000([0-9]+)\ue001({_SPACE}?)')


# What is written where a checkpoint has no template; <START> and <END> open and close a turn.
# Ours, for the models that ship with the library: whatever the messages hold is kept.
_PLAIN = r"""{{ bos_token }}
{%- for message in messages %}
  {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
  {{- '<START>' + role + '\n' + message['content'] + '<END>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<START>model\n' }}{% endif %}"""
# As Google's template of Gemma 3: there is no system turn, its text opens the first user turn, and
# messages lose the whitespace at their ends.
_GEMMA3 = r"""{{ bos_token }}
{%- set has_system = messages[0]['role'] == 'system' %}
{%- for message in (messages[1:] if has_system else messages) %}
  {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
  {%- set before = messages[0]['content'] + '\n\n' if has_system and loop.first else '' %}
  {{- '<START>' + role + '\n' + before + message['content'] | trim + '<END>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<START>model\n' }}{% endif %}"""
# As Google's templates of Gemma 4: thoughts are asked for in the system turn, and those of past
# responses are left out. The larger models are told by an empty channel that none are wanted.
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
    """The place of a message in a rendered conversation.

    Attributes:
      role: 'system', 'user' or 'assistant'.
      trims_start, trims_end: whether the template takes whitespace off the message's two ends.
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
    """The conversations that a jinja2 chat template writes.

    Attributes:
      source: the template.
    """

    def __init__(
        self, source: str, tokens: Mapping[str, str], where: str = 'the chat template'
    ) -> None:
        """Renders nothing yet; a template that cannot be used is an error of the first method.

        Args:
          source: the template; gets what transformers gives it: `messages`,
            `add_generation_prompt`, `enable_thinking`, no tools, and `tokens`.
          tokens: values of `bos_token` and its like.
          where: where the template came from, for error messages.
        """
        self.source = source
        self._tokens = dict(tokens)
        self._where = where
        self._known: dict[tuple, Parts] = {}

    def prompt(self, has_system: bool, thinking: bool) -> Parts:
        """Returns a conversation of one user turn, up to where the response starts.

        Raises:
          ValueError: the template is no jinja2, or refuses or loses one of the messages.
        """
        roles = ('system', 'user') if has_system else ('user',)
        return self._rendered(roles, thinking, True)

    def next_turn(self, thinking: bool) -> Parts:
        """Returns a later user turn, from after the end of the response before it.

        Raises:
          ValueError: see `prompt`; or the template writes a past turn otherwise than it opened it.
        """
        after = _after(self._rendered(('user', 'assistant', 'user'), thinking, True), 'assistant')
        return (_without_prefix(after[0], self.turn_end(), self._where), *after[1:])

    def turn_end(self) -> str:
        """Returns what closes a response in a conversation that goes on."""
        parts = self._rendered(('user', 'assistant'), False, False)
        return _literal(_after(parts, 'assistant'))

    def response_prefix(self, thinking: bool) -> str:
        """Returns the end of a prompt that later turns do not see, such as an empty thought."""
        asks = _literal(_after(self.prompt(False, thinking), 'user'))
        parts = self._rendered(('user', 'assistant'), thinking, False)
        return _without_prefix(asks, _literal(_after(parts, 'user')[:1]), self._where)

    def response_slot(self) -> Slot:
        """Returns the place of a response in a conversation that goes on."""
        parts = self._rendered(('user', 'assistant'), False, False)
        return next(p for p in parts if isinstance(p, Slot) and p.role == 'assistant')

    def _rendered(self, roles: tuple[str, ...], thinking: bool, asks: bool) -> Parts:
        kind = (roles, thinking, asks)
        if kind not in self._known:
            self._known[kind] = self._render(roles, thinking, asks)
        return self._known[kind]

    def _render(self, roles: tuple[str, ...], thinking: bool, asks: bool) -> Parts:
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
                    add_generation_prompt=asks,
                    enable_thinking=thinking,
                    tools=None,
                    documents=None,
                    **self._tokens,
                )
            )
        except Exception as error:  # whatever a template of someone else's may do
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
    """Returns the chat template of a checkpoint and the file that it is from, or None.

    The order is that of transformers: chat_template.jinja, chat_template.json, then the key
    `chat_template` of tokenizer_config.json (of several named ones that which is named default).

    Raises:
      ValueError: a file is not valid JSON, or holds something else than a template.
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
    """Returns a chat template for a checkpoint that comes without one.

    Args:
      turn_start, turn_end: tokens that open and close a turn.
      has_system_turn: whether a system text has its own turn; in Gemma 3 it has none.
      thinks: whether the vocabulary has Gemma 4's thought channel.
      empty_thought: whether a prompt without thinking ends in an empty thought channel.
    """
    template = _GEMMA4 if thinks else _PLAIN if has_system_turn else _GEMMA3
    if not empty_thought:
        template = template.replace(_EMPTY_THOUGHT, '')
    return template.replace('<START>', turn_start).replace('<END>', turn_end)


def _named_default(value: Any, path: epath.Path) -> str | None:
    """Returns the template that a JSON file holds under `chat_template`, or None."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):  # several, for different uses
        value = {t.get('name'): t.get('template') for t in value if isinstance(t, dict)}
    if isinstance(value, dict) and isinstance(value.get('default'), str):
        return value['default']
    raise ValueError(
        f'{path}: chat_template must be a template or a list with one named "default", got '
        f'{type(value).__name__}.'
    )


def _environment() -> Any:
    """Returns jinja2's environment with the settings that transformers renders templates with."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks responses for training; what it holds is written as it is."""

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
    """Yields a rendered conversation as literal text and slots, first and last a (empty) text."""
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
            f'{where} writes a past turn otherwise than it asked for it ({text!r} does not start '
            f'with {prefix!r}), so a conversation cannot go on. Ask in one turn.'
        )
    return text[len(prefix) :]
