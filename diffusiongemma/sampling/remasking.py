"""Remasking for masked diffusion: tokens that were accepted with low confidence are reopened."""

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
    """The state of `Remask` between steps.

    Attributes:
      confidences: [B, C] float32, the probability with which each token was accepted; 0 for the
        initial tokens of the canvas, so that they are reopened first.
      rule: the state of the inner rule.
    """

    confidences: Float[Array, 'B C']
    rule: Any


@dataclasses.dataclass(frozen=True)
class Remask:
    """A rule that wraps another rule, and reopens its least confident tokens at the end.

    In masked diffusion an accepted token never changes, so an early mistake affects all later
    tokens. This rule masks `count` tokens again once a canvas has no mask: those that were accepted
    with the lowest probability *at that time* (a later prediction for an accepted token says
    little, because the denoiser has learned to copy it). They are predicted again, given all other
    tokens, until the stopping rule or the maximum number of steps ends the canvas (remasking by
    remembered confidence: Wang et al. 2025, arXiv:2503.00307). Pinned tokens are kept, and the last
    step reopens nothing. With uniform noise no token is ever fixed, so the rule raises an error.

    Attributes:
      rule: the rule that accepts open positions.
      count: the number of tokens that are reopened at a time, >= 1.
    """

    rule: AcceptanceRule = EntropyBound()
    count: int = 8

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f'count must be >= 1 token to reopen, got {self.count}.')

    @property
    def reads_logits(self) -> bool:
        """Returns whether the inner rule reads the logits."""
        return acceptance.reads_logits(self.rule)

    def first_state(self, canvas: Int[Array, 'B C']) -> RemaskState:
        """See `StatefulRule`."""
        zeros = jnp.zeros(canvas.shape, jnp.float32)
        return RemaskState(zeros, acceptance.first_state(self.rule, canvas))

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
        # The confidence of a position that stays open is overwritten before it is used.
        confidences = jnp.where(proposal.open, proposal.confidences, state.confidences)
        is_full = jnp.all(canvas != proposal.noise, axis=-1, keepdims=True)  # [B, 1]
        ranked = confidences
        if proposal.pinned is not None:
            ranked = jnp.where(proposal.pinned, jnp.inf, ranked)
        rank = jnp.argsort(jnp.argsort(ranked, axis=-1, stable=True), axis=-1)  # [B, C]
        continues = proposal.next_noise_level > 0  # False for the last step
        reopened = is_full & continues & (rank < self.count) & jnp.isfinite(ranked)
        return jnp.where(reopened, proposal.noise, canvas), RemaskState(confidences, rule)
