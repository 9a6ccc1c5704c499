"""Which tensor of the published format each parameter comes from, and how its axes change.

Layers are stacked over repetitions of the layer pattern, as the scan wants them. `hf_import.py`
reads with this table and `hf_export.py` writes with it.

DiffusionGemma stores its backbone once, under `model.decoder.`; the encoder adds one scalar per
layer. An autoregressive Gemma has the same names under another prefix.
"""

import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import numpy as np

from diffusiongemma.models.config import LayerStack, ModelConfig

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
            return [(..., _layer_source(path, stack.tail_first + slot, shape))]
        period = len(stack.pattern)
        return [
            (group, _layer_source(path, stack.first + group * period + slot, shape[1:]))
            for group in range(stack.num_groups)
        ]
    kernels = {'gate': 'gate_proj', 'up': 'up_proj', 'down': 'down_proj'}
    table = {
        'embedder/embedding': _plain('embed_tokens.weight', shape),
        'backbone/final_norm/scale': _plain('norm.weight', shape),
        'self_conditioning/pre_norm/scale': _plain('self_conditioning.pre_norm.weight', shape),
        'per_layer_embedder/embedding': _packed('embed_tokens_per_layer.weight', shape),
        'per_layer_embedder/projection': _linear('per_layer_model_projection.weight', shape, 1),
        'per_layer_embedder/projection_norm/scale': _plain(
            'per_layer_projection_norm.weight', shape
        ),
    } | {
        f'self_conditioning/mlp/{ours}': _linear(f'self_conditioning.{theirs}.weight', shape, 1)
        for ours, theirs in kernels.items()
    }
    return [(..., table[name])]


# Where the backbone has its layers, and the config's word for them.
STACKS = {
    'layers': 'kv_layers',
    'tail': 'kv_layers',
    'shared_layers': 'kv_shared_layers',
    'shared_tail': 'kv_shared_layers',
}
NORMS = {
    'pre_attention_norm': 'input_layernorm',
    'post_attention_norm': 'post_attention_layernorm',
    'pre_ffn_norm': 'pre_feedforward_layernorm',
    'post_ffn_norm': 'post_feedforward_layernorm',
    'post_mlp_norm': 'post_feedforward_layernorm_1',
    'post_moe_norm': 'post_feedforward_layernorm_2',
    'pre_moe_norm': 'pre_feedforward_layernorm_2',
    'post_per_layer_norm': 'post_per_layer_input_norm',
}


def _layer_source(path: list[str], layer: int, shape: tuple[int, ...]) -> Source:
    """Source of one layer's parameter; `path` starts below the layer, `shape` is unstacked."""
    prefix = f'layers.{layer}.'
    match path:
        case [('encode_scalar' | 'denoise_scalar') as which]:
            of_encoder = which == 'encode_scalar'
            return Source(f'{prefix}layer_scalar', (1,), lambda x: x.reshape(()), of_encoder)
        case [norm, 'scale'] if norm in NORMS:
            return _plain(f'{prefix}{NORMS[norm]}.weight', shape)
        case ['attention', ('query_norm' | 'key_norm') as norm, 'scale']:
            return _plain(f'{prefix}self_attn.{norm[0]}_norm.weight', shape)
        case ['attention', ('query' | 'key' | 'value') as kernel]:  # [D, heads, H]
            return _linear(f'{prefix}self_attn.{kernel[0]}_proj.weight', shape, 1)
        case ['attention', 'output']:  # [N, H, D]
            return _linear(f'{prefix}self_attn.o_proj.weight', shape, 2)
        case ['mlp', kernel]:
            return _linear(f'{prefix}mlp.{kernel}_proj.weight', shape, 1)
        case ['per_layer', ('gate' | 'projection') as kernel]:
            theirs = {'gate': 'per_layer_input_gate', 'projection': 'per_layer_projection'}
            return _linear(f'{prefix}{theirs[kernel]}.weight', shape, 1)
        case ['moe', 'router', 'kernel']:
            return _linear(f'{prefix}router.proj.weight', shape, 1)
        case ['moe', 'router', name]:
            return _plain(f'{prefix}router.{name}', shape)
        case ['moe', 'experts', 'down']:  # [E, F, D] from [E, D, F]
            e, f, d = shape
            tensor = f'{prefix}experts.down_proj'
            return Source(tensor, (e, d, f), lambda x: x.swapaxes(1, 2))
        case ['moe', 'experts', ('gate' | 'up') as half]:  # [E, D, F] from half of [E, 2F, D]
            e, d, f = shape
            start = 0 if half == 'gate' else f
            tensor = f'{prefix}experts.gate_up_proj'
            return Source(tensor, (e, 2 * f, d), lambda x: x[:, start : start + f].swapaxes(1, 2))
    raise ValueError(f'no published tensor is known for the parameter {"/".join(path)}.')


def _plain(tensor: str, shape: tuple[int, ...]) -> Source:
    return Source(tensor, shape, lambda x: x)


def _packed(tensor: str, shape: tuple[int, ...]) -> Source:
    """A table [V, layers, P] from a matrix [V, layers * P]."""
    return Source(tensor, (shape[0], int(np.prod(shape[1:]))), lambda x: x.reshape(shape))


def _linear(tensor: str, shape: tuple[int, ...], num_inputs: int) -> Source:
    """A kernel [*inputs, *outputs] from a matrix [prod(outputs), prod(inputs)]."""
    inputs = int(np.prod(shape[:num_inputs]))
    outputs = int(np.prod(shape[num_inputs:]))
    return Source(tensor, (outputs, inputs), lambda x: x.T.reshape(shape))
