"""Evaluates a student against its teacher on held-out problems; ends with one JSON line.

python -m diffusiongemma.evaluate --checkpoint=builtin --config=configs/tiny.py

With --sweep it evaluates the student at every point of the config's eval.sweep, and plots the
quality-speed curve:

python -m diffusiongemma.evaluate --config=configs/tiny.py --sweep --output=/tmp/sweep
"""

import dataclasses
import json
import sys

from absl import flags
from ml_collections import config_flags
from rich.console import Console

from diffusiongemma import cli

with cli.extra_named(__name__):
    from diffusiongemma.distillation.comparison import compare_with_teacher, sweep_student
    from diffusiongemma.distillation.experiment import Experiment
    from diffusiongemma.distillation.loading import load_teacher
    from diffusiongemma.evaluation.report import comparison_table

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Path of the config file.')
_CHECKPOINT = flags.DEFINE_string(
    'checkpoint', 'builtin', "The student: a workdir, a bundle, or 'builtin'."
)
_SWEEP = flags.DEFINE_bool('sweep', False, 'Evaluate all settings of config.eval.sweep.')
_OUTPUT = flags.DEFINE_string('output', None, 'Directory for the files of a sweep.')


def say_next(checkpoint: str) -> None:
    """Prints the next commands to stderr, because the last line of stdout is JSON."""
    print(
        f'{checkpoint} is evaluated; next: python -m diffusiongemma.sample '
        f'--checkpoint={checkpoint} samples from it, this command with --sweep '
        '--output=DIRECTORY measures its quality against its speed.',
        file=sys.stderr,
    )


def main(argv: list[str]) -> None:
    """Evaluates a student."""
    del argv
    cli.say_devices()
    experiment = Experiment.of(_CONFIG.value)
    if _SWEEP.value != (_OUTPUT.value is not None):
        raise ValueError('a sweep needs both --sweep and --output=DIRECTORY.')
    if _SWEEP.value:
        output = cli.output_directory('output', _OUTPUT.value)
        print(json.dumps(sweep_student(experiment, _CHECKPOINT.value, output)))
        say_next(_CHECKPOINT.value)
        return
    comparison, *_ = compare_with_teacher(experiment, load_teacher(experiment), _CHECKPOINT.value)
    Console().print(comparison_table(comparison))
    print(json.dumps(dataclasses.asdict(comparison)))
    say_next(_CHECKPOINT.value)


if __name__ == '__main__':
    flags.mark_flags_as_required(['config'])
    cli.run_main(main, Experiment)
