"""Builds the attention masks of all passes from positions and segment ids.

A pass runs over M blocks of T queries per row (the causal pass: one block, the sequence;
the denoise pass: M canvases of C tokens). Its keys are a shared prefix of S tokens and
the block itself. True means visible.
"""

from typing import NamedTuple

import flax.struct
import jax.numpy as jnp
from jaxtyping import Bool, Int

from diffusiongemma.models.arrays import Array


class KeyTokens(NamedTuple):
    """The tokens of the S keys of a prefix.

    Attributes:
      positions: [B, S] int32, the position of each token in its document.
      segment_ids: [B, S] int32, the document of each token; 0 for an empty slot.
    """

    positions: Int[Array, 'B S']
    segment_ids: Int[Array, 'B S']


@flax.struct.dataclass
class AttentionMask:
    """The visible keys of each query, for prefix keys and block keys.

    Attributes:
      prefix: [B, M, T or 1, S] bool.
      block: [B, M, T or 1, T] bool.
    """

    prefix: Bool[Array, 'B M Q S']
    block: Bool[Array, 'B M Q T']

    def rows(self, queries: Int[Array, ' Q']) -> 'AttentionMask':
        """Returns the mask of some of the T queries, by their indices [Q] int32."""

        def pick(mask: Bool[Array, 'B M T S']) -> Bool[Array, 'B M Q S']:
            return mask if mask.shape[2] == 1 else mask[:, :, queries]

        return AttentionMask(pick(self.prefix), pick(self.block))


@flax.struct.dataclass
class CausalMask:
    """A causal mask: a token sees itself and the earlier tokens of its document.

    With a window it sees itself and the window - 1 tokens before it. Padding (segment 0) is only
    visible to padding, and sees no prefix tokens.

    The mask is stored as positions [B, T] and expanded only for the queries whose scores are
    computed at the same time.

    Attributes:
      positions: [B, T] int32, the position of each token in its document.
      segment_ids: [B, T] int32, the document of each token; 0 for padding.
      prefix: the S earlier tokens.
      window: the number of keys that a query sees, including itself, or None.
    """

    positions: Int[Array, 'B T']
    segment_ids: Int[Array, 'B T']
    prefix: KeyTokens
    window: int | None = flax.struct.field(pytree_node=False)

    def rows(self, queries: Int[Array, ' Q']) -> AttentionMask:
        """Returns the mask of some of the T queries, by their indices [Q] int32."""
        positions, segment_ids = self.positions[:, queries], self.segment_ids[:, queries]  # [B, Q]
        return self._of(positions, segment_ids)

    def all_rows(self) -> AttentionMask:
        """Returns the mask of all T queries."""
        return self._of(self.positions, self.segment_ids)

    def _of(self, positions: Int[Array, 'B Q'], segment_ids: Int[Array, 'B Q']) -> AttentionMask:
        def visible(keys: KeyTokens) -> Bool[Array, 'B 1 Q S']:
            same = segment_ids[:, :, None] == keys.segment_ids[:, None, :]  # [B, Q, keys]
            distance = positions[:, :, None] - keys.positions[:, None, :]
            near = distance >= 0
            if self.window is not None:
                near &= distance < self.window
            return (same & near)[:, None]  # [B, 1, Q, keys]

        from_prefix = visible(self.prefix) & (self.prefix.segment_ids > 0)[:, None, None, :]
        return AttentionMask(from_prefix, visible(KeyTokens(self.positions, self.segment_ids)))


def canvas_prefix_window(window: int) -> int:
    """Returns the number of prefix tokens that a canvas sees in a sliding layer with a window W.

    It is W - 1 for the whole canvas, as in the public transformers implementation; Google's JAX
    code uses W.
    """
    return window - 1


def canvas_mask(
    starts: Int[Array, 'B M'],
    segment_ids: Int[Array, 'B M'],
    canvas_length: int,
    prefix: KeyTokens,
    window: int | None,
) -> AttentionMask:
    """Returns the mask of the denoise pass: a canvas token sees its whole canvas and the prefix.

    All tokens of a canvas see the same prefix: the tokens of the canvas's document before its
    start, and with a window only the last `canvas_prefix_window(window)` of them. Other canvases
    are not visible.

    Args:
      starts: [B, M] int32, the position of each canvas's first token.
      segment_ids: [B, M] int32, the document of each canvas; 0 for an unused slot.
      canvas_length: the canvas length C.
      prefix: the S clean tokens.
      window: the window of the layer, or None.
    """
    same = segment_ids[:, :, None] == prefix.segment_ids[:, None, :]  # [B, M, S]
    distance = starts[:, :, None] - prefix.positions[:, None, :]  # [B, M, S], 1 = the token before
    visible = same & (prefix.segment_ids > 0)[:, None, :] & (distance >= 1)
    if window is not None:
        visible &= distance <= canvas_prefix_window(window)
    block = jnp.ones((*starts.shape, 1, canvas_length), bool)  # [B, M, 1, C]
    return AttentionMask(prefix=visible[:, :, None, :], block=block)  # prefix: [B, M, 1, S]
