"""Converts examples to rows of a training batch: example -> document -> packed rows.

A document is one tokenized example: its prompt, its response and the turn end that stops it.
Several documents share a row; `segment_ids` distinguishes them (1, 2, ... in order, 0 = empty).
The response of each document is cut into separate canvases, which start at its first token or,
for a share of the documents, at a random one. Documents are never truncated: one that fits no row
is dropped and counted.

The keys of a batch, with B rows of length L, N canvases per row, C tokens per canvas:

    tokens              [B, L] int32     documents, pad id elsewhere
    segment_ids         [B, L] int32     1.. = document, 0 = empty
    positions           [B, L] int32     position inside the document, from 0
    target_mask         [B, L] bool      True on the response and its turn end
    canvas_tokens       [B, N, C] int32  response in pieces of C; pad id after its last token
    canvas_segment_ids  [B, N] int32     document of the canvas, 0 = unused
    canvas_starts       [B, N] int32     position in the document of the canvas's first token
    canvas_offsets      [B, N] int32     index in the row of the canvas's first token

Without canvases (N = 0, for autoregressive training) a batch only has the first four keys. With
the teacher's k most likely tokens (`RowLayout.top_k`) it has three more. Their values at index i
describe token i + 1, as causal logits do, and are only valid if that token is a target:

    teacher_ids         [B, L, k] int32    the tokens
    teacher_log_probs   [B, L, k] float16  their log-probabilities
    teacher_log_rest    [B, L] float16     log of the total probability of all other tokens
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from absl import logging
from jaxtyping import Int

from diffusiongemma.errors import check_range

Features = dict[str, np.ndarray]

TEACHER_KEYS = ('teacher_ids', 'teacher_log_probs', 'teacher_log_rest')
# The key of an example's response as tokens, [R] int32, which need not end in a stop token.
RESPONSE_IDS = 'response_ids'


@runtime_checkable
class PromptTokenizer(Protocol):
    """The part of `Tokenizer` that packing needs."""

    pad_id: int

    def format_prompt(self, prompt: str) -> list[int]: ...

    def format_response(self, response: str) -> list[int]: ...


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """A description of the sizes of a packed row.

    Attributes:
      row_length: the number of tokens in a row, L.
      canvases_per_row: the number of canvas slots in a row, N; 0 leaves the canvases out.
      canvas_length: the number of tokens in a canvas, C.
      pad_id: the token id at positions without a document.
      random_offset_rate: the share of documents whose canvases start at a random token of the
        response's first canvas (earlier tokens are only prefix). A decoder that starts a canvas
        wherever the previous one was cut short needs such examples.
      top_k: the number of tokens per teacher distribution, which the examples must then contain;
        0 leaves the distributions out.
      one_canvas: whether a document gets one random canvas of its response instead of all.
    """

    row_length: int
    canvases_per_row: int
    canvas_length: int
    pad_id: int = 0
    random_offset_rate: float = 0.0
    top_k: int = 0
    one_canvas: bool = False

    def __post_init__(self) -> None:
        check_range('random_offset_rate', self.random_offset_rate, 0, 1)
        check_range('row_length', self.row_length, 1)
        check_range('canvases_per_row', self.canvases_per_row, 0)
        if self.canvases_per_row:
            check_range('canvas_length', self.canvas_length, 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """A tokenized example.

    Attributes:
      tokens: [T] int32, prompt and response.
      prompt_length: the index of the response's first token.
      teacher: the features of the example in `TEACHER_KEYS`: the teacher's distribution at each
        of the R tokens of the response, [R, k] or [R].
    """

    tokens: Int[np.ndarray, ' T']
    prompt_length: int
    teacher: Features = dataclasses.field(default_factory=dict)

    @property
    def response(self) -> Int[np.ndarray, ' R']:
        """Returns the response with the token that stops it, [R] int32."""
        return self.tokens[self.prompt_length :]


def tokenize(example: Mapping[str, Any], tokenizer: PromptTokenizer) -> Document:
    """Returns the document of an example {'prompt', 'response'}, including `TEACHER_KEYS` if any.

    If the example has `RESPONSE_IDS`, they are used unchanged as its response.
    """
    prompt = tokenizer.format_prompt(example['prompt'])
    if RESPONSE_IDS in example:
        response = [int(token) for token in example[RESPONSE_IDS]]
    else:
        response = tokenizer.format_response(example['response'])
    teacher = {name: example[name] for name in TEACHER_KEYS if name in example}
    return Document(np.asarray(prompt + response, np.int32), len(prompt), teacher)


def cut_canvases(
    response: Int[np.ndarray, ' R'], canvas_length: int, pad_id: int = 0
) -> Int[np.ndarray, 'n {canvas_length}']:
    """Returns a response [R] cut into canvases [ceil(R / C), C], the last padded with pad_id."""
    count = -(-len(response) // canvas_length)
    canvases = np.full((count * canvas_length,), pad_id, np.int32)  # [n * C]
    canvases[: len(response)] = response
    return canvases.reshape(count, canvas_length)


def misfit(document: Document, layout: RowLayout) -> str | None:
    """Returns why a document does not fit a row of this layout, or None if it fits."""
    if len(document.tokens) > layout.row_length:
        return f'longer than row_length={layout.row_length} tokens'
    canvases = -(-len(document.response) // layout.canvas_length) if layout.canvases_per_row else 0
    if canvases > layout.canvases_per_row:
        return (
            f'response longer than canvases_per_row={layout.canvases_per_row} canvases of '
            f'{layout.canvas_length} tokens'
        )
    return None


def draw_offset(document: Document, layout: RowLayout, rng: np.random.Generator) -> int:
    """Returns the index in the response at which the document's canvases start, usually 0."""
    if rng.random() >= layout.random_offset_rate:
        return 0
    return int(rng.integers(min(layout.canvas_length, len(document.response))))


