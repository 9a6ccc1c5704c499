"""Converts any format that `load_model` opens to the Hugging Face format or to a bundle."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusiongemma.checkpoints import bundle, hf_export
from diffusiongemma.checkpoints.hf_config import is_published
from diffusiongemma.checkpoints.int8_storage import INT8
from diffusiongemma.checkpoints.load import BASE_PARAMS, load_model, model_directory
from diffusiongemma.checkpoints.packaged import PACKAGED
from diffusiongemma.models.config import ModelConfig

FORMATS = ('hf', 'bundle')


def convert(
    source: str | Path,
    output: Path,
    format: str,
    *,
    dtype: Any = None,
    max_shard_bytes: int = hf_export.MAX_SHARD_BYTES,
    base: Path | None = None,
    generation: Callable[[ModelConfig], Mapping[str, Any]] | None = None,
) -> None:
    """Reads a model and writes it to a new directory.

    Args:
      source: any model that `load_model` opens.
      output: the directory to create.
      format: 'hf' (the published format of Hugging Face) or 'bundle'.
      dtype: the dtype of the parameters; None keeps their dtypes. 'int8' stores large parameters
        of a bundle as int8 (`int8_storage`).
      max_shard_bytes: the maximum size of a file in the published format.
      base: a published checkpoint that supplies what the model does not contain, see `save_hf`;
        by default `source` if it is one.
      generation: returns the generation_config.json for a model whose base has none.

    Raises:
      FileNotFoundError: if `source` does not exist or contains no model.
      ValueError: if it cannot be read, the format cannot represent it, or `output` already
        contains a model.
    """
    if format not in FORMATS:
        raise ValueError(f'format must be one of {FORMATS}, got {format!r}.')
    directory = model_directory(source)
    hf_export.check_empty(output)
    if format != 'bundle' and dtype == INT8:
        raise ValueError("dtype='int8' is for the format 'bundle'; transformers would not read it.")
    content = bundle.read_content(directory) if bundle.is_bundle(directory) else {}
    model, params, tokenizer = load_model(source, None if dtype == INT8 else dtype)
    if format == 'bundle':
        if 'base_fingerprint' in content:  # the bundle only stores its trained part
            params = {name: value for name, value in params.items() if name not in BASE_PARAMS}
            tokenizer = None if content['base'] in PACKAGED else tokenizer
            extras = {name: content[name] for name in ('about', 'base', 'base_fingerprint')}
        elif tokenizer is None:
            raise ValueError(
                f'{directory} has no tokenizer.model or tokenizer.json; a bundle needs one.'
            )
        else:
            extras = {'about': {'converted_from': directory.name}}
        bundle.save_bundle(output, model.config, params, tokenizer, dtype=dtype, **extras)
        return
    if base is None and is_published(directory):
        base = directory
    hf_export.save_hf(
        output,
        model.config,
        params,
        tokenizer,
        max_shard_bytes=max_shard_bytes,
        generation=generation(model.config) if generation else None,
        base=base,
    )
