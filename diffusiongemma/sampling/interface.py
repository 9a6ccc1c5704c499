"""The interface of models for sampling."""

import dataclasses
import numbers
from typing import Any, Protocol, cast, runtime_checkable

from jaxtyping import Float, Int

from diffusiongemma.models.arrays import Array
from diffusiongemma.models.cache import Prefix
from diffusiongemma.models.config import LightConfig
from diffusiongemma.models.denoiser import DiffusionGemma


class SampledConfig(Protocol):
    """The config of a model for sampling; it may also have the attributes of `Traits`."""

    @property
    def vocab_size(self) -> int: ...


@runtime_checkable
class CausalModel(Protocol):
    """A flax module that can be sampled autoregressively.

    Keys and values may be any pytree of arrays [..., B, K, T, H]; the sampler only stores and
    passes them.

    A model may also have a method `empty_kv(batch_size, capacity)`, which returns zeros with the
    structure of the keys and values of `capacity` tokens, but with fewer slots for layers that only
    see the last tokens. Such an array is a ring (`KVCache`), and
    `prefix.key_tokens(slots)` returns the tokens in it. Without this method the cache has a slot
    for every token.
    """

    @property
    def config(self) -> SampledConfig: ...

    def apply(self, variables: dict[str, Any], *args: Any, method: str) -> Any: ...

    def encode(
        self,
        tokens: Int[Array, 'B T'],
        positions: Int[Array, 'B T'],
        segment_ids: Int[Array, 'B T'],
        prefix: Prefix | None = None,
    ) -> tuple[Float[Array, 'B T D'], Any]:
        """Returns the hidden states [B, T, D] of the causal pass, and its keys and values.

        Args:
          tokens: [B, T] int32.
          positions: [B, T] int32, the position of each token in its row.
          segment_ids: [B, T] int32, 1 for tokens and 0 for padding.
          prefix: the cached tokens that precede `tokens`; None if there are none.
        """
        ...

    def unembed(self, hidden: Float[Array, '*B D']) -> Float[Array, '*B V']:
        """Returns float32 logits [..., V] of hidden states [..., D]."""
        ...


@runtime_checkable
class DenoisingModel(CausalModel, Protocol):
    """A flax module that can also denoise; its `config` also has `canvas_length`.

    If the config has a `mask_id` that is not None, noise is this token, and an accepted position
    keeps its token (masked diffusion). Otherwise noise is uniform.
    """

    def denoise(
        self,
        canvas: Int[Array, 'B M C'],
        starts: Int[Array, 'B M'],
        segment_ids: Int[Array, 'B M'],
        prefix: Prefix,
        soft_embeddings: Float[Array, 'B M C D'] | None = None,
    ) -> Float[Array, 'B M C V']:
        """Returns the logits of canvases after a prefix, [B, M, C, V] float32.

        A model whose config sets `self_conditioning` to False ignores soft embeddings. A model
        whose config sets `predict_next` to True also gets `previous` [B, M] int32, the token
        before each canvas.

        Args:
          canvas: [B, M, C] int32, the noisy tokens of M canvases per row; the sampler uses M = 1.
          starts: [B, M] int32, the position of the first token of each canvas.
          segment_ids: [B, M] int32, 1 for every canvas of the sampler.
          prefix: the cached tokens before the canvases.
          soft_embeddings: [B, M, C, D], the self-conditioning input.
        """
        ...

    def soft_embed(self, logits: Float[Array, '*B V']) -> Float[Array, '*B D']:
        """Returns expected embeddings [..., D] of logits [..., V], for self-conditioning."""
        ...


def check_model(model: CausalModel) -> None:
    """Checks that a model has the causal pass and a vocabulary.

    Raises:
      TypeError: if a method is missing.
      ValueError: if its config has no valid `vocab_size`.
    """
    for name in ('encode', 'unembed'):
        if not hasattr(type(model), name):
            raise TypeError(f'{type(model).__name__} has no method {name}, see CausalModel.')
    size, mask_id = getattr(model.config, 'vocab_size', None), traits(model).mask_id
    if not isinstance(size, numbers.Integral) or size < 1:
        raise ValueError(
            f'vocab_size in the config of {type(model).__name__} must be an integer >= 1, got '
            f'{size!r}.'
        )
    if mask_id is not None and mask_id >= size:
        raise ValueError(f'mask_id={mask_id} must be one of the {size} token ids of the model.')


def check_logits(model: CausalModel, logits: Array, method: str) -> None:
    """Raises ValueError if logits [..., V] of a method do not have one entry per token id."""
    if logits.shape[-1] != model.config.vocab_size:
        raise ValueError(
            f'{type(model).__name__}.{method} must return logits [..., '
            f'{model.config.vocab_size}], one per token id of its config, got {logits.shape}.'
        )


def denoising(model: CausalModel) -> DenoisingModel:
    """Returns the same model; raises TypeError if it has no denoise pass."""
    if not hasattr(model, 'denoise'):
        raise TypeError(f'{type(model).__name__} has no method denoise, see DenoisingModel.')
    return cast(DenoisingModel, model)  # one without self-conditioning may lack soft_embed


@dataclasses.dataclass(frozen=True)
class Traits:
    """Properties of a model that decide how it is sampled.

    They are attributes of the model's config. The defaults hold for a config without them.

    Attributes:
      canvas_length: C, the number of tokens of a canvas; 0 for a model without a denoiser.
      predict_next: whether a canvas token is predicted at the position before its own.
      self_conditioning: whether a denoise pass gets the predictions of the previous one.
      mask_id: the mask token that represents noise; None for uniform noise.
      max_positions: the maximum length of prompt and response together; None for no limit.
    """

    canvas_length: int = 0
    predict_next: bool = False
    self_conditioning: bool = True
    mask_id: int | None = None
    max_positions: int | None = None

    def __post_init__(self) -> None:
        for name, least in (('canvas_length', 0), ('mask_id', 0), ('max_positions', 1)):
            value = getattr(self, name)
            if name != 'canvas_length' and value is None:
                continue
            if not isinstance(value, numbers.Integral) or value < least:
                raise ValueError(
                    f'{name} in the config of a model must be an integer >= {least}, got {value!r}.'
                )
        for name in ('predict_next', 'self_conditioning'):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f'{name} in the config of a model must be True or False, got '
                    f'{getattr(self, name)!r}.'
                )


_TRAITS = tuple(field.name for field in dataclasses.fields(Traits))


def traits(model: CausalModel) -> Traits:
    """Returns the traits of a model, from its config."""
    config = model.config
    return Traits(**{name: getattr(config, name) for name in _TRAITS if hasattr(config, name)})


def light_config(model: CausalModel) -> LightConfig | None:
    """Returns the config of a light denoiser; None for any other model."""
    return model.light if isinstance(model, DiffusionGemma) else None
