"""Reads Google's orbax checkpoints of Gemma 4 and DiffusionGemma as published tensors.

The names and shapes of the leaves are those of the modules in google-deepmind/gemma:
`gemma/gm/nn/gemma4/_modules.py` (attention, MLP, norms, `skip_scale`), `_moe.py` (experts and
router), `_transformer.py` (`layer_N`, `embedder`, `final_norm`) and
`gemma/diffusion/_transformer.py` (`self_conditioner`). In a mixture of experts, `mlp` contains the
experts and `mlp2` the dense MLP, and one `skip_scale` serves both passes;
`convert_diffusion_gemma_weights.py` of huggingface/transformers reads both in the same way.
Supported are the nested layout and the flat one with names like
'transformer/layer_0/attn/_key_norm' (`gemma/gm/ckpts/_checkpoint.py`), but not checkpoints that
stack layers.

Besides shapes, a checkpoint says little about its model. A config.json of the published format
beside it supplies the other settings; without one, those of the released models are used.
"""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict

from diffusiongemma.checkpoints.hf_config import model_config_from_hf, read_hf_config
from diffusiongemma.checkpoints.hf_import import load_tensors
from diffusiongemma.checkpoints.hf_tensors import AUTOREGRESSIVE, DECODER, ENCODER
from diffusiongemma.models.arrays import Params
from diffusiongemma.models.config import ModelConfig
from diffusiongemma.models.transformer import Gemma

_MARKER = '_METADATA'  # orbax writes this file into the directory of every tree
_TOWERS = re.compile(
    r'vision_encoder/|audio_encoder/|SigLiPFromPatches_0/|embedder/(mm|audio)_|.*/lora/'
)
# (width, layers) of a released model -> settings that its shapes do not determine.
_RELEASED = {
    (2816, 30): {
        'sliding_window': 1024,
        'max_position_embeddings': 262_144,
        'top_k_experts': 8,
        'canvas_length': 256,
    },
    (5376, 60): {'sliding_window': 1024, 'max_position_embeddings': 262_144},
}
_Convert = Callable[[Any], Any]
_Leaf = tuple[str, _Convert]  # a leaf of the checkpoint, and its conversion to a published tensor

_ATTENTION = {
    'attn/attn_vec_einsum/w': [('self_attn.o_proj', lambda x: _matrix(x.transpose(2, 0, 1)))],
    'attn/q_einsum/w': [('self_attn.q_proj', lambda x: _heads(x))],
    'attn/k_einsum/w': [('self_attn.k_proj', lambda x: _heads(x))],
    'attn/kv_einsum/w': [
        ('self_attn.k_proj', lambda x: _heads(x[0])),
        ('self_attn.v_proj', lambda x: _heads(x[1])),
    ],
    'attn/query_norm/scale': [('self_attn.q_norm', lambda x: x)],
    'attn/key_norm/scale': [('self_attn.k_norm', lambda x: x)],
    'pre_attention_norm/scale': [('input_layernorm', lambda x: x)],
    'post_attention_norm/scale': [('post_attention_layernorm', lambda x: x)],
    'post_ffw_norm/scale': [('post_feedforward_layernorm', lambda x: x)],
}
_GATED = (('gate_proj', lambda x: x[0]), ('up_proj', lambda x: x[1]))
_DENSE = {
    'mlp/gating_einsum': [(f'mlp.{name}', convert) for name, convert in _GATED],
    'mlp/linear': [('mlp.down_proj', lambda x: x.T)],
    'pre_ffw_norm/scale': [('pre_feedforward_layernorm', lambda x: x)],
}
# In a model with experts, the dense MLP is `mlp2`, and `mlp` contains the experts and the router.
_MIXTURE = {
    'mlp2/gating_einsum': _DENSE['mlp/gating_einsum'],
    'mlp2/linear': _DENSE['mlp/linear'],
    'pre_ffw2_norm/scale': _DENSE['pre_ffw_norm/scale'],
    'post_ffw2_norm/scale': [('post_feedforward_layernorm_1', lambda x: x)],
    'pre_ffw_norm/scale': [('pre_feedforward_layernorm_2', lambda x: x)],
    'post_ffw1_norm/scale': [('post_feedforward_layernorm_2', lambda x: x)],
    'mlp/router_logits/w': [('router.proj', lambda x: x.T)],
}
_BARE = {  # tensors whose names do not end in '.weight'
    'mlp/gating_einsum': ('experts.gate_up_proj', lambda x: x.reshape(x.shape[0], -1, x.shape[3])),
    'mlp/linear': ('experts.down_proj', lambda x: x.swapaxes(1, 2)),
    'mlp/router_scale': ('router.scale', lambda x: x),
    'mlp/per_expert_scale': ('router.per_expert_scale', lambda x: x),
}
_OUTSIDE = {
    'embedder/input_embedding': [('embed_tokens', lambda x: x)],
    'final_norm/scale': [('norm', lambda x: x)],
    'self_conditioner/pre_norm/scale': [('self_conditioning.pre_norm', lambda x: x)],
    'self_conditioner/ffw/gating_einsum': [
        (f'self_conditioning.{name}', convert) for name, convert in _GATED
    ],
    'self_conditioner/ffw/linear': [('self_conditioning.down_proj', lambda x: x.T)],
}


