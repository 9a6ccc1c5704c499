r"""Tells whether a config fits a TPU slice or some GPUs, and what a step costs, without a device.

It compiles the training step or the sampler with the real TPU compiler (pip install -e '.[plan]')
and prints memory, FLOPs, traffic and lower bounds of their time. No TPU is needed and nothing is
allocated. For GPUs it uses XLA's CPU compiler, which estimates their memory. The last line of the
output is JSON.

  python -m diffusiongemma.plan --config=configs/gemma4_26b_a4b.py --topology=v5p:4x4x4 \
    --optimization_level=O1
  python -m diffusiongemma.plan --config=configs/gemma3_270m.py --topology=L4:1
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from absl import flags, logging
from jax.sharding import Mesh
from ml_collections import config_flags

from diffusiongemma import cli

with cli.extra_named(__name__):
    from diffusiongemma.distillation.experiment import Experiment
    from diffusiongemma.models.config import ModelConfig
    from diffusiongemma.planning import compiler, programs
    from diffusiongemma.planning.fit import largest_that_fits
    from diffusiongemma.planning.report import as_json, print_plan
    from diffusiongemma.planning.sampler_programs import sampler_programs

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Path of the config file.')
_TOPOLOGY = flags.DEFINE_string(
    'topology',
    None,
    'The devices: a TPU slice such as v5e:4x4, v5p:2x2x2 or v6e:8x8, or a kind of GPU and how '
    'many of them, such as H100:8 or L4:1.',
)
_WHAT = flags.DEFINE_enum(
    'what',
    'step',
    ['step', 'sampler'],
    "What to compile: the config's training step, or the programs of its sampler.",
)
_MODEL = flags.DEFINE_string(
    'model',
    None,
    "Preset to plan for. By default it is the config's teacher, or the preset that is named like "
    'the config file.',
)
_LAYERS = flags.DEFINE_integer(
    'layers',
    None,
    'Plan only the first N layers of the model, for a quick check. N must be a multiple of the '
    'layer pattern (6 for Gemma 4 26B-A4B).',
)
_BATCH_SIZE = flags.DEFINE_integer(
    'batch_size', 8, 'Rows of the sampler (with --what=sampler).', lower_bound=1
)
_PROMPT_LENGTH = flags.DEFINE_integer(
    'prompt_length', 1024, 'Tokens of each prompt (with --what=sampler).', lower_bound=1
)
_LEVEL = flags.DEFINE_enum(
    'optimization_level',
    'O2',
    ['O1', 'O2'],
    "The compiler's optimization level. O2 is its default. O1 compiles large programs several "
    'times faster, but then the memory and the traffic that it prints are upper bounds.',
)
_FIT = flags.DEFINE_bool(
    'fit',
    False,
    'Search for the largest batch that fits: double the batch size while the program fits, or '
    'halve it until it does. Each batch size is one compilation.',
)
_PROGRAMS = flags.DEFINE_list(
    'programs',
    None,
    "Compile only these programs of the sampler (with --what=sampler), such as 'denoise step'.",
)


def main(argv: list[str]) -> None:
    """Prints the plans of a config."""
    del argv
    experiment = Experiment.of(_CONFIG.value)
    config_flag: Any = flags.FLAGS['config']
    name = Path(config_flag.config_filename).stem
    teacher = programs.teacher_config(experiment.teacher, name, _MODEL.value)
    if _LAYERS.value is not None:
        teacher = programs.cut_to(teacher, _LAYERS.value)
    devices, figures = compiler.topology_devices(cli.required('topology', _TOPOLOGY.value))
    try:
        mesh = experiment.mesh.make(devices)
    except ValueError as error:
        raise ValueError(
            f'{_TOPOLOGY.value} has {len(devices)} devices: {error} For example '
            f'--config.mesh.fsdp=-1.'
        ) from error

    def plan(rows: int) -> list[compiler.Plan]:
        planned = _planned(experiment, teacher, mesh, rows)
        plans = [compiler.compile_program(p, mesh, figures, _LEVEL.value) for p in planned]
        if _FIT.value:
            fits = all(plan.fits for plan in plans)
            logging.info('%d rows %s.', rows, 'fit' if fits else 'do not fit')
        return plans

    rows = experiment.data.batch_size if _WHAT.value == 'step' else _BATCH_SIZE.value
    if _FIT.value:
        rows, plans = largest_that_fits(rows, experiment.compute.batch_multiple(mesh), plan)
    else:
        plans = plan(rows)
    result: dict[str, Any] = {'config': name, 'topology': _TOPOLOGY.value}
    result |= {'optimization_level': _LEVEL.value, 'layers': teacher.num_layers}
    result |= {'device': dataclasses.asdict(figures), 'mesh': dict(mesh.shape)}
    result |= {'rows': rows, 'programs': []}
    cut = '' if _LAYERS.value is None else f' cut to {_LAYERS.value} layers'
    title = f'{name}{cut} on {_TOPOLOGY.value}, {rows} rows, at {_LEVEL.value}'
    for each in plans:
        change = '' if each.fits else compiler.advice(each.kinds, figures, mesh, _WHAT.value)
        print_plan(each, figures, mesh, title, change)
        result['programs'].append(as_json(each, figures, mesh.size) | {'change': change})
    print(json.dumps(result))


def _planned(
    experiment: Experiment, teacher: ModelConfig, mesh: Mesh, rows: int
) -> list[programs.PlannedProgram]:
    """Returns the training step, or the selected programs of the sampler, with `rows` rows."""
    if _WHAT.value == 'step':
        data = dataclasses.replace(experiment.data, batch_size=rows)
        return [programs.training_step(dataclasses.replace(experiment, data=data), teacher, mesh)]
    planned = sampler_programs(
        experiment, teacher, mesh, batch_size=rows, prompt_length=_PROMPT_LENGTH.value
    )
    names = [program.name for program in planned]
    selected = _PROGRAMS.value or names
    if set(selected) - set(names):
        raise ValueError(f'--programs={selected}: the programs of this sampler are {names}.')
    return [program for program in planned if program.name in selected]


if __name__ == '__main__':
    flags.mark_flags_as_required(['config', 'topology'])
    cli.run_main(main, Experiment)
