"""Compares accepted lengths of objectives and denoisers after equal numbers of steps.

A study trains several denoisers on the same teacher-written targets for --steps steps each:
word_problems with the teacher of configs/tiny.py, or gemma3_270m with the pretrained Gemma 3 270M,
where a run takes much longer. The script writes drafting.csv and drafting.png to the output
directory, where each run has its own workdir, so that an interrupted benchmark can be continued.

python benchmarks/drafting.py --output=/tmp/drafting
python benchmarks/drafting.py --study=gemma3_270m --steps=160 --output=/tmp/drafting_gemma
"""

import csv
import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from diffusiongemma import cli
from diffusiongemma.distillation.experiment import Experiment
from diffusiongemma.distillation.loading import load_teacher
from diffusiongemma.distillation.reporting import read_metrics
from diffusiongemma.distillation.run import train_student
from diffusiongemma.distillation.targets import write_targets
from diffusiongemma.evaluation.report import ACCEPTED_LENGTH, EXPECTED_ACCEPTED_LENGTH

_STUDY = flags.DEFINE_enum(
    'study',
    'word_problems',
    ['word_problems', 'gemma3_270m'],
    'Study to run: its teacher and its denoisers.',
)
_OUTPUT = flags.DEFINE_string('output', None, 'Directory of the runs, the table and the plot.')
_STEPS = flags.DEFINE_integer('steps', 200, 'Steps of each run.', lower_bound=10)
_ONLY = flags.DEFINE_list(
    'only', [], 'Names of runs, such as light_3-accepted_length-0; the default is all.'
)

Changes = dict[str, Any]
OBJECTIVES: dict[str, Changes] = {
    name: {'weights': name} for name in ('equal', 'decay', 'accepted_length')
}


@dataclasses.dataclass(frozen=True)
class Study:
    """The runs of a comparison.

    Attributes:
      config: name of the config file that all runs start from.
      changes: changes of its keys for all runs.
      denoisers: changes of keys for each denoiser.
      main: the denoiser and objective that are compared with all others, with two seeds.
      additions: more changes of `drafting`, for the main denoiser only.
      every: whether every denoiser is trained with every objective; if not, the denoisers other
        than the main one are trained with the main objective only.
      reports: how often a run measures the accepted length on held-out text.
      warmup: the fraction of the steps in which the learning rate rises.
    """

    config: str
    changes: Changes
    denoisers: dict[str, Changes]
    main: tuple[str, str]
    additions: dict[str, Changes]
    every: bool
    reports: int
    warmup: float

    def runs(self) -> list[tuple[str, str, int]]:
        """Returns the denoiser, objective and seed of each run, with the main row first."""
        every = [
            (denoiser, objective, 0)
            for denoiser in self.denoisers
            for objective in OBJECTIVES
            if self.every or denoiser == self.main[0] or objective == self.main[1]
        ]
        additions = [(self.main[0], objective, 0) for objective in self.additions]
        return sorted([*every, (*self.main, 1), *additions], key=lambda run: run[:2] != self.main)


def _gemma_layers(*layers: int) -> Changes:
    """Returns a light denoiser that starts from these layers of Gemma 3 270M."""
    return {'light': {'layers': layers, 'draft_vocab_size': 8_192, 'serial_rank': 64}}


STUDIES = {
    'word_problems': Study(
        config='tiny',
        changes={'canvas_length': 16, 'drafting': {'anchors_per_row': 32}},
        denoisers={
            'light_1': {'light': {'layers': (4,), 'serial_rank': 64}},
            'light_2': {'light': {'layers': (3, 4), 'serial_rank': 64}},
            'light_3': {'light': {'layers': (2, 3, 4), 'serial_rank': 64}},
            'separate': {'denoiser': 'separate'},
        },
        main=('light_3', 'accepted_length'),
        additions={
            'refused_drafts': {'weights': 'accepted_length', 'refused_rate': 0.25},
            'total_variation': {'weights': 'accepted_length', 'total_variation': 0.25},
        },
        every=True,
        reports=20,
        warmup=0.04,
    ),
    'gemma3_270m': Study(
        config='gemma3_270m_light',
        changes={
            'data': {'batch_size': 1},
            'drafting': {'held_out': 48, 'anchors_per_row': 32, 'prompts': False},
        },
        denoisers={
            'light_1': _gemma_layers(17),
            'light_2': _gemma_layers(0, 17),
            'light_4': _gemma_layers(0, 5, 11, 17),
            'light_6': _gemma_layers(0, 3, 7, 10, 14, 17),
        },
        main=('light_4', 'accepted_length'),
        additions={
            'anchors_8': {'weights': 'accepted_length', 'anchors_per_row': 8},
            'prompts': {'weights': 'accepted_length', 'anchors_per_row': 96, 'prompts': True},
        },
        every=False,
        reports=2,
        warmup=0.2,
    ),
}


