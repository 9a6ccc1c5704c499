"""Where in a row drafts start."""

import jax
import jax.numpy as jnp

from diffusiongemma.distillation.canvases import Batch


def anchor_places(batch: Batch, lookup_ngram: int = 0, prompts: bool = False) -> jax.Array:
    """[B, L] bool, where a draft may start: response tokens that another one follows.

    With `prompts` tokens of prompts too, and with `lookup_ngram` only those where a lookup of so
    many tokens finds nothing.
    """
    segment_ids = batch['segment_ids']
    is_target = batch['target_mask']
    if prompts:  # but not at a document's first token, before which there are no states
        is_target = (segment_ids > 0) & (batch['positions'] > 0)
    followed = jnp.roll(is_target, -1, axis=1) & (jnp.roll(segment_ids, -1, axis=1) == segment_ids)
    places = (is_target & followed).at[:, -1].set(False)
    return places & ~occurs_earlier(batch, lookup_ngram) if lookup_ngram else places


def occurs_earlier(batch: Batch, ngram: int) -> jax.Array:
    """[B, L] bool, whether the `ngram` tokens up to here occur earlier in their document."""
    tokens, segments = batch['tokens'], batch['segment_ids']
    length = tokens.shape[1]
    equal = tokens[:, :, None] == tokens[:, None, :]
    equal &= segments[:, :, None] == segments[:, None, :]  # [B, L, L]
    runs = equal
    for k in range(1, ngram):  # the token k before is equal too
        runs &= jnp.pad(equal, [(0, 0), (k, 0), (k, 0)])[:, :length, :length]
    index = jnp.arange(length)
    return jnp.any(runs & (index < index[:, None]), axis=-1)


def draw_anchors(key: jax.Array, places: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Draws different places of each row, all with the same probability.

    Args:
      key: PRNG key.
      places: [B, L] bool.
      count: A.

    Returns:
      [B, A] int32 in increasing order, and [B, A] bool; false where a row has fewer places.

    Raises:
      ValueError: a row can't have so many.
    """
    length = places.shape[1]
    if count >= length:
        raise ValueError(
            f'anchors_per_row={count} do not fit a row of {length} tokens; use at most '
            f'{length - 1}, or longer rows.'
        )
    drawn = jnp.where(places, jax.random.uniform(key, places.shape), -1.0)
    scores, anchors = jax.lax.top_k(drawn, count)
    # No draft starts at a row's last token: what is not used stands there, after all others.
    anchors = jnp.sort(jnp.where(scores >= 0, anchors, length - 1), axis=1)
    return anchors.astype(jnp.int32), anchors < length - 1
