"""Evaluates a student against its teacher on held-out problems; ends with one JSON line.

python -m diffusiongemma.evaluate --checkpoint=builtin --config=configs/tiny.py
"""

import dataclasses
import json

from absl import flags
from ml_collections import config_flags
from rich.console import Console

from diffusiongemma import run_config
from diffusiongemma.distillation.run import compare_with_teacher, load_teacher
from diffusiongemma.evaluation.report import comparison_table

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Path of the config file.')
_CHECKPOINT = flags.DEFINE_string(
    'checkpoint', 'builtin', "The student: a workdir, a bundle, or 'builtin'."
)


def main(argv: list[str]) -> None:
    del argv
    config = _CONFIG.value
    comparison, *_ = compare_with_teacher(config, load_teacher(config), _CHECKPOINT.value)
    Console().print(comparison_table(comparison))
    print(json.dumps(dataclasses.asdict(comparison)))


if __name__ == '__main__':
    flags.mark_flags_as_required(['config'])
    run_config.run_main(main)
