"""Runs a distillation: targets, training stages, export and evaluation."""

import contextlib
import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from diffusiongemma.checkpoints.load import saved_draft_ids
from diffusiongemma.checkpoints.store import CheckpointStore
from diffusiongemma.data.pipeline import TrainIterator, make_train_iterator
from diffusiongemma.data.sources import DataSpec, Source, load_source, split_source
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.distillation.canvases import Batch
from diffusiongemma.distillation.comparison import check_settings, evaluate_run
from diffusiongemma.distillation.draft_vocabulary import draft_vocabulary, tokenized
from diffusiongemma.distillation.drafting import Drafting
from diffusiongemma.distillation.experiment import Experiment, write_resolved
from diffusiongemma.distillation.export import export_student, save_frozen
from diffusiongemma.distillation.held_out import held_out_batch, held_out_metrics
from diffusiongemma.distillation.loading import Teacher, load_init, load_teacher, mesh_to_load_on
from diffusiongemma.distillation.loop import fit, start_or_resume
from diffusiongemma.distillation.setup import Setup
from diffusiongemma.distillation.state import TrainState
from diffusiongemma.distillation.step import Constants, Objective
from diffusiongemma.distillation.student import frozen_params
from diffusiongemma.distillation.targets import write_targets
from diffusiongemma.evaluation.compare import Comparison
from diffusiongemma.models.denoiser import DRAFT_IDS
from diffusiongemma.models.transformer import parameter_count
from diffusiongemma.parallel import param_shardings, processes


def distill(experiment: Experiment, workdir: Path) -> Comparison:
    """Runs the distillation of `experiment`, or resumes an interrupted one.

    At the end, `workdir` contains config.json, targets/, checkpoints/, tensorboard/, metrics.jsonl,
    the exported student in model/, evaluation.json and distillation.png.

    Args:
      experiment: the config of the distillation.
      workdir: the directory of the run.

    Returns:
      The comparison of student and teacher.

    Raises:
      ValueError: if the experiment is impossible, or `workdir` belongs to another one.
      FileNotFoundError: if the teacher or a data source does not exist.
    """
    teacher = load_teacher(experiment)
    logging.info('teacher: %d parameters', parameter_count(teacher.params))
    check_settings(experiment, teacher)  # reports mistakes now and not after hours
    write_resolved(experiment, workdir)
    targets = write_targets(
        teacher.model,
        teacher.params,
        teacher.tokenizer,
        experiment.targets,
        workdir / 'targets',
        experiment.mesh.make(),
        seed=experiment.seed,
    )
    if experiment.targets.top_k_logits:  # the targets contain the teacher's distributions
        teacher = teacher.on_host()
    setup, state = train_student(experiment, teacher, targets, workdir)
    export_student(setup, state, teacher, workdir)
    return evaluate_run(experiment, teacher.on_devices(mesh_to_load_on(experiment)), workdir)


