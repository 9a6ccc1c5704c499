"""Measures the effect of each part of the distillation by short runs without it.

    python benchmarks/ablations.py --output=/tmp/ablations --rows=main,no_kl

Every row is one `distill` command, a short run from the weights of the shipped teacher, evaluated
with up to 16 denoise steps per canvas. Rows with the same targets write them once. Finished rows
are read from --output, so that an interrupted call can be continued. The script prints the table,
writes ablations.csv and draws ablations.png.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path

import matplotlib
from absl import flags
from rich.console import Console
from rich.table import Table

from diffusiongemma import cli

matplotlib.use('Agg')

# The keys that all rows share, then the changes of each row.
BASE = {
    'sampling.max_denoising_steps': 16,
    'data.batch_size': 8,
    'train.num_steps': 200,
    'stage2.first_step': 130,
    'eval.speed_batches': 2,
    'eval.speed_batch_sizes': '(1,)',
}
SHARED = {'denoiser': 'shared'}
ROWS = {
    'main': {},
    'main_seed_1': {'seed': 1},
    'main_seed_2': {'seed': 2},
    'no_sequence_level_targets': {'targets.sequence_level': False},
    'no_kl': {'stage1.kd_weight': 0.0, 'stage2.kd_weight': 0.0},
    'no_self_conditioning': {'self_conditioning': False},
    'no_stage_2': {'stage2.first_step': 200},
    'masked': {'corruption': 'masked'},
    'one_canvas': {'data.one_canvas': True, 'data.canvases_per_row': 6},
    'shared_weights': SHARED,
    'shared_weights_no_ar_loss': SHARED | {'ar_weight': 0.0},
}
COLUMNS = (
    'student_accuracy',
    'exact_match',
    'tokens_per_denoise_pass',
    'teacher_nll',
    'lossless_tokens_per_pass',
)

_OUTPUT = flags.DEFINE_string('output', None, 'Directory for the runs and the table.')
_ROWS = flags.DEFINE_list('rows', list(ROWS), 'Rows to run, in this order.')


def command(row: str, workdir: Path) -> list[str]:
    """Returns the command of a row."""
    overrides = BASE | ROWS[row]
    return [
        sys.executable, '-m', 'diffusiongemma.distill', '--config=configs/tiny_diffusion.py',
        f'--workdir={workdir}', *(f'--config.{key}={value}' for key, value in overrides.items()),
    ]  # fmt: skip


def run_row(row: str, output: Path) -> dict:
    """Runs a row unless it is finished, and returns its evaluation.

    Raises:
      RuntimeError: if the command failed; the message contains the end of its output.
    """
    result = output / row / 'evaluation.json'
    if not result.exists():
        share_targets(row, output)
        done = subprocess.run(command(row, output / row), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f'row {row} failed: {done.stderr[-500:]}')
    return json.loads(result.read_text())


def share_targets(row: str, output: Path) -> None:
    """Lets rows with the same targets share one directory of them."""
    settings = {k: v for k, v in ROWS[row].items() if k.startswith('targets.') or k == 'seed'}
    shared = output / '_'.join(['targets', *(f'{k}_{v}' for k, v in sorted(settings.items()))])
    link = output / row / 'targets'
    if not link.exists():
        shared.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(shared.resolve())


def plot(evaluations: dict[str, dict], path: Path) -> None:
    """Plots the accuracy and the tokens per lossless pass of each row."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 0.4 * len(evaluations) + 1.5), sharey=True)
    names = list(evaluations)[::-1]
    for axis, key, label, factor in (
        (axes[0], 'student_accuracy', 'accuracy by diffusion, %', 100),
        (axes[1], 'lossless_tokens_per_pass', 'tokens per pass, lossless', 1),
    ):
        axis.barh(
            [n.replace('_', ' ') for n in names], [factor * evaluations[n][key] for n in names]
        )
        axis.set_xlabel(label)
        axis.grid(axis='x', alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv: list[str]) -> None:
    del argv
    unknown = sorted(set(_ROWS.value) - set(ROWS))
    if unknown:
        raise ValueError(f'unknown rows {unknown}; known: {list(ROWS)}.')
    output = Path(_OUTPUT.value)
    table = Table('row', *COLUMNS)
    evaluations = {}
    for row in _ROWS.value:
        evaluations[row] = run_row(row, output)
        table.add_row(row, *(f'{evaluations[row][key]:.3f}' for key in COLUMNS))
        Console().print(f'{row}: ' + ' '.join(command(row, output / row)[1:]))
    Console().print(table)
    with (output / 'ablations.csv').open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(('row', *COLUMNS))
        writer.writerows([row, *(e[key] for key in COLUMNS)] for row, e in evaluations.items())
    plot(evaluations, output / 'ablations.png')
    print(json.dumps({row: {k: e[k] for k in COLUMNS} for row, e in evaluations.items()}))


if __name__ == '__main__':
    flags.mark_flag_as_required('output')
    cli.run_main(main)