def config_of(study: Study, denoiser: str, objective: str, seed: int) -> ConfigDict:
    """Returns the config of a run: that of the study's config file with --steps steps."""
    path = Path(__file__).parents[1] / 'configs' / f'{study.config}.py'
    spec = importlib.util.spec_from_file_location(study.config, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    with config.unlocked():
        config.update(study.changes)
        config.update(study.denoisers[denoiser])
        config.seed = seed
        config.drafting.update((OBJECTIVES | study.additions)[objective])
        config.train = {
            'num_steps': _STEPS.value,
            'max_loss_increase': 100.0,  # the first losses of a single layer vary by more than 10
            'report_every': max(_STEPS.value // study.reports, 1),
            'checkpoint_every': _STEPS.value,
        }
        config.optimizer.warmup_steps = max(int(study.warmup * _STEPS.value), 5)
    return config


def curve(config: ConfigDict, workdir: Path) -> list[tuple[int, float, float]]:
    """Returns numbers of trained canvas tokens, the accepted and expected lengths after them."""
    tokens = config.data.batch_size * config.drafting.anchors_per_row * config.canvas_length
    return [
        (int(row['step']) * tokens, row[ACCEPTED_LENGTH], row[EXPECTED_ACCEPTED_LENGTH])
        for row in read_metrics(workdir)
    ]


def plot(
    study: Study, path: Path, curves: dict[tuple[str, str, int], list[tuple[int, float, float]]]
) -> None:
    """Plots the accepted length over canvas tokens, with a panel for each denoiser."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(12, 3.4), layout='constrained')
    panels = figure.subplots(1, len(study.denoisers), sharey=True)
    colors = {name: f'C{i}' for i, name in enumerate(OBJECTIVES | study.additions)}
    for axes, denoiser in zip(panels, study.denoisers, strict=True):
        for (name, objective, seed), points in curves.items():
            if name == denoiser:
                label = objective if seed == 0 else None
                tokens, lengths, _ = zip(*points, strict=True)
                axes.plot(tokens, lengths, color=colors[objective], label=label)
                axes.legend(fontsize='small')
        axes.set(xscale='log', xlabel='canvas tokens trained on', title=denoiser)
        axes.xaxis.set_minor_formatter(NullFormatter())  # the labels would overlap
        axes.grid(alpha=0.3)
    panels[0].set(ylabel='accepted length, held-out text')
    figure.savefig(path, dpi=120)


def main(argv: list[str]) -> None:
    del argv
    output = Path(_OUTPUT.value)
    study = STUDIES[_STUDY.value]
    names = ['-'.join(map(str, run)) for run in study.runs()]
    if unknown := set(_ONLY.value) - set(names):
        raise ValueError(
            f'--only: {sorted(unknown)} are not runs of {_STUDY.value}; these are {names}.'
        )
    base = Experiment.of(config_of(study, *study.main, 0))
    teacher = load_teacher(base)
    targets = write_targets(
        teacher.model,
        teacher.params,
        teacher.tokenizer,
        base.targets,
        output / 'targets',
        base.mesh.make(),
        seed=base.seed,
    )
    curves = {}
    for name, run in zip(names, study.runs(), strict=True):
        if _ONLY.value and name not in _ONLY.value:
            continue
        config, workdir = config_of(study, *run), output / name
        train_student(Experiment.of(config), teacher, targets, workdir)
        curves[run] = curve(config, workdir)
        plot(study, output / 'drafting.png', curves)
    columns = ('denoiser', 'objective', 'seed', 'canvas_tokens', 'accepted_length', 'expected')
    rows = [(*run, *points[-1]) for run, points in curves.items()]
    with (output / 'drafting.csv').open('w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    table = Table('denoiser', 'objective', 'seed', 'canvas tokens', 'accepted length', 'expected')
    for *run, tokens, length, expected in rows:
        table.add_row(*map(str, run), f'{tokens:,}', f'{length:.2f}', f'{expected:.2f}')
    Console().print(table)
    print(json.dumps([dict(zip(columns, row, strict=True)) for row in rows]))


if __name__ == '__main__':
    flags.mark_flags_as_required(['output'])
    cli.run_main(main)
