"""Selects the positions in a row at which drafts start."""

import jax
import jax.numpy as jnp

from diffusiongemma.distillation.canvases import Batch


def anchor_places(batch: Batch, lookup_ngram: int = 0, prompts: bool = False) -> jax.Array:
    """Returns where a draft may start, [B, L] bool: response tokens that are not the last.

    With `prompts`, prompt tokens are included. With `lookup_ngram`, a position is excluded if the
    last `lookup_ngram` tokens up to it occur earlier in its document.
    """
    segment_ids = batch['segment_ids']
    is_target = batch['target_mask']
    if prompts:  # except for the first token of a document, which has no hidden state before it
        is_target = (segment_ids > 0) & (batch['positions'] > 0)
    followed = jnp.roll(is_target, -1, axis=1) & (jnp.roll(segment_ids, -1, axis=1) == segment_ids)
    places = (is_target & followed).at[:, -1].set(False)  # `roll` wraps around
    return places & ~occurs_earlier(batch, lookup_ngram) if lookup_ngram else places


def occurs_earlier(batch: Batch, ngram: int) -> jax.Array:
    """Returns whether the last `ngram` tokens occur earlier in their document, [B, L] bool."""
    tokens, segments = batch['tokens'], batch['segment_ids']
    length = tokens.shape[1]
    equal = tokens[:, :, None] == tokens[:, None, :]
    equal &= segments[:, :, None] == segments[:, None, :]  # [B, L, L]
    runs = equal
    for k in range(1, ngram):  # the tokens k positions earlier must be equal as well
        runs &= jnp.pad(equal, [(0, 0), (k, 0), (k, 0)])[:, :length, :length]
    index = jnp.arange(length)
    return jnp.any(runs & (index < index[:, None]), axis=-1)  # [B, L], over earlier tokens


def check_count(count: int, row_length: int) -> None:
    """Raises ValueError if a row has too few tokens for `count` anchors."""
    if count >= row_length:
        raise ValueError(
            f'config.drafting.anchors_per_row={count} do not fit a row of {row_length} tokens; use '
            f'at most {row_length - 1}, or longer rows.'
        )


def draw_anchors(key: jax.Array, places: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Draws distinct positions of each row, uniformly.

    Args:
      key: a PRNG key.
      places: [B, L] bool, the possible positions.
      count: the number of anchors A.

    Returns:
      The anchors [B, A] int32 in increasing order, and which of them are used, [B, A] bool: False
      for the last ones if a row has fewer than A possible positions.

    Raises:
      ValueError: if count is not less than L.
    """
    length = places.shape[1]
    check_count(count, length)
    drawn = jnp.where(places, jax.random.uniform(key, places.shape), -1.0)
    scores, anchors = jax.lax.top_k(drawn, count)  # [B, A], a draw without replacement
    # No draft starts at the last token of a row, so this index marks unused anchors.
    anchors = jnp.sort(jnp.where(scores >= 0, anchors, length - 1), axis=1)
    return anchors.astype(jnp.int32), anchors < length - 1
