"""Which pieces of a vocabulary stand for no text, and what each is for."""

import dataclasses
import re

import sentencepiece

# The turn tokens of Gemma 4 and of Gemma 3, in order of preference.
TURN_PIECES = (('<|turn>', '<turn|>'), ('<start_of_turn>', '<end_of_turn>'))
# Gemma 4: asks for thoughts in the system turn; they stand between the other two in a response.
THINK_PIECES = ('<|think|>', '<|channel>', '<channel|>')
# Gemma 4 hands over to a tool here, and waits: nothing that follows is its response.
TOOL_RESPONSE_PIECE = '<|tool_response>'
# Pieces that steer the model rather than stand for text. Control symbols of the model file are
# always among them; released vocabularies hold the others as user-defined symbols, which
# sentencepiece would find in plain text.
_STEERING = re.compile(
    r'<\|[^|<>]+\|?>|<[^|<>]+\|>|<(?:start|end)_of_\w+>|<(?:pad|eos|bos|unk|mask)>'
)


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that steer a model.

    Attributes:
      ids: of all of them, by their pieces.
      pad_id, bos_id, eos_id, unk_id, mask_id: the common ones.
      turn_ids: of the tokens that open and close a turn.
      chat_turns: whether these are used: a pretrained model's have the type UNUSED.
      stop_ids: tokens after which a response is over.
      think_ids: of the tokens that ask for thoughts, open and close their channel, or None.
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
    """Finds the special tokens of a vocabulary.

    Args:
      processor: of the sentencepiece model.
      source: where it came from, for error messages.

    Raises:
      ValueError: one that is needed is missing.
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
