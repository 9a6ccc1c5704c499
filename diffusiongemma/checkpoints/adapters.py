"""Reads and writes LoRA adapters: adapter.json + adapter.safetensors, which name their base."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from diffusiongemma.checkpoints.fields import read_fields, read_model_config
from diffusiongemma.checkpoints.json_file import read_json
from diffusiongemma.checkpoints.placement import param_shapes
from diffusiongemma.checkpoints.safetensors_reader import TensorReader
from diffusiongemma.checkpoints.safetensors_writer import save_tensors
from diffusiongemma.models.arrays import Params
from diffusiongemma.models.config import ModelConfig
from diffusiongemma.models.denoiser import model_for
from diffusiongemma.models.lora import LoraConfig, init_lora
from diffusiongemma.parallel import processes

CONFIG_FILE = 'adapter.json'
PARAMS_FILE = 'adapter.safetensors'
FORMAT = 'diffusiongemma-lora-1'


@dataclasses.dataclass(frozen=True)
class Adapters:
    """The content of an adapter directory.

    Attributes:
      lora: the LoRA settings with which the adapters are merged.
      params: the adapter parameters, float32.
      model: the config of the adapted model.
      base: the path or alias of the base model.
      base_fingerprint: the `fingerprint` of the base's parameters.
    """

    lora: LoraConfig
    params: Params
    model: ModelConfig
    base: str
    base_fingerprint: str


def is_adapters(directory: Path) -> bool:
    """Returns whether `directory` contains adapters."""
    return (directory / CONFIG_FILE).exists()


def fingerprint(params: Mapping[str, Any]) -> str:
    """Returns a hash of the norm scales, cast to bfloat16, which identifies a base model."""
    digest = hashlib.sha256()
    for name, value in sorted(flatten_dict(params['backbone'], sep='/').items()):
        if name.endswith('/scale'):
            scale = np.asarray(processes.on_host(value)).astype(ml_dtypes.bfloat16)
            digest.update(name.encode() + scale.tobytes())
    return digest.hexdigest()[:16]


def save_adapters(
    directory: Path,
    lora: LoraConfig,
    adapters: Mapping[str, Any],
    model: ModelConfig,
    *,
    base: str,
    base_fingerprint: str,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Writes adapters; `load_model` opens the directory as the adapted model.

    All processes must call it; only process 0 writes.

    Args:
      directory: the directory to create; existing adapters in it are replaced.
      lora: the LoRA settings with which the adapters are merged.
      adapters: trained parameters with the structure of `init_lora`.
      model: the config of the adapted model.
      base: the path or alias of the base; a relative path may also start at `directory`.
      base_fingerprint: the `fingerprint` of the base's parameters.
      about: JSON values that describe how the adapters were trained.
    """
    flat = flatten_dict(processes.on_host(dict(adapters)), sep='/')
    if not processes.is_writer():
        return
    directory.mkdir(parents=True, exist_ok=True)
    # In C order, because safetensors writes raw memory.
    arrays = {name: np.array(value, np.float32, order='C') for name, value in flat.items()}
    save_tensors(arrays, directory / PARAMS_FILE, {'format': FORMAT})
    content = {
        'format': FORMAT,
        'base': base,
        'base_fingerprint': base_fingerprint,
        'lora': dataclasses.asdict(lora),
        'model': model.to_dict(),
        'about': dict(about or {}),
    }
    (directory / CONFIG_FILE).write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')


def read_adapters(directory: Path) -> Adapters:
    """Returns adapters that `save_adapters` wrote.

    Raises:
      FileNotFoundError: if the weights are missing.
      ValueError: if a file is damaged or has another format.
    """
    path = directory / CONFIG_FILE
    content = read_json(path)
    if content.get('format') != FORMAT:
        raise ValueError(f'{path}: format {content.get("format")!r}, expected {FORMAT!r}.')
    lora = read_fields(LoraConfig, content.get('lora'), f'{path}, "lora"')
    model = read_model_config(content.get('model'), f'{path}, "model"')
    base, base_fingerprint = (content.get(name) for name in ('base', 'base_fingerprint'))
    if not (isinstance(base, str) and isinstance(base_fingerprint, str)) or '\0' in base:
        raise ValueError(
            f'{path}: "base" and "base_fingerprint" must be strings, got {base!r} and '
            f'{base_fingerprint!r}; "base" is the path of the base model.'
        )
    reader = TensorReader(directory, PARAMS_FILE)
    _check_shapes(reader, lora, model, path)
    reader.check_weights(reader.shapes)
    params = {name: reader.read(name) for name in reader.shapes}
    return Adapters(lora, unflatten_dict(params, sep='/'), model, base, base_fingerprint)


def _check_shapes(reader: TensorReader, lora: LoraConfig, model: ModelConfig, path: Path) -> None:
    """Raises ValueError unless the tensors have the names and shapes of the model's adapters."""
    module = model_for(model)
    params = {
        name: jax.ShapeDtypeStruct(shape, np.float32)
        for name, shape in param_shapes(module).items()
    }
    params = unflatten_dict(params, sep='/')
    try:
        expected = jax.eval_shape(lambda p: init_lora(lora, p, jax.random.key(0)), params)
    except ValueError as error:  # for example if no kernel matches
        raise ValueError(f'{path}: {error}') from error
    shapes = {name: value.shape for name, value in flatten_dict(expected, sep='/').items()}
    problems = [f'{name} is missing' for name in sorted(set(shapes) - set(reader.shapes))]
    problems += [f'{name} is unknown' for name in sorted(set(reader.shapes) - set(shapes))]
    problems += [
        f'{name} has shape {reader.shapes[name]}, {CONFIG_FILE} asks for {shape}'
        for name, shape in sorted(shapes.items())
        if reader.shapes.get(name, shape) != shape
    ]
    if problems:
        more = f' (and {len(problems) - 5} more)' if len(problems) > 5 else ''
        raise ValueError(
            f'{path.parent / PARAMS_FILE} does not fit {CONFIG_FILE}: {"; ".join(problems[:5])}'
            f'{more}. Copy both files from the same run.'
        )
