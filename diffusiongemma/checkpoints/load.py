"""Opens whatever holds a model: a shipped one, a workdir, a bundle, a published or an orbax one."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict

from diffusiongemma.checkpoints import adapters, bundle, hf_import, orbax_import
from diffusiongemma.checkpoints.fields import read_fields, read_model_config
from diffusiongemma.checkpoints.store import CHECKPOINTS_DIR, read_ema
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.models.denoiser import DRAFT_IDS
from diffusiongemma.models.inference import with_execution
from diffusiongemma.models.lora import LoraConfig, base_params, merge_lora
from diffusiongemma.models.precision import cpu_has_bfloat16
from diffusiongemma.models.presets import PRESETS
from diffusiongemma.models.transformer import Gemma
from diffusiongemma.parallel.sharding import param_shardings

ASSETS = Path(__file__).parents[1] / 'assets'
BUILTIN = {
    'builtin': ASSETS / 'student',
    'builtin-student': ASSETS / 'student',
    'builtin-teacher': ASSETS / 'teacher',
    'builtin-sudoku': ASSETS / 'sudoku',
}
EXPORT_DIR = 'model'  # in a workdir: the model that the run exports
BASE_DIR = 'base'  # in a workdir: the model whose parameters the run leaves as they are
DRAFT_IDS_FILE = 'draft_ids.npy'  # in a workdir: the draft vocabulary of a light student


def load_model(
    path: str | Path, dtype: Any = jnp.float32, mesh: jax.sharding.Mesh | None = None
) -> tuple[Gemma, dict, Tokenizer | None]:
    """Loads a model, its parameters and its tokenizer.

    Args:
      path: 'builtin' (the shipped student), 'builtin-teacher', 'builtin-sudoku' (a student for
        sudoku alone), a bundle, the workdir of a run (the model that it exported, else the averaged
        parameters of its newest checkpoint), one of its checkpoints (WORKDIR/checkpoints/STEP), a
        directory in the published format (config.json and safetensors), one of Google's orbax
        checkpoints (see `orbax_import`), or adapters, which are merged into their base.
      dtype: of the parameters and the computation; a denoiser with layers of its own computes in
        bfloat16 on a CPU with native bfloat16 matmuls (`Execution.denoise_dtype`). None keeps the
        parameters as they are stored and computes in float32.
      mesh: parameters are created in their shards on it (see `parallel.make_mesh`), without ever
        being whole on the host; None for the default device.

    Returns:
      The model (a DiffusionGemma where it can denoise, else a Gemma), its parameters, and the
      tokenizer, or None where the directory has none.

    Raises:
      FileNotFoundError: there is no such model, or `path` names a preset, which has no weights.
      ValueError: the files do not fit together; the message names the tensor.
    """
    directory = model_directory(path)
    if adapters.is_adapters(directory):
        return _load_adapted(directory, dtype, mesh)
    if bundle.is_bundle(directory):
        model, params = _load_bundle(directory, dtype, mesh)
    elif (directory / CHECKPOINTS_DIR).is_dir():
        model, params = _load_run(directory, None, dtype, mesh)
    elif directory.parent.name == CHECKPOINTS_DIR and directory.name.isdigit():
        step, directory = int(directory.name), directory.parents[1]
        model, params = _load_run(directory, step, dtype, mesh)
    elif orbax_import.is_orbax(directory):
        model, params = orbax_import.load_orbax(directory, dtype, mesh)
    else:
        model, params = hf_import.load_hf(directory, dtype, mesh)
    if mesh is None and model.config.has_frozen_encoder:
        model = _with_fast_denoiser(model)
    tokenizer_file = directory / bundle.TOKENIZER_FILE
    # Of the Gemma 4 models those with per-layer embeddings (E2B, E4B) have prompts without the
    # empty thought channel. A chat template, where there is one, says so itself.
    empty_thought = model.config.per_layer is None
    tokenizer = None
    if tokenizer_file.exists():
        tokenizer = Tokenizer.load(str(tokenizer_file), empty_thought)
    return model, params, tokenizer


def _with_fast_denoiser(model: Gemma) -> Gemma:
    """A denoiser with layers of its own in bfloat16 on a CPU with native bfloat16 matmuls."""
    if jax.default_backend() == 'cpu' and cpu_has_bfloat16():
        return with_execution(model, denoise_dtype='bfloat16')
    return model


def model_directory(path: str | Path) -> Path:
    """Where the files of a model lie; raises FileNotFoundError when there is no such directory."""
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
    exported = directory / EXPORT_DIR
    return exported if bundle.is_bundle(exported) else directory


def _load_bundle(directory: Path, dtype: Any, mesh: jax.sharding.Mesh | None) -> tuple[Gemma, dict]:
    """A bundle, on the base that it names if it lacks parameters."""
    content = bundle.read_content(directory)
    if 'base_fingerprint' not in content:
        return bundle.load_bundle(directory, dtype, mesh)
    base = _base_of(directory, content['base'], bundle.CONFIG_FILE)
    base_model, params, _ = load_model(base, dtype, mesh)
    where = f'{directory / bundle.CONFIG_FILE}, "model"'
    config = read_model_config(content.get('model'), where)
    backbone = base_model.config.autoregressive
    if backbone != config.autoregressive or (
        adapters.fingerprint(params) != content['base_fingerprint']
    ):
        raise ValueError(
            f'{directory} was trained on another model than {base}: a light student only drafts '
            f'for its own teacher. Change "base" in {directory / bundle.CONFIG_FILE} to where '
            'that is.'
        )
    model = bundle.model_for(config, base_model.dtype)
    own = bundle.load_own_params(directory, model, dtype, mesh)
    names = ('embedder', 'backbone', 'per_layer_embedder')
    params = {name: params[name] for name in names if name in params} | own
    bundle.check_params(model, flatten_dict(params, sep='/'), f'{directory} on {base}')
    return model, params


def _base_of(directory: Path, base: str, file: str) -> str | Path:
    """Where the base that a file in `directory` names is; raises FileNotFoundError."""
    for path in (base, directory / base):
        if path in BUILTIN or Path(path).is_dir():
            return path
    raise FileNotFoundError(
        f'{directory} needs the model {base}, which is not there; change "base" in '
        f'{directory / file} to where it is.'
    )


def saved_draft_ids(workdir: Path) -> jax.Array | None:
    """The draft vocabulary [Vd] int32 of a run's light student; None where it has none."""
    path = workdir / DRAFT_IDS_FILE
    return jnp.asarray(np.load(path)) if path.exists() else None


