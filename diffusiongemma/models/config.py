"""The one frozen config that describes every backbone, and what follows from it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

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

    def __post_init__(self):
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

    def __post_init__(self):
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

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f'the width of per-layer embeddings must be >= 1, got {self.width}.')


SHARED, SEPARATE, LIGHT = 'shared', 'separate', 'light'


@dataclasses.dataclass(frozen=True)
class LightConfig:
    """A few layers of their own that read the frozen teacher's keys, values and states.

    Attributes:
      layers: teacher layers that the denoiser's layers start from, in order. Each attends to the
        keys and values that the teacher has cached in that very layer, so there is no second cache.
      teacher_state: the final hidden state of the last encoded token, through a projection that
        starts at zero, is added to every canvas input.
      draft_vocab_size: tokens that the denoiser's head scores, see `draft_vocabulary` in the
        parameters; 0 for the whole vocabulary.
      serial_rank: rank of a bigram term on the logits that ties each draft token to the one before
        it; 0 for none.
    """

    layers: tuple[int, ...]
    teacher_state: bool = True
    draft_vocab_size: int = 0
    serial_rank: int = 0

    def __post_init__(self):
        object.__setattr__(self, 'layers', tuple(self.layers))
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(
                f'light.layers must be increasing numbers of teacher layers, got {self.layers}.'
            )
        for name in ('draft_vocab_size', 'serial_rank'):
            if getattr(self, name) < 0:
                raise ValueError(f'light.{name} must be >= 0 (0: none), got {getattr(self, name)}.')


@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
    """What a DiffusionGemma has besides its backbone.

    Attributes:
      canvas_length: C, tokens denoised at once.
      kind: 'shared', the backbone's own weights with layer scalars of their own, as released;
        'separate', a full second set of layers, so that the encode pass stays exactly the
        teacher; or 'light', a few layers that read the frozen teacher's states.
      predict_next: a canvas token is predicted at the position before its own, as the
        autoregressive pass predicts it: the denoise pass runs over the token before the canvas
        and all of the canvas but its last token. What a teacher has learned then holds from the
        first step on (Gong et al. 2024, arXiv:2410.17891). The released models do not.
      self_conditioning: a denoise pass sees the soft embeddings of the step before; else it was
        trained without, and takes none.
      mask_id: the token that stands for noise, of a denoiser that was trained with masked
        corruption; None for uniform noise.
      light: of the kind 'light', and of no other.
    """

    canvas_length: int
    kind: str = SHARED
    predict_next: bool = False
    self_conditioning: bool = True
    mask_id: int | None = None
    light: LightConfig | None = None

    def __post_init__(self):
        if self.canvas_length < 1:
            raise ValueError(f'canvas_length must be >= 1, got {self.canvas_length}.')
        if self.kind not in (SHARED, SEPARATE, LIGHT):
            raise ValueError(
                f'the kind of a denoiser must be one of {(SHARED, SEPARATE, LIGHT)}, '
                f'got {self.kind!r}.'
            )
        if (self.light is not None) != (self.kind == LIGHT):
            raise ValueError(
                f"a denoiser of kind 'light' needs a LightConfig and no other kind has one, got "
                f'kind={self.kind!r} and light={self.light}.'
            )


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


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Gemma backbone, and with a `denoiser` a DiffusionGemma.

    How it is computed (layout, dtypes, devices) is not part of it: see `Execution`.

    Attributes:
      vocab_size: V.
      width: D.
      num_heads: N, query heads.
      ffn_width: F of the dense MLP.
      layer_types: 'sliding' or 'full' for each layer, in order.
      sliding: attention of the sliding layers.
      full: attention of the full layers.
      max_positions: longest sequence that the model is made for, prompt and response; None for
        no limit.
      moe: routed experts in every layer, or None for a dense model.
      per_layer: per-layer embeddings, or None.
      num_kv_shared_layers: the last layers have no keys and values of their own; each attends
        to those of the last layer of its type before them.
      kv_shared_ffn_width: F of these last layers; None for `ffn_width`.
      denoiser: of a DiffusionGemma; None for a purely autoregressive model.
      query_scale: factor on queries before the softmax. Gemma 4 uses 1.0.
      value_norm: RMS-normalise values (without scale).
      layer_scalar: the residual stream is scaled once per layer.
      norm_scale_offset: added to every norm's scale weight (1.0 in Gemma 3, 0.0 in Gemma 4).
      norm_eps: epsilon inside the RMS norms.
      final_logit_softcap: cap of the tanh on the logits, or None.
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

    def __post_init__(self):
        object.__setattr__(self, 'layer_types', tuple(self.layer_types))
        if not self.layer_types:
            raise ValueError('layer_types is empty: a model needs at least one layer.')
        unknown = sorted(set(self.layer_types) - {SLIDING, FULL})
        if unknown:
            raise ValueError(f'layer_types may hold {SLIDING!r} and {FULL!r}, got {unknown}.')
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

    def _check_denoiser(self):
        if self.mask_id is not None and not 0 <= self.mask_id < self.vocab_size:
            raise ValueError(
                f'mask_id must be one of {self.vocab_size} token ids or None, got {self.mask_id}.'
            )
        light = self.denoiser and self.denoiser.light
        if not light:
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

    def _check_per_layer_and_sharing(self):
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
    def canvas_length(self) -> int:
        """C; 0 for a purely autoregressive model."""
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
        """Whether the denoise pass has layers of its own: the encode pass is the teacher."""
        return self.denoiser is not None and self.denoiser.kind != SHARED

    @property
    def kv_layers(self) -> LayerStack:
        """The layers with keys and values of their own: what a K/V cache holds."""
        own = self.layer_types[: self.num_layers - self.num_kv_shared_layers]
        return LayerStack(0, own)

    @property
    def kv_shared_layers(self) -> LayerStack:
        """The layers after them, which share their keys and values."""
        first = self.num_layers - self.num_kv_shared_layers
        return LayerStack(first, self.layer_types[first:], shares_kv=True)

    @property
    def autoregressive(self) -> 'ModelConfig':
        """The same backbone without a denoise pass."""
        return dataclasses.replace(self, denoiser=None)

    def kv_source(self, layer: int) -> int:
        """Number of the layer whose keys and values a layer attends to: often its own."""
        first_shared = self.num_layers - self.num_kv_shared_layers
        if layer < first_shared:
            return layer
        kind = self.layer_types[layer]
        return max(i for i in range(first_shared) if self.layer_types[i] == kind)

    def attention(self, kind: str) -> AttentionConfig:
        """The attention of a layer type, 'sliding' or 'full'."""
        return self.sliding if kind == SLIDING else self.full

    def ffn_width_of(self, shares_kv: bool) -> int:
        """F of the layers with keys and values of their own, or of those that share them."""
        return (self.kv_shared_ffn_width if shares_kv else None) or self.ffn_width

    def replace(self, **changes: Any) -> 'ModelConfig':
        """The config with other fields; those of `DenoiserConfig` are replaced in the denoiser.

        `GEMMA3_1B.replace(canvas_length=64)` has a denoiser where there was none, and
        `canvas_length=0` takes it away.
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

    def to_dict(self) -> dict:
        """Plain JSON types; `from_dict` reverses it."""
        return dataclasses.asdict(self) | {'layer_types': list(self.layer_types)}

    @classmethod
    def from_dict(cls, values: dict) -> 'ModelConfig':
        """Raises ValueError when a key is unknown or a required one is missing."""
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
        return _build(cls, values, 'model config')


_EXECUTION_KEYS = ('scan_layers', 'output_major', 'denoise_dtype')  # once part of the config
_FLAT_KEYS = ('canvas_length', 'separate_denoiser', 'predict_next', 'self_conditioning', 'mask_id')


def with_nested_denoiser(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config dict of today, also from one of before.

    Then the denoiser's fields stood among the others, and some were of the execution.

    Raises:
      ValueError: there are fields of a denoiser and no canvas.
    """
    values = {name: value for name, value in values.items() if name not in _EXECUTION_KEYS}
    flat = {name: values.pop(name) for name in _FLAT_KEYS if name in values}
    is_separate = flat.pop('separate_denoiser', False)
    if flat.get('canvas_length', 0) != 0 or flat.get('canvas_length', 0) is False:
        values['denoiser'] = flat | {'kind': SEPARATE if is_separate else SHARED}
    elif is_separate or flat.get('predict_next'):
        raise ValueError('separate_denoiser and predict_next need a canvas_length > 0.')
    return values


def _build(cls, values: dict, where: str):
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
