"""Opens whatever holds a model: a shipped one, a run's workdir, a bundle, a published one."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from flax.traverse_util import flatten_dict

from diffusiongemma.checkpoints import bundle, hf_import
from diffusiongemma.checkpoints.store import CHECKPOINTS_DIR, read_ema
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.models.config import ModelConfig
from diffusiongemma.models.presets import PRESETS
from diffusiongemma.models.transformer import Gemma

ASSETS = Path(__file__).parents[1] / 'assets'
BUILTIN = {
    'builtin': ASSETS / 'student',
    'builtin-student': ASSETS / 'student',
    'builtin-teacher': ASSETS / 'teacher',
}
EXPORT_DIR = 'model'  # in a workdir: the model that the run exports
BASE_DIR = 'base'  # in a workdir: the model whose parameters the run leaves as they are


def load_model(path: str | Path, dtype: Any = jnp.float32) -> tuple[Gemma, dict, Tokenizer | None]:
    """Loads a model, its parameters and its tokenizer.

    Args:
      path: 'builtin' (the shipped student), 'builtin-teacher', a bundle, the workdir of a run
        (the model that it exported, else the averaged parameters of its newest checkpoint),
        or a directory in the published format (config.json and safetensors).
      dtype: of the parameters and the computation.

    Returns:
      The model (a DiffusionGemma where it can denoise, else a Gemma), its parameters, and the
      tokenizer, or None where the directory has none.

    Raises:
      FileNotFoundError: there is no such model, or `path` names a preset, which has no weights.
      ValueError: the files do not fit together; the message names the tensor.
    """
    directory = BUILTIN.get(str(path), Path(path))
    if not directory.is_dir() and str(path) in PRESETS:
        raise FileNotFoundError(
            f'{path} is a preset, which has no weights: pass the directory of a downloaded '
            'checkpoint (config.json and safetensors) of that model. For the architecture alone '
            f"use diffusiongemma.models.presets.PRESETS['{path}']."
        )
    if not directory.is_dir():
        raise FileNotFoundError(
            f'no model at {directory}: pass a directory, or one of {sorted(BUILTIN)}.'
        )
    if bundle.is_bundle(directory / EXPORT_DIR):
        directory = directory / EXPORT_DIR
    if bundle.is_bundle(directory):
        model, params = bundle.load_bundle(directory, dtype)
    elif (directory / CHECKPOINTS_DIR).is_dir():
        model, params = _load_run(directory, dtype)
    else:
        model, params = hf_import.load_hf(directory, dtype)
    tokenizer_file = directory / bundle.TOKENIZER_FILE
    tokenizer = Tokenizer.load(str(tokenizer_file)) if tokenizer_file.exists() else None
    return model, params, tokenizer


def _load_run(workdir: Path, dtype: Any) -> tuple[Gemma, dict]:
    """The averaged parameters of a run's newest checkpoint, and their model."""
    step, about, ema_params = read_ema(workdir)
    if 'model' not in about:
        raise ValueError(
            f'the checkpoint of step {step} in {workdir} does not say which model it is of; '
            'finish its run, which exports a model.'
        )
    model = bundle.model_for(ModelConfig.from_dict(about['model']), dtype)
    if bundle.is_bundle(workdir / BASE_DIR):
        ema_params = bundle.load_bundle(workdir / BASE_DIR, dtype)[1] | ema_params
    bundle.check_params(model, flatten_dict(ema_params, sep='/'), f'{workdir}, step {step}')
    logging.info('%s: averaged parameters of step %d', workdir, step)
    return model, jax.tree.map(lambda leaf: leaf.astype(dtype), ema_params)
