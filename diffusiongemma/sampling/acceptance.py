"""What becomes of each position of a canvas after a denoise step.

A rule is a small frozen object with one pure method, `next_canvas`. Those that only choose which
positions take their candidate have that choice as `accept` too. A rule that carries state from
step to step says what it starts with in a second method, `first_state`.
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
    """What one denoise step has to offer to a rule.

    Attributes:
      canvas: [B, C] int32, the tokens that the step read.
      candidates: [B, C] int32, a token drawn at each position.
      noise: [B, C] int32, fresh noise: uniform tokens, or the mask token.
      open: [B, C] bool, positions that the rule decides on. The others, which are pinned or
        (masked diffusion) unmasked already, keep their token.
      entropies: [B, C] float32, entropy of the predictions in nats; 0 where not open.
      confidences: [B, C] float32, probability of the candidates; 1 where not open.
      margins: [B, C] float32, probability of the most likely token less that of the second; 1 where
        not open.
      noise_level: [] float32, or [B, 1] where rows differ (in training), t of the canvas that
        the step read.
      next_noise_level: likewise, s < t of the canvas that the rule makes.
      keys: [B] keys for a rule that draws.
      vocab_size: uniform noise is drawn from this many tokens; None with masked diffusion.
      pinned: [B, C] bool, positions that no rule may change; None for no such position.
      logits: [B, C, V] float32, what the step says of each position, at its temperature; banned
        tokens have -inf. At a position that masked diffusion has unmasked already they are those
        of the model, as at every other. What a rule does not read costs nothing.
      temperature: [] float32, or [B, 1], by which the model's logits were divided.
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
        """The next canvas if the `accepted` [B, C] positions take their candidate.

        Nothing is frozen: every other open position becomes noise again.
        """
        return jnp.where(self.open, jnp.where(accepted, self.candidates, self.noise), self.canvas)


@runtime_checkable
class StatelessRule(Protocol):
    """Makes the next canvas; hashable, since the sampler compiles it in."""

    def next_canvas(self, proposal: Proposal) -> Int[Array, 'B C']:
        """Returns the canvas that the next denoise step reads, [B, C] int32."""
        ...


@runtime_checkable
class StatefulRule(Protocol):
    """Makes the next canvas from what the step offers and from its own state; hashable.

    The state is a pytree of arrays [B, ...]. A row that has stopped keeps its own.
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
    """A rule that says whether it may read the logits."""

    @property
    def reads_logits(self) -> bool: ...


def reads_logits(rule: AcceptanceRule) -> bool:
    """Whether a rule may read the logits; it says that it does not by a false `reads_logits`.

    The sampler offers them in any case; stage 2 would compute them for the rule alone.
    """
    return rule.reads_logits if isinstance(rule, SaysWhatItReads) else True


def first_state(rule: AcceptanceRule, canvas: Int[Array, 'B C']) -> Any:
    """Returns a rule's state before the first step of canvases [B, C]; None of one without."""
    return rule.first_state(canvas) if isinstance(rule, StatefulRule) else None


def next_canvas(
    rule: AcceptanceRule, proposal: Proposal, state: Any
) -> tuple[Int[Array, 'B C'], Any]:
    """Returns the canvas [B, C] that a rule makes, and its state after that."""
    if isinstance(rule, StatefulRule):
        return rule.next_canvas(proposal, state)
    return rule.next_canvas(proposal), None


