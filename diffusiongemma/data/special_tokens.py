"""Finds the special tokens of a vocabulary and their roles."""

import dataclasses
import re

import sentencepiece

# The turn tokens of Gemma 4 and of Gemma 3, in order of preference.
TURN_PIECES = (('<|turn>', '<turn|>'), ('<start_of_turn>', '<end_of_turn>'))
# Gemma 4: the first piece requests thoughts in the system turn, the other two open and close the
# thoughts in a response.
THINK_PIECES = ('<|think|>', '<|channel>', '<channel|>')
# Gemma 4 calls a tool with this piece and waits for its result; later tokens are not its response.
TOOL_RESPONSE_PIECE = '<|tool_response>'
# Pieces that control the model instead of encoding text. The control symbols of the model file are
# always special; released vocabularies store these others as user-defined symbols, which
# sentencepiece would match in plain text.
_STEERING = re.compile(
    r'<\|[^|<>]+\|?>|<[^|<>]+\|>|<(?:start|end)_of_\w+>|<(?:pad|eos|bos|unk|mask)>'
)


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """A set of the special token ids of a vocabulary.

    Attributes:
      ids: the ids of all special tokens by their pieces.
      pad_id, bos_id, eos_id, unk_id, mask_id: the ids of the common special tokens.
      turn_ids: the ids of the tokens that open and close a turn.
      chat_turns: whether turns are used; in a pretrained model they have the type UNUSED.
      stop_ids: the ids of the tokens that end a response.
      think_ids: the ids of the tokens that request thoughts, open and close their channel, or
        None.
    """

    ids: dict[str, int]
    pad_id: int
    bos_id: int
    eos_id: int
    unk_id: int
    mask_id: int
    turn_ids: tuple[int, int]
    chat_turns: bool
    stop_ids: tuple[int, ...]
    think_ids: tuple[int, ...] | None


def special_tokens(processor: sentencepiece.SentencePieceProcessor, source: str) -> SpecialTokens:
    """Returns the special tokens of a vocabulary.

    Args:
      processor: the loaded sentencepiece model.
      source: the file of the model, for error messages.

    Raises:
      ValueError: if a required token is missing.
    """
    pieces = processor.id_to_piece(list(range(processor.get_piece_size())))
    ids = {
        piece: i
        for i, piece in enumerate(pieces)
        if processor.is_control(i) or processor.is_unknown(i) or _STEERING.fullmatch(piece)
    }

    def required(name: str, token_id: int) -> int:
        if token_id < 0:
            raise ValueError(f'The tokenizer model {source} has no {name} token.')
        return token_id

    pad_id, eos_id = required('pad', processor.pad_id()), required('eos', processor.eos_id())
    bos_id = required('bos', processor.bos_id())
    mask_id = required('<mask>', ids.get('<mask>', -1))
    turns = [(ids[a], ids[b]) for a, b in TURN_PIECES if a in ids and b in ids]
    if not turns:
        names = ' or '.join(f'{start} and {end}' for start, end in TURN_PIECES)
        raise ValueError(
            f'The tokenizer model {source} lacks the turn tokens {names}. Use the '
            'tokenizer of a Gemma checkpoint, or train one with '
            'diffusiongemma.data.train_tokenizer.'
        )
    chat_turns = not processor.is_unused(turns[0][0])
    turn_ends = [turns[0][1]]
    if TOOL_RESPONSE_PIECE in ids:
        turn_ends.append(ids[TOOL_RESPONSE_PIECE])
    thinks = tuple(ids[piece] for piece in THINK_PIECES if piece in ids)
    return SpecialTokens(
        ids=ids,
        pad_id=pad_id,
        bos_id=bos_id,
        eos_id=eos_id,
        unk_id=processor.unk_id(),
        mask_id=mask_id,
        turn_ids=turns[0],
        chat_turns=chat_turns,
        stop_ids=(eos_id, *(turn_ends if chat_turns else ())),
        think_ids=thinks if len(thinks) == len(THINK_PIECES) else None,
    )
