"""Exports parameters to the published format (Hugging Face safetensors), for transformers.

The table of `hf_tensors.py` determines the tensors: each is allocated and then filled through the
`convert` views of the parameters that it contains. Parts that a bundle does not contain (vision
tower, token ids, tokenizer files) can come from a base checkpoint.
"""

import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from diffusiongemma.checkpoints.hf_config_export import (
    PLACEHOLDER_VISION,
    TokenIds,
    hf_config,
    vision_config,
)
from diffusiongemma.checkpoints.hf_tensors import TOWERS, Source, TensorNames, sources
from diffusiongemma.checkpoints.placement import param_shapes
from diffusiongemma.checkpoints.safetensors_reader import INDEX_FILE, SINGLE_FILE, TensorReader
from diffusiongemma.checkpoints.safetensors_writer import save_tensors
from diffusiongemma.data.chat_template import TEMPLATE_FILE
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.models.config import ModelConfig, MoEConfig
from diffusiongemma.models.denoiser import DiffusionGemma

MAX_SHARD_BYTES = 5 * 10**9
CONFIG_FILE, GENERATION_FILE = 'config.json', 'generation_config.json'
TOKENIZER_FILES = (
    'tokenizer.model', 'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json',
    'added_tokens.json', 'chat_template.jinja', 'chat_template.json', 'processor_config.json',
    'preprocessor_config.json',
)  # fmt: skip
_NULL_EXPERT = MoEConfig(num_experts=1, top_k=1, expert_width=8)


