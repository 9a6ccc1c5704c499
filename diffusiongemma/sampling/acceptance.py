"""Acceptance rules, which make the next canvas after a denoise step.

A rule is a small frozen object with one pure method, `next_canvas`. Rules that only choose which
positions take their candidate also have this choice as a method `accept`. A rule with state has a
second method, `first_state`, which returns its initial state.
"""

import dataclasses
from typing import Any, ClassVar, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Key

from diffusiongemma.models.arrays import Array

PerRow = Float[Array, ''] | Float[Array, 'B 1']  # one number, or one for each row


@flax.struct.dataclass
class Proposal:
    """The results of one denoise step, which are the input of an acceptance rule.

    Attributes:
      canvas: [B, C] int32, the tokens that the step read.
      candidates: [B, C] int32, a token drawn at each position.
      noise: [B, C] int32, fresh noise: uniform tokens, or the mask token.
      open: [B, C] bool, positions that the rule decides on. All others are pinned or (masked
        diffusion) already unmasked, and keep their token.
      entropies: [B, C] float32, entropy of the predictions in nats; 0 at positions not open.
      confidences: [B, C] float32, probability of the candidates; 1 at positions not open.
      margins: [B, C] float32, probability of the argmax token minus that of the second most likely
        one; 1 at positions not open.
      noise_level: [] float32, or [B, 1] if rows differ (in training), the level t of the canvas
        that the step read.
      next_noise_level: the same shape, the level s < t of the canvas that the rule makes.
      keys: [B] keys for a rule that draws.
      vocab_size: the number of tokens that uniform noise is drawn from; None for masked diffusion.
      pinned: [B, C] bool, positions that no rule may change; None if there are none.
      logits: [B, C, V] float32, shaped logits of the step; -inf for banned tokens. Positions that
        masked diffusion has already unmasked also have the model's logits. If a rule does not read
        them, they are not computed (in training they are then None).
      temperature: [] float32, or [B, 1], the divisor of the model's logits.
      greedy: bool, or [B, 1] bool, whether the candidates are the argmax tokens.
    """

    canvas: Int[Array, 'B C']
    candidates: Int[Array, 'B C']
    noise: Int[Array, 'B C']
    open: Bool[Array, 'B C']
    entropies: Float[Array, 'B C']
    confidences: Float[Array, 'B C']
    margins: Float[Array, 'B C']
    noise_level: PerRow
    next_noise_level: PerRow
    keys: Key[Array, ' B']
    vocab_size: int | None = flax.struct.field(pytree_node=False)
    pinned: Bool[Array, 'B C'] | None = None
    logits: Float[Array, 'B C V'] | None = None
    temperature: PerRow | float = 1.0
    greedy: Bool[Array, ''] | Bool[Array, 'B 1'] | bool = False

    def take(self, accepted: Bool[Array, 'B C']) -> Int[Array, 'B C']:
        """Returns the canvas in which `accepted` [B, C] positions take their candidate.

        All other open positions become noise again.
        """
        return jnp.where(self.open, jnp.where(accepted, self.candidates, self.noise), self.canvas)


@runtime_checkable
class StatelessRule(Protocol):
    """A rule without state; hashable, because it is a static argument of compiled programs."""

    def next_canvas(self, proposal: Proposal) -> Int[Array, 'B C']:
        """Returns the canvas that the next denoise step reads, [B, C] int32."""
        ...


@runtime_checkable
class StatefulRule(Protocol):
    """A rule with a state, which is a pytree of arrays [B, ...]; hashable.

    The state of a row that has stopped no longer changes.
    """

    def first_state(self, canvas: Int[Array, 'B C']) -> Any:
        """Returns the state before the first step of canvases [B, C] int32."""
        ...

    def next_canvas(self, proposal: Proposal, state: Any) -> tuple[Int[Array, 'B C'], Any]:
        """Returns the canvas that the next step reads, [B, C] int32, and the state after it."""
        ...


AcceptanceRule = StatelessRule | StatefulRule


@runtime_checkable
class SaysWhatItReads(Protocol):
    """A rule that declares whether it may read the logits."""

    @property
    def reads_logits(self) -> bool: ...


def reads_logits(rule: AcceptanceRule) -> bool:
    """Returns `rule.reads_logits`; True for a rule without this attribute.

    The sampler always passes the logits, but stage 2 only computes them if this is True.
    """
    return rule.reads_logits if isinstance(rule, SaysWhatItReads) else True


