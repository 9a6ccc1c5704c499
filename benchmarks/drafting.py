"""Compares accepted lengths of objectives and denoisers after equal training tokens.

Every run trains on the same teacher-written targets of configs/tiny.py for --steps steps. The
script writes drafting.csv and drafting.png to the output directory, where each run has its own
workdir, so that an interrupted benchmark can be continued.

python benchmarks/drafting.py --output=/tmp/drafting
"""

import csv
import importlib.util
import json
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from diffusiongemma import run_config
from diffusiongemma.distillation.experiment import Experiment
from diffusiongemma.distillation.loading import load_teacher
from diffusiongemma.distillation.reporting import read_metrics
from diffusiongemma.distillation.run import train_student
from diffusiongemma.distillation.targets import write_targets
from diffusiongemma.evaluation.report import ACCEPTED_LENGTH

_OUTPUT = flags.DEFINE_string('output', None, 'Directory of the runs, the table and the plot.')
_STEPS = flags.DEFINE_integer('steps', 200, 'Steps of each run.', lower_bound=10)
_ONLY = flags.DEFINE_list(
    'only', [], 'Names of runs, such as light_3-accepted_length-0; the default is all.'
)

TINY = Path(__file__).parents[1] / 'configs' / 'tiny.py'
DENOISERS: dict[str, dict[str, Any]] = {
    'light_1': {'light': {'layers': (4,), 'serial_rank': 64}},
    'light_2': {'light': {'layers': (3, 4), 'serial_rank': 64}},
    'light_3': {'light': {'layers': (2, 3, 4), 'serial_rank': 64}},
    'separate': {'denoiser': 'separate'},
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    name: {'weights': name} for name in ('equal', 'decay', 'accepted_length')
}
MAIN = ('light_3', 'accepted_length')  # with a second seed, and with these
ADDITIONS: dict[str, dict[str, Any]] = {
    'refused_drafts': {'weights': 'accepted_length', 'refused_rate': 0.25},
    'total_variation': {'weights': 'accepted_length', 'total_variation': 0.25},
}


def runs() -> list[tuple[str, str, int]]:
    """Returns the denoiser, objective and seed of each run, with the main row first."""
    every = [(denoiser, objective, 0) for denoiser in DENOISERS for objective in OBJECTIVES]
    additions = [(MAIN[0], objective, 0) for objective in ADDITIONS]
    return sorted([*every, (*MAIN, 1), *additions], key=lambda run: run[:2] != MAIN)


def config_of(denoiser: str, objective: str, seed: int) -> ConfigDict:
    """Returns the config of a run: that of the main job with --steps steps."""
    spec = importlib.util.spec_from_file_location('tiny', TINY)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    with config.unlocked():
        config.update(DENOISERS[denoiser])
        config.seed = seed
        config.canvas_length = 16
        config.drafting.update((OBJECTIVES | ADDITIONS)[objective])
        config.train = {
            'num_steps': _STEPS.value,
            'report_every': max(_STEPS.value // 20, 1),
            'checkpoint_every': _STEPS.value,
        }
        config.optimizer.warmup_steps = max(_STEPS.value // 25, 5)
    return config


def curve(config: ConfigDict, workdir: Path) -> list[tuple[int, float]]:
    """Returns numbers of trained canvas tokens and the accepted lengths after them."""
    tokens = config.data.batch_size * config.drafting.anchors_per_row * config.canvas_length
    return [(int(row['step']) * tokens, row[ACCEPTED_LENGTH]) for row in read_metrics(workdir)]


def plot(path: Path, curves: dict[tuple[str, str, int], list[tuple[int, float]]]) -> None:
    """Plots the accepted length over canvas tokens, with a panel for each denoiser."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(12, 3.4), layout='constrained')
    panels = figure.subplots(1, len(DENOISERS), sharey=True)
    colors = {name: f'C{i}' for i, name in enumerate(OBJECTIVES | ADDITIONS)}
    for axes, denoiser in zip(panels, DENOISERS, strict=True):
        for (name, objective, seed), points in curves.items():
            if name == denoiser:
                label = objective if seed == 0 else None
                axes.plot(*zip(*points, strict=True), color=colors[objective], label=label)
                axes.legend(fontsize='small')
        axes.set(xscale='log', xlabel='canvas tokens trained on', title=denoiser)
        axes.xaxis.set_minor_formatter(NullFormatter())  # the labels would overlap
        axes.grid(alpha=0.3)
    panels[0].set(ylabel='accepted length, held-out text')
    figure.savefig(path, dpi=120)


def main(argv: list[str]) -> None:
    del argv
    output = Path(_OUTPUT.value)
    base = Experiment.of(config_of(*MAIN, 0))
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
    for run in runs():
        name = '-'.join(map(str, run))
        if _ONLY.value and name not in _ONLY.value:
            continue
        config, workdir = config_of(*run), output / name
        train_student(Experiment.of(config), teacher, targets, workdir)
        curves[run] = curve(config, workdir)
        plot(output / 'drafting.png', curves)
    names = ('denoiser', 'objective', 'seed', 'canvas_tokens', 'accepted_length')
    rows = [(*run, *points[-1]) for run, points in curves.items()]
    with (output / 'drafting.csv').open('w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(rows)
    table = Table('denoiser', 'objective', 'seed', 'canvas tokens', 'accepted length')
    for denoiser, objective, seed, tokens, length in rows:
        table.add_row(denoiser, objective, str(seed), f'{tokens:,}', f'{length:.2f}')
    Console().print(table)
    print(json.dumps([dict(zip(names, row, strict=True)) for row in rows]))


if __name__ == '__main__':
    flags.mark_flags_as_required(['output'])
    run_config.run_main(main)