@dataclasses.dataclass(frozen=True)
class EntropyBound:
    """Accepts the k most certain positions whose joint uncertainty is bounded.

    k is the largest number such that the sum of the k lowest entropies, less the largest of
    them, is at most the bound. That difference bounds the mutual information between the k
    tokens, which is what drawing them independently loses (entropy-bounded unmasking,
    Ben-Hamu et al. 2025, arXiv:2505.24857). One position is always accepted; of equally
    uncertain ones the first.

    Attributes:
      entropy_bound: nats, >= 0. Infinity accepts everything.
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
        """[..., C] float32 nats -> [..., C] bool."""
        order = jnp.argsort(entropies, axis=-1, stable=True)
        ascending = jnp.take_along_axis(entropies, order, axis=-1)
        # Position i of the order is the largest of its set: what counts is the sum before it.
        sums = jnp.cumsum(ascending[..., :-1], axis=-1)
        sums_before = jnp.concatenate([jnp.zeros_like(ascending[..., :1]), sums], axis=-1)
        rank = jnp.argsort(order, axis=-1)
        return jnp.take_along_axis(sums_before <= self.entropy_bound, rank, axis=-1)

    def next_canvas(self, proposal: Proposal) -> Int[Array, 'B C']:
        """Accepted positions take their candidate, the others become noise: [B, C] int32."""
        return proposal.take(self.accept(proposal.entropies))


@dataclasses.dataclass(frozen=True)
class TopK:
    """Accepts the k open positions with the most probable candidates (MaskGIT's rule,
    Chang et al. 2022, arXiv:2202.04200); of equally probable ones the first.

    Attributes:
      k: positions per step, >= 1.
    """

    k: int = 1
    reads_logits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f'k must be >= 1 position per denoise step, got {self.k}.')

    def accept(
        self, confidences: Float[Array, '*B C'], open_positions: Bool[Array, '*B C']
    ) -> Bool[Array, '*B C']:
        """[..., C] float32 and [..., C] bool -> [..., C] bool, k of the open ones (or all)."""
        order = jnp.argsort(jnp.where(open_positions, -confidences, jnp.inf), axis=-1, stable=True)
        return open_positions & (jnp.argsort(order, axis=-1) < self.k)

    def next_canvas(self, proposal: Proposal) -> Int[Array, 'B C']:
        """Accepted positions take their candidate, the others become noise: [B, C] int32."""
        return proposal.take(self.accept(proposal.confidences, proposal.open))


@dataclasses.dataclass(frozen=True)
class ConfidenceThreshold:
    """Accepts candidates of at least a given probability, and the most probable one in any case
    (the parallel decoding of Fast-dLLM, Wu et al. 2025, arXiv:2505.22618).

    Attributes:
      threshold: probability in [0, 1].
    """

    threshold: float = 0.9
    reads_logits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_probability('threshold', self.threshold)

    def accept(
        self, confidences: Float[Array, '*B C'], open_positions: Bool[Array, '*B C']
    ) -> Bool[Array, '*B C']:
        """[..., C] float32 and [..., C] bool -> [..., C] bool."""
        return _above(confidences, open_positions, self.threshold)

    def next_canvas(self, proposal: Proposal) -> Int[Array, 'B C']:
        """Accepted positions take their candidate, the others become noise: [B, C] int32."""
        return proposal.take(self.accept(proposal.confidences, proposal.open))


@dataclasses.dataclass(frozen=True)
class Margin:
    """Accepts positions whose most likely token leads the second by at least a given probability,
    and the one that leads most in any case (top-k margin of Kim et al. 2025, arXiv:2502.06768,
    with a threshold in place of a number).

    Attributes:
      threshold: difference of probabilities in [0, 1].
    """

    threshold: float = 0.8
    reads_logits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_probability('threshold', self.threshold)

    def accept(
        self, margins: Float[Array, '*B C'], open_positions: Bool[Array, '*B C']
    ) -> Bool[Array, '*B C']:
        """[..., C] float32 and [..., C] bool -> [..., C] bool."""
        return _above(margins, open_positions, self.threshold)

    def next_canvas(self, proposal: Proposal) -> Int[Array, 'B C']:
        """Accepted positions take their candidate, the others become noise: [B, C] int32."""
        return proposal.take(self.accept(proposal.margins, proposal.open))


@dataclasses.dataclass(frozen=True)
class Ancestral:
    """Draws the next canvas from the exact reverse posterior of the corruption.

    With the candidate as x_0, position by position x_s ~ q(x_s | x_t, x_0) (D3PM, Austin et al.
    2021, arXiv:2107.03006). Samples then have the distribution that the denoiser stands for, up to
    what drawing the positions of a step independently loses, which vanishes as steps grow. For
    that the candidates must be drawn at temperature 1, no canvas may stop early, and what is
    committed is the canvas itself: `SamplingConfig.ancestral` sets all three.

    Uniform corruption to level t keeps a token with probability a_t = 1 - t. With a = a_t / a_s,
    q(x_s | x_t, x_0) is proportional to
    (a [x_s = x_t] + (1 - a) / V) (a_s [x_s = x_0] + (1 - a_s) / V),
    a mixture of x_t, x_0 and a uniform token. A masked token is unmasked with probability
    (t - s) / t.
    """

    reads_logits: ClassVar[bool] = False

    def next_canvas(self, proposal: Proposal) -> Int[Array, 'B C']:
        """[B, C] int32."""
        length = proposal.canvas.shape[-1]
        uniform = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(proposal.keys)
        t, s = proposal.noise_level, proposal.next_noise_level
        if proposal.vocab_size is None:
            return proposal.take(uniform < (t - s) / t)
        size = proposal.vocab_size
        kept = (1 - t) / (1 - s)  # s < 1
        same = proposal.canvas == proposal.candidates
        stays = kept * (1 - s) * same + kept * s / size
        takes = jnp.broadcast_to((1 - kept) * (1 - s) / size, stays.shape)
        becomes_noise = jnp.broadcast_to((1 - kept) * s / size, stays.shape)
        threshold = uniform * (stays + takes + becomes_noise)
        drawn = jnp.where(threshold < stays + takes, proposal.candidates, proposal.noise)
        drawn = jnp.where(threshold < stays, proposal.canvas, drawn)
        return jnp.where(proposal.open, drawn, proposal.canvas)


def _above(
    values: Float[Array, '*B C'], open_positions: Bool[Array, '*B C'], threshold: float
) -> Bool[Array, '*B C']:
    """Open positions whose value reaches the threshold, and the first largest one."""
    ranked = jnp.where(open_positions, values, -jnp.inf)
    best = jnp.arange(values.shape[-1]) == jnp.argmax(ranked, axis=-1, keepdims=True)
    return open_positions & ((values >= threshold) | best)


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f'{name} is a probability in [0, 1], got {value}.')
