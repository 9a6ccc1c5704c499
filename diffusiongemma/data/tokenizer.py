"""A sentencepiece tokenizer with the turn format of Gemma.

    >>> from diffusiongemma.data.tokenizer import Tokenizer
    >>> tokenizer = Tokenizer.load('builtin')
    >>> tokenizer.decode(tokenizer.encode('two  spaces\\n')) == 'two  spaces\\n'
    True

Text and control tokens do not mix: `encode` never returns a control token, even if the text
spells its name, and `decode` never shows one. Only the methods that format turns insert them. A
pretrained model has no turns: its tokenizer (`chat_turns` is False) formats a prompt as plain text
to be continued.
"""

from __future__ import annotations

import hashlib
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import sentencepiece
from etils import epath

from diffusiongemma.data.chat_template import (
    TEMPLATE_FILE,
    ChatTemplate,
    Parts,
    default_template,
    find_template,
)
from diffusiongemma.data.special_tokens import THINK_PIECES, TURN_PIECES, special_tokens
from diffusiongemma.data.tokenizer_json import model_from_tokenizer_json
from diffusiongemma.data.vocabulary import SPACE, mark_unused

BUILTIN = 'builtin'
_BUILTIN_PATH = pathlib.Path(__file__).parents[1] / 'assets' / 'tokenizer.model'


