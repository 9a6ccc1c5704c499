"""Opens models of any kind: shipped or packaged, workdirs, bundles, published, GGUF and orbax."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict

from diffusiongemma.checkpoints import adapters, bundle, gguf_import, hf_import, orbax_import
from diffusiongemma.checkpoints.fields import read_fields, read_model_config
from diffusiongemma.checkpoints.hf_tokenizer import has_empty_thought, published_tokenizer
from diffusiongemma.checkpoints.packaged import PACKAGED, packaged_file
from diffusiongemma.checkpoints.store import CHECKPOINTS_DIR, read_ema
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.models.arrays import Params
from diffusiongemma.models.config import ModelConfig
from diffusiongemma.models.denoiser import DRAFT_IDS, DiffusionGemma, model_for
from diffusiongemma.models.execution import cpu_has_bfloat16
from diffusiongemma.models.inference import for_inference, quantize_weights, with_execution
from diffusiongemma.models.lora import LoraConfig, base_params, merge_lora
from diffusiongemma.models.presets import PRESETS
from diffusiongemma.models.transformer import Gemma
from diffusiongemma.parallel.sharding import param_shardings

ASSETS = Path(__file__).parents[1] / 'assets'
BUILTIN = {
    'builtin': ASSETS / 'student',
    'builtin-student': ASSETS / 'student',
    'builtin-teacher': ASSETS / 'teacher',
    'builtin-sudoku': ASSETS / 'sudoku',
    'gemma3-270m-student': ASSETS / 'gemma3_270m_student',
}
EXPORT_DIR = 'model'  # in a workdir: the model that the run exports
BASE_DIR = 'base'  # in a workdir: the model with the frozen parameters
BASE_PARAMS = ('embedder', 'backbone', 'per_layer_embedder')  # a light student takes these from it
DRAFT_IDS_FILE = 'draft_ids.npy'  # in a workdir: the draft vocabulary of a light student

Opened = tuple[Gemma, Params, Tokenizer | None]  # model, parameters and tokenizer


def load_model(
    path: str | Path, dtype: Any = jnp.float32, mesh: jax.sharding.Mesh | None = None
) -> Opened:
    """Loads a model, its parameters and its tokenizer.

    Args:
      path: 'builtin' (the shipped student), 'builtin-teacher', 'builtin-sudoku' (a student for
        sudoku only), 'gemma3-270m' (Google's weights, from a package that the extra `gemma`
        installs), a bundle, the workdir of a run (its exported model, else the averaged parameters
        of its newest checkpoint), one of its checkpoints (WORKDIR/checkpoints/STEP), a directory
        in the published format (config.json and safetensors), a GGUF file or a directory with one,
        an orbax checkpoint of Google (see `orbax_import`), or adapters, which are merged into
        their base.
      dtype: the dtype of the parameters and of the computation. A separate or light denoiser
        computes in bfloat16 on a CPU with native bfloat16 matmuls (`Execution.denoise_dtype`).
        None keeps the stored dtypes and computes in float32.
      mesh: the mesh on which parameters are created in shards (see `parallel.make_mesh`), without
        a whole copy on the host; None for the default device. Only the averaged parameters of a
        checkpoint of a run are first read onto one device.

    Returns:
      The model (a DiffusionGemma if it has a denoiser, else a Gemma), its parameters, and the
      tokenizer, or None if there is none.

    Raises:
      FileNotFoundError: if there is no such model, if `path` names a preset (which has no
        weights), or if the package of a packaged model is missing.
      ValueError: if the files are inconsistent; the message names the tensor.
    """
    directory = model_directory(path)
    open_it = next(open_it for detects, open_it in FORMATS if detects(directory))
    model, params, tokenizer = open_it(directory, dtype, mesh)
    return model if mesh is not None else _with_fast_denoiser(model), params, tokenizer


def load_for_sampling(
    path: str | Path, weights: str | None = None
) -> tuple[Gemma, Params, Tokenizer]:
    """Loads a model and its tokenizer, with the weight layout for sampling on these devices.

    Args:
      path: see `load_model`.
      weights: 'int8' or 'fp8' for weight-only quantization; None for none.

    Raises:
      FileNotFoundError, ValueError: the errors of `load_model`, or there is no tokenizer.
    """
    model, params, tokenizer = load_model(path)
    if tokenizer is None:
        raise ValueError(f'{path} has no tokenizer.model or tokenizer.json; copy one there.')
    model, params = for_inference(model, params)
    if weights is not None:
        params = quantize_weights(model, params, weights)
    return model, params, tokenizer


def _tokenizer_of(directory: Path, config: ModelConfig) -> Tokenizer | None:
    """Returns the tokenizer.model in `directory`, or None if there is none."""
    file = directory / bundle.TOKENIZER_FILE
    return Tokenizer.load(str(file), has_empty_thought(config)) if file.exists() else None


def _with_fast_denoiser(model: Gemma) -> Gemma:
    """Returns the model with a bfloat16 denoiser if this is a CPU with native bfloat16 matmuls.

    A denoiser with shared weights has the dtype of the encode pass.
    """
    has_own_denoiser = isinstance(model, DiffusionGemma) and model.config.has_frozen_encoder
    if has_own_denoiser and jax.default_backend() == 'cpu' and cpu_has_bfloat16():
        return with_execution(model, denoise_dtype='bfloat16')
    return model


def model_directory(path: str | Path) -> Path:
    """Returns the directory with the files of a model, or its GGUF file.

    Raises:
      FileNotFoundError: if the directory or file does not exist, or a packaged model is not
        installed.
      ValueError: if the file of a packaged model is not the expected one, or `path` is a URL.
    """
    if '://' in str(path):
        raise ValueError(
            f'{path} is a URL, and models are read from directories: copy it first (gcloud storage '
            'cp --recursive, hf download) or mount the bucket, and pass that directory.'
        )
    if str(path) in PACKAGED and not Path(path).exists():
        return packaged_file(str(path))
    directory = BUILTIN.get(str(path), Path(path))
    if directory.suffix == gguf_import.SUFFIX and directory.is_file():
        return directory
    if not directory.is_dir() and str(path) in PRESETS:
        raise FileNotFoundError(
            f'{path} is a preset, which has no weights: pass the directory of a downloaded '
            'checkpoint (config.json and safetensors) of that model. For the architecture alone '
            f"use diffusiongemma.models.presets.PRESETS['{path}']."
        )
    if not directory.is_dir():
        raise FileNotFoundError(
            f'no model at {directory}: pass a directory, a {gguf_import.SUFFIX} file, or one of '
            f'{sorted([*BUILTIN, *PACKAGED])}.'
        )
    exported = directory / EXPORT_DIR
    return exported if bundle.is_bundle(exported) else directory


def about_model(path: str | Path) -> dict[str, Any]:
    """Returns the `about` entry of a bundle or an exported model: how it was made; else {}.

    Raises:
      FileNotFoundError, ValueError: the errors of `model_directory`, or an unknown bundle format.
    """
    directory = model_directory(path)
    if not bundle.is_bundle(directory):
        return {}
    about = bundle.read_content(directory).get('about')
    return about if isinstance(about, dict) else {}


def _load_bundle(directory: Path, dtype: Any, mesh: jax.sharding.Mesh | None) -> Opened:
    """Loads a bundle, including the parameters and the tokenizer of its base, if it names one."""
    content = bundle.read_content(directory)
    if 'base_fingerprint' not in content:
        model, params = bundle.load_bundle(directory, dtype, mesh)
        return model, params, _tokenizer_of(directory, model.config)
    base = _base_of(directory, content['base'], bundle.CONFIG_FILE)
    base_model, params, tokenizer = load_model(base, dtype, mesh)
    where = f'{directory / bundle.CONFIG_FILE}, "model"'
    config = read_model_config(content.get('model'), where)
    backbone = base_model.config.autoregressive
    if backbone != config.autoregressive or (
        adapters.fingerprint(params) != content['base_fingerprint']
    ):
        raise ValueError(
            f'{directory} was trained on another model than {base}: a light student only drafts '
            f'for its own teacher. Change "base" in {directory / bundle.CONFIG_FILE} to the path '
            'of that teacher.'
        )
    model = model_for(config, base_model.dtype)
    trained = bundle.load_own_params(directory, model, dtype, mesh)
    params = {name: params[name] for name in BASE_PARAMS if name in params} | trained
    bundle.check_params(model, flatten_dict(params, sep='/'), f'{directory} on {base}')
    return model, params, _tokenizer_of(directory, config) or tokenizer


def _base_of(directory: Path, base: str, file: str) -> str | Path:
    """Returns the path of a base that a file in `directory` names; raises FileNotFoundError."""
    for path in (base, directory / base):
        if path in (*BUILTIN, *PACKAGED) or Path(path).exists():
            return path
    raise FileNotFoundError(
        f'{directory} needs the model {base}, which does not exist; change "base" in '
        f'{directory / file} to its path.'
    )


def saved_draft_ids(workdir: Path) -> jax.Array | None:
    """Returns the draft vocabulary of a run's light student, [Vd] int32, or None."""
    path = workdir / DRAFT_IDS_FILE
    return jnp.asarray(np.load(path)) if path.exists() else None


