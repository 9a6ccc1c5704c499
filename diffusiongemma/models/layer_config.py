"""Configs of the parts of a layer, and how layers are stacked."""

import dataclasses

SLIDING = 'sliding'
FULL = 'full'


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Attention of one layer type.

    Attributes:
      num_kv_heads: key/value heads K; divides the model's query heads N.
      head_dim: H, even.
      rope_theta: base wavelength of the rotary embedding.
      rope_fraction: share of the H/2 frequencies that rotate ("proportional" RoPE);
        the others are zero.
      rope_scale: positions are divided by it ("linear" scaling; 8 in the full layers of the
        Gemma 3 models that read more than 32K tokens).
      window: keys that a query sees, itself included; None for the whole prefix.
      value_is_key: no value projection; the value is the raw key projection.
    """

    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_fraction: float = 1.0
    rope_scale: float = 1.0
    window: int | None = None
    value_is_key: bool = False

    def __post_init__(self) -> None:
        if self.head_dim % 2:
            raise ValueError(f'head_dim must be even for rotary embeddings, got {self.head_dim}.')
        if self.window is not None and self.window < 1:
            raise ValueError(f'window must be >= 1 or None (no window), got {self.window}.')
        if not 0 <= self.rope_fraction <= 1:
            raise ValueError(f'rope_fraction must lie in [0, 1], got {self.rope_fraction}.')
        if self.rope_scale <= 0:
            raise ValueError(f'rope_scale must be > 0, got {self.rope_scale}.')


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Routed experts beside the dense MLP: E experts of width F_e, top-k of them per token."""

    num_experts: int
    top_k: int
    expert_width: int

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f'top_k must lie in [1, num_experts={self.num_experts}], got {self.top_k}.'
            )


@dataclasses.dataclass(frozen=True)
class PerLayerConfig:
    """Per-layer embeddings: every token has a small vector for each layer (Gemma 4 E2B, E4B).

    Attributes:
      width: P of each vector.
      vocab_size: tokens that have such vectors; at least the model's V.
    """

    width: int
    vocab_size: int

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f'the width of per-layer embeddings must be >= 1, got {self.width}.')


@dataclasses.dataclass(frozen=True)
class LayerStack:
    """Consecutive layers that differ in nothing but their type.

    Whole repetitions of a pattern share code; what is left over is applied one by one.

    Attributes:
      first: number of its first layer in the model.
      types: 'sliding' or 'full' for each layer.
      shares_kv: the layers attend to keys and values of earlier ones and have none themselves.
      scanned: the repetitions are one loop over stacked parameters, keys and values.
    """

    first: int
    types: tuple[str, ...]
    shares_kv: bool = False
    scanned: bool = True

    def as_loop(self, scanned: bool) -> 'LayerStack':
        """The same layers, their repetitions in a loop or not (`Execution.scan_layers`)."""
        return dataclasses.replace(self, scanned=scanned)

    @property
    def pattern(self) -> tuple[str, ...]:
        """The shortest run of layer types that, repeated, gives `types`."""
        types = self.types
        for period in range(1, len(types) + 1):
            if all(types[i] == types[i % period] for i in range(len(types))):
                return types[:period]
        return types

    @property
    def num_groups(self) -> int:
        """G, whole repetitions of the pattern."""
        return len(self.types) // len(self.pattern) if self.types else 0

    @property
    def tail(self) -> tuple[str, ...]:
        """Layer types left over after the last whole repetition; applied one by one."""
        return self.types[self.num_groups * len(self.pattern) :]

    @property
    def tail_first(self) -> int:
        """Number of the first tail layer in the model."""
        return self.first + len(self.types) - len(self.tail)

    @property
    def stacked(self) -> tuple[str, ...]:
        """Layer types whose keys and values are stacked, [G, ...] for each: those of a scan."""
        return self.pattern if self.scanned else ()

    @property
    def single(self) -> tuple[str, ...]:
        """Layer types whose keys and values are arrays of their own."""
        return self.tail if self.scanned else self.types
