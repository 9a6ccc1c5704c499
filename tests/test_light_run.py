"""Tests runs that train a light student: resuming, loading, and export with its teacher."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from new_params import new_params
from test_distillation_run import DATA, assert_equal, crash_at, train_student

from diffusiongemma import configuration
from diffusiongemma.checkpoints.bundle import save_bundle
from diffusiongemma.checkpoints.convert import convert
from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.data.pipeline import eval_examples
from diffusiongemma.data.sources import DataSpec
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.distillation import reporting, run
from diffusiongemma.distillation.experiment import Experiment
from diffusiongemma.distillation.export import export_student
from diffusiongemma.distillation.loading import Teacher, load_teacher
from diffusiongemma.distillation.run import distill
from diffusiongemma.models import Gemma
from diffusiongemma.parallel import make_mesh
from diffusiongemma.planning import programs
from diffusiongemma.planning.sampler_programs import sampler_programs

sys.path.insert(0, str(Path(__file__).parents[1] / 'configs'))
import tiny  # noqa: E402


@pytest.fixture
def teacher_directory(tiny_config, tmp_path):
    """Returns the bundle of a random teacher with the built-in vocabulary, and writes problems."""
    tokenizer = Tokenizer.load('builtin')
    model = Gemma(tiny_config.replace(vocab_size=tokenizer.vocab_size, canvas_length=0))
    params = new_params(model)
    save_bundle(tmp_path / 'teacher', model.config, params, tokenizer)
    lines = [json.dumps(row) + '\n' for row in eval_examples(DATA)]
    (tmp_path / 'problems.jsonl').write_text(''.join(lines))
    return tmp_path / 'teacher'


def assert_close(rounded, whole):
    for one, other in zip(jax.tree.leaves(rounded), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, other, atol=0.01 * float(np.abs(other).max()))


def light_config(teacher_directory, **changes):
    config = tiny.get_config()
    config.teacher = str(teacher_directory)
    config.mesh = {'data': 1, 'fsdp': 8}
    config.canvas_length = 4
    config.light = {'layers': (0, 2), 'draft_vocab_size': 700, 'serial_rank': 4}
    config.data = {'batch_size': 8, 'row_length': 128}
    config.drafting = {'anchors_per_row': 4, 'held_out': 8, 'refused_rate': 0.5}
    config.train = {'num_steps': 4, 'report_every': 1, 'checkpoint_every': 2}
    # The draft vocabulary is counted in the whole source, so it is a small one.
    problems = teacher_directory.parent / 'problems.jsonl'
    config.targets.source = {'kind': 'jsonl', 'path': str(problems)}
    config.targets.sequence_level = False  # the answers of a random teacher do not end
    config.eval = {
        'source': {'kind': 'wordmath', 'split': 'test', 'size': 2},
        'batch_size': 2,
        'speed_batch_sizes': (2,),
        'speed_batches': 1,
    }
    config.sampling.max_new_tokens = 6
    config.update(changes)
    return config


def test_a_light_student_is_exported_without_its_teacher_and_opens_on_no_other(
    teacher_directory, tmp_path
):
    workdir = tmp_path / 'run'
    config = light_config(teacher_directory, mesh={'data': 1})
    config.train = {'num_steps': 1, 'report_every': 1, 'checkpoint_every': 1}
    config.drafting.refused_rate = 0.0
    teacher = load_teacher(Experiment.of(config))
    setup, state = train_student(config, teacher, DATA, workdir)
    export_student(setup, state, teacher, workdir)
    model, params, _ = load_model(workdir)
    assert set(json.loads((workdir / 'model' / 'config.json').read_text())) >= {
        'base',
        'base_fingerprint',
    }
    assert model.light.draft_vocab_size == 700 and params['draft_ids'].shape == (700,)
    rows = reporting.read_metrics(workdir)
    assert {'held_out/accepted_length', 'held_out/acceptance/04'} <= set(rows[-1])
    # This teacher has the same architecture and other weights.
    other, tokenizer = Gemma(model.config.autoregressive), Tokenizer.load('builtin')
    changed = new_params(other, 5)
    changed['backbone']['final_norm']['scale'] += 1.0
    save_bundle(teacher_directory, other.config, changed, tokenizer)
    with pytest.raises(ValueError, match='was trained on another model than'):
        load_model(workdir)


@pytest.mark.slow
def test_a_light_student_goes_on_with_its_draft_vocabulary_and_can_be_small(
    teacher_directory, tmp_path, monkeypatch
):
    workdir = tmp_path / 'run'
    distill(Experiment.of(light_config(teacher_directory)), workdir)
    model, params, _ = load_model(workdir)
    # A resumed run reads its draft vocabulary and has no steps left.
    experiment = Experiment.of(light_config(teacher_directory))
    targets, teacher = experiment.targets.source, load_teacher(experiment)
    with monkeypatch.context() as patch:
        patch.delattr(run, 'draft_vocabulary')
        train_student(light_config(teacher_directory), teacher, targets, workdir)
    np.testing.assert_array_equal(np.load(workdir / 'draft_ids.npy'), params['draft_ids'])
    # A student that is initialized from it keeps its draft vocabulary on other data.
    more = light_config(teacher_directory, init=str(workdir))
    more.train = {'num_steps': 1, 'report_every': 1, 'checkpoint_every': 1}
    other_data = DataSpec(kind='wordmath', size=100, seed=5)
    train_student(more, teacher, other_data, tmp_path / 'more')
    continued = np.load(tmp_path / 'more' / 'draft_ids.npy')
    np.testing.assert_array_equal(continued, params['draft_ids'])
    # Stored in eight bits, it loads with the same teacher and has similar outputs.
    convert(workdir, tmp_path / 'small', 'bundle', dtype='int8')
    small, small_params, _ = load_model(tmp_path / 'small')
    assert small == model
    assert_close(small_params, params)
    assert_equal(small_params['backbone'], params['backbone'])


@pytest.mark.slow
def test_an_interrupted_run_ends_as_one_that_was_not(teacher_directory, tmp_path, monkeypatch):
    config = light_config(teacher_directory)
    teacher: Teacher = load_teacher(Experiment.of(config))
    _, whole = train_student(config, teacher, DATA, tmp_path / 'whole')
    with monkeypatch.context() as patch:
        crash_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train_student(config, teacher, DATA, tmp_path / 'cut')
    _, resumed = train_student(config, teacher, DATA, tmp_path / 'cut')
    assert_equal(whole, resumed)
    opened, params, _ = load_model(tmp_path / 'cut')
    assert_equal({name: params[name] for name in resumed.ema_params}, resumed.ema_params)
    assert opened.light is not None
    assert np.asarray(params['draft_ids']).dtype == np.int32


@pytest.mark.slow
def test_a_light_run_and_its_sampling_are_planned():
    config, mesh = tiny.get_config(), make_mesh({'data': 8})
    config.data.batch_size = 8
    config.light.draft_vocab_size = 600
    experiment = Experiment.of(config)
    teacher = programs.teacher_config(experiment.teacher, 'tiny', None)
    step = programs.training_step(experiment, teacher, mesh)
    sampling = sampler_programs(experiment, teacher, mesh, batch_size=8, prompt_length=16)
    assert [program.name for program in sampling] == ['generate', 'draft', 'verify']
    for program in (step, *sampling):
        jax.eval_shape(program.function, *program.arguments)
        assert all(size > 0 for size in program.kinds.values())


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            {'light': {'layers': (0, 7)}},
            r'light.layers=\(0, 7\), but the teacher has layers 0 to 2',
        ),
        ({'light': {'layer': (0,)}}, "config.light has no key 'layer'; did you mean 'layers'"),
        ({'light': {'layers': (0,), 'draft_vocab_size': 2000}}, 'larger than the vocabulary'),
        ({'drafting': {'anchors_per_row': 128}}, 'anchors_per_row=128 do not fit a row of 128'),
        ({'drafting': {}}, "config.denoiser='light' is trained to draft"),
        ({'denoiser': 'heavy'}, "must be one of .* got 'heavy'"),
    ],
)
def test_what_cannot_be_trained_is_said_in_one_line(teacher_directory, tmp_path, changes, message):
    config = light_config(teacher_directory)
    teacher = load_teacher(Experiment.of(config))
    with config.unlocked():
        for name, value in changes.items():
            config[name] = value
    with pytest.raises(ValueError, match=message):
        train_student(config, teacher, DATA, tmp_path / 'run')


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('sampling.draft_length', 5, 'draft_length=5 is longer than the canvas of 4 tokens'),
        (
            'compute.microbatches',
            3,
            'batch_size=8 is not divisible by .*microbatches=3',
        ),
        ('light.draft_vocab_size', 1, 'draft_vocab_size=1 has no room for the'),
        ('targets.source.size', 9, '9 examples are too few to hold a tenth out'),
        ('sampling.acceptance', 'GibbsSweep()', 'GibbsSweep is for uniform noise'),
        ('drafting.anchors_per_row', 10**6, 'anchors_per_row=1000000 do not fit a row of 128'),
    ],
)
def test_an_impossible_setting_is_refused_before_anything_is_written(
    teacher_directory, tmp_path, key, value, message
):
    config = light_config(teacher_directory)
    config = configuration.complete(config, Experiment, [key])
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=message):
        distill(Experiment.of(config), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()
