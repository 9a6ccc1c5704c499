"""Weights of the published format (Hugging Face safetensors) -> parameters.

Left out, with a line in the log, are the vision and audio towers, the key and value weights that
files may still have for layers that share the keys and values of an earlier one, and tied copies: a
head or encoder weights that equal, value for value, the tensor that is read. Where they differ it
is an error.
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

from diffusiongemma.checkpoints.bundle import model_for
from diffusiongemma.checkpoints.hf_config import read_hf_config
from diffusiongemma.checkpoints.hf_tensors import HEADS, Source, TensorNames, sources
from diffusiongemma.checkpoints.placement import assemble, flat_shardings, param_shapes
from diffusiongemma.checkpoints.reader import Reader
from diffusiongemma.checkpoints.safetensors_reader import TensorReader
from diffusiongemma.models.config import ModelConfig
from diffusiongemma.models.transformer import Gemma

_COMPARED = 2**22  # numbers of a tied copy that are compared at a time


def load_hf(
    directory: Path, dtype: Any, mesh: jax.sharding.Mesh | None = None
) -> tuple[Gemma, dict]:
    """Reads a published checkpoint: (model, parameters).

    Tensors are read one at a time, cast, and copied into the shards of one parameter after the
    other: beside what is on the devices already the host holds one tensor and what its devices
    hold of one parameter (its layers stacked).

    Args:
      directory: of the checkpoint.
      dtype: of the parameters and the computation; None keeps what is stored.
      mesh: the parameters are created in their shards on it; None for the default device.

    Raises:
      FileNotFoundError: config.json or weights are missing.
      ValueError: a tensor is missing, unknown or of another shape, or is stored in a dtype that
        is not supported (checked before any tensor is read); or a copy of a tied tensor differs
        from it.
    """
    config = read_hf_config(directory)
    return load_tensors(TensorReader(directory), config, dtype, mesh)


def load_tensors(
    reader: Reader, config: ModelConfig, dtype: Any, mesh: jax.sharding.Mesh | None
) -> tuple[Gemma, dict]:
    """Model and parameters of `config` from a reader's tensors, see `load_hf`."""
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
    """Raises ValueError unless the reader holds exactly what the table asks for.

    Returns:
      The names of tied copies beside that, each with the tensor that it must equal.
    """
    problems: list[str] = []
    wanted: set[str] = set()
    copies: dict[str, str] = {}
    for parameter, parts in table.items():
        for _, source in parts:
            tensor = names.of(source)
            wanted.add(tensor)
            have = reader.shapes.get(tensor)
            if have is None:
                problems.append(f'{tensor} is missing (for {parameter})')
            elif have != source.shape:
                problems.append(
                    f'{tensor} has shape {have}, the config asks for {source.shape} '
                    f'(for {parameter})'
                )
    reader.check_weights(sorted(wanted & set(reader.shapes)))
    left_out: Counter[str] = Counter()
    for name in sorted(set(reader.shapes) - wanted):
        part = names.left_out(name)
        if part is not None:
            left_out[part] += 1
        elif (original := names.tied_to(name, wanted)) is not None:
            copies[name] = original
        else:
            problems.append(f'{name} is unknown')
    if problems:
        more = f' (and {len(problems) - 5} more)' if len(problems) > 5 else ''
        raise ValueError(f'{directory}: {"; ".join(problems[:5])}{more}.')
    if left_out:
        said = ', '.join(f'{part} ({count})' for part, count in sorted(left_out.items()))
        logging.info('%s: tensors left out, the text needs none of them: %s', directory, said)
    return copies


def _check_copies(copies: Mapping[str, str], reader: Reader) -> None:
    """Raises ValueError unless each copy has the values of its original; logs what is left out."""
    for name, original in copies.items():
        shape, wanted = reader.shapes[name], reader.shapes[original]
        if shape == wanted and _same_values(reader, name, original):
            continue
        how = 'values' if shape == wanted else f'shape ({shape}, not {wanted})'
        remedy = (
            'A head of its own is not supported: if it was trained (LoRA with modules_to_save), '
            'train again without it; if the embedding is what you want'
            if name in HEADS
            else 'Encoder and decoder share these weights here: if the decoder has what you want'
        )
        raise ValueError(
            f'{reader.directory}: {name} has other {how} than {original}, to which the format ties '
            f'it. {remedy}, delete {name} from the file.'
        )
    if copies:
        logging.info(
            '%s: tied copies left out, equal to what is read: %s',
            reader.directory,
            ', '.join(f'{name} ({original})' for name, original in copies.items()),
        )


def _same_values(reader: Reader, name: str, original: str) -> bool:
    """Whether two tensors of one shape hold the same numbers, some rows of them at a time."""
    shape = reader.shapes[name]
    if not shape:
        return _equal(reader.read(name), reader.read(original))
    count = max(1, _COMPARED // max(1, int(np.prod(shape[1:]))))
    return all(
        _equal(reader.rows(name, start, start + count), reader.rows(original, start, start + count))
        for start in range(0, shape[0], count)
    )


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays hold the same numbers, whatever dtypes they are stored in."""
    if a.dtype == b.dtype and a.tobytes() == b.tobytes():
        return True  # NaNs included
    return np.array_equal(a.astype(np.float64), b.astype(np.float64), equal_nan=True)
