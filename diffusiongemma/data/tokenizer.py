"""Sentencepiece tokenizer with the turn format of Gemma.

    >>> from diffusiongemma.data.tokenizer import Tokenizer
    >>> tokenizer = Tokenizer.load('builtin')
    >>> tokenizer.decode(tokenizer.encode('two  spaces\\n')) == 'two  spaces\\n'
    True

Text and control tokens do not mix: `encode` never emits a control token, whatever the text
spells out, and `decode` never shows one. Only `format_prompt` and `format_response` put them in.
A pretrained model has no turns: its tokenizer (`chat_turns` is False) formats a prompt as plain
text to be continued.
"""

from __future__ import annotations

import hashlib
import pathlib
import re
from collections.abc import Iterable

import sentencepiece
from etils import epath

from diffusiongemma.data.tokenizer_json import model_from_tokenizer_json
from diffusiongemma.data.vocabulary import SPACE, mark_unused

BUILTIN = 'builtin'
_BUILTIN_PATH = pathlib.Path(__file__).parents[1] / 'assets' / 'tokenizer.model'
# The turn tokens of Gemma 4 and of Gemma 3, in order of preference.
TURN_PIECES = (('<|turn>', '<turn|>'), ('<start_of_turn>', '<end_of_turn>'))
# Gemma 4: asks for thoughts in the system turn; they stand between the other two in a response.
THINK_PIECES = ('<|think|>', '<|channel>', '<channel|>')
# Pieces that steer the model rather than stand for text. Control symbols of the model file are
# always among them; released vocabularies hold the others as user-defined symbols, which
# sentencepiece would find in plain text.
_STEERING = re.compile(
    r'<\|[^|<>]+\|?>|<[^|<>]+\|>|<(?:start|end)_of_\w+>|<(?:pad|eos|bos|unk|mask)>'
)


