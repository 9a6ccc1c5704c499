"""Writes configs.md, the page of every config key, from the dataclasses that read them.

python docs/config_page.py
"""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

from diffusiongemma.data.sources import DataSpec
from diffusiongemma.distillation.compute import ComputeConfig
from diffusiongemma.distillation.drafting import DraftingConfig
from diffusiongemma.distillation.loop import LoopConfig
from diffusiongemma.distillation.run import BatchConfig
from diffusiongemma.distillation.stage1 import Stage1
from diffusiongemma.distillation.stage2 import Stage2
from diffusiongemma.distillation.state import OptimizerConfig
from diffusiongemma.distillation.targets import TargetsConfig
from diffusiongemma.evaluation.compare import EvalConfig
from diffusiongemma.evaluation.sweep import Grid
from diffusiongemma.models import (
    AttentionConfig,
    DenoiserConfig,
    LightConfig,
    ModelConfig,
    MoEConfig,
    PerLayerConfig,
)
from diffusiongemma.models.lora import LoraConfig
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

This page is written by `python docs/config_page.py` from the dataclasses that read the keys, and a
test compares them. A key without a default must be in the config; keys that a config leaves out
have the default.
"""
# Keys that are no fields of a dataclass: those that the programs read themselves.
DISTILL = {
    'seed': 'of everything random: noise, order of the data, first parameters',
    'dtype': "of the computation: 'float32' or 'bfloat16'",
    'denoise_dtype': 'of a denoiser with layers of its own, see `Execution.denoise_dtype`',
    'mesh': 'devices along each axis, see below',
    'teacher': "what is distilled: a checkpoint that `load_model` opens, or 'builtin-teacher'",
    'init': "a student to go on from; empty starts from the teacher's weights",
    'canvas_length': 'C, tokens of a canvas',
    'denoiser': "'shared', 'separate' or 'light', see `DenoiserConfig` below",
    'light': "layers and head of a 'light' denoiser, see below",
    'predict_next': 'a canvas token is predicted at the position before its own',
    'self_conditioning': 'a denoise step sees the soft embeddings of the step before',
    'lora': 'adapters alone, see below',
    'targets': 'stage 0, see below',
    'data': 'batches, see below',
    'compute': 'memory against time, see below',
    'corruption': "the forward process: 'uniform' or 'masked'",
    'ar_weight': "weight of KL(teacher || encode pass); no effect but with 'shared'",
    'drafting': 'trains the denoiser to draft, in place of the two stages, see below',
    'stage1': 'see below',
    'stage2': 'see below',
    'optimizer': 'see below',
    'train': 'see below',
    'sampling': 'how the student is sampled when it is evaluated, see below',
    'eval': 'see below',
}
TRAIN = {
    'seed': 'of everything random: order of the data, first parameters',
    'init': 'a model to go on from; empty starts from random parameters',
    'tokenizer': "path of a sentencepiece model, or 'builtin'",
    'dtype': "of the computation: 'float32' or 'bfloat16'",
    'mesh': 'devices along each axis, see below',
    'model': 'see below',
    'data': '`sources`, a tuple of sources with a `weight` each; `batch_size` and `row_length`',
    'compute': 'memory against time, see below',
    'optimizer': 'see below',
    'train': 'see below',
}
MESH = {
    'data': 'copies of the parameters, each with its part of the batch; -1: whatever is left',
    'fsdp': 'parameters and batch are split',
    'tensor': 'heads and FFN widths are split',
    'expert': 'experts are split',
    'sequence': 'tokens of a row are split',
}
# Title, keys or their dataclass, keys that it lacks (or does not describe), fields a run fills in.
SECTIONS: tuple[tuple[str, Any, dict[str, str], tuple[str, ...]], ...] = (
    ('distill, generate_targets, evaluate: top level', DISTILL, {}, ()),
    ('train: top level', TRAIN, {}, ()),
    ('mesh', MESH, {}, ()),
    ('compute', ComputeConfig, {}, ()),
    ('targets', TargetsConfig, {}, ()),
    ('targets.source, eval.source, data.sources', DataSpec, {}, ()),
    ('data', BatchConfig, {}, ()),
    ('lora', LoraConfig, {}, ()),
    ('light', LightConfig, {}, ()),
    ('drafting', DraftingConfig, {}, ()),
    ('stage1', Stage1, {}, ('corruption', 'schedule')),
    (
        'stage2',
        Stage2,
        {'first_step': 'step at which stage 1 ends and stage 2 begins'},
        ('corruption', 'schedule', 'acceptance'),
    ),
    ('optimizer', OptimizerConfig, {}, ()),
    ('train', LoopConfig, {}, ()),
    ('sampling', SamplingConfig, {}, ()),
    ('eval', EvalConfig, {'source': 'the examples', 'sweep': 'the grid of `--sweep`'}, ()),
    ('eval.sweep', Grid, {}, ()),
    ('model', ModelConfig, {}, ()),
    ('model.denoiser', DenoiserConfig, {}, ()),
    ('model.sliding, model.full', AttentionConfig, {}, ()),
    (
        'model.moe',
        MoEConfig,
        {
            'num_experts': 'E, experts of a layer',
            'top_k': 'experts that a token is routed to',
            'expert_width': 'F_e, FFN width of an expert',
        },
        (),
    ),
    ('model.per_layer', PerLayerConfig, {}, ()),
)


def attributes(cls: type) -> dict[str, str]:
    """Name and text of what the class's docstring lists under `Attributes:`."""
    doc = inspect.cleandoc(cls.__doc__ or '')
    _, _, listed = doc.partition('Attributes:\n')
    found: dict[str, str] = {}
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


def default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f'`{field.default_factory()!r}`'
    return '' if field.default is dataclasses.MISSING else f'`{field.default!r}`'


def rows(keys: Any, beside: dict[str, str], filled_in: tuple[str, ...]) -> list[tuple[str, ...]]:
    """(key, default, meaning) of a section; a field without a description is a KeyError."""
    if isinstance(keys, dict):
        return [(name, '', text) for name, text in keys.items()]
    about = beside | attributes(keys)
    fields = [field for field in dataclasses.fields(keys) if field.name not in filled_in]
    listed = [(field.name, default(field), about[field.name]) for field in fields]
    own = {field.name for field in fields}
    return listed + [(name, '', text) for name, text in beside.items() if name not in own]


def page() -> str:
    parts = [INTRO]
    for title, keys, beside, filled_in in SECTIONS:
        name = f' (`{keys.__name__}`)' if isinstance(keys, type) else ''
        lines = [f'## {title}{name}', '', '| key | default | meaning |', '|---|---|---|']
        for row in rows(keys, beside, filled_in):
            key, value, text = (cell.replace('|', '\\|') for cell in row)
            lines.append(f'| `{key}` | {value} | {text} |')
        parts.append('\n'.join(lines) + '\n')
    return '\n'.join(parts)


if __name__ == '__main__':
    PAGE.write_text(page(), encoding='utf-8')
