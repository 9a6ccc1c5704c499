"""Reads GGUF files of llama.cpp: a model, its parameters and its tokenizer.

Tensors are renamed to those of the published format, so `hf_import` checks and places them. Each
is dequantized to float32 when its parameter is assembled.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusiongemma.checkpoints.gguf_config import ROPE_FREQUENCIES, read_gguf_config
from diffusiongemma.checkpoints.gguf_reader import GgufFile
from diffusiongemma.checkpoints.hf_import import load_tensors
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.data.vocabulary import SPACE, scores_of_merges, sentencepiece_model
from diffusiongemma.models.arrays import Params
from diffusiongemma.models.transformer import Gemma

SUFFIX = '.gguf'
_PREFIX = 'model.'
_TOP = {
    'token_embd.weight': 'embed_tokens.weight',
    'output_norm.weight': 'norm.weight',
    'per_layer_token_embd.weight': 'embed_tokens_per_layer.weight',
    'per_layer_model_proj.weight': 'per_layer_model_projection.weight',
    'per_layer_proj_norm.weight': 'per_layer_projection_norm.weight',
}
_BLOCK = {
    'attn_norm.weight': 'input_layernorm.weight',
    'attn_q.weight': 'self_attn.q_proj.weight',
    'attn_k.weight': 'self_attn.k_proj.weight',
    'attn_v.weight': 'self_attn.v_proj.weight',
    'attn_output.weight': 'self_attn.o_proj.weight',
    'attn_q_norm.weight': 'self_attn.q_norm.weight',
    'attn_k_norm.weight': 'self_attn.k_norm.weight',
    'post_attention_norm.weight': 'post_attention_layernorm.weight',
    'ffn_norm.weight': 'pre_feedforward_layernorm.weight',
    'ffn_gate.weight': 'mlp.gate_proj.weight',
    'ffn_up.weight': 'mlp.up_proj.weight',
    'ffn_down.weight': 'mlp.down_proj.weight',
    'post_ffw_norm.weight': 'post_feedforward_layernorm.weight',
    'layer_output_scale.weight': 'layer_scalar',
    'inp_gate.weight': 'per_layer_input_gate.weight',
    'proj.weight': 'per_layer_projection.weight',
    'post_norm.weight': 'post_per_layer_input_norm.weight',
    'ffn_gate_inp.weight': 'router.proj.weight',
    'ffn_gate_inp.scale': 'router.scale',
    'ffn_gate_up_exps.weight': 'experts.gate_up_proj',
    'ffn_down_exps.weight': 'experts.down_proj',
    'ffn_down_exps.scale': 'router.per_expert_scale',
    'pre_ffw_norm_2.weight': 'pre_feedforward_layernorm_2.weight',
    'post_ffw_norm_1.weight': 'post_feedforward_layernorm_1.weight',
    'post_ffw_norm_2.weight': 'post_feedforward_layernorm_2.weight',
}
# Prefixes of vision and audio towers in some files, and their names in the published format.
_TOWERS = {'v.': 'vision_tower.', 'mm.': 'multi_modal_projector.', 'a.': 'audio_tower.'}
_MODELS = ('llama', 'gemma4')  # vocabularies with scores, and with a list of merges


def find_gguf(path: Path) -> Path | None:
    """Returns the GGUF file at `path`: the file itself, or the one in a directory, or None.

    A directory is only searched if it has no config.json.

    Raises:
      ValueError: if a directory without config.json contains several GGUF files.
    """
    if path.suffix == SUFFIX and not path.is_dir():
        return path
    if not path.is_dir() or (path / 'config.json').exists():
        return None
    files = sorted(path.glob(f'*{SUFFIX}'))
    if len(files) > 1:
        names = ', '.join(file.name for file in files[:5])
        raise ValueError(f'{path} holds several GGUF files ({names}); pass the path of one.')
    return files[0] if files else None


def load_gguf(
    path: Path, dtype: Any, mesh: jax.sharding.Mesh | None = None
) -> tuple[Gemma, Params, Tokenizer]:
    """Returns the model, the parameters and the tokenizer of a GGUF file.

    Header, config, vocabulary and shapes are checked before any tensor is read.

    Args:
      path: the path of the file.
      dtype: the dtype of the parameters and of the computation; None for float32, to which all
        tensors are dequantized.
      mesh: the mesh on which the parameters are created in shards; None for the default device.

    Raises:
      FileNotFoundError: if the file or the package `gguf` is missing.
      ValueError: if the file is damaged, contains another model, or lacks a tensor or its
        vocabulary.
    """
    file = GgufFile(path)
    config = read_gguf_config(file)
    tokenizer = gguf_tokenizer(file)
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f'{path}: its tokenizer has {tokenizer.vocab_size} tokens, its embedding '
            f'{config.vocab_size} rows; the file is inconsistent; convert it again.'
        )
    tensors = GgufTensors(file, config.norm_scale_offset)
    model, params = load_tensors(tensors, config, dtype, mesh)
    return model, params, tokenizer


class GgufTensors:
    """A `reader.Reader` of the tensors of a GGUF file by their published names.

    Attributes:
      directory: the path of the file, for error messages.
      shapes: the shape of every tensor by its published name.
    """

    def __init__(self, file: GgufFile, norm_offset: float = 0.0) -> None:
        """Wraps a file.

        Args:
          file: the opened GGUF file.
          norm_offset: the difference between stored and published norm weights. It is 1 for
            Gemma 3, which multiplies by 1 + w, while llama.cpp multiplies by the stored weight.
        """
        self._file = file
        self._norm_offset = norm_offset
        self._stored = {published_name(name): name for name in file.tensors}
        self._stored.pop(ROPE_FREQUENCIES, None)  # already read by read_gguf_config
        self.directory = file.path
        self.shapes = {name: file.tensors[stored].shape for name, stored in self._stored.items()}

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor in float32."""
        values = self._file.read(self._stored[name])
        return values - self._norm_offset if name.endswith('norm.weight') else values

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Returns rows [start, stop) of a tensor in float32."""
        return self.read(name)[start:stop]

    def check_weights(self, names: Iterable[str]) -> None:
        """Accepts all tensors: the constructor of `GgufFile` has already checked their types."""


def published_name(name: str) -> str:
    """Returns the published name of a tensor, or the name itself if there is none."""
    if name in _TOP:
        return _PREFIX + _TOP[name]
    block = re.fullmatch(r'blk\.(\d+)\.(.+)', name)
    if block and block[2] in _BLOCK:
        return f'{_PREFIX}layers.{block[1]}.{_BLOCK[block[2]]}'
    for start, tower in _TOWERS.items():
        if name.startswith(start):
            return tower + name
    return name


def gguf_tokenizer(file: GgufFile) -> Tokenizer:
    """Returns the tokenizer of the vocabulary in a GGUF file.

    A file with a chat template contains an instruction-tuned model. Without a template, prompts
    are plain text (`Tokenizer.chat_turns`).

    Raises:
      ValueError: if the file has no vocabulary, or one that is not of Gemma's kind.
    """
    where = 'tokenizer.ggml.'
    needed = ('model', 'tokens', 'token_type')
    values: dict[str, Any] = {
        name: file.metadata.get(where + name) for name in (*needed, 'scores', 'merges')
    }
    missing = [where + name for name in needed if values[name] is None]
    if missing:
        raise ValueError(f'{file.path} has no vocabulary: {", ".join(missing)} is missing.')
    if values['model'] not in _MODELS:
        raise ValueError(
            f'{file.path} has a vocabulary of the kind {values["model"]!r}; those of Gemma are '
            f'{", ".join(_MODELS)}.'
        )
    if file.metadata.get(where + 'add_space_prefix', False):
        raise ValueError(f'{file.path}: add_space_prefix is set, which is not supported.')
    types = values['token_type']
    pieces = [piece.replace(' ', SPACE) for piece in values['tokens']]
    name = 'merges' if values['model'] == 'gemma4' else 'scores'
    if values[name] is None:
        raise ValueError(f'{file.path} has no vocabulary: {where}{name} is missing.')
    if len(types) != len(pieces) or (name == 'scores' and len(values[name]) != len(pieces)):
        raise ValueError(f'{file.path}: tokens, types and {name} differ in number.')
    if name == 'merges':
        pairs = [tuple(pair.split(' ')) for pair in values['merges']]
        scores = scores_of_merges(pieces, types, pairs, str(file.path))
    else:
        scores = values['scores']
    model = sentencepiece_model(pieces, scores, types, str(file.path))
    template = file.metadata.get('tokenizer.chat_template')
    tokenizer = Tokenizer(model, str(file.path), template, template_source=str(file.path))
    return tokenizer if template is not None else tokenizer.without_chat_turns()
