"""Writes the frozen part of the student during a run, and the whole student at its end."""

from pathlib import Path
from typing import Any

import numpy as np

from diffusiongemma import configuration
from diffusiongemma.checkpoints.adapters import fingerprint
from diffusiongemma.checkpoints.bundle import TOKENIZER_FILE, save_bundle
from diffusiongemma.checkpoints.load import BASE_DIR, DRAFT_IDS_FILE, EXPORT_DIR, saved_draft_ids
from diffusiongemma.distillation.loading import Teacher
from diffusiongemma.distillation.setup import Setup
from diffusiongemma.distillation.state import TrainState
from diffusiongemma.distillation.step import Constants
from diffusiongemma.distillation.student import frozen_params
from diffusiongemma.models.config import LIGHT
from diffusiongemma.models.denoiser import DRAFT_IDS
from diffusiongemma.parallel import processes


def save_frozen(constants: Constants, teacher: Teacher, workdir: Path) -> None:
    """Writes the tokenizer and frozen parameters; checkpoints only contain the trained part."""
    if processes.is_writer():
        teacher.tokenizer.save(workdir / TOKENIZER_FILE)
    if constants.student:
        save_bundle(workdir / BASE_DIR, teacher.model.config, teacher.params, teacher.tokenizer)
        if DRAFT_IDS in constants.student and processes.is_writer():
            np.save(workdir / DRAFT_IDS_FILE, np.asarray(constants.student[DRAFT_IDS]))
        processes.broadcast_from_writer(None)  # waits until process 0 has written the files


def export_student(setup: Setup, state: TrainState, teacher: Teacher, workdir: Path) -> None:
    """Writes the student with averaged parameters to `workdir`/model.

    A light student is written with the name of its teacher instead of the teacher's parameters.
    Adapters are also written to a separate directory.
    """
    experiment, config, lora = setup.experiment, setup.student.config, setup.lora
    about: dict[str, Any] = {
        'teacher': str(experiment.teacher),
        'steps': int(state.step),
        'seed': experiment.seed,
        'sampling': configuration.json_values(experiment.sampling),
    }
    if lora is None:
        frozen = frozen_params(config, teacher.params, saved_draft_ids(workdir))
        params = frozen | state.evaluated_params
    else:
        lora.save(workdir, state.evaluated_params, teacher.params, str(experiment.teacher), about)
        params = lora.combine(lora.base(teacher.params, setup.mesh), state.evaluated_params)
    base_fields = {}
    if experiment.denoiser == LIGHT:
        name = experiment.teacher  # an absolute path, if it is a directory
        base_fields['base'] = str(Path(name).resolve()) if Path(name).is_dir() else name
        base_fields['base_fingerprint'] = fingerprint(teacher.params)
        params = {name: value for name, value in params.items() if name not in teacher.params}
    save_bundle(
        workdir / EXPORT_DIR,
        config,
        params,
        teacher.tokenizer,
        dtype='bfloat16',
        about=about,
        **base_fields,
    )