def _heads(x: Any) -> Any:
    """Reshapes [N, D, H] -> [N * H, D]."""
    return x.transpose(0, 2, 1).reshape(-1, x.shape[1])


def _matrix(x: Any) -> Any:
    """Reshapes [D, N, H] -> [D, N * H]."""
    return x.reshape(x.shape[0], -1)


def is_orbax(directory: Path) -> bool:
    """Returns whether `directory` is an orbax checkpoint of a tree."""
    return (directory / _MARKER).is_file()


def load_orbax(
    directory: Path, dtype: Any, mesh: jax.sharding.Mesh | None = None
) -> tuple[Gemma, Params]:
    """Returns the model and the parameters of an orbax checkpoint, read leaf by leaf (`load_hf`).

    Args:
      directory: the directory of the checkpoint; it must contain the config.json of the published
        model unless it is a released one.
      dtype: the dtype of the parameters and of the computation; None keeps the stored dtypes and
        computes in float32.
      mesh: the mesh on which the parameters are created in shards; None for the default device.

    Raises:
      ValueError: if the layout is unknown, if there is no config.json and the sizes are not those
        of a released model, or if a leaf is missing, unknown or of a wrong shape.
    """
    reader = OrbaxReader(directory)
    return load_tensors(reader, reader.config(), dtype, mesh)


