"""Pads prompts to arrays and checks them."""

from collections.abc import Sequence

import numpy as np


def check_prompts(tokens: np.ndarray, lengths: np.ndarray, vocab_size: int) -> None:
    """Raises ValueError if a length or a token id is out of range."""
    width = tokens.shape[1]
    bad = np.flatnonzero((lengths < 1) | (lengths > width))
    if bad.size:
        raise ValueError(
            f'Prompt lengths must lie in [1, {width}], the width of tokens; row {bad[0]} has '
            f'{lengths[bad[0]]}. An empty prompt needs at least the bos token.'
        )
    inside = np.arange(width) < lengths[:, None]
    wrong = np.argwhere(inside & ((tokens < 0) | (tokens >= vocab_size)))
    if wrong.size:
        row, column = wrong[0]
        raise ValueError(
            f'Token {tokens[row, column]} in row {row}, column {column} is outside the '
            f"model's vocabulary of {vocab_size}. Was the prompt made with another tokenizer?"
        )


def check_fits(lengths: np.ndarray, max_new_tokens: int, limit: int | None) -> None:
    """Raises ValueError if a prompt and its response may exceed the model's positions."""
    longest = int(lengths.max())
    if limit is not None and longest + max_new_tokens > limit:
        raise ValueError(
            f'The prompt in row {int(lengths.argmax())} has {longest} tokens; with '
            f'max_new_tokens={max_new_tokens} that is more than the {limit} positions of the '
            f'model. Shorten the prompt, or lower max_new_tokens to at most {limit - longest}.'
            if longest < limit
            else f'The prompt in row {int(lengths.argmax())} has {longest} tokens, but the model '
            f'has {limit} positions for prompt and response. Shorten the prompt.'
        )


def pad_prompts(
    prompts: Sequence[Sequence[int]],
    pad_id: int = 0,
    *,
    multiple: int = 64,
    width: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads prompts to a common width.

    A sampler compiles once per width, so widths are rounded up to a multiple.

    Args:
      prompts: the token ids of each prompt.
      pad_id: the token id of the padding.
      multiple: the length of the longest prompt is rounded up to a multiple of this number.
      width: an exact width P instead of the rounded one.

    Returns:
      tokens [B, P] int32 and lengths [B] int32.

    Raises:
      ValueError: if there are no prompts, or one is empty or longer than `width`.
    """
    if not prompts:
        raise ValueError('No prompts to pad: pass at least one list of token ids.')
    if multiple < 1:
        raise ValueError(f'multiple must be >= 1, got {multiple}.')
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not lengths.all():
        raise ValueError(
            f'Prompt {int(lengths.argmin())} is empty; a prompt holds at least the bos token.'
        )
    if width is None:
        width = -(-int(lengths.max()) // multiple) * multiple
    if lengths.max() > width:
        raise ValueError(
            f'Prompt {int(lengths.argmax())} has {lengths.max()} tokens and does not fit in '
            f'width={width}. Shorten it or raise the width.'
        )
    tokens = np.full((len(prompts), width), pad_id, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths
