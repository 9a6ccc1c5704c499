"""Tests that programs accept every config in configs/, and that a recipe's student fits."""

import dataclasses
import functools
import importlib.util
import json
import math
import re
import sys
import types
import typing
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict, config_flags

from diffusiongemma import cli, configuration
from diffusiongemma.data.packing import RowLayout
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.distillation.experiment import Experiment, TeacherTraining, write_resolved
from diffusiongemma.distillation.lora import lora_student
from diffusiongemma.distillation.setup import objectives, sampling_config
from diffusiongemma.distillation.state import OptimizerConfig, create_state, make_optimizer
from diffusiongemma.models import PRESETS, DiffusionGemma, Gemma, init_params
from diffusiongemma.parallel import (
    MESH_AXES,
    batch_sharding,
    param_shardings,
    state_shardings,
)
from diffusiongemma.planning.programs import training_step
from diffusiongemma.sampling import TokenStability, TopK
from diffusiongemma.train import train

sys.path.insert(0, str(Path(__file__).parents[1] / 'docs'))
import config_page  # noqa: E402

CONFIGS = Path(__file__).parents[1] / 'configs'
TEACHERS = ['tiny_teacher']
STUDENTS = sorted({path.stem for path in CONFIGS.glob('*.py')} - set(TEACHERS))
RECIPES = {  # the bytes per device, and the number of devices
    'gemma3_270m': (24e9, 1),
    'gemma3_1b': (80e9, 8),
    'gemma4_e2b': (80e9, 8),
    'gemma4_26b_a4b': (95e9, 64),
}
TOKENIZER = Tokenizer.load('builtin')


def load(name):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def experiment(name):
    return Experiment.of(load(name))


def student_of(config, preset):
    names = ('canvas_length', 'predict_next')
    return preset.replace(kind=config.denoiser, **{name: config[name] for name in names})


@pytest.mark.parametrize('name', STUDENTS + TEACHERS)
def test_a_config_says_what_it_is_for_its_hardware_and_the_command_that_runs_it(name):
    text = (CONFIGS / f'{name}.py').read_text(encoding='utf-8').split('"""')[1]
    program = 'train' if name in TEACHERS else 'distill'
    assert 'Meant for ' in text and f'python -m diffusiongemma.{program} ' in text
    assert f'--config=configs/{name}.py' in text


@pytest.mark.slow
def test_the_light_recipe_for_a_gpu_compiles_and_fits_its_card():
    light = experiment('gemma3_270m_light_gpu')
    mesh = light.mesh.make(jax.devices()[:1])
    planned = training_step(light, PRESETS['gemma3_270m'], mesh)
    step = jax.jit(planned.function, donate_argnums=planned.donated)
    memory = step.lower(*planned.arguments).compile().memory_analysis()
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 0.9 * 80e9


@pytest.mark.parametrize('name', TEACHERS)
def test_a_teachers_config_builds_everything_of_its_run(name):
    training = TeacherTraining.of(load(name))
    make_optimizer(training.optimizer, training.train.num_steps)
    assert training.data.sources
    assert training.model.vocab_size == TOKENIZER.vocab_size


@pytest.mark.parametrize('name', STUDENTS)
def test_a_students_config_builds_everything_of_its_run(name):
    student = experiment(name)
    make_optimizer(student.optimizer, student.train.num_steps)
    stages = objectives(student, TOKENIZER)
    assert stages[-1][1] == student.train.num_steps
    data = student.data
    RowLayout(data.row_length, data.canvases_per_row, student.canvas_length)
    if student.drafting is not None:
        assert stages[0][0].anchors_per_row < data.row_length
    else:
        assert 0 < stages[0][1]
        # The sudoku config has only the first stage.
        assert (stages[0][1] < stages[1][1]) == (name != 'sudoku')
        response = data.canvases_per_row * student.canvas_length
        assert student.targets.max_new_tokens <= response <= data.row_length
    assert student.eval.source is not None
    sampling_config(student, TOKENIZER)


@pytest.mark.parametrize('name', STUDENTS + TEACHERS)
def test_what_a_run_writes_of_its_config_is_read_as_the_same(name, tmp_path):
    cls = TeacherTraining if name in TEACHERS else Experiment
    config = cls.of(load(name))
    write_resolved(config, tmp_path)
    written = json.loads((tmp_path / 'config.json').read_text(encoding='utf-8'))
    assert cls.of(ConfigDict(written)) == config


def test_a_config_that_says_little_has_defaults_for_the_rest():
    config = ConfigDict(
        {
            'canvas_length': 8,
            'targets': {'source': {'kind': 'wordmath'}},
            'data': {'batch_size': 2, 'row_length': 64},
            'train': {'num_steps': 1},
            'mesh': {'fsdp': 4},
        }
    )
    little = Experiment.of(config)
    assert (little.seed, little.denoiser, little.light) == (0, 'shared', None)
    assert (little.mesh.data, little.mesh.fsdp, little.stage2.num_steps) == (1, 4, 2)
    assert Experiment.of(configuration.complete(config, Experiment)) == little
    del config.train
    with pytest.raises(ValueError, match=r"config lacks \['train'\]; see configs/tiny.py"):
        Experiment.of(config)


def test_a_config_with_all_keys_of_an_older_version_is_read():
    """The config has all sections and values of configs/tiny_diffusion.py in version 0.1."""
    path = Path(__file__).parent / 'data' / 'config_of_0_1.json'
    old = Experiment.of(ConfigDict(json.loads(path.read_text(encoding='utf-8'))))
    new = experiment('tiny_diffusion')
    same = ('targets', 'data', 'train', 'compute', 'stage1', 'stage2', 'optimizer', 'eval', 'mesh')
    assert all(getattr(old, name) == getattr(new, name) for name in same)
    assert sampling_config(old, TOKENIZER) == sampling_config(new, TOKENIZER)
    assert old.lora.of_denoiser('separate') is None


def test_the_page_of_config_keys_is_what_the_dataclasses_say():
    assert config_page.PAGE.read_text(encoding='utf-8') == config_page.page(), (
        'docs/configs.md is out of date: run python docs/config_page.py'
    )
    mesh = next(cls for title, cls, _ in config_page.SECTIONS if title == 'mesh')
    assert tuple(field.name for field in dataclasses.fields(mesh)) == MESH_AXES


def sections_of(cls, path=''):
    """Returns the path and dataclass of each section of a dataclass."""
    for field in dataclasses.fields(cls):
        section = configuration.section_of(cls, field.name)
        if section is not None:
            yield f'{path}{field.name}', section
            yield from sections_of(section, f'{path}{field.name}.')


@pytest.mark.parametrize('cls', [Experiment, TeacherTraining])
def test_every_section_of_a_config_is_on_the_page(cls):
    listed = {
        (part, section)
        for title, section, _ in config_page.SECTIONS
        for part in title.removesuffix(' of train').split(', ')
    }
    found = set(sections_of(cls))
    assert ('optimizer', OptimizerConfig) in found and found <= listed


def parsed(name, *overrides):
    """Returns a config with overrides, parsed as by a program."""
    argv = ['program', f'--config={CONFIGS / name}.py', *overrides]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
    cls = TeacherTraining if name in TEACHERS else Experiment
    values['config'].parser = cli._WithDefaults(values['config'].parser, cls, argv)
    values(argv)
    return values.config


@pytest.mark.parametrize('name', ['tiny', 'tiny_diffusion', *TEACHERS])
def test_every_key_of_the_page_is_set_on_the_command_line(name):
    texts = {bool: 'true', int: '3', float: '0.5', str: 'text', tuple: '(1, 2)'}
    expected = {bool: True, int: 3, float: 0.5, str: 'text', tuple: (1, 2)}
    cls = TeacherTraining if name in TEACHERS else Experiment
    overrides = {}
    for section, inside in [('', cls), *sections_of(cls)]:
        for field, hint in typing.get_type_hints(inside).items():
            kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            kind = typing.get_origin(kinds[0]) or kinds[0]
            if kind in texts and configuration.section_of(inside, field) is None:
                overrides[f'{section}.{field}'.lstrip('.')] = kind
    assert len(overrides) > (30 if name in TEACHERS else 100)
    config = parsed(name, *(f'--config.{path}={texts[k]}' for path, k in overrides.items()))
    for path, kind in overrides.items():
        value = config
        for part in path.split('.'):
            value = value[part]
        assert value == expected[kind], path


def test_a_rule_on_the_command_line_or_in_a_config_is_written_and_read_again(tmp_path):
    config = parsed('jsonl', '--config.sampling.acceptance=TopK(k=4)')
    with config.unlocked():
        config.sampling.stopping = TokenStability(2)
    expected = sampling_config(Experiment.of(config), TOKENIZER)
    assert (expected.acceptance, expected.stopping) == (TopK(4), TokenStability(2))
    write_resolved(Experiment.of(config), tmp_path)
    written = ConfigDict(json.loads((tmp_path / 'config.json').read_text(encoding='utf-8')))
    assert sampling_config(Experiment.of(written), TOKENIZER) == expected


def test_what_json_cannot_hold_is_named(tmp_path):
    config = load('jsonl')
    with config.unlocked():
        config.sampling.acceptance = types.SimpleNamespace(next_canvas=None)
    with pytest.raises(ValueError, match='holds namespace.*, which config.json cannot'):
        write_resolved(Experiment.of(config), tmp_path)


@pytest.mark.parametrize(
    ('path', 'value', 'message'),
    [
        ('canvas_length', 7.5, 'config.canvas_length must be an integer, got 7.5'),
        ('canvas_length', True, 'config.canvas_length must be an integer, got True'),
        ('canvas_length', 0, 'config.canvas_length=0 must be at least 1'),
        ('canvas_length', 1000, 'config.canvas_length=1000 .* at most config.data.row_length=256'),
        ('light', {'layers': 4}, 'config.light.layers must be a tuple, got 4'),
        ('light', {'layers': (2, 0.5)}, r'config.light.layers\[1\] must be an integer, got 0.5'),
        ('light', 3, 'config.light must be a section, with keys, got 3'),
        ('optimizer.b2', 1.0, r'optimizer.b2 must be in \[0, 1\), got 1.0'),
        ('optimizer.clip_norm', float('nan'), 'clip_norm must be a number > 0, got nan'),
        ('ar_weight', float('inf'), 'config.ar_weight must be >= 0, got inf'),
        ('data.random_offset_rate', 2.0, r'random_offset_rate must be in \[0, 1\], got 2.0'),
        ('targets.max_new_tokens', -1, 'targets.max_new_tokens must be >= 1, got -1'),
        ('denoiser', 'lite', 'config.denoiser must be one of .* got .lite.'),
        ('corruption', 'maskd', 'config.corruption must be one of .* got .maskd.'),
        ('denoise_dtype', 'float8', 'config: denoise_dtype must be|config.denoise_dtype must be'),
        ('train.num_steps', 0, 'config.train.num_steps must be >= 1, got 0'),
        ('compute.microbatches', 0, 'config.compute.microbatches must be >= 1, got 0'),
        ('mesh', {'data': 0}, 'config.mesh: mesh sizes must be >= 1'),
        ('seed', 10**400, r'config.seed must be in \[0, 4294967295\], got 1000'),
        ('teacher', 3, 'config.teacher must be a string, got 3'),
        ('optimizer.learning_rate', '1e-3', "learning_rate must be a number, got '1e-3'"),
        ('self_conditioning', 1, 'config.self_conditioning must be True or False, got 1'),
    ],
)
def test_a_value_of_a_wrong_type_is_named(path, value, message):
    config = load('tiny_diffusion').copy_and_resolve_references()
    *sections, name = path.split('.')
    values = config.to_dict()
    inside = functools.reduce(dict.__getitem__, sections, values)
    inside[name] = value
    with pytest.raises(ValueError, match=message):
        Experiment.of(ConfigDict(values))


def test_a_teacher_without_room_for_the_tokens_is_refused(tmp_path):
    config = load('tiny_teacher')
    config.model.vocab_size = 1000
    with pytest.raises(ValueError, match='vocab_size=1000 is less than the 1024 tokens of'):
        train(TeacherTraining.of(config), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_numbers_of_numpy_paths_and_lists_are_plain_values(tmp_path):
    values = load('tiny_diffusion').to_dict()
    values |= {'canvas_length': np.int32(8), 'teacher': tmp_path, 'ar_weight': np.float32(0.5)}
    values['light'] = {'layers': [0, 1]}
    built = Experiment.of(ConfigDict(values))
    assert (built.canvas_length, built.teacher, built.light.layers) == (8, str(tmp_path), (0, 1))
    assert Experiment.of(ConfigDict(configuration.json_values(built))) == built


def test_a_key_that_nothing_reads_is_still_refused():
    for key in ('targets.source.promt_feature=x', 'sampling.nothing=1', 'nothing.size=1'):
        with pytest.raises((AttributeError, KeyError)):
            parsed('jsonl', f'--config.{key}')


@pytest.mark.parametrize('name', [name for name in STUDENTS if load(name).denoiser != 'light'])
def test_adapters_need_no_more_than_a_rank(name):
    config = load(name)
    config.lora.rank = 8
    student = Experiment.of(config)
    preset = PRESETS.get(name, PRESETS['gemma3_270m'])
    model = DiffusionGemma(student_of(config, preset))
    assert lora_student(student.lora, model, student.seed) is not None


@pytest.mark.slow
@pytest.mark.parametrize('name', RECIPES)
def test_the_training_state_of_a_recipe_takes_what_its_config_says(name):
    config, (memory, num_devices) = load(name), RECIPES[name]
    preset = PRESETS[name]
    assert config.data.row_length <= preset.max_positions
    sizes = tuple(1 if config.mesh[axis] == -1 else config.mesh[axis] for axis in MESH_AXES)
    mesh = AbstractMesh(sizes, MESH_AXES)
    assert mesh.size == num_devices
    batch_sharding(mesh, config.data.batch_size)
    if preset.moe is not None:
        assert preset.moe.num_experts % mesh.shape['expert'] == 0
    model = DiffusionGemma(student_of(config, preset))
    optimizer = make_optimizer(OptimizerConfig(), 10)
    state = jax.eval_shape(
        lambda key: create_state(init_params(model, key), optimizer), jax.random.key(0)
    )
    student = param_shardings(model, mesh)
    state_bytes = bytes_per_device(state, state_shardings(state, student, mesh))
    gradient_bytes = bytes_per_device(state.params, student)
    gemma = Gemma(model.config.autoregressive)
    teacher = jax.eval_shape(lambda key: init_params(gemma, key), jax.random.key(0))
    teacher_bytes = bytes_per_device(teacher, param_shardings(gemma, mesh)) / 2  # in bfloat16
    text = (CONFIGS / f'{name}.py').read_text(encoding='utf-8')
    assert f' {state_bytes / 1e9:.1f} GB\n  gradients' in text
    assert f' {(gradient_bytes + teacher_bytes) / 1e9:.1f} GB\n' in text
    together = float(re.search(r'  (?:together|everything .*?) .*?([\d.]+) GB\n', text)[1])
    assert state_bytes + gradient_bytes + teacher_bytes < together * 1e9 < 0.9 * memory


def bytes_per_device(shapes, shardings):
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in pairs)