class OrbaxReader:
    """A `reader.Reader` of an orbax checkpoint under the names of the published tensors.

    Attributes:
      directory: the directory of the checkpoint.
      shapes: the shape of every tensor. A leaf without a published name keeps its name.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._checkpointer = ocp.PyTreeCheckpointer()
        self._leaves = self._read_leaves()
        names = [name for name in self._leaves if not _TOWERS.match(name)]
        if not any(name.startswith('layer_0/') for name in names):
            raise ValueError(
                f'{directory} has no layer_0, so it is not a Gemma in a layout that can be read; '
                f'its first leaves are {names[:3]}.'
            )
        self.is_diffusion = any(name.startswith('self_conditioner/') for name in names)
        is_mixture = 'layer_0/mlp2/linear' in names
        self._tensors: dict[str, _Leaf] = {}
        for name in names:
            self._tensors |= _published(name, self.is_diffusion, is_mixture)
        self.shapes: Mapping[str, tuple[int, ...]] = {
            tensor: jax.eval_shape(convert, self._leaves[leaf][1]).shape
            for tensor, (leaf, convert) in self._tensors.items()
        }

    def read(self, tensor: str) -> np.ndarray:
        """Returns one tensor in its stored dtype; no other part of the checkpoint is read."""
        leaf, convert = self._tensors[tensor]
        path, abstract = self._leaves[leaf]
        item = unflatten_dict({path: abstract})
        arguments = unflatten_dict({path: ocp.RestoreArgs(restore_type=np.ndarray)})
        tree = self._checkpointer.restore(
            self.directory.absolute(),
            args=ocp.args.PyTreeRestore(item, restore_args=arguments, partial_restore=True),
        )
        (array,) = jax.tree.leaves(tree)
        value: np.ndarray = convert(array)
        return value

    def rows(self, tensor: str, start: int, stop: int) -> np.ndarray:
        """Returns rows [start, stop) of one tensor, clipped to its size."""
        return self.read(tensor)[start:stop]

    def check_weights(self, names: Collection[str]) -> None:
        """Raises ValueError if one of these tensors is not floating-point."""
        for name in names:
            leaf = self._tensors[name][0]
            dtype = self._leaves[leaf][1].dtype
            if not jnp.issubdtype(dtype, jnp.floating):
                raise ValueError(
                    f'{self.directory}: the weight {leaf} is stored as {dtype}; store it in a '
                    'floating-point dtype.'
                )

    def config(self) -> ModelConfig:
        """Returns the config from config.json, else from shapes and the released models."""
        if (self.directory / 'config.json').exists():
            return read_hf_config(self.directory)
        leaf = {name: abstract.shape for name, (_, abstract) in self._leaves.items()}
        vocab_size, width = leaf['embedder/input_embedding']
        layers = [name for name in leaf if re.fullmatch(r'layer_\d+/attn/q_einsum/w', name)]
        released = _RELEASED.get((width, len(layers)))
        if released is None or 'embedder/per_layer_embeddings' in leaf:
            raise ValueError(
                f'{self.directory}: width {width} and {len(layers)} layers are not those of a '
                'released model that can be read without a config.json; put the config.json of '
                'the published model (or one like it) beside the checkpoint.'
            )
        return model_config_from_hf(
            _released_config(leaf, released, len(layers), vocab_size, self.is_diffusion)
        )

    def _read_leaves(self) -> dict[str, tuple[tuple[str, ...], jax.ShapeDtypeStruct]]:
        """Returns path, shape and dtype of each leaf, by its name in the nested layout."""
        metadata = self._checkpointer.metadata(self.directory.absolute()).item_metadata
        leaves = {}
        for path, leaf in jax.tree_util.tree_flatten_with_path(
            metadata.tree, is_leaf=lambda x: hasattr(x, 'shape')
        )[0]:
            keys = tuple(str(getattr(key, 'key', key)) for key in path)
            abstract = jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)
            leaves[_plain_name('/'.join(keys))] = (keys, abstract)
        return leaves


def _plain_name(name: str) -> str:
    """Returns the name of a leaf in the nested layout: without root prefix and without '/w'."""
    name = re.sub(r'^(params/)?(transformer/)?', '', name)
    name = re.sub(r'/(gating_einsum|linear)/w$', r'/\1', name)
    return re.sub(r'/_(key|query)_norm/', r'/\1_norm/', name)


def _published(name: str, is_diffusion: bool, is_mixture: bool) -> dict[str, _Leaf]:
    """Returns the published tensors of a leaf by their full names."""
    prefix = DECODER if is_diffusion else AUTOREGRESSIVE[-1]
    layer = re.match(r'layer_(\d+)/(.*)', name)
    if layer is None:
        tensors = [(f'{tensor}.weight', convert) for tensor, convert in _OUTSIDE.get(name, ())]
    else:
        number, path = layer.groups()
        table = _ATTENTION | (_MIXTURE if is_mixture else _DENSE)
        if path == 'skip_scale':
            tensors = [('layer_scalar', lambda x: x)]
        elif is_mixture and path in _BARE:
            tensors = [_BARE[path]]
        else:
            tensors = [(f'{tensor}.weight', convert) for tensor, convert in table.get(path, ())]
        tensors = [(f'layers.{number}.{tensor}', convert) for tensor, convert in tensors]
    result = {prefix + tensor: (name, convert) for tensor, convert in tensors}
    if is_diffusion:  # one scalar for both passes
        result |= {
            ENCODER + tensor: (name, convert)
            for tensor, convert in tensors
            if tensor.endswith('layer_scalar')
        }
    return result or {name: (name, lambda x: x)}


def _released_config(
    leaf: Mapping[str, tuple[int, ...]],
    released: Mapping[str, int],
    num_layers: int,
    vocab_size: int,
    is_diffusion: bool,
) -> dict[str, Any]:
    """Returns the config.json of a released model from its shapes and its other settings."""
    is_full = [f'layer_{i}/attn/k_einsum/w' in leaf for i in range(num_layers)]
    num_heads, width, head_dim = leaf['layer_0/attn/q_einsum/w']
    last = f'layer_{num_layers - 1}/attn'
    full = {
        'head_dim': leaf[f'{last}/q_einsum/w'][2],
        'num_key_value_heads': leaf[f'{last}/k_einsum/w'][0],
    }
    is_mixture = 'layer_0/mlp2/linear' in leaf
    dense = 'layer_0/mlp2/linear' if is_mixture else 'layer_0/mlp/linear'
    text = {
        'vocab_size': vocab_size,
        'hidden_size': width,
        'intermediate_size': leaf[dense][0],
        'num_hidden_layers': num_layers,
        'layer_types': ['full_attention' if f else 'sliding_attention' for f in is_full],
        'num_attention_heads': num_heads,
        'num_key_value_heads': leaf['layer_0/attn/kv_einsum/w'][1],
        'head_dim': head_dim,
        'per_layer_config': {str(i): full for i, f in enumerate(is_full) if f},
        'sliding_window': released['sliding_window'],
        'max_position_embeddings': released['max_position_embeddings'],
        'final_logit_softcapping': 30.0,
        'attention_k_eq_v': True,
        'hidden_size_per_layer_input': 0,
        'enable_moe_block': is_mixture,
    }
    if is_mixture:
        experts, expert_width, _ = leaf['layer_0/mlp/linear']
        text |= {
            'num_experts': experts,
            'moe_intermediate_size': expert_width,
            'top_k_experts': released['top_k_experts'],
        }
    if not is_diffusion:
        return {'model_type': 'gemma4_text'} | text
    return {
        'model_type': 'diffusion_gemma',
        'canvas_length': released['canvas_length'],
        'text_config': text,
    }
