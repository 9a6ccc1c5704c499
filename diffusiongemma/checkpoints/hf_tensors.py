"""Maps each parameter to its tensors in the published format, including the change of axes.

`models/weights.py` declares the names; this module expands them to all layers. Parameters stack
layers over repetitions of the layer pattern, as `scan` needs them. `hf_import.py` reads and
`hf_export.py` writes with this table.

DiffusionGemma stores its backbone once, under `model.decoder.`; the encoder adds one scalar per
layer. An autoregressive Gemma has the same names under another prefix.
"""

import math
import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import numpy as np

from diffusiongemma.models.config import LayerStack, ModelConfig
from diffusiongemma.models.weights import weight_at

DECODER = 'model.decoder.'
ENCODER = 'model.encoder.language_model.'
# Prefixes of the backbone of an autoregressive Gemma: with a vision tower (new files, old files),
# and without one.
AUTOREGRESSIVE = ('model.language_model.', 'language_model.model.', 'model.')
TOWERS = re.compile(
    r'(model\.)?(encoder\.)?(?P<part>vision_tower|embed_vision|vision_embedder|audio_tower|'
    r'embed_audio|multi_modal_projector)\.'
)
SHARED_KV = re.compile(r'layers\.(?P<layer>\d+)\.self_attn\.[kv]_(proj|norm)\.weight')
HEADS = ('lm_head.weight', 'language_model.lm_head.weight')


class Source(NamedTuple):
    """The source of a parameter: a tensor name, its required shape, and a change of axes.

    `tensor` is the name without the prefix of the backbone. `convert` returns a *view* of the
    tensor's memory with the axes of the parameter: import copies from it, export writes into it.
    `of_encoder` is True if the tensor belongs to the encoder only.
    """

    tensor: str
    shape: tuple[int, ...]
    convert: Callable[[np.ndarray], np.ndarray]
    of_encoder: bool = False


class TensorNames:
    """The full tensor names of one checkpoint, and the roles of tensors that are not imported.

    `present` are the tensor names of an existing checkpoint, which determine the prefix.
    """

    def __init__(self, config: ModelConfig, present: Collection[str] = ()) -> None:
        self._kv_shared = range(config.kv_shared_layers.first, config.num_layers)
        if config.is_diffusion:
            self.backbone, self._encoder = DECODER, ENCODER
        else:
            prefixes = [p for p in AUTOREGRESSIVE if f'{p}embed_tokens.weight' in present]
            self.backbone = self._encoder = prefixes[0] if prefixes else AUTOREGRESSIVE[-1]

    def of(self, source: Source) -> str:
        """Returns the full name of the tensor of a source."""
        return (self._encoder if source.of_encoder else self.backbone) + source.tensor

    def tied_to(self, name: str, wanted: set[str]) -> str | None:
        """Returns the tensor that `name` must equal, or None if it is not a tied copy.

        A head is tied to the embedding, and encoder tensors are tied to those of the decoder.
        `wanted` are the names of all imported tensors.
        """
        if name in HEADS:
            return f'{self.backbone}embed_tokens.weight'
        in_decoder = self.backbone + name.removeprefix(self._encoder)
        return in_decoder if name.startswith(self._encoder) and in_decoder in wanted else None

    def left_out(self, name: str) -> str | None:
        """Returns the part that an unused tensor belongs to, such as a vision tower, or None."""
        tower = TOWERS.match(name)
        if tower:
            return tower['part']
        shared = SHARED_KV.fullmatch(name.removeprefix(self.backbone))
        if shared and int(shared['layer']) in self._kv_shared:
            return 'keys and values of layers that share those of an earlier one'
        return None


def sources(config: ModelConfig, name: str, shape: tuple[int, ...]) -> list[tuple[Any, Source]]:
    """Returns the tensors of one parameter, each with its index along the stacked layer axis.

    Args:
      config: the config of the model.
      name: the '/'-joined path of the parameter.
      shape: the shape of the parameter.
    """
    parts = name.split('/')
    if parts[0] == 'backbone' and parts[1] in STACKS:
        stack: LayerStack = getattr(config, STACKS[parts[1]])
        slot, path = int(parts[2].removeprefix('layer_')), parts[3:]
        if parts[1].endswith('tail'):
            return [(..., _source(path, f'layers.{stack.tail_first + slot}.', shape))]
        period = len(stack.pattern)
        return [
            (group, _source(path, f'layers.{stack.first + group * period + slot}.', shape[1:]))
            for group in range(stack.num_groups)
        ]
    if parts[0] not in _OUTSIDE_LAYERS:
        raise ValueError(f'no published tensor is known for the parameter {name}.')
    return [(..., _source(parts, '', shape))]


# Names of the layer stacks in the parameters, and the properties of `ModelConfig` for them.
STACKS = {
    'layers': 'kv_layers',
    'tail': 'kv_layers',
    'shared_layers': 'kv_shared_layers',
    'shared_tail': 'kv_shared_layers',
}
_OUTSIDE_LAYERS = ('embedder', 'backbone', 'self_conditioning', 'per_layer_embedder')


def _source(path: list[str], prefix: str, shape: tuple[int, ...]) -> Source:
    """Returns the source of the parameter at a path; `shape` is the shape in one layer."""
    weight = weight_at(path)
    if weight is None or weight.published is None:
        raise ValueError(f'no published tensor is known for the parameter {"/".join(path)}.')
    tensor = prefix + weight.published
    if not weight.inputs:
        stored = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else shape or (1,)
        return Source(tensor, stored, lambda x: x.reshape(shape), weight.of_encoder)
    first, last = len(weight.maps), len(weight.maps) + len(weight.inputs)
    maps, inputs, outputs = shape[:first], math.prod(shape[first:last]), math.prod(shape[last:])
    index, parts = weight.part

    def convert(x: np.ndarray) -> np.ndarray:
        """Views [*maps, parts * prod(outputs), prod(inputs)] as [*maps, *inputs, *outputs]."""
        part = x[..., index * outputs : (index + 1) * outputs, :]  # [*maps, outputs, inputs]
        return part.swapaxes(-1, -2).reshape(shape)

    return Source(tensor, (*maps, parts * outputs, inputs), convert, weight.of_encoder)
