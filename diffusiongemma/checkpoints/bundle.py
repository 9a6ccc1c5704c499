"""Model bundles: config.json + params.safetensors + tokenizer.model in one directory.

This is the format of the shipped models and of exports of a run. Parameters keep their dtype; the
name of a parameter is its path in the tree, joined by '/'. A bundle may name a `base`, another
bundle that has the missing parameters, so a student with a separate denoiser need not repeat its
teacher. With a `base_fingerprint`, the base is any model that `load_model` opens, and it must be
the model that the student was trained on; light students are stored in this way. Large weights may
be stored as int8 (`int8_storage`).
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from diffusiongemma.checkpoints.fields import read_model_config
from diffusiongemma.checkpoints.int8_storage import BLOCK, INT8, SCALE, from_int8, to_int8
from diffusiongemma.checkpoints.json_file import read_json
from diffusiongemma.checkpoints.placement import assemble, flat_shardings, param_shapes
from diffusiongemma.checkpoints.safetensors_reader import TensorReader
from diffusiongemma.checkpoints.safetensors_writer import save_tensors
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.models.arrays import Params
from diffusiongemma.models.config import ModelConfig
from diffusiongemma.models.denoiser import model_for
from diffusiongemma.models.transformer import Gemma
from diffusiongemma.parallel import processes

CONFIG_FILE = 'config.json'
PARAMS_FILE = 'params.safetensors'
TOKENIZER_FILE = 'tokenizer.model'
FORMAT = 'diffusiongemma-bundle-1'


def is_bundle(directory: Path) -> bool:
    """Returns whether `directory` contains a bundle (and not some other config.json)."""
    return (directory / PARAMS_FILE).exists()


def save_bundle(
    directory: Path,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer | None,
    *,
    dtype: Any = None,
    about: Mapping[str, Any] | None = None,
    base: str | None = None,
    base_fingerprint: str | None = None,
) -> None:
    """Writes a bundle. All processes must call it; only process 0 writes.

    Args:
      directory: the directory to create; the files of an existing bundle in it are replaced.
      config: the config of the model.
      params: the parameters as a nested dict of arrays.
      tokenizer: the tokenizer to store in the bundle; None to use that of a base with a
        fingerprint.
      dtype: the dtype to cast parameters to; None keeps their dtypes, 'int8' stores large ones as
        int8 and all others as bfloat16.
      about: JSON values that describe how the model was made.
      base: the path, relative to `directory`, of a bundle with the parameters that `params` lacks;
        with a fingerprint, the name or path of any model.
      base_fingerprint: the `fingerprint` of the base's parameters.
    """
    flat = flatten_dict(processes.on_host(params), sep='/')
    if not processes.is_writer():
        processes.broadcast_from_writer(None)  # waits until process 0 has written the files
        return
    directory.mkdir(parents=True, exist_ok=True)
    if dtype == INT8:
        flat = {k: v for name, value in flat.items() for k, v in to_int8(name, value).items()}
        dtype = jnp.bfloat16
    # safetensors writes raw memory, so arrays that are not in C order would be scrambled.
    arrays = {
        name: np.array(value, cast_to(dtype, value.dtype), order='C')
        for name, value in flat.items()
    }
    partial = directory / (PARAMS_FILE + '.partial')
    save_tensors(arrays, partial, {'format': FORMAT})
    content = {'format': FORMAT, 'model': config.to_dict(), 'about': dict(about or {})}
    if base is not None:
        content['base'] = base
    if base_fingerprint is not None:
        content['base_fingerprint'] = base_fingerprint
    (directory / CONFIG_FILE).write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
    if tokenizer is not None:
        tokenizer.save(directory / TOKENIZER_FILE)
    partial.replace(directory / PARAMS_FILE)
    processes.broadcast_from_writer(None)


def load_bundle(
    directory: Path, dtype: Any, mesh: jax.sharding.Mesh | None = None
) -> tuple[Gemma, Params]:
    """Returns the model and the parameters of a bundle.

    Parameters are read one at a time, directly into their shards.

    Args:
      directory: the directory of the bundle.
      dtype: the dtype of the parameters and of the computation; None keeps the stored dtypes and
        computes in float32.
      mesh: the mesh on which the parameters are created in shards; None for the default device.

    Raises:
      FileNotFoundError: if a file of the bundle is missing.
      ValueError: if a file is damaged, or a parameter is missing, unknown or has a wrong shape.
    """
    content = read_content(directory)
    config_path = directory / CONFIG_FILE
    model = model_for(
        read_model_config(content.get('model'), f'{config_path}, "model"'), dtype or jnp.float32
    )
    reader_of: dict[str, _BundleReader] = {}
    for where in filter(None, (_base(content, config_path), '.')):
        reader = _BundleReader(directory / where)
        reader.check_weights(reader.shapes)
        reader_of |= dict.fromkeys(reader.shapes, reader)
    shapes = {name: reader.shapes[name] for name, reader in reader_of.items()}
    check_shapes(model, shapes, str(directory))
    return model, _read(model, reader_of, dtype, mesh)


def load_own_params(
    directory: Path, model: Gemma, dtype: Any, mesh: jax.sharding.Mesh | None = None
) -> Params:
    """Returns the parameters that a bundle stores, without those of its base.

    Args:
      directory: the directory of the bundle.
      model: the whole model, including the parameters of the base.
      dtype, mesh: see `load_bundle`.

    Raises:
      ValueError: if a file is damaged, or a parameter is unknown to `model` or has a wrong shape.
    """
    reader = _BundleReader(directory)
    expected_shapes = param_shapes(model)
    missing_shapes = {
        name: shape for name, shape in expected_shapes.items() if name not in reader.shapes
    }
    check_shapes(model, {**missing_shapes, **reader.shapes}, str(directory))
    return _read(model, dict.fromkeys(reader.shapes, reader), dtype, mesh)


class _BundleReader(TensorReader):
    """A reader of the parameters of a bundle, which dequantizes int8 weights to float32."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, PARAMS_FILE)
        stored = self.shapes
        self._scaled = {name for name in stored if name + SCALE in stored}
        self.shapes = {
            name: shape
            for name, shape in stored.items()
            if name.removesuffix(SCALE) not in self._scaled or name in self._scaled
        }
        for name in self._scaled:
            blocks = -(-math.prod(stored[name]) // BLOCK)
            if self.dtypes[name] != 'I8' or stored[name + SCALE] != (blocks,):
                raise ValueError(
                    f'{directory / PARAMS_FILE}: {name} is stored as {self.dtypes[name]} with '
                    f'scales of shape {stored[name + SCALE]}; expected I8 and ({blocks},).'
                )
            self.dtypes[name] = 'F32'  # the dtype after dequantization

    def read(self, name: str) -> np.ndarray:
        value = super().read(name)
        return from_int8(value, super().read(name + SCALE)) if name in self._scaled else value


def read_content(directory: Path) -> dict[str, Any]:
    """Returns the config.json of a bundle: `model`, `about`, and `base` if it has one.

    Raises:
      FileNotFoundError: if there is no config.json.
      ValueError: if it has another format.
    """
    config_path = directory / CONFIG_FILE
    if not config_path.exists():
        raise FileNotFoundError(f'{directory} has {PARAMS_FILE} but no {CONFIG_FILE}.')
    content = read_json(config_path)
    if content.get('format') != FORMAT:
        raise ValueError(f'{config_path}: format {content.get("format")!r}, expected {FORMAT!r}.')
    return content


def cast_to(dtype: Any, present: Any) -> Any:
    """Returns the dtype to cast a parameter to; its `present` dtype, if that is not floating."""
    return present if dtype is None or not jnp.issubdtype(present, jnp.floating) else dtype


def _read(model: Gemma, reader_of: Mapping[str, '_BundleReader'], dtype: Any, mesh: Any) -> Params:
    shardings, flat = flat_shardings(model, mesh), {}
    for name, reader in reader_of.items():
        value = reader.read(name)
        shape = reader.shapes[name]
        cast = cast_to(dtype, value.dtype)
        flat[name] = assemble(shape, cast, shardings[name], [(..., value)])
    params: Params = unflatten_dict(flat, sep='/')
    return params


def _base(content: Mapping[str, Any], path: Path) -> str | None:
    """Returns the path of the base bundle, or None; raises FileNotFoundError if it is missing."""
    base = content.get('base')
    if base is None:
        return None
    if not isinstance(base, str) or '\0' in base:
        raise ValueError(f'{path}: "base" must be the path of a bundle, got {base!r}.')
    if not (path.parent / base / PARAMS_FILE).is_file():
        raise FileNotFoundError(
            f'{path.parent} takes parameters from the bundle {base!r}, and there is no '
            f'{PARAMS_FILE} in it; copy it there, or change "base" in {path}.'
        )
    return base


def check_params(model: Gemma, arrays: Mapping[str, Any], where: str) -> None:
    """Raises ValueError unless `arrays` (by '/'-joined name) are the parameters of `model`."""
    check_shapes(model, {name: value.shape for name, value in arrays.items()}, where)


def check_shapes(model: Gemma, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises ValueError unless `shapes` (by '/'-joined name) are those of the parameters."""
    expected = param_shapes(model)
    problems = [f'{name} is missing' for name in sorted(set(expected) - set(shapes))]
    problems += [f'{name} is unknown' for name in sorted(set(shapes) - set(expected))]
    problems += [
        f'{name} has shape {tuple(shapes[name])}, the config asks for {expected[name]}'
        for name in sorted(set(shapes) & set(expected))
        if tuple(shapes[name]) != expected[name]
    ]
    if problems:
        more = f' (and {len(problems) - 5} more)' if len(problems) > 5 else ''
        raise ValueError(f'{where} does not fit its config: {"; ".join(problems[:5])}{more}.')
