"""A predictor-corrector rule for uniform noise that needs no additional training.

For a canvas x_t at noise level t, the denoiser predicts p(x_0^i | x_t) at every position i. The
prediction without the token at position i itself follows from Bayes' rule, because tokens are
corrupted independently:

    p(x_0^i | x_t but i)  is proportional to  p(x_0^i | x_t) / q(x_t^i | x_0^i),
    q(x_t^i | x_0^i) = (1 - t) [x_t^i = x_0^i] + t / V.

Given all other tokens at the same level, the token at position i is then clean with probability
1 - t and noise otherwise:

    p(x_t^i | x_t but i) = (1 - t) p(x_0^i = x_t^i | x_t but i) + t / V.

Redrawing tokens from this distribution one after the other is Gibbs sampling of canvases at level
t: it preserves their distribution and moves a canvas with errors of earlier steps towards it (a
corrector in the sense of Campbell et al. 2022, arXiv:2205.14987). A token that is likely only
because it is already in the canvas loses this support.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from diffusiongemma.models.arrays import Array
from diffusiongemma.models.vocabulary import most_likely_tokens
from diffusiongemma.sampling import acceptance
from diffusiongemma.sampling.acceptance import AcceptanceRule, Ancestral, Proposal
from diffusiongemma.sampling.epilogue import draw_tokens, per_row
from diffusiongemma.sampling.randomness import fold_in_rows


@flax.struct.dataclass
class SweepState:
    """The state of a sweep between steps.

    Attributes:
      phase: [B] int32, the number of steps in the current cycle; at 0 the predictor is next.
      noise_level: [B, 1] float32, the level of the canvas after the latest predictor step.
      corrected: [B] int32, the number of corrector steps so far.
      predictor: the state of the predictor.
    """

    phase: Int[Array, ' B']
    noise_level: Float[Array, 'B 1']
    corrected: Int[Array, ' B']
    predictor: Any


@dataclasses.dataclass(frozen=True)
class GibbsSweep:
    """A rule that runs corrector steps after each predictor step, at the same noise level.

    The predictor covers the noise levels in correspondingly fewer steps. A corrector step redraws
    every n-th position, n = C / positions, as part of a sweep over the canvas; all others keep
    their token. It is exact for `positions` = 1; positions that are redrawn together do not see
    each other's new token. It is only for uniform noise: in a masked canvas, only masks could be
    redrawn (`Remask` reopens tokens instead).

    Attributes:
      predictor: the rule of predictor steps.
      correctors: the number of corrector steps after each predictor step, >= 1.
      positions: the number of positions that a corrector step redraws, >= 1.
    """

    predictor: AcceptanceRule = Ancestral()
    correctors: int = 1
    positions: int = 8

    def __post_init__(self) -> None:
        if self.correctors < 1 or self.positions < 1:
            raise ValueError(
                f'correctors and positions must be >= 1, got {self.correctors} and '
                f'{self.positions}; without correctors, use the predictor alone.'
            )

    def first_state(self, canvas: Int[Array, 'B C']) -> SweepState:
        """See `StatefulRule`."""
        zeros = jnp.zeros(canvas.shape[0], jnp.int32)
        return SweepState(
            phase=zeros,
            noise_level=jnp.ones((zeros.size, 1), jnp.float32),
            corrected=zeros,
            predictor=acceptance.first_state(self.predictor, canvas),
        )

    def next_canvas(
        self, proposal: Proposal, state: SweepState
    ) -> tuple[Int[Array, 'B C'], SweepState]:
        """See `StatefulRule`."""
        if proposal.vocab_size is None:
            raise ValueError(
                'GibbsSweep is for uniform noise, and this model was trained with masks: use '
                'Remask, which masks tokens again.'
            )
        step = proposal.noise_level - proposal.next_noise_level
        reached = jnp.maximum(proposal.noise_level - (1 + self.correctors) * step, 0.0)
        predicted, predictor = acceptance.next_canvas(
            self.predictor,
            dataclasses.replace(proposal, next_noise_level=reached),
            state.predictor,
        )
        corrected = self.correct(proposal, state.noise_level, state.corrected)
        predicts = state.phase == 0  # [B]

        def select(predicted: jax.Array, corrected: jax.Array) -> jax.Array:
            return jnp.where(per_row(predicts, predicted), predicted, corrected)

        return select(predicted, corrected), SweepState(
            phase=(state.phase + 1) % (1 + self.correctors),
            noise_level=select(
                jnp.broadcast_to(reached, state.noise_level.shape), state.noise_level
            ),
            corrected=state.corrected + ~predicts,
            predictor=jax.tree.map(select, predictor, state.predictor),
        )

    def correct(
        self, proposal: Proposal, noise_level: Float[Array, 'B 1'], corrected: Int[Array, ' B']
    ) -> Int[Array, 'B C']:
        """Returns the canvas [B, C] with some positions redrawn.

        Args:
          proposal: the denoiser's predictions for the canvas.
          noise_level: [B, 1] float32, the level of the canvas; at 0 it has no noise and does not
            change.
          corrected: [B] int32, the number of corrector steps before this one.
        """
        length, size = proposal.canvas.shape[-1], proposal.vocab_size
        assert size is not None  # `next_canvas` refuses masked diffusion
        logits = proposal.logits
        assert logits is not None  # always set for a rule that reads them
        level = jnp.maximum(noise_level, np.finfo(np.float32).tiny)
        # The logits are shaped, that is divided by the temperature, and so is the gain.
        gain = jnp.log1p(size * (1 - level) / level) / proposal.temperature  # [B, 1]
        is_current = jnp.arange(logits.shape[-1]) == proposal.canvas[..., None]  # [B, C, V]
        others = logits - jnp.where(is_current, gain[..., None], 0.0)  # [B, C, V]
        uniform_keys, token_keys = (fold_in_rows(proposal.keys, n) for n in (1, 2))
        uniform = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(uniform_keys)  # [B, C]
        draws = jnp.where(uniform < level, proposal.noise, draw_tokens(others, token_keys))
        draws = jnp.where(proposal.greedy, most_likely_tokens(others), draws)
        parts = -(-length // self.positions)
        turn = jnp.arange(length) % parts == (corrected % parts)[:, None]  # [B, C]
        return jnp.where(turn & proposal.open & (noise_level > 0), draws, proposal.canvas)