def _load_run(
    workdir: Path, step: int | None, dtype: Any, mesh: jax.sharding.Mesh | None
) -> tuple[Gemma, dict]:
    """The averaged parameters of a run's checkpoint, or its newest, and their model."""
    step, about, ema_params = read_ema(workdir, step)
    if 'model' not in about:
        raise ValueError(
            f'the checkpoint of step {step} in {workdir} does not say which model it is of; '
            'finish its run, which exports a model.'
        )
    config = read_model_config(about['model'], f'{workdir}, step {step}')
    model = bundle.model_for(config, dtype or jnp.float32)
    if bundle.is_bundle(workdir / BASE_DIR):
        base = bundle.load_bundle(workdir / BASE_DIR, dtype)[1]
        if 'lora' in about:
            start = base_params(model.config, base)
            ema_params = merge_lora(
                start, ema_params, read_fields(LoraConfig, about['lora'], f'{workdir}, step {step}')
            )
        else:
            ema_params = base | ema_params
    draft_ids = saved_draft_ids(workdir)
    if draft_ids is not None:
        ema_params[DRAFT_IDS] = draft_ids
    bundle.check_params(model, flatten_dict(ema_params, sep='/'), f'{workdir}, step {step}')
    logging.info('%s: averaged parameters of step %d', workdir, step)
    cast = jax.tree.map(lambda leaf: leaf.astype(bundle.cast_to(dtype, leaf.dtype)), ema_params)
    return model, cast if mesh is None else jax.device_put(cast, param_shardings(model, mesh))


def _check_chain(directory: Path) -> None:
    """Raises ValueError where adapters adapt, by way of others or not, themselves."""
    seen = []
    while adapters.is_adapters(directory):
        if directory.resolve() in seen:
            raise ValueError(
                f'{directory} adapts itself; change "base" in {directory / adapters.CONFIG_FILE} '
                'to the model that it was trained on.'
            )
        seen.append(directory.resolve())
        base = adapters.read_adapters(directory).base
        near = Path(base) if Path(base).is_dir() else directory / base
        directory = BUILTIN.get(base, near)


def _load_adapted(
    directory: Path, dtype: Any, mesh: jax.sharding.Mesh | None
) -> tuple[Gemma, dict, Tokenizer | None]:
    """The base that adapters name, with them merged in, and its tokenizer."""
    found = adapters.read_adapters(directory)
    base = _base_of(directory, found.base, adapters.CONFIG_FILE)
    _check_chain(directory)
    base_model, params, tokenizer = load_model(base, dtype, mesh)
    if adapters.fingerprint(params) != found.base_fingerprint:
        raise ValueError(f'{directory} does not adapt {base}: its weights are of another model.')
    model = bundle.model_for(found.model, base_model.dtype)
    merge = jax.jit(merge_lora, static_argnums=2)
    merged = merge(base_params(found.model, params), found.params, found.lora)
    bundle.check_params(model, flatten_dict(merged, sep='/'), str(directory))
    logging.info('%s: adapters of rank %d on %s', directory, found.lora.rank, base)
    embedding = params['embedder']['embedding']
    merged = jax.tree.map(lambda leaf: jnp.asarray(leaf, embedding.dtype), merged)
    if mesh is not None:
        merged = jax.device_put(merged, param_shardings(model, mesh))
    return model, merged, tokenizer
