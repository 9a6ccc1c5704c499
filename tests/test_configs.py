"""Every config in configs/ is one that its program accepts, and a recipe's student fits."""

import importlib.util
import json
import math
import re
import sys
import typing
from pathlib import Path

import jax
import pytest
from absl import flags
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict, config_flags

from diffusiongemma import configuration, run_config, train
from diffusiongemma.data.packing import RowLayout
from diffusiongemma.data.sources import DataSpec
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.distillation import run
from diffusiongemma.distillation.compute import ComputeConfig
from diffusiongemma.distillation.loop import LoopConfig
from diffusiongemma.distillation.lora import lora_student
from diffusiongemma.distillation.state import OptimizerConfig, create_state, make_optimizer
from diffusiongemma.distillation.targets import TargetsConfig
from diffusiongemma.evaluation.compare import EvalConfig
from diffusiongemma.evaluation.sweep import Grid
from diffusiongemma.models import PRESETS, DiffusionGemma, Gemma, init_params
from diffusiongemma.parallel import (
    MESH_AXES,
    batch_sharding,
    make_mesh,
    param_shardings,
    state_shardings,
)
from diffusiongemma.planning.programs import training_step
from diffusiongemma.sampling import TokenStability, TopK

sys.path.insert(0, str(Path(__file__).parents[1] / 'docs'))
import config_page  # noqa: E402

