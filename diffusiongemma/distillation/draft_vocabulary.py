"""Selects the draft vocabulary: the tokens that the head of a light denoiser scores."""

import collections
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging

from diffusiongemma.data.packing import tokenize
from diffusiongemma.data.sources import Source

MAX_COUNTED = 20_000  # the number of examples of each source whose tokens are counted


def tokenized(sources: Iterable[Source], tokenizer: Any) -> Iterator[np.ndarray]:
    """Yields the tokens of up to `MAX_COUNTED` examples of each source."""
    for source in sources:
        for index in range(min(len(source), MAX_COUNTED)):
            yield tokenize(source[index], tokenizer).tokens


def needed_tokens(tokenizer: Any, size: int) -> list[int]:
    """Returns the tokens that every draft vocabulary has: stop, pad and single-byte tokens.

    Raises:
      ValueError: if there are more than `size`, or the whole vocabulary has fewer than `size`.
    """
    if size > tokenizer.vocab_size:
        raise ValueError(
            f'config.light.draft_vocab_size={size} is larger than the vocabulary of '
            f'{tokenizer.vocab_size} tokens; use 0 for all of them.'
        )
    single = [i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1]
    needed = sorted({*tokenizer.stop_ids, tokenizer.pad_id, *single})
    if len(needed) > size:
        raise ValueError(
            f'config.light.draft_vocab_size={size} has no room for the {len(needed)} stop tokens '
            'and tokens of a single byte; use a larger one, or 0 for the whole vocabulary.'
        )
    return needed


def draft_vocabulary(
    documents: Iterable[Sequence[int] | np.ndarray], tokenizer: Any, size: int
) -> np.ndarray:
    """Returns the most frequent tokens of some texts, and the tokens that any text may need.

    The latter are stop tokens, the pad token and all tokens of a single byte, including digits.
    Missing tokens do not affect correctness, because the verify pass scores the whole vocabulary;
    a draft is only rejected at such a token.

    Args:
      documents: token ids of texts that are similar to those that will be drafted.
      tokenizer: a `Tokenizer`.
      size: the number of tokens Vd.

    Returns:
      [Vd] int32 token ids in increasing order.

    Raises:
      ValueError: if the size is impossible, see `needed_tokens`.
    """
    chosen = dict.fromkeys(needed_tokens(tokenizer, size))
    counts: collections.Counter[int] = collections.Counter()
    for document in documents:
        counts.update(np.asarray(document).tolist())
    by_count = (token for token, _ in counts.most_common())
    others = (i for i in range(tokenizer.vocab_size))
    for token in (*by_count, *others):
        if len(chosen) == size:
            break
        chosen.setdefault(token)
    total = max(sum(counts.values()), 1)
    covered = sum(count for token, count in counts.items() if token in chosen) / total
    logging.info('draft vocabulary: %d tokens, %.2f%% of the text', size, 100 * covered)
    return np.sort(np.fromiter(chosen, np.int32))
