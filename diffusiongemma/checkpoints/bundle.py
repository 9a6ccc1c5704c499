"""Model bundles: config.json + params.safetensors + tokenizer.model in one directory.

The format of the shipped models and of what a run exports. Parameters keep their dtype; a
parameter's name is its path in the tree, joined by '/'.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.models.config import ModelConfig
from diffusiongemma.models.denoiser import DiffusionGemma
from diffusiongemma.models.transformer import Gemma, init_params

CONFIG_FILE = 'config.json'
PARAMS_FILE = 'params.safetensors'
TOKENIZER_FILE = 'tokenizer.model'
FORMAT = 'diffusiongemma-bundle-1'


def model_for(config: ModelConfig, dtype: Any) -> Gemma:
    """The module of a config: a DiffusionGemma where it has a canvas, else a Gemma."""
    return (DiffusionGemma if config.is_diffusion else Gemma)(config, dtype)


def is_bundle(directory: Path) -> bool:
    """Whether `directory` holds a bundle (and not some other config.json)."""
    return (directory / PARAMS_FILE).exists()


def save_bundle(
    directory: Path,
    config: ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    *,
    dtype: Any = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Writes a bundle.

    Args:
      directory: is created; the files of an older bundle in it are replaced.
      config: of the model.
      params: nested dict of arrays.
      tokenizer: of the model; written into the bundle.
      dtype: parameters are cast to it; None keeps theirs.
      about: JSON values on how the model was made.
    """
    directory.mkdir(parents=True, exist_ok=True)
    flat = flatten_dict(jax.device_get(params), sep='/')
    # safetensors writes the memory as it lies: another order than C would scramble the array.
    arrays = {
        name: np.array(value, dtype or value.dtype, order='C') for name, value in flat.items()
    }
    partial = directory / (PARAMS_FILE + '.partial')
    save_file(arrays, partial, metadata={'format': FORMAT})
    content = {'format': FORMAT, 'model': config.to_dict(), 'about': dict(about or {})}
    (directory / CONFIG_FILE).write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
    tokenizer.save(directory / TOKENIZER_FILE)
    partial.replace(directory / PARAMS_FILE)


def load_bundle(directory: Path, dtype: Any) -> tuple[Gemma, dict]:
    """Reads a bundle: (model, parameters), both in `dtype`.

    Raises:
      FileNotFoundError: a file of the bundle is missing.
      ValueError: a file is damaged, or a parameter is missing, unknown or of another shape.
    """
    config_path = directory / CONFIG_FILE
    if not config_path.exists():
        raise FileNotFoundError(f'{directory} has {PARAMS_FILE} but no {CONFIG_FILE}.')
    try:
        content = json.loads(config_path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{config_path} is no JSON ({error}); copy it again.') from error
    if content.get('format') != FORMAT:
        raise ValueError(f'{config_path}: format {content.get("format")!r}, expected {FORMAT!r}.')
    model = model_for(ModelConfig.from_dict(content['model']), dtype)
    try:
        arrays = load_file(directory / PARAMS_FILE)
    except SafetensorError as error:
        raise ValueError(
            f'{directory / PARAMS_FILE} is damaged ({error}); copy it again.'
        ) from error
    check_params(model, arrays, str(directory))
    params = {name: np.asarray(value, dtype) for name, value in arrays.items()}
    return model, jax.device_put(unflatten_dict(params, sep='/'))


def check_params(model: Gemma, arrays: Mapping[str, np.ndarray], where: str) -> None:
    """Raises ValueError unless `arrays` (by '/'-joined name) are the parameters of `model`."""
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    wanted = {name: value.shape for name, value in flatten_dict(shapes, sep='/').items()}
    problems = [f'{name} is missing' for name in sorted(set(wanted) - set(arrays))]
    problems += [f'{name} is unknown' for name in sorted(set(arrays) - set(wanted))]
    problems += [
        f'{name} has shape {tuple(arrays[name].shape)}, the config asks for {wanted[name]}'
        for name in sorted(set(arrays) & set(wanted))
        if tuple(arrays[name].shape) != wanted[name]
    ]
    if problems:
        more = f' (and {len(problems) - 5} more)' if len(problems) > 5 else ''
        raise ValueError(f'{where} does not fit its config: {"; ".join(problems[:5])}{more}.')