CONFIGS = Path(__file__).parents[1] / 'configs'
TEACHERS = ['tiny_teacher']
STUDENTS = sorted({path.stem for path in CONFIGS.glob('*.py')} - set(TEACHERS))
RECIPES = {  # bytes of a device, and devices
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
    config = load('gemma3_270m_light_gpu')
    planned = training_step(
        config, PRESETS['gemma3_270m'], make_mesh(config.mesh, jax.devices()[:1])
    )
    step = jax.jit(planned.function, donate_argnums=planned.donated)
    memory = step.lower(*planned.arguments).compile().memory_analysis()
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 0.9 * 80e9


@pytest.mark.parametrize('name', TEACHERS)
def test_a_teachers_config_builds_everything_of_its_run(name):
    config = load(name)
    configuration.check_keys(config, train.CONFIG_KEYS)
    ComputeConfig.of(config)
    loop = configuration.build(LoopConfig, config.train, 'train')
    make_optimizer(
        configuration.build(OptimizerConfig, config.optimizer, 'optimizer'), loop.num_steps
    )
    assert configuration.data_specs(config)
    assert configuration.model_config(config).vocab_size == TOKENIZER.vocab_size


@pytest.mark.parametrize('name', STUDENTS)
def test_a_students_config_builds_everything_of_its_run(name):
    config = load(name)
    configuration.check_keys(config, run.CONFIG_KEYS)
    ComputeConfig.of(config)
    configuration.compute_dtype(config)
    loop = configuration.build(LoopConfig, config.train, 'train')
    make_optimizer(
        configuration.build(OptimizerConfig, config.optimizer, 'optimizer'), loop.num_steps
    )
    stages = run.objectives(config, TOKENIZER)
    assert stages[-1][1] == loop.num_steps
    data = configuration.build(run.BatchConfig, config.data, 'data')
    RowLayout(data.row_length, data.canvases_per_row, config.canvas_length)
    targets = configuration.build(TargetsConfig, config.targets, 'targets')
    if config.get('drafting'):
        assert stages[0][0].anchors_per_row < data.row_length
    else:
        assert 0 < stages[0][1]
        # Sudoku has the first stage alone.
        assert (stages[0][1] < stages[1][1]) == (name != 'sudoku')
        response = data.canvases_per_row * config.canvas_length
        assert targets.max_new_tokens <= response <= data.row_length
    values = config.eval.to_dict()
    DataSpec.from_config(values.pop('source'))
    if 'sweep' in values:
        configuration.build(Grid, values.pop('sweep'), 'eval.sweep')
    configuration.build(EvalConfig, values, 'eval')


def test_the_page_of_config_keys_is_what_the_dataclasses_say():
    assert config_page.PAGE.read_text(encoding='utf-8') == config_page.page(), (
        'docs/configs.md is out of date: run python docs/config_page.py'
    )
    optional = set(configuration.OPTIONAL_KEYS)
    assert tuple(k for k in config_page.DISTILL if k not in optional) == run.CONFIG_KEYS
    assert tuple(k for k in config_page.TRAIN if k not in optional) == train.CONFIG_KEYS
    assert tuple(config_page.MESH) == MESH_AXES


@pytest.mark.parametrize('name', STUDENTS + TEACHERS)
def test_every_key_of_a_config_is_on_the_page(name):
    sections = {
        title: {key for key, _, _ in config_page.rows(keys, *rest)}
        for title, keys, *rest in config_page.SECTIONS
    }

    def check(values, section):
        unknown = set(values) - sections[section]
        assert not unknown, f'{name}: {section} has {sorted(unknown)}'

    config = load(name).to_dict()
    data = config['data'] if name in TEACHERS else {}
    top = 'train' if name in TEACHERS else 'distill, generate_targets, evaluate'
    check(config, f'{top}: top level')
    sources = [config[part]['source'] for part in ('targets', 'eval') if part in config]
    for source in (*sources, *data.get('sources', ())):
        check(source, 'targets.source, eval.source, data.sources')
    for section, values in config.items():
        if section in sections and not data.get('sources') or section in ('optimizer', 'train'):
            check(values, section)
    check(config.get('eval', {}).get('sweep', {}), 'eval.sweep')
    model = config.get('model', {})
    check(model, 'model')
    for kind in ('sliding', 'full'):
        check(model.get(kind, {}), 'model.sliding, model.full')


def parsed(name, *overrides):
    """A config with overrides, as a program parses it."""
    argv = ['program', f'--config={CONFIGS / name}.py', *overrides]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
    values['config'].parser = run_config._WithOptionalKeys(values['config'].parser, argv)
    values(argv)
    return values.config


@pytest.mark.parametrize('name', STUDENTS + TEACHERS)
def test_every_key_of_the_page_is_set_on_the_command_line(name):
    config = load(name)
    texts = {bool: 'true', int: '3', float: '0.5', str: 'text', tuple: '(1, 2)'}
    expected = {bool: True, int: 3, float: 0.5, str: 'text'}
    for section, cls in run_config._sections().items():
        inside = config
        for part in section.split('.'):
            inside = inside.get(part) if inside is not None else None
        if inside is None or (name in TEACHERS and section == 'data'):
            continue
        for field, hint in typing.get_type_hints(cls).items():
            kinds = [t for t in (*typing.get_args(hint), hint) if t in expected]
            if kinds and typing.get_origin(hint) is not tuple:
                path = f'{section}.{field}'
                value = parsed(name, f'--config.{path}={texts[kinds[0]]}')
                for part in path.split('.'):
                    value = value[part]
                assert value == expected[kinds[0]], path


def test_the_sections_that_are_completed_are_those_of_the_page():
    listed = {
        part: keys
        for title, keys, *_ in config_page.SECTIONS
        for part in title.split(', ')
        if isinstance(keys, type)
    }
    assert listed.pop('data.sources') is DataSpec  # a tuple, which no override reaches into
    assert listed == run_config._sections()


def test_a_rule_on_the_command_line_or_in_a_config_is_written_and_read_again(tmp_path):
    config = parsed('jsonl', '--config.sampling.acceptance=TopK(k=4)')
    with config.unlocked():
        config.sampling.stopping = TokenStability(2)
    expected = run.sampling_config(config, TOKENIZER)
    assert (expected.acceptance, expected.stopping) == (TopK(4), TokenStability(2))
    configuration.write_resolved(config, tmp_path)
    written = ConfigDict(json.loads((tmp_path / 'config.json').read_text(encoding='utf-8')))
    assert run.sampling_config(written, TOKENIZER) == expected


def test_what_json_cannot_hold_is_named(tmp_path):
    config = load('jsonl')
    with config.unlocked():
        config.sampling.acceptance = object()
    with pytest.raises(ValueError, match='holds <object object .*, which config.json cannot'):
        configuration.write_resolved(config, tmp_path)


def test_a_key_that_nothing_reads_is_still_refused():
    for key in ('targets.source.promt_feature=x', 'sampling.nothing=1', 'nothing.size=1'):
        with pytest.raises((AttributeError, KeyError)):
            parsed('jsonl', f'--config.{key}')


@pytest.mark.parametrize('name', [name for name in STUDENTS if load(name).denoiser != 'light'])
def test_adapters_need_no_more_than_a_rank(name):
    config = load(name)
    config.lora.rank = 8
    preset = PRESETS.get(name, PRESETS['gemma3_270m'])
    assert lora_student(config, DiffusionGemma(student_of(config, preset))) is not None


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
    together = float(re.search(r'  together .*?([\d.]+) GB\n', text)[1])
    assert state_bytes + gradient_bytes + teacher_bytes < together * 1e9 < 0.9 * memory


def bytes_per_device(shapes, shardings):
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in pairs)
