"""Writes configs.md, the table of all config keys, from the dataclasses that read them.

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

A config is a Python file with `get_config()`, which returns an `ml_collections.ConfigDict`. Every
key of this page can be set on the command line, whether or not the file has it:
`--config.train.num_steps=500`, `--config.targets.source.prompt_feature=question`, and tuples as
`--config.eval.speed_batch_sizes='(1, 8)'`. Only the sources in the tuple `data.sources` have to be
changed in the file. An unknown key is an error that names the most similar key. The whole config of
a run, including overrides, is written to `config.json` in its workdir.

`configs/` has `tiny` (the README's main job, a light denoiser), `tiny_diffusion` (a separate
denoiser for the diffusion mode), `tiny_teacher`, `jsonl` (your own prompts), `sudoku`, and recipes
for `gemma3_270m`, `gemma3_1b`, `gemma4_e2b` and `gemma4_26b_a4b` ([models.md](models.md)).

A recipe has only the keys that differ from the defaults below; `experiment_config` adds the others.
A config is read once, into an `Experiment` (for the command `train`, a `TeacherTraining`). This
page is written by `python docs/config_page.py` from the dataclasses, and a test compares them. A
key without a default must be in the config.
"""
DISTILL = 'distill, generate_targets, evaluate, plan: top level'
TRAIN = 'train: top level'
# The title, the dataclass that reads the section, and descriptions that its docstring lacks.
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
            'num_experts': 'E, the number of experts of a layer',
            'top_k': 'the number of experts that a token is routed to',
            'expert_width': 'F_e, the FFN width of an expert',
        },
    ),
    ('model.per_layer', PerLayerConfig, {}),
)


def attributes(cls: type) -> dict[str, str]:
    """Returns the names and descriptions that a class and its bases list under `Attributes:`."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, listed = inspect.cleandoc(base.__doc__ or '').partition('Attributes:\n')
        names: list[str] = []
        for line in listed.splitlines():
            if match := re.match(r'  ([a-z0-9_]+(?:, [a-z0-9_]+)*): (.*)', line):
                names = match[1].split(', ')
                texts |= dict.fromkeys(names, match[2])
            elif line.startswith('   '):
                texts |= {name: f'{texts[name]} {line.strip()}' for name in names}
            elif line.strip():
                break
    return texts


def default(cls: type, field: dataclasses.Field) -> str:
    """Returns the default of a key as text; '' for a section or a key without a default."""
    if section_of(cls, field.name) is not None:
        return ''
    if field.default_factory is not dataclasses.MISSING:
        return f'`{field.default_factory()!r}`'
    return '' if field.default is dataclasses.MISSING else f'`{field.default!r}`'


def rows(cls: type, others: dict[str, str]) -> list[tuple[str, str, str]]:
    """Returns (key, default, meaning) of every field of a dataclass.

    Raises:
      KeyError: if a field has no description.
    """
    meanings = others | attributes(cls)
    return [(f.name, default(cls, f), meanings[f.name]) for f in dataclasses.fields(cls)]


def page() -> str:
    """Returns the text of configs.md."""
    parts = [INTRO]
    for title, cls, others in SECTIONS:
        lines = [
            f'## {title} (`{cls.__name__}`)',
            '',
            '| key | default | meaning |',
            '|---|---|---|',
        ]
        for row in rows(cls, others):
            key, value, text = (cell.replace('|', '\\|') for cell in row)
            lines.append(f'| `{key}` | {value} | {text} |')
        parts.append('\n'.join(lines) + '\n')
    return '\n'.join(parts)


if __name__ == '__main__':
    PAGE.write_text(page(), encoding='utf-8')
