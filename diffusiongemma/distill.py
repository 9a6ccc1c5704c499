"""Distills an AR teacher into a diffusion student, then compares both.

python -m diffusiongemma.distill --config=configs/tiny.py --workdir=/tmp/diffusiongemma
"""

from absl import flags
from ml_collections import config_flags

from diffusiongemma import cli, configuration, process_flags

with cli.extra_named(__name__):
    from diffusiongemma.distillation.experiment import Experiment
    from diffusiongemma.distillation.run import distill

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Path of the config file.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory for all files of the run.')
_PROFILE = flags.DEFINE_bool('profile', False, 'Trace a few steps for xprof, to workdir/profile.')


def main(argv: list[str]) -> None:
    """Starts or resumes a distillation."""
    del argv
    process_flags.join()
    cli.say_devices()
    config = configuration.profiled(_CONFIG.value, _PROFILE.value)
    workdir = cli.output_directory('workdir', _WORKDIR.value)
    distill(Experiment.of(config), workdir)


if __name__ == '__main__':
    flags.mark_flags_as_required(['config', 'workdir'])
    cli.run_main(main, Experiment)