def train_student(
    experiment: Experiment, teacher: Teacher, targets: DataSpec, workdir: Path
) -> tuple[Setup, TrainState]:
    """Trains a student from the teacher's weights, with stages 1 and 2 or the drafting objective.

    Args:
      experiment: the config of the distillation.
      teacher: the teacher of the experiment.
      targets: the teacher's answers, the result of `write_targets`.
      workdir: the directory of checkpoints and metrics.

    Returns:
      The setup with the models, and the state after the last step.

    Raises:
      ValueError: if the experiment is invalid, or `workdir` belongs to another one.
    """
    setup = Setup.of(experiment, teacher.model, teacher.tokenizer, experiment.mesh.make())
    source: Source | DataSpec = targets
    held_out = None
    if experiment.drafting is not None:
        source, held_out = split_source(targets, experiment.drafting.held_out)
    about = setup.describe(teacher.tokenizer.content_hash)
    loop = experiment.train
    store = CheckpointStore(workdir, loop.max_to_keep, about, loop.best_metric)
    params = processes.in_shards(teacher.params, param_shardings(setup.teacher, setup.mesh))
    student_params = load_init(experiment, setup.student) if experiment.init else None
    if setup.lora is not None:
        frozen = setup.lora.base(params, setup.mesh)
    else:
        saved = saved_draft_ids(workdir) if store.latest_step is not None else None
        if student_params is not None:  # its head and serial correction have one row per draft id
            saved = student_params.get(DRAFT_IDS)
        elif saved is None:
            saved = count_draft_ids(setup, source, teacher.tokenizer)
        frozen = frozen_params(setup.student.config, params, saved)
    constants = setup.constants(params, frozen)
    shardings = setup.trained_shardings(params)
    if student_params is not None:
        params = processes.in_shards(student_params, param_shardings(setup.student, setup.mesh))
    batches = train_batches(setup, source, teacher.tokenizer)
    state = start_or_resume(setup.initial_state, shardings, setup.mesh, store, batches, params)
    write_resolved(experiment, workdir, fits=True)
    del params, student_params, frozen  # the steps only need `constants`
    save_frozen(constants, teacher, workdir)
    drafts = None
    if held_out is not None:
        length = experiment.data.row_length
        drafts = held_out_batch(held_out, teacher.tokenizer, length, setup.rows)
    with contextlib.closing(batches):
        for objective, last_step in setup.objectives:
            if int(state.step) < last_step:
                stage = Stage(objective, last_step, constants, drafts)
                state = run_stage(setup, stage, state, batches, store, workdir)
    store.close()
    return setup, state


class Stage(NamedTuple):
    """A training stage: an objective and its constant inputs.

    Attributes:
      objective: the training objective.
      last_step: the step at which the stage ends.
      constants: the frozen parameters.
      held_out: examples on which drafts are measured, or None.
    """

    objective: Objective
    last_step: int
    constants: Constants
    held_out: Batch | None


def run_stage(
    setup: Setup,
    stage: Stage,
    state: TrainState,
    batches: TrainIterator,
    store: CheckpointStore,
    workdir: Path,
) -> TrainState:
    """Trains one stage; returns the state after its last step."""
    objective, _, constants, held_out = stage
    evaluate = None
    if held_out is not None and isinstance(objective, Drafting):
        evaluate = held_out_metrics(setup.student, objective, constants, held_out)
    return fit(
        jax.jit(setup.step(objective), donate_argnums=0),
        state,
        batches,
        store,
        dataclasses.replace(setup.experiment.train, num_steps=stage.last_step),
        workdir=workdir,
        description=type(objective).__name__.lower(),
        batch_sharding=setup.rows,
        batch_size=setup.experiment.data.batch_size,
        constants=(constants,),
        evaluate=evaluate,
    )


def count_draft_ids(
    setup: Setup, targets: Source | DataSpec, tokenizer: Tokenizer
) -> jax.Array | None:
    """Returns the draft vocabulary [Vd] int32 of a light student, or None if it has none.

    Tokens are counted in the targets and in the source beyond its configured `size` (at most
    `draft_vocabulary.MAX_COUNTED` examples of each), because the targets of one run contain only
    few of the 262,144 tokens of a large vocabulary.
    """
    light = setup.student.light
    if light is None or not light.draft_vocab_size:
        return None
    full_source = load_source(dataclasses.replace(setup.experiment.targets.source, size=None))
    answers = load_source(targets) if isinstance(targets, DataSpec) else targets
    documents = tokenized((answers, full_source), tokenizer)
    return jnp.asarray(draft_vocabulary(documents, tokenizer, light.draft_vocab_size))


def train_batches(setup: Setup, targets: Source | DataSpec, tokenizer: Tokenizer) -> TrainIterator:
    """Returns the training batches of this process."""
    shape, experiment = setup.experiment.data, setup.experiment
    part, parts = processes.data_shard(setup.rows, shape.batch_size)
    return make_train_iterator(
        targets,
        tokenizer,
        batch_size=shape.batch_size // parts,
        row_length=shape.row_length,
        canvases_per_row=setup.canvases_per_row,
        canvas_length=experiment.canvas_length,
        seed=experiment.seed,
        random_offset_rate=shape.random_offset_rate,
        one_canvas=shape.one_canvas,
        top_k=experiment.targets.top_k_logits,
        process_index=part,
        process_count=parts,
        workers=shape.workers,
    )
