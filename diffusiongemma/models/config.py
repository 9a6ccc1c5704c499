"""`ModelConfig`, the frozen config of every backbone, and the values derived from it."""

import dataclasses
from typing import Any

from diffusiongemma.models.denoiser_config import (
    LIGHT,
    SEPARATE,
    SHARED,
    DenoiserConfig,
    LightConfig,
    with_nested_denoiser,
)
from diffusiongemma.models.layer_config import (
    FULL,
    SLIDING,
    AttentionConfig,
    LayerStack,
    MoEConfig,
    PerLayerConfig,
)

__all__ = [
    'FULL',
    'LIGHT',
    'SEPARATE',
    'SHARED',
    'SLIDING',
    'AttentionConfig',
    'DenoiserConfig',
    'LayerStack',
    'LightConfig',
    'MoEConfig',
    'ModelConfig',
    'PerLayerConfig',
    'with_nested_denoiser',
]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture of a Gemma or, with a `denoiser`, of a DiffusionGemma.

    Layout, dtypes and devices are not part of it, see `Execution`.

    Attributes:
      vocab_size: V, the vocabulary size.
      width: D, the width of the residual stream.
      num_heads: N, the number of query heads.
      ffn_width: F, the width of the dense MLP.
      layer_types: 'sliding' or 'full' for each layer, in order.
      sliding: the attention of the sliding layers.
      full: the attention of the full layers.
      max_positions: the maximum length of prompt and response together; None for no limit.
      moe: the routed experts of every layer, or None for a dense model.
      per_layer: the per-layer embeddings, or None.
      num_kv_shared_layers: the number of last layers without key and value projections; each
        attends to the keys and values of the last layer of its type before them.
      kv_shared_ffn_width: F of these last layers; None for `ffn_width`.
      denoiser: the denoiser of a DiffusionGemma; None for a purely autoregressive model.
      query_scale: the factor on queries before the softmax. Gemma 4 uses 1.0.
      value_norm: whether values are RMS-normalized (without scale).
      layer_scalar: whether the output of each layer is multiplied by a scalar.
      norm_scale_offset: added to the scale weight of every norm (1.0 in Gemma 3, 0.0 in Gemma 4).
      norm_eps: the epsilon of the RMS norms.
      final_logit_softcap: the cap of the tanh on the logits, or None.
    """

    vocab_size: int
    width: int
    num_heads: int
    ffn_width: int
    layer_types: tuple[str, ...]
    sliding: AttentionConfig
    full: AttentionConfig
    max_positions: int | None = None
    moe: MoEConfig | None = None
    per_layer: PerLayerConfig | None = None
    num_kv_shared_layers: int = 0
    kv_shared_ffn_width: int | None = None
    denoiser: DenoiserConfig | None = None
    query_scale: float = 1.0
    value_norm: bool = True
    layer_scalar: bool = True
    norm_scale_offset: float = 0.0
    norm_eps: float = 1e-6
    final_logit_softcap: float | None = 30.0

    def __post_init__(self) -> None:
        object.__setattr__(self, 'layer_types', tuple(self.layer_types))
        if not self.layer_types:
            raise ValueError('layer_types is empty: a model needs at least one layer.')
        unknown = sorted(set(self.layer_types) - {SLIDING, FULL})
        if unknown:
            raise ValueError(f'layer_types must be {SLIDING!r} or {FULL!r}, got {unknown}.')
        for kind in sorted(set(self.layer_types)):
            kv_heads = self.attention(kind).num_kv_heads
            if self.num_heads % kv_heads:
                raise ValueError(
                    f'num_heads={self.num_heads} is not a multiple of the {kv_heads} key/value '
                    f'heads of the {kind} layers.'
                )
        self._check_per_layer_and_sharing()
        self._check_denoiser()
        if self.final_logit_softcap is not None and self.final_logit_softcap <= 0:
            raise ValueError(
                f'final_logit_softcap must be > 0 or None, got {self.final_logit_softcap}.'
            )

    def _check_denoiser(self) -> None:
        if self.mask_id is not None and not 0 <= self.mask_id < self.vocab_size:
            raise ValueError(
                f'mask_id must be one of {self.vocab_size} token ids or None, got {self.mask_id}.'
            )
        light = self.light
        if light is None:
            return
        if not 0 <= light.layers[0] <= light.layers[-1] < self.num_layers:
            raise ValueError(
                f'light.layers={light.layers}, but the teacher has layers 0 to '
                f'{self.num_layers - 1}.'
            )
        if light.draft_vocab_size > self.vocab_size:
            raise ValueError(
                f'light.draft_vocab_size={light.draft_vocab_size} is larger than the vocabulary '
                f'of {self.vocab_size} tokens; use 0 for all of them.'
            )

    def _check_per_layer_and_sharing(self) -> None:
        if self.per_layer is not None and self.per_layer.vocab_size < self.vocab_size:
            raise ValueError(
                f'per-layer embeddings of {self.per_layer.vocab_size} tokens are too few for a '
                f'vocabulary of {self.vocab_size}.'
            )
        if not 0 <= self.num_kv_shared_layers < self.num_layers:
            raise ValueError(
                f'num_kv_shared_layers must lie in [0, {self.num_layers - 1}] for '
                f'{self.num_layers} layers, got {self.num_kv_shared_layers}.'
            )
        orphans = sorted(set(self.kv_shared_layers.types) - set(self.kv_layers.types))
        if orphans:
            raise ValueError(
                f'the last {self.num_kv_shared_layers} layers share keys and values, but no layer '
                f'of type {orphans} before them has any.'
            )
        if self.kv_shared_ffn_width is not None and not self.num_kv_shared_layers:
            raise ValueError('kv_shared_ffn_width is set, but num_kv_shared_layers is 0.')

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    @property
    def is_diffusion(self) -> bool:
        return self.denoiser is not None

    @property
    def kind(self) -> str | None:
        """Returns the kind of the denoiser; None for a purely autoregressive model."""
        return self.denoiser.kind if self.denoiser else None

    @property
    def light(self) -> LightConfig | None:
        """Returns the config of a light denoiser; None for other kinds."""
        return self.denoiser.light if self.denoiser else None

    @property
    def canvas_length(self) -> int:
        """Returns the canvas length C; 0 for a purely autoregressive model."""
        return self.denoiser.canvas_length if self.denoiser else 0

    @property
    def predict_next(self) -> bool:
        return self.denoiser is not None and self.denoiser.predict_next

    @property
    def self_conditioning(self) -> bool:
        return self.denoiser is None or self.denoiser.self_conditioning

    @property
    def mask_id(self) -> int | None:
        return self.denoiser.mask_id if self.denoiser else None

    @property
    def has_frozen_encoder(self) -> bool:
        """Returns whether the denoiser is separate or light, so the encode pass is the teacher."""
        return self.denoiser is not None and self.denoiser.kind != SHARED

    @property
    def kv_layers(self) -> LayerStack:
        """Returns the layers that compute keys and values, which a K/V cache holds."""
        types = self.layer_types[: self.num_layers - self.num_kv_shared_layers]
        return LayerStack(0, types)

    @property
    def kv_shared_layers(self) -> LayerStack:
        """Returns the layers after `kv_layers`, which share the keys and values of those."""
        first = self.num_layers - self.num_kv_shared_layers
        return LayerStack(first, self.layer_types[first:], shares_kv=True)

    @property
    def autoregressive(self) -> 'ModelConfig':
        """Returns the config of the same backbone without a denoiser."""
        return dataclasses.replace(self, denoiser=None)

    def kv_source(self, layer: int) -> int:
        """Returns the index of the layer whose keys and values a layer attends to."""
        first_shared = self.num_layers - self.num_kv_shared_layers
        if layer < first_shared:
            return layer
        kind = self.layer_types[layer]
        return max(i for i in range(first_shared) if self.layer_types[i] == kind)

    def attention(self, kind: str) -> AttentionConfig:
        """Returns the attention config of a layer type, 'sliding' or 'full'."""
        return self.sliding if kind == SLIDING else self.full

    def ffn_width_of(self, shares_kv: bool) -> int:
        """Returns F of the layers that share keys and values, or of all other layers."""
        return (self.kv_shared_ffn_width if shares_kv else None) or self.ffn_width

    def replace(self, **changes: Any) -> 'ModelConfig':
        """Returns the config with other fields; fields of `DenoiserConfig` change the denoiser.

        `GEMMA3_1B.replace(canvas_length=64)` adds a denoiser, and `canvas_length=0` removes it.
        """
        names = {field.name for field in dataclasses.fields(DenoiserConfig)}
        inner = {name: changes.pop(name) for name in list(changes) if name in names}
        config = dataclasses.replace(self, **changes)
        if not inner:
            return config
        if inner.get('canvas_length', self.canvas_length) == 0:
            if set(inner) != {'canvas_length'}:
                raise ValueError(f'{sorted(inner)} need a canvas_length > 0.')
            return config.autoregressive
        if config.denoiser is None:
            denoiser = DenoiserConfig(**inner)
        else:
            denoiser = dataclasses.replace(config.denoiser, **inner)
        return dataclasses.replace(config, denoiser=denoiser)

    def to_dict(self) -> dict[str, Any]:
        """Returns the config as JSON values, which `from_dict` reads."""
        return dataclasses.asdict(self) | {'layer_types': list(self.layer_types)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> 'ModelConfig':
        """Returns the config; raises ValueError if a key is unknown or a required one missing."""
        values = with_nested_denoiser(values)
        nested = {
            'sliding': AttentionConfig,
            'full': AttentionConfig,
            'moe': MoEConfig,
            'per_layer': PerLayerConfig,
            'denoiser': DenoiserConfig,
        }
        for name, nested_cls in nested.items():
            if values.get(name) is None:
                continue
            if name == 'denoiser' and values[name].get('light') is not None:
                light = _build(LightConfig, values[name]['light'], "model config, 'light'")
                values[name] = values[name] | {'light': light}
            values[name] = _build(nested_cls, values[name], f'model config, {name!r}')
        config: ModelConfig = _build(cls, values, 'model config')
        return config


def _build(cls: type, values: dict[str, Any], where: str) -> Any:
    names = {field.name for field in dataclasses.fields(cls)}
    required = {
        field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING
    }
    unknown, missing = sorted(set(values) - names), sorted(required - set(values))
    if unknown or missing:
        raise ValueError(
            f'{where}: unknown keys {unknown}, missing keys {missing}; known: {sorted(names)}.'
        )
    return cls(**values)
