"""The configs of a denoiser and of a light denoiser."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from diffusiongemma.errors import check_range

KINDS = SHARED, SEPARATE, LIGHT = 'shared', 'separate', 'light'
_EXECUTION_KEYS = ('scan_layers', 'output_major', 'denoise_dtype')  # keys of older configs
_FLAT_KEYS = ('canvas_length', 'separate_denoiser', 'predict_next', 'self_conditioning', 'mask_id')


@dataclasses.dataclass(frozen=True)
class LightConfig:
    """The config of a light denoiser: a few layers that read the frozen teacher's states.

    Attributes:
      layers: the teacher layers that the denoiser's layers start from, in order. Each attends to
        the cached keys and values of its teacher layer, so there is no second cache.
      teacher_state: whether a zero-initialized projection of the final hidden state of the last
        encoded token is added to every canvas input.
      draft_vocab_size: the number of tokens that the denoiser's head scores (`draft_ids` in the
        parameters); 0 for the whole vocabulary.
      serial_rank: the rank of a bigram term on the logits that conditions each draft token on the
        previous one; 0 for none.
    """

    layers: tuple[int, ...]
    teacher_state: bool = True
    draft_vocab_size: int = 0
    serial_rank: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, 'layers', tuple(self.layers))
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(
                f'layers must be increasing numbers of teacher layers, got {self.layers}.'
            )
        for name in ('draft_vocab_size', 'serial_rank'):
            check_range(name, getattr(self, name), 0)


@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
    """The config of the denoiser of a DiffusionGemma.

    Attributes:
      canvas_length: C, the number of tokens that are denoised at once.
      kind: 'shared', the backbone's weights with separate layer scalars, as released; 'separate', a
        full second set of layers, so that the encode pass remains exactly the teacher; or 'light',
        a few layers that read the frozen teacher's states.
      predict_next: whether a canvas token is predicted at the position before it, as in the
        autoregressive pass: the denoise pass runs over the token before the canvas and all canvas
        tokens but the last. The teacher's next-token prediction then is a good initialization (Gong
        et al. 2024, arXiv:2410.17891). The released models do not use it.
      self_conditioning: whether a denoise pass gets the soft embeddings of the previous step.
      mask_id: the mask token of a denoiser that was trained with masked corruption; None for
        uniform noise.
      light: the config of a light denoiser; None for other kinds.
    """

    canvas_length: int
    kind: str = SHARED
    predict_next: bool = False
    self_conditioning: bool = True
    mask_id: int | None = None
    light: LightConfig | None = None

    def __post_init__(self) -> None:
        check_range('canvas_length', self.canvas_length, 1)
        if self.kind not in KINDS:
            raise ValueError(f'the kind of a denoiser must be one of {KINDS}, got {self.kind!r}.')
        if (self.light is not None) != (self.kind == LIGHT):
            raise ValueError(
                f"a denoiser of kind 'light' needs a LightConfig and no other kind has one, got "
                f'kind={self.kind!r} and light={self.light}.'
            )


def with_nested_denoiser(values: Mapping[str, Any]) -> dict[str, Any]:
    """Converts an older config dict to the present format.

    Older configs have the denoiser's fields at the top level, and some keys of `Execution`.

    Raises:
      ValueError: if there are fields of a denoiser but no canvas length.
    """
    values = {name: value for name, value in values.items() if name not in _EXECUTION_KEYS}
    flat = {name: values.pop(name) for name in _FLAT_KEYS if name in values}
    is_separate = flat.pop('separate_denoiser', False)
    # False equals 0 but is a wrong type, which the check of the denoiser's fields must see.
    if flat.get('canvas_length', 0) != 0 or flat.get('canvas_length', 0) is False:
        values['denoiser'] = flat | {'kind': SEPARATE if is_separate else SHARED}
    elif is_separate or flat.get('predict_next'):
        raise ValueError('separate_denoiser and predict_next need a canvas_length > 0.')
    return values
