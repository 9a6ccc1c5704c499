"""Compares a student with its teacher: metrics, sample texts, plots and a sweep."""

import dataclasses
import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console

from diffusiongemma.checkpoints.load import EXPORT_DIR
from diffusiongemma.data.pipeline import eval_examples
from diffusiongemma.data.sources import DataSpec, load_source, split_source
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.distillation.draft_vocabulary import needed_tokens
from diffusiongemma.distillation.experiment import Experiment
from diffusiongemma.distillation.loading import Teacher, load_student, load_teacher
from diffusiongemma.distillation.reporting import progress, read_metrics
from diffusiongemma.distillation.setup import Setup, sampling_config
from diffusiongemma.distillation.targets import check_targets
from diffusiongemma.evaluation.compare import Comparison, Contestant, EvalConfig, compare
from diffusiongemma.evaluation.report import (
    comparison_table,
    plot_run,
    plot_sweep,
    print_samples,
    sweep_table,
)
from diffusiongemma.evaluation.sweep import Grid, summary, sweep, write_csv
from diffusiongemma.models.inference import for_inference
from diffusiongemma.models.transformer import Gemma
from diffusiongemma.parallel import processes
from diffusiongemma.sampling import Sampler
from diffusiongemma.sampling.interface import traits
from diffusiongemma.sampling.noise import noise_vocab
from diffusiongemma.sampling.rules import check_rule
from diffusiongemma.sampling.sampler import main_mode


class Evaluation(NamedTuple):
    """The first arguments of `compare` and `sweep`, in order."""

    teacher: Contestant
    student: Contestant
    tokenizer: Tokenizer
    examples: list[dict[str, Any]]
    config: EvalConfig


def eval_source(experiment: Experiment) -> DataSpec:
    """Returns `config.eval.source`; raises ValueError if it is missing."""
    if experiment.eval.source is None:
        raise ValueError('config.eval.source is missing; set it to the examples to evaluate.')
    return experiment.eval.source


def student_sampler(experiment: Experiment, student: Gemma, tokenizer: Tokenizer) -> Sampler:
    """Returns the sampler of an evaluation; raises ValueError if its settings are impossible."""
    return Sampler(student, sampling_config(experiment, tokenizer), main_mode(student))


def check_settings(experiment: Experiment, teacher: Teacher) -> None:
    """Checks that data sources exist, and that this teacher can be distilled and evaluated.

    Raises:
      FileNotFoundError: if a data source is missing.
      ValueError: if a setting is impossible.
    """
    prompts, _ = map(load_source, (experiment.targets.source, eval_source(experiment)))
    if experiment.drafting is not None:
        split_source(prompts, experiment.drafting.held_out)
    tokenizer = teacher.tokenizer
    setup = Setup.of(experiment, teacher.model, tokenizer, experiment.mesh.make())
    _ = setup.rows  # raises ValueError if the mesh can't divide a batch
    light = setup.student.light
    if light is not None and light.draft_vocab_size:
        needed_tokens(tokenizer, light.draft_vocab_size)
    sampler = student_sampler(experiment, setup.student, tokenizer)
    if isinstance(rule := sampler.config.acceptance_rule, Hashable):
        check_rule(rule, noise_vocab(setup.student, sampler.config))
    check_room(sampler)
    check_targets(experiment.targets, teacher.model)


def check_room(sampler: Sampler) -> None:
    """Raises ValueError if the longest answers leave no room for a prompt."""
    positions = traits(sampler.model).max_positions
    if positions is not None and sampler.config.max_new_tokens >= positions:
        raise ValueError(
            f'config.sampling.max_new_tokens={sampler.config.max_new_tokens} leaves no room for a '
            f'prompt in the {positions} positions of the teacher; lower it.'
        )


