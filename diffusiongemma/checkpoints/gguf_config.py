"""Converts the metadata of a GGUF file to a `ModelConfig`.

The keys that llama.cpp's converter writes for Gemma 3 and Gemma 4 are translated back to those of
config.json, and then read with the checks of `hf_config`. An unknown key is an error, because
ignoring it could silently change the model.
"""

from typing import Any

import numpy as np

from diffusiongemma.checkpoints.gguf_reader import GgufFile
from diffusiongemma.checkpoints.hf_config import model_config_from_hf
from diffusiongemma.models.config import ModelConfig

ARCHITECTURES = ('gemma3', 'gemma4')
ROPE_FREQUENCIES = 'rope_freqs.weight'
# Prefixes of the settings of vision and audio towers, which some files contain.
_TOWER_KEYS = ('vision.', 'audio.', 'mm.')
_SLIDING, _FULL = 'sliding_attention', 'full_attention'
_PATTERN = 6  # Gemma 3 has one full layer after five sliding ones, a constant in llama.cpp
_LAYERS_OF_27B = 62  # only Gemma 3 27B has another query scale; llama.cpp detects it by this number
_UNROTATED = 1e29  # llama.cpp divides frequencies that proportional RoPE does not rotate by 1e30


class _Keys:
    """The metadata keys of one architecture; each is read once, so unknown keys are left over."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        prefix = f'{architecture}.'
        self._path = file.path
        self._prefix = prefix
        self._left = {
            key.removeprefix(prefix): value
            for key, value in file.metadata.items()
            if key.startswith(prefix) and not key.removeprefix(prefix).startswith(_TOWER_KEYS)
        }

    def take(self, key: str) -> Any:
        if key not in self._left:
            raise ValueError(f'{self._path} lacks the key {self._prefix}{key}.')
        return self._left.pop(key)

    def get(self, key: str, default: Any) -> Any:
        return self._left.pop(key, default)

    def by_layer(self, key: str, num_layers: int) -> list[Any]:
        """Returns the value of each layer; a file may contain one value or a list."""
        value = self.take(key)
        values = value if isinstance(value, list) else [value] * num_layers
        if len(values) != num_layers:
            raise ValueError(
                f'{self._path}: {self._prefix}{key} has {len(values)} values for {num_layers} '
                'layers.'
            )
        return values

    def check_all_read(self) -> None:
        if self._left:
            names = ', '.join(f'{self._prefix}{key}' for key in sorted(self._left)[:5])
            raise ValueError(f'{self._path}: {names} is set, which is not supported.')


def read_gguf_config(file: GgufFile) -> ModelConfig:
    """Returns the config of the model in a GGUF file.

    Raises:
      ValueError: if the architecture is unknown, a key is missing or unknown, or the model is not
        supported.
    """
    architecture = file.metadata.get('general.architecture')
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f'{file.path} holds a model of the architecture {architecture!r}; supported: '
            f'{", ".join(ARCHITECTURES)}.'
        )
    if 'token_embd.weight' not in file.tensors:
        raise ValueError(f'{file.path} lacks the tensor token_embd.weight.')
    if 'output.weight' in file.tensors:
        raise ValueError(
            f'{file.path} has a separate output head (output.weight), which is not supported: '
            'the head of Gemma is its embedding.'
        )
    keys = _Keys(file, architecture)
    content = _gemma3(keys, file) if architecture == 'gemma3' else _gemma4(keys, file)
    keys.check_all_read()
    try:
        return model_config_from_hf(content)
    except ValueError as error:
        raise ValueError(f'{file.path}: {error}') from error


def _common(keys: _Keys, file: GgufFile) -> dict[str, Any]:
    """Returns the settings that both architectures have, with the names of config.json."""
    vocab_size = file.tensors['token_embd.weight'].shape[0]
    if keys.get('vocab_size', vocab_size) != vocab_size:
        raise ValueError(f'{file.path}: the vocabulary and token_embd.weight differ in size.')
    return {
        'vocab_size': vocab_size,
        'hidden_size': keys.take('embedding_length'),
        'num_hidden_layers': keys.take('block_count'),
        'num_attention_heads': keys.take('attention.head_count'),
        'max_position_embeddings': keys.take('context_length'),
        'rms_norm_eps': keys.take('attention.layer_norm_rms_epsilon'),
        'sliding_window': keys.take('attention.sliding_window'),
        'final_logit_softcapping': keys.get('final_logit_softcapping', None),
        'attn_logit_softcapping': keys.get('attn_logit_softcapping', None),
    }


def _gemma3(keys: _Keys, file: GgufFile) -> dict[str, Any]:
    content = _common(keys, file)
    layers = content['num_hidden_layers']
    head_dim = _same(keys, file, 'attention.key_length', 'attention.value_length')
    pattern = keys.get('attention.sliding_window_pattern', _PATTERN)
    if not isinstance(pattern, list):
        pattern = [(i + 1) % pattern != 0 for i in range(layers)]
    width_of_head = content['hidden_size'] // content['num_attention_heads']
    return dict(content) | {
        'model_type': 'gemma3_text',
        'intermediate_size': keys.take('feed_forward_length'),
        'num_key_value_heads': keys.take('attention.head_count_kv'),
        'head_dim': head_dim,
        'query_pre_attn_scalar': width_of_head if layers == _LAYERS_OF_27B else head_dim,
        'layer_types': [_SLIDING if sliding else _FULL for sliding in pattern],
        'rope_parameters': {
            _FULL: {'rope_theta': keys.get('rope.freq_base', 1e6)} | _rope_scaling(keys, file),
            _SLIDING: {'rope_theta': keys.get('rope.freq_base_swa', 1e4)},
        },
    }


def _gemma4(keys: _Keys, file: GgufFile) -> dict[str, Any]:
    content = _common(keys, file)
    layers = content['num_hidden_layers']
    sliding = keys.by_layer('attention.sliding_window_pattern', layers)
    shared = keys.get('attention.shared_kv_layers', 0)
    heads = keys.by_layer('attention.head_count_kv', layers)
    widths = keys.by_layer('feed_forward_length', layers)
    head_dim = _same(keys, file, 'attention.key_length_swa', 'attention.value_length_swa')
    full_head_dim = _same(keys, file, 'attention.key_length', 'attention.value_length')
    for key, size in (('', full_head_dim), ('_swa', head_dim)):
        if keys.get(f'rope.dimension_count{key}', size) != size:
            raise ValueError(
                f'{file.path}: partly rotated heads (rope.dimension_count{key}) are not supported.'
            )
    per_layer = keys.get('embedding_length_per_layer_input', 0)
    experts = keys.get('expert_count', 0)
    owning = [i for i in range(layers - shared) if not sliding[i]]
    content |= {
        'model_type': 'gemma4_text',
        'intermediate_size': widths[0],
        'layer_types': [_SLIDING if local else _FULL for local in sliding],
        'head_dim': head_dim,
        'global_head_dim': full_head_dim,
        'num_key_value_heads': _one(file, 'head_count_kv of sliding layers', heads, sliding, True),
        'num_kv_shared_layers': shared,
        'use_double_wide_mlp': _double_wide(file, widths, shared),
        # llama.cpp uses the keys as values if a layer has no value weights.
        'attention_k_eq_v': any(f'blk.{i}.attn_v.weight' not in file.tensors for i in owning),
        'hidden_size_per_layer_input': per_layer,
        'enable_moe_block': bool(experts),
        'rope_parameters': {
            _FULL: {
                'rope_type': 'proportional',
                'rope_theta': keys.take('rope.freq_base'),
                'partial_rotary_factor': _rotated(file),
            },
            _SLIDING: {'rope_theta': keys.get('rope.freq_base_swa', 1e4)},
        },
    }
    full_heads = _one(file, 'head_count_kv of full layers', heads, sliding, False)
    if not content['attention_k_eq_v'] and full_heads != content['num_key_value_heads']:
        raise ValueError(
            f'{file.path}: full layers with value weights must have as many key/value heads as '
            f'sliding layers ({content["num_key_value_heads"]}), got {full_heads}.'
        )
    content['num_global_key_value_heads'] = full_heads
    if per_layer:
        table = file.tensors.get('per_layer_token_embd.weight')
        content['vocab_size_per_layer_input'] = table.shape[0] if table else content['vocab_size']
    if experts:
        content |= {
            'num_experts': experts,
            'top_k_experts': keys.take('expert_used_count'),
            'moe_intermediate_size': keys.take('expert_feed_forward_length'),
        }
    return content


def _same(keys: _Keys, file: GgufFile, first: str, second: str) -> int:
    value: int = keys.take(first)
    other: int = keys.take(second)
    if value != other:
        raise ValueError(f'{file.path}: {first}={value} and {second}={other} must be equal.')
    return value


def _one(file: GgufFile, name: str, values: list[int], sliding: list[Any], is_sliding: bool) -> int:
    """Returns the value that all layers of one type share."""
    distinct = {v for v, local in zip(values, sliding, strict=True) if bool(local) == is_sliding}
    if len(distinct) > 1:
        raise ValueError(
            f'{file.path}: {name} is {sorted(distinct)}; layers of one type must be alike.'
        )
    return distinct.pop() if distinct else values[0]


def _double_wide(file: GgufFile, widths: list[int], shared: int) -> bool:
    """Returns whether the MLPs of layers that share keys and values are twice as wide."""
    first, sharing = set(widths[: len(widths) - shared]), set(widths[len(widths) - shared :])
    if len(first) == 1 and sharing in (set(), first):
        return False
    if len(first) == 1 and sharing == {2 * min(first)}:
        return True
    raise ValueError(f'{file.path}: feed_forward_length {widths} is not supported.')


def _rope_scaling(keys: _Keys, file: GgufFile) -> dict[str, Any]:
    kind, factor = keys.get('rope.scaling.type', 'none'), keys.get('rope.scaling.factor', 1.0)
    keys.get('rope.scaling.original_context_length', None)  # only used by other kinds of scaling
    if kind not in ('none', 'linear'):
        raise ValueError(f'{file.path}: rotary scaling of the type {kind!r} is not supported.')
    return {'rope_type': 'linear', 'factor': factor} if kind == 'linear' else {}


def _rotated(file: GgufFile) -> float:
    """Returns the fraction of a full layer's head that is rotated."""
    if ROPE_FREQUENCIES not in file.tensors:
        raise ValueError(f'{file.path} lacks the tensor {ROPE_FREQUENCIES}.')
    factors = file.read(ROPE_FREQUENCIES)
    rotated = int(np.sum(factors == 1.0))
    if not np.all(factors[:rotated] == 1.0) or not np.all(factors[rotated:] > _UNROTATED):
        raise ValueError(f'{file.path}: {ROPE_FREQUENCIES} must hold factors of 1, then of 1e30.')
    return rotated / factors.size
