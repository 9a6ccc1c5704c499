"""Converts a tokenizer.json of Hugging Face's `tokenizers` to a sentencepiece model.

Gemma 4's checkpoints have only this file. It was made from a sentencepiece model and is converted
back to one; a pipeline with steps other than Gemma's is an error. Runs of more than 31 spaces are
split as in sentencepiece, longest piece first, and not as in `tokenizers`.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from diffusiongemma.data.vocabulary import (
    SPACE,
    PieceType,
    scores_of_merges,
    sentencepiece_model,
)

_NORMALIZER = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': SPACE}
# The normalizer leaves no spaces to split at, so files with and without this step are equivalent.
_PRE_TOKENIZERS = (
    None,
    {
        'type': 'Split',
        'pattern': {'String': ' '},
        'behavior': 'MergedWithPrevious',
        'invert': False,
    },
)
_MODEL = {
    'type': 'BPE',
    'byte_fallback': True,
    'continuing_subword_prefix': (None, ''),
    'end_of_word_suffix': (None, ''),
    'dropout': (None, 0.0),
    'ignore_merges': (None, False),
}
_WHITE = f'{SPACE}\n\t'
_ADDED_FLAGS = ('single_word', 'lstrip', 'rstrip')


def model_from_tokenizer_json(content: bytes, source: str) -> bytes:
    """Returns the serialized sentencepiece model that a tokenizer.json was made from.

    Args:
      content: the content of the file.
      source: the name of the file, for error messages.

    Raises:
      ValueError: if it is not valid JSON, not a Gemma tokenizer, or incomplete.
    """
    try:
        parsed = json.loads(content)
    except ValueError as error:
        raise ValueError(f'{source} is not valid JSON ({error}); copy it again.') from error
    if not isinstance(parsed, dict) or not isinstance(parsed.get('model'), dict):
        raise ValueError(f'{source} is not a tokenizer.json: it has no "model".')
    _check_pipeline(parsed, source)
    id_of, types = _vocabulary(parsed, source)
    pieces = list(id_of)
    merges = [
        tuple(pair.split(' ')) if isinstance(pair, str) else tuple(pair)
        for pair in parsed['model'].get('merges', ())
    ]
    if any(len(pair) != 2 for pair in merges):
        raise ValueError(f'{source} has a merge that is not a pair of pieces.')
    pairs = [(first, second) for first, second in merges]
    runs = _runs_merged_first(merges)
    types = [PieceType.USER_DEFINED if p in runs else t for p, t in zip(pieces, types, strict=True)]
    scores = scores_of_merges(pieces, types, pairs, source)
    return sentencepiece_model(pieces, scores, types, source)


def _runs_merged_first(merges: Sequence[tuple[str, ...]]) -> set[str]:
    """Returns the runs of one white-space character that are merged before anything else.

    In sentencepiece these are user-defined pieces: the longest one always matches, independent of
    the text around it. Some files store them as added tokens, others as the first merges.
    """
    unions = (left + right for left, right in merges)
    return set(
        itertools.takewhile(lambda piece: piece[0] in _WHITE and len(set(piece)) == 1, unions)
    )


def _check_pipeline(parsed: Mapping[str, Any], source: str) -> None:
    """Raises ValueError if the file prepares text differently from Gemma's tokenizers."""
    problems = []
    if parsed.get('normalizer') != _NORMALIZER:
        problems.append('normalizer')
    if parsed.get('pre_tokenizer') not in _PRE_TOKENIZERS:
        problems.append('pre_tokenizer')
    for name, expected in _MODEL.items():
        value = parsed['model'].get(name)
        if value not in expected if isinstance(expected, tuple) else value != expected:
            problems.append(f'model.{name}={value!r}')
    for token in parsed.get('added_tokens', ()):
        if any(token.get(flag) for flag in _ADDED_FLAGS):
            problems.append(f'added token {token.get("content")!r}')
    if problems:
        raise ValueError(
            f'{source}: {", ".join(problems[:5])} is not as in the tokenizers of Gemma (BPE with '
            'byte fallback, spaces replaced by U+2581); only those can be read.'
        )


def _vocabulary(parsed: Mapping[str, Any], source: str) -> tuple[dict[str, int], list[int]]:
    """Returns the id of every piece, ordered by id, and the type of every piece."""
    added = {token['content']: token for token in parsed.get('added_tokens', ())}
    id_of = dict(parsed['model'].get('vocab', {}))
    for content, token in added.items():
        if id_of.setdefault(content, token['id']) != token['id']:
            raise ValueError(
                f'{source}: {content!r} has the id {id_of[content]} in the vocabulary and '
                f'{token["id"]} among the added tokens.'
            )
    id_of = dict(sorted(id_of.items(), key=lambda item: item[1]))
    if list(id_of.values()) != list(range(len(id_of))):
        raise ValueError(f'{source}: the ids of its {len(id_of)} pieces are not 0, 1, 2, ...')
    bytes_ = {f'<0x{byte:02X}>' for byte in range(256)}

    def kind(piece: str) -> PieceType:
        if piece in added:
            return PieceType.CONTROL if added[piece].get('special') else PieceType.USER_DEFINED
        return PieceType.BYTE if piece in bytes_ else PieceType.NORMAL

    return id_of, [kind(piece) for piece in id_of]
