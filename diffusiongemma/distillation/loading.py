"""Opens the models of an experiment: the teacher, and a student to continue from."""

import dataclasses
from pathlib import Path

import jax
from flax.traverse_util import flatten_dict

from diffusiongemma.checkpoints.load import BASE_PARAMS, Opened, load_model
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.distillation.experiment import Experiment
from diffusiongemma.models.arrays import Params
from diffusiongemma.models.denoiser import DiffusionGemma
from diffusiongemma.models.execution import compute_dtype
from diffusiongemma.models.transformer import Gemma
from diffusiongemma.parallel import param_shardings, processes

# Settings of the model that may differ between a run and the student that it continues from.
# Settings of a denoiser in which a student may differ from the one that it starts from.
MAY_CHANGE = {f'denoiser.{name}' for name in ('canvas_length', 'self_conditioning', 'mask_id')}


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The frozen AR model to distill, with its parameters and its tokenizer."""

    model: Gemma
    params: Params
    tokenizer: Tokenizer

    def on_host(self) -> 'Teacher':
        """Returns the teacher with its parameters gathered to the host."""
        return dataclasses.replace(self, params=processes.on_host(self.params))

    def on_devices(self, mesh: jax.sharding.Mesh | None) -> 'Teacher':
        """Returns the teacher with sharded parameters; on one device if there is no mesh."""
        shardings = None if mesh is None else param_shardings(self.model, mesh)
        if shardings is None:
            return dataclasses.replace(self, params=jax.device_put(self.params))
        return dataclasses.replace(self, params=processes.in_shards(self.params, shardings))


def load_teacher(experiment: Experiment) -> Teacher:
    """Opens `config.teacher`, or the teacher in it if it is a student with a frozen encode pass.

    Raises:
      ValueError: if it is empty, has no tokenizer, or is a student with shared weights.
    """
    if not experiment.teacher:
        raise ValueError(
            'config.teacher is empty: give the directory of the downloaded checkpoint with '
            '--config.teacher=DIRECTORY.'
        )
    model, params, tokenizer = _load(experiment, experiment.teacher)
    if tokenizer is None:
        raise ValueError(f'{experiment.teacher} has no tokenizer.model; copy it there.')
    if model.config.is_diffusion:
        if not model.config.has_frozen_encoder:
            raise ValueError(
                f'config.teacher={experiment.teacher} is a student whose passes share their '
                'weights; give the autoregressive model that it was distilled from.'
            )
        params = {name: params[name] for name in BASE_PARAMS if name in params}
    gemma = placed(experiment, Gemma(model.config.autoregressive, model.dtype))
    return Teacher(gemma, params, tokenizer)


def load_student(experiment: Experiment, checkpoint: str | Path) -> Opened:
    """Opens a student for its evaluation."""
    model, params, tokenizer = _load(experiment, checkpoint)
    return placed(experiment, model), params, tokenizer


def load_init(experiment: Experiment, model: DiffusionGemma) -> Params:
    """Returns the parameters of `config.init`, a student with the config of `model`.

    Raises:
      ValueError: if its config differs in settings other than MAY_CHANGE.
    """
    source, params, _ = load_model(experiment.init, mesh=mesh_to_load_on(experiment))
    actual, expected = (flatten_dict(m.config.to_dict(), sep='.') for m in (source, model))
    differing = [
        f'{name}={actual.get(name)!r}, not {expected.get(name)!r}'
        for name in sorted({*actual, *expected} - MAY_CHANGE)
        if actual.get(name) != expected.get(name)
    ]
    if differing:
        raise ValueError(
            f'config.init: {experiment.init} is not the student that this config describes: it has '
            f'{"; ".join(differing)}.'
        )
    return params


def mesh_to_load_on(experiment: Experiment) -> jax.sharding.Mesh | None:
    """Returns the mesh of the run if it splits parameters or spans several processes, else None.

    None loads parameters to one device.
    """
    mesh = experiment.mesh.make()
    return mesh if mesh.size > mesh.shape['data'] or jax.process_count() > 1 else None


def placed(experiment: Experiment, model: Gemma) -> Gemma:
    """Returns the model on the mesh on which its parameters are loaded."""
    mesh = mesh_to_load_on(experiment)
    return model if mesh is None else experiment.execution.place(model, mesh)


def _load(experiment: Experiment, name: str | Path) -> Opened:
    dtype = compute_dtype(experiment.dtype)
    return load_model(name, dtype, mesh_to_load_on(experiment))
