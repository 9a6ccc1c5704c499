"""Builds sentencepiece models from vocabularies that are stored in other formats.

GGUF files and tokenizer.json store the vocabulary of a sentencepiece model, its order of merges
and the type of each piece. After conversion to a sentencepiece model they are used, saved in
bundles and hashed like any `tokenizer.model`.
"""

import enum
from collections.abc import Iterable, Sequence
from typing import Any

from absl import logging
from sentencepiece import sentencepiece_model_pb2

_proto: Any = sentencepiece_model_pb2  # it defines its classes at import, which mypy cannot see
SPACE = '\u2581'  # the character that sentencepiece writes for a space
# Gemma's names of the pieces whose role sentencepiece must know.
UNKNOWN, BEGIN, END, PAD = '<unk>', '<bos>', '<eos>', '<pad>'


class PieceType(enum.IntEnum):
    """The types of pieces, numbered as in sentencepiece and in GGUF."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def sentencepiece_model(
    pieces: Sequence[str], scores: Sequence[float], types: Sequence[int], source: str
) -> bytes:
    """Returns a serialized sentencepiece model of Gemma's kind: BPE with byte fallback.

    Text is not normalized, and no space is added before the first word.

    Args:
      pieces: the pieces in the order of their ids; spaces may be written as ' '.
      scores: the score of each piece; the pair of neighbors whose merged piece has the highest
        score is merged first.
      types: the `PieceType` of each piece.
      source: the file of the vocabulary, for error messages.

    Raises:
      ValueError: if a piece that Gemma's tokenizers need is missing, or a type is unknown.
    """
    missing = [name for name in (UNKNOWN, BEGIN, END, PAD) if name not in pieces]
    if missing:
        raise ValueError(f'the vocabulary of {source} lacks {missing}, which Gemma has.')
    unknown_types = sorted(set(types) - set(PieceType))
    if unknown_types:
        raise ValueError(f'the vocabulary of {source} has pieces of the types {unknown_types}.')
    model = _proto.ModelProto()
    for piece, score, kind in zip(pieces, scores, types, strict=True):
        kind = PieceType.UNKNOWN if piece == UNKNOWN else kind
        model.pieces.add(piece=piece.replace(' ', SPACE), score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = _proto.TrainerSpec.BPE
    trainer.vocab_size = len(pieces)
    trainer.byte_fallback = True
    trainer.unk_piece, trainer.unk_id = UNKNOWN, pieces.index(UNKNOWN)
    trainer.bos_piece, trainer.bos_id = BEGIN, pieces.index(BEGIN)
    trainer.eos_piece, trainer.eos_id = END, pieces.index(END)
    trainer.pad_piece, trainer.pad_id = PAD, pieces.index(PAD)
    normalizer.name = 'identity'
    normalizer.add_dummy_prefix = False
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    data: bytes = model.SerializeToString()
    return data


def scores_of_merges(
    pieces: Sequence[str],
    types: Sequence[int],
    merges: Iterable[tuple[str, str]],
    source: str,
) -> list[float]:
    """Returns piece scores with which sentencepiece merges in the order of `merges`.

    A list of merges ranks pairs, while a score ranks the merged piece. The two are equivalent if
    all pairs that form the same piece are adjacent in the list, as in every list that was made
    from scores. User-defined pieces match before any merge, so their rank is ignored.

    Args:
      pieces: the pieces in the order of their ids, with spaces as in sentencepiece.
      types: the `PieceType` of each piece.
      merges: pairs of pieces, in the order in which they are merged.
      source: the file of the vocabulary, for error messages.

    Raises:
      ValueError: if the pairs that form one piece are not adjacent, or if a merged piece is not
        in the vocabulary.
    """
    types_of = dict(zip(pieces, types, strict=True))
    normal = {piece for piece, kind in types_of.items() if kind == PieceType.NORMAL}
    rank_of: dict[str, int] = {}
    listed: dict[str, int] = {}  # the number of pairs that form each piece
    last = None
    for rank, (left, right) in enumerate(merges):
        union = left + right
        if union not in types_of:
            raise ValueError(f'{source}: {union!r} is merged, but is not in the vocabulary.')
        if union not in normal:
            continue
        if union != last:
            if union in rank_of:
                raise ValueError(
                    f'{source}: the merges that become {union!r} are not next to each other; '
                    'sentencepiece cannot merge in this order.'
                )
            rank_of[union] = rank
            last = union
        listed[union] = listed.get(union, 0) + 1
    unlisted = [
        piece
        for piece in normal
        if len(piece) > 1
        and sum(piece[:i] in normal and piece[i:] in normal for i in range(1, len(piece)))
        > listed.get(piece, 0)
    ]
    if unlisted:
        logging.warning(
            '%s: %d pieces, such as %r, can be merged from two pieces in ways that the list of '
            'merges does not have; sentencepiece may split texts with them differently.',
            source, len(unlisted), min(unlisted),
        )  # fmt: skip
    return [-float(rank_of.get(piece, len(rank_of))) for piece in pieces]


def mark_unused(model: bytes, pieces: Iterable[str]) -> bytes:
    """Returns a sentencepiece model in which `pieces` have the type UNUSED."""
    content = _proto.ModelProto.FromString(model)
    names = set(pieces)
    for piece in content.pieces:
        if piece.piece in names:
            piece.type = PieceType.UNUSED
    data: bytes = content.SerializeToString()
    return data
