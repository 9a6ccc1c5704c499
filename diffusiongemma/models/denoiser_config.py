"""The config of a denoiser: its kind, its canvas, what a light one has."""

import dataclasses
from collections.abc import Mapping
from typing import Any

SHARED, SEPARATE, LIGHT = 'shared', 'separate', 'light'
_EXECUTION_KEYS = ('scan_layers', 'output_major', 'denoise_dtype')  # once part of the config
_FLAT_KEYS = ('canvas_length', 'separate_denoiser', 'predict_next', 'self_conditioning', 'mask_id')


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

    def __post_init__(self) -> None:
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

    def __post_init__(self) -> None:
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