def first_state(rule: AcceptanceRule, canvas: Int[Array, 'B C']) -> Any:
    """Returns the state of a rule before the first step of canvases [B, C]; None if stateless."""
    return rule.first_state(canvas) if isinstance(rule, StatefulRule) else None


def next_canvas(
    rule: AcceptanceRule, proposal: Proposal, state: Any
) -> tuple[Int[Array, 'B C'], Any]:
    """Returns the canvas [B, C] int32 that a rule makes, and the new state of the rule.

    Raises:
      ValueError: if the rule returns anything but a canvas.
    """
    canvas: Any
    if isinstance(rule, StatefulRule):
        canvas, state = rule.next_canvas(proposal, state)
    else:
        canvas, state = rule.next_canvas(proposal), None
    shape, dtype = jnp.shape(canvas), jnp.result_type(canvas)
    if shape != proposal.canvas.shape or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f'{rule!r}.next_canvas returned {dtype}{list(shape)}; it must return the canvas, '
            f'int32{list(proposal.canvas.shape)}.'
        )
    return canvas, state


@dataclasses.dataclass(frozen=True)
class EntropyBound:
    """A rule that accepts the k most certain positions whose joint uncertainty is bounded.

    k is the largest number such that the sum of the k lowest entropies, minus the largest of
    them, is at most the bound. This difference bounds the mutual information between the k
    tokens, which independent draws lose (entropy-bounded unmasking, Ben-Hamu et al. 2025,
    arXiv:2505.24857). At least one position is accepted; ties are broken by the first position.

    Attributes:
      entropy_bound: the bound in nats, >= 0. Infinity accepts all positions.
    """

    entropy_bound: float = 0.1
    reads_logits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.entropy_bound >= 0:
            raise ValueError(
                f'entropy_bound must be >= 0 nats, got {self.entropy_bound}; the released models '
                'use 0.1, higher values accept more tokens per step.'
            )

    def accept(self, entropies: Float[Array, '*B C']) -> Bool[Array, '*B C']:
        """Returns the accepted positions for entropies: [..., C] float32 nats -> [..., C] bool."""
        order = jnp.argsort(entropies, axis=-1, stable=True)  # [..., C], most certain first
        ascending = jnp.take_along_axis(entropies, order, axis=-1)
        # The i-th entropy in this order is the largest of its set, so it is not part of the sum.
        sums = jnp.cumsum(ascending[..., :-1], axis=-1)  # [..., C - 1]
        sums_before = jnp.concatenate([jnp.zeros_like(ascending[..., :1]), sums], axis=-1)
        rank = jnp.argsort(order, axis=-1)  # [..., C], place of each position in the order
        return jnp.take_along_axis(sums_before <= self.entropy_bound, rank, axis=-1)

    def next_canvas(self, proposal: Proposal) -> Int[Array, 'B C']:
        """Returns the next canvas [B, C] int32, with noise at positions that are not accepted."""
        return proposal.take(self.accept(proposal.entropies))


@dataclasses.dataclass(frozen=True)
class TopK:
    """A rule that accepts the k open positions with the most probable candidates.

    This is MaskGIT's rule (Chang et al. 2022, arXiv:2202.04200). Ties are broken by the first
    position.

    Attributes:
      k: the number of accepted positions per step, >= 1.
    """

    k: int = 1
    reads_logits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f'k must be >= 1 position per denoise step, got {self.k!r}.')

    def accept(
        self, confidences: Float[Array, '*B C'], open_positions: Bool[Array, '*B C']
    ) -> Bool[Array, '*B C']:
        """Returns the k open positions with the highest confidence, [..., C] bool.

        If fewer than k positions are open, all of them are returned.

        Args:
          confidences: [..., C] float32.
          open_positions: [..., C] bool.
        """
        order = jnp.argsort(jnp.where(open_positions, -confidences, jnp.inf), axis=-1, stable=True)
        return open_positions & (jnp.argsort(order, axis=-1) < self.k)

    def next_canvas(self, proposal: Proposal) -> Int[Array, 'B C']:
        """Returns the next canvas [B, C] int32, with noise at positions that are not accepted."""
        return proposal.take(self.accept(proposal.confidences, proposal.open))