class _Tensor(NamedTuple):
    """A tensor to be written: its name, shape and dtype, and the function that creates it."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def save_hf(
    directory: Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    tokenizer: Tokenizer | None = None,
    *,
    dtype: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    generation: Mapping[str, Any] | None = None,
    base: Path | None = None,
) -> None:
    """Writes a checkpoint in the published format.

    A dense denoiser gets one expert whose output is zero, because the format requires experts in
    every layer (`with_null_expert`).

    Args:
      directory: the directory to create; it must not contain a model yet.
      config: the config of the model.
      params: the parameters as a nested dict of arrays. They are copied from the devices one
        tensor at a time; the host holds one file of the checkpoint.
      tokenizer: the tokenizer of the model, or None.
      dtype: the dtype of the tensors; None keeps that of the parameters.
      max_shard_bytes: the maximum size of a file, unless a single tensor is larger.
      generation: the content of generation_config.json in addition to the token ids, if the base
        has no such file.
      base: a checkpoint in the published format that the model comes from. Its vision tower,
        tokenizer files and settings that a `ModelConfig` does not have are copied.

    Raises:
      ValueError: if the directory already contains a model, or the format cannot represent this
        one; the message names the reason and the remedy.
    """
    if config.is_diffusion and config.moe is None:
        logging.info('the denoiser is dense: adding one expert whose output is zero')
        config, params = with_null_expert(config, params)
    base_config = json.loads((base / CONFIG_FILE).read_text(encoding='utf-8')) if base else {}
    tokens = _token_ids(tokenizer)
    dtype_name = str(np.dtype(dtype or params['embedder']['embedding'].dtype))
    content = hf_config(config, dtype_name, tokens, base_config)
    check_empty(directory)
    tensors = list(_text_tensors(config, flatten_dict(dict(params), sep='/'), dtype))
    if config.is_diffusion:
        tensors += _vision_tensors(base, base_config, tensors[0].dtype, config.width)
    directory.mkdir(parents=True, exist_ok=True)
    _write_tensors(directory, tensors, max_shard_bytes)
    _write_tokenizer(directory, tokenizer, base)
    if base is not None and (base / GENERATION_FILE).exists():
        shutil.copyfile(base / GENERATION_FILE, directory / GENERATION_FILE)
    else:
        _write_json(directory / GENERATION_FILE, dict(generation or {}) | tokens.to_hf())
    _write_json(directory / CONFIG_FILE, content)  # last, because it makes the directory a model
    logging.info('%s: wrote %d tensors in %s', directory, len(tensors), dtype_name)


def with_null_expert(
    config: ModelConfig, params: Mapping[str, Any]
) -> tuple[ModelConfig, dict[str, Any]]:
    """Returns config and parameters of a dense model with one added expert whose output is zero.

    The output of the dense MLP passes through one additional norm, whose epsilon changes outputs
    slightly (below 1e-4 in the logits of the shipped student).
    """
    config = config.replace(moe=_NULL_EXPERT)
    flat = flatten_dict(dict(params), sep='/')
    dtype = flat['embedder/embedding'].dtype
    for name, shape in param_shapes(DiffusionGemma(config)).items():
        if name not in flat:
            one = 1.0 - config.norm_scale_offset if name.endswith('norm/scale') else 1.0
            flat[name] = np.full(shape, one if name.endswith('scale') else 0.0, dtype)
    return config, unflatten_dict(flat, sep='/')


def check_empty(directory: Path) -> None:
    """Raises ValueError if `directory` contains a model, because files of two would be mixed."""
    existing = sorted(path.name for path in directory.glob('*.safetensors'))
    existing += [name for name in (CONFIG_FILE, INDEX_FILE) if (directory / name).exists()]
    if existing:
        raise ValueError(
            f'{directory} holds {existing[0]} already; choose a new directory, or delete this one.'
        )


def _token_ids(tokenizer: Tokenizer | None) -> TokenIds:
    if tokenizer is None:
        return TokenIds()
    return TokenIds(tokenizer.pad_id, tokenizer.bos_id, tokenizer.stop_ids)


def _text_tensors(config: ModelConfig, params: Mapping[str, Any], dtype: Any) -> Iterator[_Tensor]:
    """Yields the tensors of the text model, in the order of the parameters."""
    names = TensorNames(config)
    params = {name: _on_host(value) for name, value in params.items()}
    parts: dict[str, list[tuple[str, Any, Source]]] = {}
    for name, value in params.items():
        for index, source in sources(config, name, tuple(value.shape)):
            parts.setdefault(names.of(source), []).append((name, index, source))

    def make(tensor: str) -> np.ndarray:
        array = np.empty(parts[tensor][0][2].shape, dtype or params[parts[tensor][0][0]].dtype)
        for name, index, source in parts[tensor]:
            view = source.convert(array)
            if not np.may_share_memory(view, array):
                raise RuntimeError(f'the conversion of {tensor} to {name} copies; see Source.')
            view[...] = jax.device_get(params[name][index])
        return array

    for tensor, pieces in parts.items():
        name, _, source = pieces[0]
        yield _Tensor(
            tensor,
            source.shape,
            np.dtype(dtype or params[name].dtype),
            functools.partial(make, tensor),
        )


def _on_host(value: Any) -> Any:
    """Returns an array on the CPU as numpy without a copy; arrays on accelerators are unchanged."""
    on_device = isinstance(value, jax.Array) and (
        len(value.devices()) > 1 or next(iter(value.devices())).platform != 'cpu'
    )
    return value if on_device else np.asarray(value)


def _vision_tensors(
    base: Path | None, base_config: Mapping[str, Any], dtype: np.dtype, width: int
) -> list[_Tensor]:
    """Returns the vision tower of the base checkpoint, or the zeros of the placeholder."""
    if base is not None and vision_config(base_config):
        reader = TensorReader(base)
        return [
            _Tensor(name, shape, reader.dtype(name), functools.partial(reader.read, name))
            for name, shape in reader.shapes.items()
            if TOWERS.match(name)
        ]
    hidden, patch = PLACEHOLDER_VISION['hidden_size'], PLACEHOLDER_VISION['patch_size']
    positions = PLACEHOLDER_VISION['position_embedding_size']
    embedder = 'model.encoder.vision_tower.patch_embedder.'
    shapes = {
        f'{embedder}input_proj.weight': (hidden, 3 * patch**2),
        f'{embedder}position_embedding_table': (2, positions, hidden),
        'model.encoder.embed_vision.embedding_projection.weight': (width, hidden),
    }
    return [
        _Tensor(name, shape, dtype, functools.partial(np.zeros, shape, dtype))
        for name, shape in shapes.items()
    ]


def _write_tensors(directory: Path, tensors: list[_Tensor], max_shard_bytes: int) -> None:
    """Writes one file, or numbered files with an index; one file at a time is in memory."""
    shards: list[list[_Tensor]] = [[]]
    filled = 0
    for tensor in sorted(tensors):
        if shards[-1] and filled + tensor.size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.size
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f'model-{number:05d}-of-{len(shards):05d}.safetensors'
        file = SINGLE_FILE if len(shards) == 1 else file
        arrays = {tensor.name: tensor.make() for tensor in shard}
        save_tensors(arrays, directory / file, {'format': 'pt'})
        weight_map |= dict.fromkeys(arrays, file)
    if len(shards) > 1:
        total = sum(tensor.size for tensor in tensors)
        index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
        _write_json(directory / INDEX_FILE, index)


def _write_tokenizer(directory: Path, tokenizer: Tokenizer | None, base: Path | None) -> None:
    """Copies the tokenizer files of a base with the same tokenizer, or writes new ones."""
    model = base / 'tokenizer.model' if base is not None else None
    differs = (
        tokenizer is not None
        and model is not None
        and model.exists()
        and Tokenizer.load(str(model)).content_hash != tokenizer.content_hash
    )
    if base is not None and not differs:
        for name in TOKENIZER_FILES:
            if (base / name).exists():
                shutil.copyfile(base / name, directory / name)
    if tokenizer is None or (directory / 'tokenizer_config.json').exists():
        return
    tokenizer.save(directory / 'tokenizer.model')
    pieces = {id_: tokenizer.piece(id_) for id_ in sorted(tokenizer.special_ids)}
    start, end = pieces[tokenizer.turn_start_id], pieces[tokenizer.turn_end_id]
    content = {
        'tokenizer_class': 'GemmaTokenizer',
        'add_bos_token': True,
        'clean_up_tokenization_spaces': False,
        'bos_token': pieces[tokenizer.bos_id],
        'eos_token': pieces[tokenizer.eos_id],
        'pad_token': pieces[tokenizer.pad_id],
        'unk_token': pieces[tokenizer.unk_id],
        'mask_token': pieces[tokenizer.mask_id],
        'extra_special_tokens': [start, end, *(pieces[i] for i in tokenizer.think_ids or ())],
    }
    _write_json(directory / 'tokenizer_config.json', content)
    if not tokenizer.chat_turns:  # a missing template marks a pretrained model
        return
    # `Tokenizer.format_prompt` renders the same template, so transformers formats identically.
    (directory / TEMPLATE_FILE).write_bytes(tokenizer.chat_template.encode())


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + '\n', encoding='utf-8')