def _load_gguf(directory: Path, dtype: Any, mesh: jax.sharding.Mesh | None) -> Opened:
    """Loads a GGUF file, or the one in a directory."""
    file = gguf_import.find_gguf(directory)
    assert file is not None
    return gguf_import.load_gguf(file, dtype, mesh)


def _load_orbax(directory: Path, dtype: Any, mesh: jax.sharding.Mesh | None) -> Opened:
    """Loads an orbax checkpoint of Google."""
    model, params = orbax_import.load_orbax(directory, dtype, mesh)
    return model, params, _tokenizer_of(directory, model.config)


def _load_published(directory: Path, dtype: Any, mesh: jax.sharding.Mesh | None) -> Opened:
    """Loads a published checkpoint; the tokenizer is checked before the weights are read."""
    tokenizer = published_tokenizer(directory)
    return *hf_import.load_hf(directory, dtype, mesh), tokenizer


def _is_step(directory: Path) -> bool:
    """Returns whether this is one checkpoint of a run: WORKDIR/checkpoints/STEP."""
    return directory.parent.name == CHECKPOINTS_DIR and directory.name.isdigit()


def _load_run(directory: Path, dtype: Any, mesh: jax.sharding.Mesh | None) -> Opened:
    """Loads the averaged parameters of a run: of its newest checkpoint, or of a given step."""
    workdir, step = directory, None
    if not (directory / CHECKPOINTS_DIR).is_dir():
        workdir, step = directory.parents[1], int(directory.name)
    model, params = _averaged(workdir, step, dtype, mesh)
    return model, params, _tokenizer_of(workdir, model.config)