@dataclasses.dataclass(frozen=True)
class ConfidenceThreshold:
    """A rule that accepts candidates above a probability, and always the most probable one.

    This is the parallel decoding of Fast-dLLM (Wu et al. 2025, arXiv:2505.22618).

    Attributes:
      threshold: the minimum probability, in [0, 1].
    """

    threshold: float = 0.9
    reads_logits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_probability('threshold', self.threshold)

    def accept(
        self, confidences: Float[Array, '*B C'], open_positions: Bool[Array, '*B C']
    ) -> Bool[Array, '*B C']:
        """Returns the accepted positions, [..., C] bool."""
        return _above(confidences, open_positions, self.threshold)

    def next_canvas(self, proposal: Proposal) -> Int[Array, 'B C']:
        """Returns the next canvas [B, C] int32, with noise at positions that are not accepted."""
        return proposal.take(self.accept(proposal.confidences, proposal.open))


@dataclasses.dataclass(frozen=True)
class Margin:
    """A rule that accepts positions by the margin between their two most likely tokens.

    It accepts margins above a threshold, and always the largest one (top-k margin of Kim et al.
    2025, arXiv:2502.06768, with a threshold instead of a number).

    Attributes:
      threshold: the minimum difference of probabilities, in [0, 1].
    """

    threshold: float = 0.8
    reads_logits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_probability('threshold', self.threshold)

    def accept(
        self, margins: Float[Array, '*B C'], open_positions: Bool[Array, '*B C']
    ) -> Bool[Array, '*B C']:
        """Returns the accepted positions, [..., C] bool."""
        return _above(margins, open_positions, self.threshold)

    def next_canvas(self, proposal: Proposal) -> Int[Array, 'B C']:
        """Returns the next canvas [B, C] int32, with noise at positions that are not accepted."""
        return proposal.take(self.accept(proposal.margins, proposal.open))


@dataclasses.dataclass(frozen=True)
class Ancestral:
    """A rule that draws the next canvas from the exact reverse posterior of the corruption.

    With the candidate as x_0, it draws x_s ~ q(x_s | x_t, x_0) at each position (D3PM, Austin et
    al. 2021, arXiv:2107.03006). Samples then have the distribution of the denoiser, except for the
    error of drawing the positions of a step independently, which vanishes with more steps. This
    requires candidates that are drawn at temperature 1, no early stop, and committing the canvas
    itself: `SamplingConfig.ancestral` sets all three.

    Uniform corruption to level t keeps a token with probability a_t = 1 - t. With a = a_t / a_s,
    q(x_s | x_t, x_0) is proportional to
    (a [x_s = x_t] + (1 - a) / V) (a_s [x_s = x_0] + (1 - a_s) / V),
    a mixture of x_t, x_0 and a uniform token. A masked token is unmasked with probability
    (t - s) / t.
    """

    reads_logits: ClassVar[bool] = False

    def next_canvas(self, proposal: Proposal) -> Int[Array, 'B C']:
        """Returns the next canvas, [B, C] int32."""
        length = proposal.canvas.shape[-1]
        uniform = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(proposal.keys)  # [B, C]
        t, s = proposal.noise_level, proposal.next_noise_level
        if proposal.vocab_size is None:
            return proposal.take(uniform < (t - s) / t)
        size = proposal.vocab_size
        a = (1 - t) / (1 - s)  # s < 1
        is_equal = proposal.canvas == proposal.candidates
        # Unnormalized probabilities of the three terms of the mixture.
        p_canvas = a * (1 - s) * is_equal + a * s / size
        p_candidate = jnp.broadcast_to((1 - a) * (1 - s) / size, p_canvas.shape)
        p_noise = jnp.broadcast_to((1 - a) * s / size, p_canvas.shape)
        threshold = uniform * (p_canvas + p_candidate + p_noise)
        draws = jnp.where(threshold < p_canvas + p_candidate, proposal.candidates, proposal.noise)
        draws = jnp.where(threshold < p_canvas, proposal.canvas, draws)
        return jnp.where(proposal.open, draws, proposal.canvas)


def _above(
    values: Float[Array, '*B C'], open_positions: Bool[Array, '*B C'], threshold: float
) -> Bool[Array, '*B C']:
    """Returns the open positions with a value >= threshold, and always the first largest one."""
    ranked = jnp.where(open_positions, values, -jnp.inf)
    best = jnp.arange(values.shape[-1]) == jnp.argmax(ranked, axis=-1, keepdims=True)  # [..., C]
    return open_positions & ((values >= threshold) | best)


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f'{name} is a probability in [0, 1], got {value}.')
