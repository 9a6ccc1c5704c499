"""The configs of the parts of a layer, and stacks of layers."""

import dataclasses

SLIDING = 'sliding'
FULL = 'full'


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """The config of the attention of one layer type.

    Attributes:
      num_kv_heads: the number of key/value heads K, a divisor of the query heads N.
      head_dim: the width H of a head, an even number.
      rope_theta: the base wavelength of the rotary embedding.
      rope_fraction: the share of the H/2 frequencies that rotate ("proportional" RoPE); the others
        are zero.
      rope_scale: the divisor of positions ("linear" scaling; 8 in the full layers of the Gemma 3
        models with a context of more than 32K tokens).
      window: the number of keys that a query sees, including itself; None for the whole prefix.
      value_is_key: whether the value is the raw key projection, without a value projection.
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
    """The config of routed experts beside the dense MLP: E experts of width F_e, k per token."""

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
    """The config of per-layer embeddings: a small vector per token and layer (Gemma 4 E2B, E4B).

    Attributes:
      width: the width P of each vector.
      vocab_size: the number of tokens with such vectors, at least V of the model.
    """

    width: int
    vocab_size: int

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f'the width of per-layer embeddings must be >= 1, got {self.width}.')


@dataclasses.dataclass(frozen=True)
class LayerStack:
    """A stack of consecutive layers that only differ in their type.

    Whole repetitions of a pattern share code; the remaining layers are applied one by one.

    Attributes:
      first: the index of the first layer of the stack in the model.
      types: 'sliding' or 'full' for each layer.
      shares_kv: whether the layers attend to the keys and values of earlier layers.
      scanned: whether the repetitions are one scan over stacked parameters, keys and values.
    """

    first: int
    types: tuple[str, ...]
    shares_kv: bool = False
    scanned: bool = True

    def as_loop(self, scanned: bool) -> 'LayerStack':
        """Returns the same layers, scanned or not (`Execution.scan_layers`)."""
        return dataclasses.replace(self, scanned=scanned)

    @property
    def pattern(self) -> tuple[str, ...]:
        """Returns the shortest sequence whose repetition, cut at the last layer, is `types`."""
        types = self.types
        for period in range(1, len(types) + 1):
            if all(types[i] == types[i % period] for i in range(len(types))):
                return types[:period]
        return types

    @property
    def num_groups(self) -> int:
        """Returns G, the number of whole repetitions of the pattern."""
        return len(self.types) // len(self.pattern) if self.types else 0

    @property
    def tail(self) -> tuple[str, ...]:
        """Returns the layer types after the last whole repetition, which are applied one by one."""
        return self.types[self.num_groups * len(self.pattern) :]

    @property
    def tail_first(self) -> int:
        """Returns the index of the first tail layer in the model."""
        return self.first + len(self.types) - len(self.tail)

    @property
    def stacked(self) -> tuple[str, ...]:
        """Returns the layer types with stacked keys and values [G, ...]: those of a scan."""
        return self.pattern if self.scanned else ()

    @property
    def single(self) -> tuple[str, ...]:
        """Returns the layer types whose keys and values are not stacked."""
        return self.tail if self.scanned else self.types