class Tokenizer:
    """A tokenizer: a sentencepiece model, its special token ids and its chat template.

    Attributes:
      vocab_size: the number of pieces.
      pad_id, eos_id, bos_id, unk_id, mask_id: ids of the common special tokens.
      turn_start_id, turn_end_id: ids of the tokens that open and close a turn.
      chat_turns: whether prompts are turns of a conversation; False for a pretrained model, whose
        turn tokens have the type UNUSED.
      stop_ids: ids of the tokens that end a response.
      think_ids: ids of the tokens that request thoughts, open and close their channel, or None.
      special_ids: ids of tokens that encode no text; `encode` avoids and `decode` skips them.
      content_hash: the SHA-256 of the model file, which is stored with data and checkpoints.
      format_hash: a hash that distinguishes prompt formats of one vocabulary; None for the
        default format of a vocabulary without thoughts.
      chat_template: the jinja2 template of conversations.
    """

    def __init__(
        self,
        model: bytes,
        source: str = 'these bytes',
        chat_template: str | None = None,
        empty_thought: bool = True,
        template_source: str = 'the chat template',
    ) -> None:
        """Reads a serialized sentencepiece model.

        Args:
          model: the content of a .model file.
          source: the file of the model, for error messages.
          chat_template: the jinja2 template of the checkpoint; None for the default of the model
            family, which the vocabulary determines.
          empty_thought: whether, without a template, a prompt that requests no thoughts ends in
            an empty thought channel, as for Gemma 4 12B, 26B and 31B (not for E2B and E4B). It
            has no effect if the vocabulary has no thought tokens.
          template_source: the file of the template, for error messages.

        Raises:
          ValueError: if it is not a sentencepiece model or lacks a required token.
        """
        self._model = model
        self._source = source
        if not model:
            raise ValueError(f'{source} is not a sentencepiece model: it is empty.')
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f'{source} is not a sentencepiece model: {error}') from error
        processor = self._processor
        self.vocab_size: int = processor.get_piece_size()
        self.content_hash: str = hashlib.sha256(model).hexdigest()
        special = special_tokens(processor, source)
        self._special = ids = special.ids
        self.special_ids: frozenset[int] = frozenset(ids.values())
        self.pad_id, self.bos_id, self.eos_id = special.pad_id, special.bos_id, special.eos_id
        self.unk_id, self.mask_id = special.unk_id, special.mask_id
        self.turn_start_id, self.turn_end_id = special.turn_ids
        self.chat_turns, self.stop_ids = special.chat_turns, special.stop_ids
        self.think_ids = special.think_ids
        self._byte_ids = [processor.piece_to_id(f'<0x{byte:02X}>') for byte in range(256)]
        literals = sorted(ids, key=len, reverse=True)
        self._literal = re.compile('|'.join(re.escape(text) for text in (*literals, SPACE)))
        self._control = re.compile('(' + '|'.join(re.escape(text) for text in literals) + ')')
        self._own_template, self._empty_thought = chat_template, empty_thought
        self._template_source = template_source
        turn = self.piece(self.turn_start_id), self.piece(self.turn_end_id)
        is_gemma3, has_thoughts = turn == TURN_PIECES[1], self.think_ids is not None
        default = default_template(
            *turn,
            has_system_turn=not is_gemma3,  # Gemma 3's system text opens the user's turn
            thinks=has_thoughts,
            empty_thought=empty_thought,
        )
        self.chat_template: str = default if chat_template is None else chat_template
        named = {'bos': self.bos_id, 'eos': self.eos_id, 'pad': self.pad_id, 'unk': self.unk_id}
        tokens = {f'{name}_token': self.piece(i) for name, i in named.items() if i >= 0}
        self._chat = ChatTemplate(self.chat_template, tokens, template_source)
        self.format_hash: str | None = None
        if has_thoughts or self.chat_template != default:
            self.format_hash = hashlib.sha256(self.chat_template.encode()).hexdigest()[:16]

    @classmethod
    def load(cls, path: str = BUILTIN, empty_thought: bool = True) -> Tokenizer:
        """Loads a .model file from a local or gs:// path, or the one in this package ('builtin').

        A tokenizer.json of a Gemma model is converted back to its sentencepiece model. A chat
        template in the same directory, as in a published checkpoint, is used.

        Args:
          path: the path of the .model or tokenizer.json file.
          empty_thought: see `__init__`; it only matters without a template.

        Raises:
          FileNotFoundError: if the file does not exist.
          ValueError: if the file is not a usable tokenizer model, or the file of the chat
            template beside it is damaged.
        """
        file = epath.Path(_BUILTIN_PATH if path == BUILTIN else path)
        if not file.is_file():
            raise FileNotFoundError(
                f'No tokenizer model at {file}. Pass the path of a sentencepiece .model file, '
                f'or {BUILTIN!r} for the one that ships with the library.'
            )
        content = file.read_bytes()
        if file.suffix == '.json':
            content = model_from_tokenizer_json(content, str(file))
        template, where = find_template(file.parent) or (None, 'the chat template')
        return cls(content, str(file), template, empty_thought, where)

    def without_chat_turns(self) -> Tokenizer:
        """Returns the tokenizer of a pretrained model with the same vocabulary."""
        if not self.chat_turns:
            return self
        names = [piece for pair in TURN_PIECES for piece in pair]
        return Tokenizer(mark_unused(self._model, names), self._source)

    def save(self, path: epath.PathLike) -> None:
        """Writes the sentencepiece model to `path`, and its chat template, if any, beside it.

        An existing template of another tokenizer is removed, because `load` would use it.
        """
        path = epath.Path(path)
        path.write_bytes(self._model)
        template = path.parent / TEMPLATE_FILE
        if self._own_template is not None:
            template.write_bytes(self._own_template.encode())
        elif template.exists():
            template.unlink()

    def __reduce__(self) -> tuple[Any, ...]:
        template = self._own_template, self._empty_thought, self._template_source
        return Tokenizer, (self._model, self._source, *template)

    def __repr__(self) -> str:
        return f'Tokenizer({self._source}, sha256 {self.content_hash[:12]})'

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of plain text, none of which is in `special_ids`.

        If the text contains the name of a special token, the name is encoded in two parts, as
        ordinary characters.

        Raises:
          ValueError: if the text is not valid Unicode, for example because of a lone surrogate.
        """
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f'the text {text[:40]!r} is not valid Unicode ({error.reason} at position '
                    f'{error.start}); give it as UTF-8.'
                ) from error
        ids: list[int] = []
        start = 0
        for match in self._literal.finditer(text):
            literal = match[0]
            ids += self._processor.encode(text[start : match.start()])
            if literal == SPACE:  # sentencepiece would read this character as a space
                ids += [self._byte_ids[byte] for byte in literal.encode()]
            else:
                ids += self._processor.encode(literal[0]) + self._processor.encode(literal[1:])
            start = match.end()
        ids += self._processor.encode(text[start:])
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids; special tokens are skipped and do not end the text.

        Raises:
          ValueError: on an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f'Token id {i} is outside the vocabulary of {self.vocab_size}.')
        text: str = self._processor.decode([i for i in ids if i not in self.special_ids])
        return text

    def piece(self, token_id: int) -> str:
        """Returns the name of a token."""
        return self._processor.id_to_piece(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the UTF-8 bytes that a token adds to a text; b'' for special tokens."""
        if token_id in self.special_ids:
            return b''
        piece = self.piece(token_id)
        if self._processor.is_byte(token_id):
            return bytes([int(piece[1:-1], 16)])
        return piece.replace(SPACE, ' ').encode()

    def format_prompt(
        self, prompt: str, system: str | None = None, thinking: bool = False
    ) -> list[int]:
        """Returns the ids of a conversation with one user turn, up to the start of the response.

        The chat template determines the format. For Gemma 4 it is `<bos><|turn>user\\n{prompt}
        <turn|>\\n<|turn>model\\n`, after a turn of the role `system` if there is a system text or
        thoughts are requested; without thoughts, prompts of the larger models end in an empty
        thought channel. Text is trimmed if the template does so. For a pretrained model
        (`chat_turns` is False) the format is `<bos>{prompt}`.

        Raises:
          ValueError: if thoughts are requested but the tokenizer has no tokens for them, if the
            chat template cannot format this conversation, or if a pretrained model gets a system
            text.
        """
        if not self.chat_turns:
            if thinking or system is not None:
                raise ValueError(
                    f'{self._source} is the tokenizer of a pretrained model, which continues plain '
                    'text: pass no system text, and ask without thinking.'
                )
            return [self.bos_id, *self.encode(prompt)]
        if thinking and self.think_ids is None:
            raise ValueError(
                f'{self._source} has no {", ".join(THINK_PIECES)}: its model does not think. '
                'Ask without thinking.'
            )
        texts = {'user': prompt} if system is None else {'user': prompt, 'system': system}
        return self._fill(self._chat.prompt(system is not None, thinking), texts)

    def format_turn(self, prompt: str, thinking: bool = False) -> list[int]:
        """Returns the ids of a later user turn, up to the start of the response.

        Raises:
          ValueError: if the model is a pretrained one, which has no turns.
        """
        if not self.chat_turns:
            raise ValueError(
                f'{self._source} is the tokenizer of a pretrained model, which has no turns: it '
                'continues a prompt and cannot hold a conversation.'
            )
        return self._fill(self._chat.next_turn(thinking), {'user': prompt})

    def response_prefix(self, thinking: bool = False) -> list[int]:
        """Returns the last ids of a prompt that later turns leave out: an empty thought channel."""
        return self._fill((self._chat.response_prefix(thinking),), {})

    def end_turn(self, response: Iterable[int]) -> list[int]:
        """Returns the ids of a response for later turns: without thoughts, with the turn end."""
        ids = [i for i in self.split_thoughts(response)[1] if i not in self.stop_ids]
        text = self.decode(ids)
        trimmed = self._chat.response_slot().trim(text)
        ids = ids if trimmed == text else self.encode(trimmed)
        return ids + self._fill((self._chat.turn_end(),), {})

    def _fill(self, parts: Parts, texts: Mapping[str, str]) -> list[int]:
        """Returns the ids of a rendered conversation; messages never become special tokens."""
        ids: list[int] = []
        run = ''  # text without special tokens, encoded as a whole
        for part in parts:
            if not isinstance(part, str):
                run += part.trim(texts[part.role])
                continue
            for piece in self._control.split(part):
                if piece in self._special:
                    ids += [*self.encode(run), self._special[piece]]
                    run = ''
                else:
                    run += piece
        return ids + self.encode(run)

    def split_thoughts(self, response: Iterable[int]) -> tuple[list[int], list[int]]:
        """Returns the ids of a response inside its thought channels, and all other ids."""
        if self.think_ids is None:
            return [], list(response)
        _, opens, closes = self.think_ids
        thoughts: list[int] = []
        answer: list[int] = []
        inside = False
        for i in response:
            if i in (opens, closes):
                inside = i == opens
            else:
                (thoughts if inside else answer).append(i)
        return thoughts, answer

    def format_response(self, response: str) -> list[int]:
        """Returns the ids of a response and its stop token: turn end, or <eos> without turns."""
        return [*self.encode(response), self.stop_ids[-1]]
