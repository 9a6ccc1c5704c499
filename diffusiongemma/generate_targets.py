"""Generates the teacher's responses that a student is trained on.

python -m diffusiongemma.generate_targets --config=configs/tiny.py --output=/tmp/targets

Start an interrupted run again to finish it. `distill` includes this step.
"""

from absl import flags
from ml_collections import config_flags

from diffusiongemma import cli, process_flags

with cli.extra_named(__name__):
    from diffusiongemma.distillation.experiment import Experiment
    from diffusiongemma.distillation.loading import load_teacher
    from diffusiongemma.distillation.targets import write_targets
    from diffusiongemma.parallel import processes

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Path of the config file.')
_OUTPUT = flags.DEFINE_string('output', None, 'Directory for the targets.')


def main(argv: list[str]) -> None:
    """Writes the targets of a config."""
    del argv
    process_flags.join()
    cli.say_devices()
    output = cli.output_directory('output', _OUTPUT.value)
    experiment = Experiment.of(_CONFIG.value)
    teacher = load_teacher(experiment)
    spec = write_targets(
        teacher.model,
        teacher.params,
        teacher.tokenizer,
        experiment.targets,
        output,
        experiment.mesh.make(),
        seed=experiment.seed,
    )
    if processes.is_writer():
        hint = '' if output.name == 'targets' else f', where {output} is called targets'
        print(
            f'targets: {spec.describe()}  next: python -m diffusiongemma.distill with this config '
            f'and --workdir={output.parent}{hint}'
        )


if __name__ == '__main__':
    flags.mark_flags_as_required(['config', 'output'])
    cli.run_main(main, Experiment)