def _averaged(
    workdir: Path, step: int | None, dtype: Any, mesh: jax.sharding.Mesh | None
) -> tuple[Gemma, Params]:
    """Returns the model and the averaged parameters of a step; None for the newest one."""
    step, about, ema_params = read_ema(workdir, step)
    if 'model' not in about:
        raise ValueError(
            f'the checkpoint of step {step} in {workdir} does not name its model; '
            'finish its run, which exports a model.'
        )
    config = read_model_config(about['model'], f'{workdir}, step {step}')
    model = model_for(config, dtype or jnp.float32)
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
    """Raises ValueError if the chain of bases of adapters is circular."""
    visited = []
    while adapters.is_adapters(directory):
        if directory.resolve() in visited:
            raise ValueError(
                f'{directory} adapts itself; change "base" in {directory / adapters.CONFIG_FILE} '
                'to the model that it was trained on.'
            )
        visited.append(directory.resolve())
        base = adapters.read_adapters(directory).base
        near = Path(base) if Path(base).is_dir() else directory / base
        directory = BUILTIN.get(base, near)


def _load_adapted(directory: Path, dtype: Any, mesh: jax.sharding.Mesh | None) -> Opened:
    """Loads the base of adapters with the adapters merged in, and its tokenizer."""
    adapter = adapters.read_adapters(directory)
    base = _base_of(directory, adapter.base, adapters.CONFIG_FILE)
    _check_chain(directory)
    base_model, params, tokenizer = load_model(base, dtype, mesh)
    if adapters.fingerprint(params) != adapter.base_fingerprint:
        raise ValueError(
            f'{directory} does not adapt {base}: its weights are of another model; change "base" '
            f'in {directory / adapters.CONFIG_FILE}.'
        )
    model = model_for(adapter.model, base_model.dtype)
    merge = jax.jit(merge_lora, static_argnums=2)
    merged = merge(base_params(adapter.model, params), adapter.params, adapter.lora)
    bundle.check_params(model, flatten_dict(merged, sep='/'), str(directory))
    logging.info('%s: adapters of rank %d on %s', directory, adapter.lora.rank, base)
    embedding = params['embedder']['embedding']
    merged = jax.tree.map(lambda leaf: jnp.asarray(leaf, embedding.dtype), merged)
    if mesh is not None:
        merged = jax.device_put(merged, param_shardings(model, mesh))
    return model, merged, tokenizer


# Pairs of (detects, opens): the first entry that detects a directory (or file) opens it.
FORMATS: tuple[tuple[Callable[[Path], bool], Callable[..., Opened]], ...] = (
    (lambda directory: gguf_import.find_gguf(directory) is not None, _load_gguf),
    (adapters.is_adapters, _load_adapted),
    (bundle.is_bundle, _load_bundle),
    (lambda directory: (directory / CHECKPOINTS_DIR).is_dir() or _is_step(directory), _load_run),
    (orbax_import.is_orbax, _load_orbax),
    (lambda directory: True, _load_published),
)
