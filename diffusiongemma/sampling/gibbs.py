"""A predictor and a corrector for uniform noise, of one denoiser and without training.

Of a canvas x_t at noise level t the denoiser says p(x_0^i | x_t) for every place i. What it would
say without its own token there follows by Bayes' rule, since every token is corrupted by itself:

    p(x_0^i | x_t but i)  is proportional to  p(x_0^i | x_t) / q(x_t^i | x_0^i),
    q(x_t^i | x_0^i) = (1 - t) [x_t^i = x_0^i] + t / V.

The token there, given all the others at the same level, is then clean with probability 1 - t and
noise otherwise:

    p(x_t^i | x_t but i) = (1 - t) p(x_0^i = x_t^i | x_t but i) + t / V.

Drawing tokens anew from this, one after the other, is Gibbs sampling of the canvases at level t:
it leaves their distribution as it is and moves a canvas that an earlier step led astray towards it
(a corrector as of Campbell et al. 2022, arXiv:2205.14987). A token that the denoiser believes only
because it stands there loses that support.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from diffusiongemma.models.arrays import Array
from diffusiongemma.models.vocabulary import most_likely_tokens
from diffusiongemma.sampling import acceptance
from diffusiongemma.sampling.acceptance import AcceptanceRule, Ancestral, Proposal
from diffusiongemma.sampling.epilogue import draw_tokens, per_row
from diffusiongemma.sampling.randomness import fold_in_rows


@flax.struct.dataclass
class SweepState:
    """What a sweep carries from step to step.

    Attributes:
      phase: [B] int32, steps since the latest predictor step began; at 0 the predictor is next.
      noise_level: [B, 1] float32, of the canvas that the latest predictor step made.
      corrected: [B] int32, corrector steps so far.
      predictor: the state of the predictor.
    """

    phase: Int[Array, ' B']
    noise_level: Float[Array, 'B 1']
    corrected: Int[Array, ' B']
    predictor: Any


@dataclasses.dataclass(frozen=True)
class GibbsSweep:
    """Follows every step of a predictor by corrector steps at the noise level that it reached.

    The predictor goes through the noise levels in so many fewer steps. A corrector step draws
    every n-th position anew, n = C / positions, the next ones of a sweep over the canvas; the
    others keep their token. With `positions` = 1 it is exact; of positions that are drawn at the
    same time none sees what becomes of the others. Only for uniform noise: of a masked canvas
    nothing can be drawn anew but masks (`Remask` takes tokens back).

    Attributes:
      predictor: any rule.
      correctors: corrector steps after each predictor step, >= 1.
      positions: positions that a corrector step draws anew, >= 1.
    """

    predictor: AcceptanceRule = Ancestral()
    correctors: int = 1
    positions: int = 8

    def __post_init__(self) -> None:
        if self.correctors < 1 or self.positions < 1:
            raise ValueError(
                f'correctors and positions must be >= 1, got {self.correctors} and '
                f'{self.positions}; without correctors, name the predictor alone.'
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
                'Remask, which takes tokens back.'
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

        def either(predicted: jax.Array, corrected: jax.Array) -> jax.Array:
            return jnp.where(per_row(predicts, predicted), predicted, corrected)

        return either(predicted, corrected), SweepState(
            phase=(state.phase + 1) % (1 + self.correctors),
            noise_level=either(
                jnp.broadcast_to(reached, state.noise_level.shape), state.noise_level
            ),
            corrected=state.corrected + ~predicts,
            predictor=jax.tree.map(either, predictor, state.predictor),
        )

    def correct(
        self, proposal: Proposal, noise_level: Float[Array, 'B 1'], corrected: Int[Array, ' B']
    ) -> Int[Array, 'B C']:
        """Returns the canvas [B, C] with some positions drawn anew.

        Args:
          proposal: what the denoiser says of the canvas.
          noise_level: [B, 1] float32, of the canvas; where it is 0 nothing is noise any more,
            and the canvas stays as it is.
          corrected: [B] int32, corrector steps before this one.
        """
        length, size = proposal.canvas.shape[-1], proposal.vocab_size
        assert size is not None  # `next_canvas` refuses masks
        logits = proposal.logits
        assert logits is not None  # a rule that reads them is offered them
        level = jnp.maximum(noise_level, jnp.finfo(jnp.float32).tiny)
        gain = jnp.log1p(size * (1 - level) / level) / proposal.temperature  # [B, 1]
        here = jnp.arange(logits.shape[-1]) == proposal.canvas[..., None]
        others = logits - jnp.where(here, gain[..., None], 0.0)  # [B, C, V]
        uniform_keys, token_keys = (fold_in_rows(proposal.keys, n) for n in (1, 2))
        uniform = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(uniform_keys)
        drawn = jnp.where(uniform < level, proposal.noise, draw_tokens(others, token_keys))
        drawn = jnp.where(proposal.greedy, most_likely_tokens(others), drawn)
        parts = -(-length // self.positions)
        turn = jnp.arange(length) % parts == (corrected % parts)[:, None]  # [B, C]
        return jnp.where(turn & proposal.open & (noise_level > 0), drawn, proposal.canvas)