class Tokenizer:
    """A sentencepiece model and the ids that the rest of the library needs.

    Attributes:
      vocab_size: number of pieces.
      pad_id, eos_id, bos_id, unk_id, mask_id: ids of the common special tokens.
      turn_start_id, turn_end_id: ids of the tokens that open and close a turn.
      chat_turns: whether prompts are turns of a conversation; False for a pretrained model, whose
        turn tokens have the type UNUSED.
      stop_ids: tokens after which a response is over.
      think_ids: ids of the tokens that ask for thoughts, open and close their channel, or None.
      special_ids: tokens that stand for no text; `encode` avoids them and `decode` skips them.
      content_hash: sha256 of the model file, stored with whatever was made with it.
    """

    def __init__(self, model: bytes, source: str = 'these bytes'):
        """Reads a serialized sentencepiece model.

        Args:
          model: content of a .model file.
          source: where it came from, for error messages.

        Raises:
          ValueError: when it is no sentencepiece model or lacks a token that is needed.
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
        pieces = processor.id_to_piece(list(range(self.vocab_size)))
        ids = {
            piece: i
            for i, piece in enumerate(pieces)
            if processor.is_control(i) or processor.is_unknown(i) or _STEERING.fullmatch(piece)
        }
        self.special_ids: frozenset[int] = frozenset(ids.values())
        self.pad_id: int = self._required('pad', processor.pad_id())
        self.eos_id: int = self._required('eos', processor.eos_id())
        self.bos_id: int = self._required('bos', processor.bos_id())
        self.unk_id: int = processor.unk_id()
        self.mask_id: int = self._required('<mask>', ids.get('<mask>', -1))
        turns = [pair for pair in TURN_PIECES if pair[0] in ids and pair[1] in ids]
        if not turns:
            names = ' or '.join(f'{start} and {end}' for start, end in TURN_PIECES)
            raise ValueError(
                f'The tokenizer model {source} lacks the turn tokens {names}. Use the tokenizer '
                'of a Gemma checkpoint, or train one with diffusiongemma.data.train_tokenizer.'
            )
        self.turn_start_id: int = ids[turns[0][0]]
        self.turn_end_id: int = ids[turns[0][1]]
        # Gemma 3 knows no system role: its system text opens the user's turn.
        self._has_system_turn = turns[0] == TURN_PIECES[0]
        self.chat_turns: bool = not processor.is_unused(self.turn_start_id)
        turn_end = (self.turn_end_id,) if self.chat_turns else ()
        self.stop_ids: tuple[int, ...] = (self.eos_id, *turn_end)
        thinks = tuple(ids[piece] for piece in THINK_PIECES if piece in ids)
        self.think_ids: tuple[int, ...] | None = thinks if len(thinks) == 3 else None
        self._byte_ids = [processor.piece_to_id(f'<0x{byte:02X}>') for byte in range(256)]
        literals = sorted(ids, key=len, reverse=True)
        self._literal = re.compile('|'.join(re.escape(text) for text in (*literals, SPACE)))

    @classmethod
    def load(cls, path: str = BUILTIN) -> Tokenizer:
        """Loads a .model file from a local or gs:// path, or the one that ships ('builtin').

        A tokenizer.json of Gemma's kind is read as the sentencepiece model that it was made of.

        Raises:
          FileNotFoundError: when there is no such file.
          ValueError: when the file is not a usable tokenizer model.
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
        return cls(content, str(file))

    def without_chat_turns(self) -> Tokenizer:
        """Returns the tokenizer of a pretrained model with the same vocabulary."""
        if not self.chat_turns:
            return self
        names = [piece for pair in TURN_PIECES for piece in pair]
        return Tokenizer(mark_unused(self._model, names), self._source)

    def save(self, path: epath.PathLike) -> None:
        """Writes the sentencepiece model to `path`."""
        epath.Path(path).write_bytes(self._model)

    def __reduce__(self):
        return Tokenizer, (self._model, self._source)

    def __repr__(self) -> str:
        return f'Tokenizer({self._source}, sha256 {self.content_hash[:12]})'

    def _required(self, name: str, token_id: int) -> int:
        if token_id < 0:
            raise ValueError(f'The tokenizer model {self._source} has no {name} token.')
        return token_id

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, never one of `special_ids`.

        The name of a special token, spelled out in the text, is encoded in two parts, so that it
        is read as the characters that it is made of.
        """
        ids: list[int] = []
        start = 0
        for match in self._literal.finditer(text):
            literal = match[0]
            ids += self._processor.encode(text[start : match.start()])
            if literal == SPACE:  # sentencepiece would read it as a blank
                ids += [self._byte_ids[byte] for byte in literal.encode()]
            else:
                ids += self._processor.encode(literal[0]) + self._processor.encode(literal[1:])
            start = match.end()
        return ids + self._processor.encode(text[start:])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; special tokens are skipped and nothing ends the text.

        Raises:
          ValueError: on an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f'Token id {i} is outside the vocabulary of {self.vocab_size}.')
        return self._processor.decode([i for i in ids if i not in self.special_ids])

    def piece(self, token_id: int) -> str:
        """The name of a token, special or not."""
        return self._processor.id_to_piece(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the UTF-8 bytes of a text; b'' for special tokens."""
        if token_id in self.special_ids:
            return b''
        piece = self.piece(token_id)
        if self._processor.is_byte(token_id):
            return bytes([int(piece[1:-1], 16)])
        return piece.replace(SPACE, ' ').encode()

    def _turn(self, role: str, content: list[int]) -> list[int]:
        header = self._processor.encode(f'{role}\n')
        newline = self._processor.encode('\n')
        return [self.turn_start_id, *header, *content, self.turn_end_id, *newline]

    def format_prompt(
        self, prompt: str, system: str | None = None, thinking: bool = False
    ) -> list[int]:
        """Ids of a conversation with one user turn, up to where the model's response starts.

        For Gemma 4 that is `<bos><|turn>user\\n{prompt}<turn|>\\n<|turn>model\\n`, with a turn of
        the role `system` before it where there is a system text, or where thoughts are asked for.
        For a pretrained model (`chat_turns` is False) it is `<bos>{prompt}`.

        Raises:
          ValueError: when thoughts are asked for and the tokenizer has no tokens for them, or when
            a pretrained model gets a system text.
        """
        if not self.chat_turns:
            if thinking or system is not None:
                raise ValueError(
                    f'{self._source} is of a pretrained model, which continues plain text: it '
                    'takes no system text and does not think.'
                )
            return [self.bos_id, *self.encode(prompt)]
        if thinking and self.think_ids is None:
            raise ValueError(
                f'{self._source} has no {", ".join(THINK_PIECES)}: its model does not think. '
                'Ask without thinking.'
            )
        ids = [self.bos_id]
        if self._has_system_turn and (thinking or system is not None):
            content = [self.think_ids[0]] if thinking and self.think_ids else []
            ids += self._turn('system', content + self.encode(system or ''))
        elif system is not None:
            prompt = f'{system}\n\n{prompt}'
        return ids + self.format_turn(prompt)

    def format_turn(self, prompt: str) -> list[int]:
        """Ids of a user turn, up to where the model's response starts.

        Raises:
          ValueError: for a pretrained model, which has no turns.
        """
        if not self.chat_turns:
            raise ValueError(
                f'{self._source} is of a pretrained model, which has no turns: it continues a '
                'prompt and cannot hold a conversation.'
            )
        header = [self.turn_start_id, *self._processor.encode('model\n')]
        return self._turn('user', self.encode(prompt)) + header

    def end_turn(self, response: Iterable[int]) -> list[int]:
        """Ids of a response as a later turn sees it: without thoughts, its turn closed."""
        ids = [i for i in self.split_thoughts(response)[1] if i not in self.stop_ids]
        return [*ids, self.turn_end_id, *self._processor.encode('\n')]

    def split_thoughts(self, response: Iterable[int]) -> tuple[list[int], list[int]]:
        """The ids of a response inside its thought channels, and the others."""
        if self.think_ids is None:
            return [], list(response)
        _, opens, closes = self.think_ids
        thoughts: list[int] = []
        rest: list[int] = []
        inside = False
        for i in response:
            if i in (opens, closes):
                inside = i == opens
            else:
                (thoughts if inside else rest).append(i)
        return thoughts, rest

    def format_response(self, response: str) -> list[int]:
        """Ids of a response with the token that stops it: turn end, or <eos> without turns."""
        return [*self.encode(response), self.stop_ids[-1]]