def open_evaluation(experiment: Experiment, teacher: Teacher, checkpoint: str | Path) -> Evaluation:
    """Opens the student in `checkpoint` and the examples of `config.eval.source`."""
    examples = eval_examples(eval_source(experiment))
    student, student_params, tokenizer = load_student(experiment, checkpoint)
    if tokenizer is None or tokenizer.content_hash != teacher.tokenizer.content_hash:
        raise ValueError(
            f'{checkpoint} and the teacher {experiment.teacher} have different tokenizers; '
            'a student is compared with the teacher that it was distilled from.'
        )
    student, student_params = for_inference(student, student_params)
    teacher_model, teacher_params = for_inference(teacher.model, teacher.params)
    sampler = student_sampler(experiment, student, tokenizer)
    greedy = dataclasses.replace(sampler.config, temperature=0.0)
    return Evaluation(
        (Sampler(teacher_model, greedy, mode='autoregressive'), teacher_params),
        (sampler, student_params),
        tokenizer,
        examples,
        experiment.eval,
    )


def compare_with_teacher(
    experiment: Experiment, teacher: Teacher, checkpoint: str | Path
) -> tuple[Comparison, list[dict[str, Any]], list[str], list[str]]:
    """Evaluates the student in `checkpoint` against the teacher on `config.eval.source`.

    Returns:
      The comparison, the examples, the teacher's responses and the student's responses.
    """
    evaluation = open_evaluation(experiment, teacher, checkpoint)
    comparison, by_teacher, by_student = compare(
        *evaluation, jax.random.key(experiment.seed), watch=progress
    )
    return comparison, evaluation.examples, by_teacher, by_student


def sweep_student(experiment: Experiment, checkpoint: str | Path, output: Path) -> dict[str, Any]:
    """Evaluates the student at every point of `config.eval.sweep`.

    Prints a table and writes sweep.csv and sweep.png to the directory `output`.

    Returns:
      The summary of the sweep, see `summary`.

    Raises:
      ValueError: if the grid is empty or has an invalid value, or `output` can't be written.
      FileNotFoundError: if the checkpoint does not exist.
    """
    grid = Grid() if experiment.eval.sweep is None else experiment.eval.sweep
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / 'sweep.csv').touch()
    except OSError as error:  # fail before the sweep and not after it
        raise ValueError(f'cannot write to {output}: {error.strerror}.') from error
    evaluation = open_evaluation(experiment, load_teacher(experiment), checkpoint)
    console = Console()
    points = sweep(*evaluation, grid, jax.random.key(experiment.seed), console)
    write_csv(output / 'sweep.csv', points)
    batch_size = evaluation.config.speed_batch_sizes[0]
    plot_sweep(output / 'sweep.png', points, batch_size)
    console.print(sweep_table(points, batch_size))
    console.print(f'table: {output / "sweep.csv"}  plot: {output / "sweep.png"}')
    return summary(points)


def evaluate_run(experiment: Experiment, teacher: Teacher, workdir: Path) -> Comparison:
    """Evaluates the exported student; prints a table and samples, writes a plot and JSON."""
    comparison, examples, by_teacher, by_student = compare_with_teacher(
        experiment, teacher, workdir
    )
    if not processes.is_writer():
        return comparison
    console = Console()
    print_samples(console, examples[:3], by_teacher[:3], by_student[:3])
    console.print(comparison_table(comparison))
    (workdir / 'evaluation.json').write_text(
        json.dumps(dataclasses.asdict(comparison), indent=2) + '\n', encoding='utf-8'
    )
    plot_run(workdir / 'distillation.png', read_metrics(workdir), comparison)
    console.print(f'plot: {workdir / "distillation.png"}  student: {workdir / EXPORT_DIR}')
    print(json.dumps(dataclasses.asdict(comparison)))
    console.print(
        f'next: python -m diffusiongemma.sample --checkpoint={workdir} --mode=lossless --watch '
        f'--prompt={json.dumps(examples[0]["prompt"])}',
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    return comparison
