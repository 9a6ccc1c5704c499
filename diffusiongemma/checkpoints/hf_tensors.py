"""Which tensor of the published format each parameter comes from, and how its axes change.

The names are declared in `models/weights.py`; here they become those of every layer. Layers are
stacked over repetitions of the layer pattern, as the scan wants them. `hf_import.py` reads with
this table and `hf_export.py` writes with it.

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
# Where an autoregressive Gemma has its backbone: beside a vision tower (new and old files), alone.
AUTOREGRESSIVE = ('model.language_model.', 'language_model.model.', 'model.')
TOWERS = re.compile(
    r'(model\.)?(encoder\.)?(?P<part>vision_tower|embed_vision|vision_embedder|audio_tower|'
    r'embed_audio|multi_modal_projector)\.'
)
SHARED_KV = re.compile(r'layers\.(?P<layer>\d+)\.self_attn\.[kv]_(proj|norm)\.weight')
HEADS = ('lm_head.weight', 'language_model.lm_head.weight')


class Source(NamedTuple):
    """Where a parameter comes from: a tensor, the shape it must have, and a change of axes.

    `tensor` starts below the prefix of the backbone. `convert` gives a *view* of the tensor's
    memory with the axes of the parameter: import copies out of it, export writes into it.
    `of_encoder`: it is the encoder's own.
    """

    tensor: str
    shape: tuple[int, ...]
    convert: Callable[[np.ndarray], np.ndarray]
    of_encoder: bool = False


class TensorNames:
    """Full tensor names in one checkpoint, and what those mean that no parameter takes.

    `present` are the names that the checkpoint has, if it exists yet.
    """

    def __init__(self, config: ModelConfig, present: Collection[str] = ()) -> None:
        self._kv_shared = range(config.kv_shared_layers.first, config.num_layers)
        if config.is_diffusion:
            self.backbone, self._encoder = DECODER, ENCODER
        else:
            found = [p for p in AUTOREGRESSIVE if f'{p}embed_tokens.weight' in present]
            self.backbone = self._encoder = found[0] if found else AUTOREGRESSIVE[-1]

    def of(self, source: Source) -> str:
        return (self._encoder if source.of_encoder else self.backbone) + source.tensor

    def tied_to(self, name: str, wanted: set[str]) -> str | None:
        """The tensor that is read in the place of another: the embedding for a head, the decoder's
        for the encoder's; None where there is none."""
        if name in HEADS:
            return f'{self.backbone}embed_tokens.weight'
        in_decoder = self.backbone + name.removeprefix(self._encoder)
        return in_decoder if name.startswith(self._encoder) and in_decoder in wanted else None

    def left_out(self, name: str) -> str | None:
        """What a tensor that no text pass uses is part of; None for any other."""
        tower = TOWERS.match(name)
        if tower:
            return tower['part']
        shared = SHARED_KV.fullmatch(name.removeprefix(self.backbone))
        if shared and int(shared['layer']) in self._kv_shared:
            return 'keys and values of layers that share those of an earlier one'
        return None


def sources(config: ModelConfig, name: str, shape: tuple[int, ...]) -> list[tuple[Any, Source]]:
    """The tensors that make up one parameter, each with its index in the stack.

    Args:
      config: of the model.
      name: '/'-joined path of the parameter.
      shape: of the parameter.
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


# Where the backbone has its layers, and the config's word for them.
STACKS = {
    'layers': 'kv_layers',
    'tail': 'kv_layers',
    'shared_layers': 'kv_shared_layers',
    'shared_tail': 'kv_shared_layers',
}
_OUTSIDE_LAYERS = ('embedder', 'backbone', 'self_conditioning', 'per_layer_embedder')


def _source(path: list[str], prefix: str, shape: tuple[int, ...]) -> Source:
    """Source of the parameter at a path; `shape` is that of one layer's."""
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
        """[*maps, parts * prod(outputs), prod(inputs)] -> [*maps, *inputs, *outputs]."""
        part = x[..., index * outputs : (index + 1) * outputs, :]
        return part.swapaxes(-1, -2).reshape(shape)

    return Source(tensor, (*maps, parts * outputs, inputs), convert, weight.of_encoder)