def draw_canvas(
    document: Document, layout: RowLayout, offset: int, rng: np.random.Generator
) -> int | None:
    """Returns the random index of the document's only canvas, or None if it keeps all canvases."""
    if not layout.one_canvas:
        return None
    return int(rng.integers(-(-(len(document.response) - offset) // layout.canvas_length)))


def document_features(
    document: Document, layout: RowLayout, offset: int = 0, canvas: int | None = None
) -> Features:
    """Returns the features of a document: T tokens with their mask, n canvases with their starts.

    Canvases begin at token `offset` of the response. With an index `canvas`, only that canvas is
    kept.
    """
    length = len(document.tokens)
    features = {
        'tokens': document.tokens,  # [T]
        'target_mask': np.arange(length) >= document.prompt_length,  # [T]
    }
    if layout.top_k:
        features |= _teacher_features(document, layout.top_k)  # [T, k], [T, k], [T]
    if layout.canvases_per_row:
        canvases = cut_canvases(document.response[offset:], layout.canvas_length, layout.pad_id)
        first = document.prompt_length + offset
        starts = first + layout.canvas_length * np.arange(len(canvases))  # [n]
        selection = slice(None) if canvas is None else slice(canvas, canvas + 1)
        features['canvas_tokens'] = canvases[selection]  # [n, C]
        features['canvas_starts'] = starts.astype(np.int32)[selection]  # [n]
    return features


def _teacher_features(document: Document, top_k: int) -> Features:
    """Returns the teacher's features of token i + 1 at each index i; 0 outside the response."""
    if not document.teacher:
        raise ValueError(
            f'config.targets.top_k_logits={top_k}, but the data hold no distributions of the '
            'teacher: write the targets again, or set it to 0 to run the teacher in training.'
        )
    actual, expected = document.teacher['teacher_ids'].shape, (len(document.response), top_k)
    if actual != expected:
        raise ValueError(
            f'the data hold [tokens, k] = {actual} most likely tokens of the teacher for a '
            f'response where {expected} are needed: they were written with another '
            'tokenizer or another config.targets.top_k_logits. Write the targets again.'
        )
    features = {}
    for name, value in document.teacher.items():
        features[name] = np.zeros((len(document.tokens), *value.shape[1:]), value.dtype)
        features[name][document.prompt_length - 1 : -1] = value  # [R, k] or [R]
    return features


def _finish_row(row: Features) -> Features:
    """Returns a row with the keys of a batch, including the index of each canvas in the row."""
    segment_ids, positions = row['tokens_segment_ids'], row['tokens_positions']
    finished = {
        'tokens': row['tokens'],
        'segment_ids': segment_ids,
        'positions': positions,
        'target_mask': row['target_mask'],
    } | {name: row[name] for name in TEACHER_KEYS if name in row}
    if 'canvas_tokens' not in row:
        return finished
    canvas_segment_ids = row['canvas_starts_segment_ids']  # [N]
    first = np.flatnonzero((positions == 0) & (segment_ids > 0))  # first token of document 1, 2, ..
    used = canvas_segment_ids > 0
    offsets = np.zeros_like(row['canvas_starts'])
    offsets[used] = first[canvas_segment_ids[used] - 1] + row['canvas_starts'][used]
    return finished | {
        'canvas_tokens': row['canvas_tokens'],
        'canvas_segment_ids': canvas_segment_ids,
        'canvas_starts': row['canvas_starts'],
        'canvas_offsets': offsets,
    }


def pack_rows(
    features: grain.IterDataset, layout: RowLayout, *, bins: int = 64, seed: int = 0
) -> grain.IterDataset:
    """Packs a stream of `document_features` into rows with the first-fit heuristic.

    Args:
      features: the documents to pack; each of them must fit a row by itself, see `misfit`.
      layout: the sizes of a row.
      bins: the number of rows that are open at a time. More bins leave fewer empty tokens but
        read further ahead.
      seed: the seed of the order in which finished rows are returned.

    Returns:
      A stream of rows, which have the features of a batch without the leading B.
    """
    lengths = {'tokens': layout.row_length, 'target_mask': layout.row_length}
    padding = {'tokens': layout.pad_id, 'target_mask': False}
    unnumbered = ['target_mask']  # features whose segments and positions are not needed
    if layout.top_k:
        lengths |= dict.fromkeys(TEACHER_KEYS, layout.row_length)
        padding |= dict.fromkeys(TEACHER_KEYS, 0)
        unnumbered += TEACHER_KEYS
    if layout.canvases_per_row:
        slots = layout.canvases_per_row
        lengths |= {'canvas_tokens': slots, 'canvas_starts': slots}
        padding |= {'canvas_tokens': layout.pad_id, 'canvas_starts': 0}
        unnumbered.append('canvas_tokens')
    packed = grain.experimental.FirstFitPackIterDataset(
        features,
        length_struct=lengths,
        padding_struct=padding,
        num_packing_bins=bins,
        meta_features=unnumbered,
        seed=seed,
    )
    return packed.map(_finish_row)


class DropCounter:
    """A counter of dropped documents by reason, which logs the count at 1, 10, 100, ..."""

    def __init__(self, source: str) -> None:
        self._source = source
        self.counts: collections.Counter[str] = collections.Counter()

    def add(self, reason: str) -> None:
        """Counts one document."""
        self.counts[reason] += 1
        count = self.counts[reason]
        if str(count).strip('0') == '1':
            logging.warning('%s: %d documents dropped so far: %s.', self._source, count, reason)


def pack_examples(
    examples: Iterable[Mapping[str, Any]], tokenizer: PromptTokenizer, layout: RowLayout
) -> Features:
    """Packs a few examples into one batch with as many rows as they need.

    Returns:
      A batch with the keys in the docstring of this module. Documents that fit no row are left
      out, with a warning.

    Raises:
      ValueError: if no document fits a row.
    """
    dropped = DropCounter('pack_examples')
    features = []
    for example in examples:
        document = tokenize(example, tokenizer)
        reason = misfit(document, layout)
        if reason:
            dropped.add(reason)
        else:
            features.append(document_features(document, layout))
    if not features:
        raise ValueError(
            f'No example fits a row of {layout}; dropped: {dict(dropped.counts) or "none"}.'
        )
    stream = grain.MapDataset.source(features).to_iter_dataset(grain.ReadOptions(num_threads=0))
    rows = list(pack_rows(stream, layout, bins=len(features)))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}  # [B, ...]
