"""Imports the weights of the published format (Hugging Face safetensors) as parameters.

Some tensors are skipped, with a line in the log: vision and audio towers, key and value weights of
layers that share the keys and values of an earlier layer, and tied copies (head or encoder weights
whose values equal those of the imported tensor). A tied copy with other values is an error.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import unflatten_dict

from diffusiongemma.checkpoints.hf_config import read_hf_config
from diffusiongemma.checkpoints.hf_tensors import HEADS, Source, TensorNames, sources
from diffusiongemma.checkpoints.placement import assemble, flat_shardings, param_shapes
from diffusiongemma.checkpoints.reader import Reader
from diffusiongemma.checkpoints.safetensors_reader import TensorReader
from diffusiongemma.models.arrays import Params
from diffusiongemma.models.config import ModelConfig
from diffusiongemma.models.denoiser import model_for
from diffusiongemma.models.transformer import Gemma

_COMPARED = 2**22  # the number of values of a tied copy that are compared at a time


def load_hf(
    directory: Path, dtype: Any, mesh: jax.sharding.Mesh | None = None
) -> tuple[Gemma, Params]:
    """Returns the model and the parameters of a published checkpoint.

    Tensors are read one at a time, cast, and copied into the shards of one parameter after the
    other. The host holds at most one tensor and the local shards of one parameter (with its
    layers stacked), in addition to what is on the devices.

    Args:
      directory: the directory of the checkpoint.
      dtype: the dtype of the parameters and of the computation; None keeps the stored dtypes and
        computes in float32.
      mesh: the mesh on which the parameters are created in shards; None for the default device.

    Raises:
      FileNotFoundError: if config.json or weights are missing.
      ValueError: if a tensor is missing, unknown, of a wrong shape or stored in an unsupported
        dtype (checked before any tensor is read), or if a tied copy differs from its original.
    """
    config = read_hf_config(directory)
    return load_tensors(TensorReader(directory), config, dtype, mesh)


def load_tensors(
    reader: Reader, config: ModelConfig, dtype: Any, mesh: jax.sharding.Mesh | None
) -> tuple[Gemma, Params]:
    """Returns the model of `config` and its parameters from a reader's tensors, see `load_hf`."""
    model = model_for(config, dtype or jnp.float32)
    shapes = param_shapes(model)
    table = {name: sources(config, name, shape) for name, shape in shapes.items()}
    names = TensorNames(config, reader.shapes)
    copies = _check(table, names, reader, reader.directory)
    _check_copies(copies, reader)
    shardings = flat_shardings(model, mesh)

    def tensors(name: str) -> Iterator[tuple[Any, np.ndarray]]:
        for index, source in table[name]:
            yield index, source.convert(reader.read(names.of(source)))

    params = {
        name: assemble(shape, dtype, shardings[name], tensors(name))
        for name, shape in shapes.items()
    }
    logging.info('%s: read %d parameters', reader.directory, len(params))
    return model, unflatten_dict(params, sep='/')


def _check(
    table: dict[str, list[tuple[Any, Source]]],
    names: TensorNames,
    reader: Reader,
    directory: Path,
) -> dict[str, str]:
    """Raises ValueError unless the reader has exactly the tensors of the table.

    Returns:
      Additional tied copies by name, each with the name of the tensor that it must equal.
    """
    problems: list[str] = []
    expected: set[str] = set()
    copies: dict[str, str] = {}
    for parameter, parts in table.items():
        for _, source in parts:
            tensor = names.of(source)
            expected.add(tensor)
            shape = reader.shapes.get(tensor)
            if shape is None:
                problems.append(f'{tensor} is missing (for {parameter})')
            elif shape != source.shape:
                problems.append(
                    f'{tensor} has shape {shape}, the config asks for {source.shape} '
                    f'(for {parameter})'
                )
    reader.check_weights(sorted(expected & set(reader.shapes)))
    left_out: Counter[str] = Counter()
    for name in sorted(set(reader.shapes) - expected):
        part = names.left_out(name)
        if part is not None:
            left_out[part] += 1
        elif (original := names.tied_to(name, expected)) is not None:
            copies[name] = original
        else:
            problems.append(f'{name} is unknown')
    if problems:
        more = f' (and {len(problems) - 5} more)' if len(problems) > 5 else ''
        raise ValueError(f'{directory}: {"; ".join(problems[:5])}{more}.')
    if left_out:
        counts = ', '.join(f'{part} ({count})' for part, count in sorted(left_out.items()))
        logging.info(
            '%s: left out, because the text model needs none of them: %s', directory, counts
        )
    return copies


def _check_copies(copies: Mapping[str, str], reader: Reader) -> None:
    """Raises ValueError unless each copy has the values of its original; logs the copies."""
    for name, original in copies.items():
        shape, expected = reader.shapes[name], reader.shapes[original]
        if shape == expected and _same_values(reader, name, original):
            continue
        how = 'values' if shape == expected else f'shape ({shape}, not {expected})'
        remedy = (
            'A separate head is not supported: if it was trained (LoRA with modules_to_save), '
            'train again without it; to use the embedding as the head'
            if name in HEADS
            else 'Encoder and decoder share these weights here; to use those of the decoder'
        )
        raise ValueError(
            f'{reader.directory}: {name} has other {how} than {original}, to which the format ties '
            f'it. {remedy}, delete {name} from the file.'
        )
    if copies:
        logging.info(
            '%s: tied copies left out, whose values equal those of their originals: %s',
            reader.directory,
            ', '.join(f'{name} ({original})' for name, original in copies.items()),
        )


def _same_values(reader: Reader, name: str, original: str) -> bool:
    """Returns whether two tensors of the same shape have equal values; compares block by block."""
    shape = reader.shapes[name]
    if not shape:
        return _equal(reader.read(name), reader.read(original))
    count = max(1, _COMPARED // max(1, int(np.prod(shape[1:]))))
    return all(
        _equal(reader.rows(name, start, start + count), reader.rows(original, start, start + count))
        for start in range(0, shape[0], count)
    )


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Returns whether two arrays have equal values, also if their dtypes differ."""
    if a.dtype == b.dtype and a.tobytes() == b.tobytes():
        return True  # also for NaNs
    return np.array_equal(a.astype(np.float64), b.astype(np.float64), equal_nan=True)
