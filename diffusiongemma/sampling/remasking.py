"""Masked diffusion that takes tokens back: what was settled in doubt becomes a mask again."""

import dataclasses
from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Float, Int

from diffusiongemma.models.arrays import Array
from diffusiongemma.sampling import acceptance
from diffusiongemma.sampling.acceptance import AcceptanceRule, EntropyBound, Proposal


@flax.struct.dataclass
class RemaskState:
    """What is remembered of the settled tokens.

    Attributes:
      confidences: [B, C] float32, the probability with which each token was settled; of tokens
        that the canvas started from 0, so that they are the first to be taken back.
      rule: the state of the rule that settles.
    """

    confidences: Float[Array, 'B C']
    rule: Any


@dataclasses.dataclass(frozen=True)
class Remask:
    """Settles tokens by another rule, and takes those of least confidence back once none is open.

    Under masked corruption a settled token stays, and one that was settled too soon spoils what
    follows from it. Here a canvas without a mask loses its `count` tokens that were settled with
    the lowest probability, as the denoiser saw it *then* (it has learned to repeat what stands in
    the canvas, so what it says of a settled token now tells little). They are predicted once more,
    with all others in sight, until the stopping rule or the limit of steps ends it (remasking by
    remembered confidence: Wang et al. 2025, arXiv:2503.00307). Pinned tokens stay, and the last
    step takes nothing back. With uniform noise nothing is settled in the first place, and the rule
    says so.

    Attributes:
      rule: any rule; it settles the open positions.
      count: tokens that are taken back at a time, >= 1.
    """

    rule: AcceptanceRule = EntropyBound()
    count: int = 8

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f'count must be >= 1 token to take back, got {self.count}.')

    @property
    def reads_logits(self) -> bool:
        """Whether the rule inside does."""
        return acceptance.reads_logits(self.rule)

    def first_state(self, canvas: Int[Array, 'B C']) -> RemaskState:
        """See `StatefulRule`."""
        nothing = jnp.zeros(canvas.shape, jnp.float32)
        return RemaskState(nothing, acceptance.first_state(self.rule, canvas))

    def next_canvas(
        self, proposal: Proposal, state: RemaskState
    ) -> tuple[Int[Array, 'B C'], RemaskState]:
        """See `StatefulRule`."""
        if proposal.vocab_size is not None:
            raise ValueError(
                'Remask is for masked diffusion; with uniform noise every token that a step does '
                'not accept becomes noise again anyway. Use its inner rule alone, or GibbsSweep.'
            )
        canvas, rule = acceptance.next_canvas(self.rule, proposal, state.rule)
        # What a position that stays open offers is overwritten before it counts.
        confidences = jnp.where(proposal.open, proposal.confidences, state.confidences)
        is_full = jnp.all(canvas != proposal.noise, axis=-1, keepdims=True)  # [B, 1]
        ranked = confidences
        if proposal.pinned is not None:
            ranked = jnp.where(proposal.pinned, jnp.inf, ranked)
        rank = jnp.argsort(jnp.argsort(ranked, axis=-1, stable=True), axis=-1)
        goes_on = proposal.next_noise_level > 0  # else the canvas is what remains
        back = is_full & goes_on & (rank < self.count) & jnp.isfinite(ranked)
        return jnp.where(back, proposal.noise, canvas), RemaskState(confidences, rule)
