"""Writes configs.md, the page of every config key, from the dataclasses that read them.

python docs/config_page.py
"""

import dataclasses
import inspect
import re
from pathlib import Path

from diffusiongemma.configuration import section_of
from diffusiongemma.data.sources import DataSpec
from diffusiongemma.distillation.answers import TargetsConfig
from diffusiongemma.distillation.compute import ComputeConfig
from diffusiongemma.distillation.drafting import DraftingConfig
from diffusiongemma.distillation.experiment import (
    BatchConfig,
    EvaluationConfig,
    Experiment,
    MixtureConfig,
    TeacherTraining,
)
from diffusiongemma.distillation.loop import LoopConfig
from diffusiongemma.distillation.lora import LoraSettings
from diffusiongemma.distillation.stage1 import Stage1Config
from diffusiongemma.distillation.stage2 import Stage2Config
from diffusiongemma.distillation.state import OptimizerConfig
from diffusiongemma.evaluation.sweep import Grid
from diffusiongemma.models import (
    AttentionConfig,
    DenoiserConfig,
    LightConfig,
    ModelConfig,
    MoEConfig,
    PerLayerConfig,
)
from diffusiongemma.parallel import MeshConfig
from diffusiongemma.sampling import SamplingConfig

PAGE = Path(__file__).with_name('configs.md')
INTRO = """# Configs

A config is a Python file with `get_config()`, which returns an `ml_collections.ConfigDict`. Any key
is overridden on the command line: `--config.train.num_steps=500`, tuples as
`--config.eval.speed_batch_sizes='(1, 8)'`, also a key of this page that the file leaves out
(`--config.targets.source.prompt_feature=question`). Sources in the tuple `data.sources` are changed
in the file. An unknown key ends the program with the nearest known name. What a run was configured
with, overrides included, is written to `config.json` in its workdir.

`configs/` has `tiny` (the README's main job, a light denoiser), `tiny_diffusion` (a separate one,
for the diffusion mode), `tiny_teacher`, `jsonl` (prompts of your own), `sudoku`, and recipes for
`gemma3_270m`, `gemma3_1b`, `gemma4_e2b` and `gemma4_26b_a4b` ([models.md](models.md)).

A recipe holds what differs from the defaults below; `experiment_config` adds the others. A config
is read once, into an `Experiment` (of `train` a `TeacherTraining`). This page is written by
`python docs/config_page.py` from the dataclasses, and a test compares them. A key without a default
must be in the config.
"""
DISTILL = 'distill, generate_targets, evaluate, plan: top level'
TRAIN = 'train: top level'
# Title, what reads the section, keys that its docstring does not describe.
SECTIONS: tuple[tuple[str, type, dict[str, str]], ...] = (
    (DISTILL, Experiment, {}),
    (TRAIN, TeacherTraining, {}),
    ('mesh', MeshConfig, {}),
    ('compute', ComputeConfig, {}),
    ('targets', TargetsConfig, {}),
    ('targets.source, eval.source, data.sources', DataSpec, {}),
    ('data', BatchConfig, {}),
    ('data of train', MixtureConfig, {}),
    ('lora', LoraSettings, {}),
    ('light, model.denoiser.light', LightConfig, {}),
    ('drafting', DraftingConfig, {}),
    ('stage1', Stage1Config, {}),
    ('stage2', Stage2Config, {}),
    ('optimizer', OptimizerConfig, {}),
    ('train', LoopConfig, {}),
    ('sampling', SamplingConfig, {}),
    ('eval', EvaluationConfig, {}),
    ('eval.sweep', Grid, {}),
    ('model', ModelConfig, {}),
    ('model.denoiser', DenoiserConfig, {}),
    ('model.sliding, model.full', AttentionConfig, {}),
    (
        'model.moe',
        MoEConfig,
        {
            'num_experts': 'E, experts of a layer',
            'top_k': 'experts that a token is routed to',
            'expert_width': 'F_e, FFN width of an expert',
        },
    ),
    ('model.per_layer', PerLayerConfig, {}),
)


def attributes(cls: type) -> dict[str, str]:
    """Returns name and text of what a class and its bases list under `Attributes:`."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, listed = inspect.cleandoc(base.__doc__ or '').partition('Attributes:\n')
        names: list[str] = []
        for line in listed.splitlines():
            if match := re.match(r'  ([a-z0-9_]+(?:, [a-z0-9_]+)*): (.*)', line):
                names = match[1].split(', ')
                found |= dict.fromkeys(names, match[2])
            elif line.startswith('   '):
                found |= {name: f'{found[name]} {line.strip()}' for name in names}
            elif line.strip():
                break
    return found


def default(cls: type, field: dataclasses.Field) -> str:
    """Returns the default of a key as text; '' where it has none, or is a section."""
    if section_of(cls, field.name) is not None:
        return ''
    if field.default_factory is not dataclasses.MISSING:
        return f'`{field.default_factory()!r}`'
    return '' if field.default is dataclasses.MISSING else f'`{field.default!r}`'


def rows(cls: type, beside: dict[str, str]) -> list[tuple[str, str, str]]:
    """Returns (key, default, meaning) of each; a field without a description is a KeyError."""
    about = beside | attributes(cls)
    return [(f.name, default(cls, f), about[f.name]) for f in dataclasses.fields(cls)]


def page() -> str:
    parts = [INTRO]
    for title, cls, beside in SECTIONS:
        lines = [
            f'## {title} (`{cls.__name__}`)',
            '',
            '| key | default | meaning |',
            '|---|---|---|',
        ]
        for row in rows(cls, beside):
            key, value, text = (cell.replace('|', '\\|') for cell in row)
            lines.append(f'| `{key}` | {value} | {text} |')
        parts.append('\n'.join(lines) + '\n')
    return '\n'.join(parts)


if __name__ == '__main__':
    PAGE.write_text(page(), encoding='utf-8')
