"""Tests whole runs on tiny models: resuming after a crash, and the contents of a workdir."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from new_params import new_params

from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.data.sources import DataSpec
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.distillation import loading, reporting, setup
from diffusiongemma.distillation.experiment import Experiment, TeacherTraining
from diffusiongemma.distillation.loading import Teacher, load_init, load_teacher
from diffusiongemma.distillation.run import distill
from diffusiongemma.distillation.run import train_student as train_experiment
from diffusiongemma.distillation.state import OptimizerConfig, create_state, make_optimizer
from diffusiongemma.distillation.targets import write_targets
from diffusiongemma.models import DiffusionGemma, Gemma
from diffusiongemma.train import train as train_teacher

sys.path.insert(0, str(Path(__file__).parents[1] / 'configs'))
import jsonl  # noqa: E402
import tiny_diffusion  # noqa: E402
import tiny_teacher  # noqa: E402

DATA = DataSpec(kind='wordmath', size=200)
SMALL = {'width': 16, 'num_heads': 2, 'ffn_width': 16, 'layer_types': ('sliding', 'full')}


@pytest.fixture
def teacher(tiny_config) -> Teacher:
    """Returns a random teacher with the vocabulary of the built-in tokenizer."""
    tokenizer = Tokenizer.load('builtin')
    config = tiny_config.replace(vocab_size=tokenizer.vocab_size, canvas_length=0)
    model = Gemma(config)
    params = new_params(model)
    return Teacher(model, params, tokenizer)


def student_config(**changes) -> ConfigDict:
    config = tiny_diffusion.get_config()
    config.mesh = {'data': 1, 'fsdp': 8}
    config.canvas_length = 8
    config.data = {'batch_size': 8, 'row_length': 128, 'canvases_per_row': 12}
    config.train = {'num_steps': 4, 'report_every': 1, 'checkpoint_every': 2}
    config.stage2.first_step = 1
    config.update(changes)
    return config


def train_student(config, teacher, targets, workdir):
    return train_experiment(Experiment.of(config), teacher, targets, workdir)


def train(config, workdir):
    return train_teacher(TeacherTraining.of(config), workdir)


def assert_equal(a, b):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(left, right)


def crash_at(monkeypatch, step):
    """Makes the next run raise an error when it reports `step`."""
    report = reporting.Reporter.report

    def report_or_die(self, at, *args, **kwargs):
        if at == step:
            raise KeyboardInterrupt
        report(self, at, *args, **kwargs)

    monkeypatch.setattr(reporting.Reporter, 'report', report_or_die)


def test_the_masters_are_float32_whatever_the_teacher_is_stored_in():
    params = {'kernel': jnp.ones(2, jnp.bfloat16)}
    state = create_state(params, make_optimizer(OptimizerConfig(), num_steps=2))
    assert state.params['kernel'].dtype == state.ema_params['kernel'].dtype == jnp.float32
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert moments and all(leaf.dtype == jnp.float32 for leaf in moments)


@pytest.mark.parametrize('lacking', ['train', 'test'])
def test_a_file_that_is_not_there_is_named_before_the_run_starts(tmp_path, lacking):
    for name in {'train', 'test'} - {lacking}:
        (tmp_path / f'{name}.jsonl').write_text('{"prompt": "a", "response": "b"}')
    config = jsonl.get_config()
    config.targets.source.path = str(tmp_path / 'train.jsonl')
    config.eval.source.path = str(tmp_path / 'test.jsonl')
    with pytest.raises(FileNotFoundError, match=f'No file at .*{lacking}.jsonl'):
        distill(Experiment.of(config), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_a_recipe_without_its_teacher_says_how_to_give_it():
    with pytest.raises(ValueError, match='config.teacher is empty: give the directory'):
        load_teacher(Experiment.of(student_config(teacher='')))


def test_a_student_on_a_frozen_teacher_gives_that_teacher_and_another_is_refused(
    tiny_config, monkeypatch
):
    teacher = load_teacher(Experiment.of(student_config(teacher='builtin')))
    expected = load_teacher(Experiment.of(student_config(teacher='builtin-teacher')))
    assert teacher.model.config == expected.model.config
    assert_equal(teacher.params, expected.params)
    shared = DiffusionGemma(tiny_config), {}, teacher.tokenizer
    monkeypatch.setattr(loading, '_load', lambda *_: shared)
    with pytest.raises(ValueError, match='is a student whose passes share their weights'):
        load_teacher(Experiment.of(student_config(teacher='somewhere')))


@pytest.mark.slow
@pytest.mark.parametrize('separate', [True, False])
def test_an_interrupted_distillation_ends_as_one_that_was_not(
    separate, teacher, tmp_path, monkeypatch
):
    def config():
        return student_config(denoiser='separate' if separate else 'shared')

    _, whole = train_student(config(), teacher, DATA, tmp_path / 'whole')
    with monkeypatch.context() as patch:
        crash_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train_student(config(), teacher, DATA, tmp_path / 'cut')
    _, resumed = train_student(config(), teacher, DATA, tmp_path / 'cut')
    assert int(resumed.step) == 4
    assert_equal(whole, resumed)  # the same noise, and the same data in the same order
    steps = [row['step'] for row in reporting.read_metrics(tmp_path / 'cut')]
    assert steps == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_run_without_an_average_resumes_and_opens_as_its_parameters(
    teacher, tmp_path, monkeypatch
):
    config = student_config()
    config.optimizer.average = False
    with monkeypatch.context() as patch:
        crash_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train_student(config, teacher, DATA, tmp_path)
    _, state = train_student(config, teacher, DATA, tmp_path)
    assert int(state.step) == 4 and state.ema_params is None
    _, params, _ = load_model(tmp_path)
    assert_equal({name: params[name] for name in state.params}, state.params)
    with pytest.raises(ValueError, match='only one of checkpoint and run keeps an average'):
        train_student(student_config(), teacher, DATA, tmp_path)
    kept = json.loads((tmp_path / 'config.json').read_text(encoding='utf-8'))
    assert not kept['optimizer']['average']  # the config of the run that wrote the checkpoints


@pytest.mark.slow
def test_an_unfinished_run_opens_as_the_teacher_with_a_trained_denoise_pass(teacher, tmp_path):
    _, state = train_student(student_config(), teacher, DATA, tmp_path)
    model, params, _ = load_model(tmp_path)
    assert model.config.has_frozen_encoder
    assert_equal({name: params[name] for name in teacher.params}, teacher.params)
    assert_equal({name: params[name] for name in state.ema_params}, state.ema_params)
    moved = params['denoise_backbone']['final_norm']['scale']
    assert np.any(moved != params['backbone']['final_norm']['scale'])


@pytest.mark.slow
def test_a_run_may_start_from_a_student(teacher, tmp_path):
    _, first = train_student(student_config(), teacher, DATA, tmp_path / 'first')
    config = student_config(init=str(tmp_path / 'first'), canvas_length=4)
    config.corruption, config.self_conditioning = 'masked', False
    config.data.canvases_per_row = 24
    config.optimizer.learning_rate = 1e-12
    _, second = train_student(config, teacher, DATA, tmp_path / 'second')
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-6),
        first.ema_params,
        second.ema_params,
    )
    opened, _, tokenizer = load_model(tmp_path / 'second')  # describes its training
    assert (opened.config.mask_id, opened.config.self_conditioning) == (tokenizer.mask_id, False)
    with pytest.raises(ValueError, match='config.init: .* is not the student'):
        config = student_config(init=str(tmp_path / 'first'), denoiser='shared')
        train_student(config, teacher, DATA, tmp_path / 'third')


def test_a_student_to_start_from_may_have_another_canvas_but_no_other_layers():
    model, params, _ = load_model('builtin')
    experiment = Experiment.of(student_config(init='builtin', mesh={'data': -1}))
    other = DiffusionGemma(model.config.replace(canvas_length=8, self_conditioning=False))
    assert jax.tree.structure(load_init(experiment, other)) == jax.tree.structure(params)
    other = DiffusionGemma(model.config.replace(canvas_length=8, num_heads=2))
    with pytest.raises(ValueError, match='is not the student .* it has num_heads=4, not 2[.]'):
        load_init(experiment, other)


@pytest.mark.slow
def test_a_workdir_of_other_data_is_refused(teacher, tmp_path):
    train_student(student_config(), teacher, DATA, tmp_path)
    longer = student_config(train={'num_steps': 6, 'report_every': 1, 'checkpoint_every': 2})
    with pytest.raises(ValueError, match='belongs to another data stream'):
        train_student(longer, teacher, DataSpec(kind='wordmath', size=100), tmp_path)


@pytest.mark.slow
def test_a_workdir_of_another_model_is_refused(teacher, tmp_path):
    train_student(student_config(), teacher, DATA, tmp_path)
    with pytest.raises(ValueError, match='canvas_length: saved 8, now 4'):
        train_student(student_config(canvas_length=4), teacher, DATA, tmp_path)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_checkpoints(teacher, tmp_path):
    train_student(student_config(), teacher, DATA, tmp_path)
    broken = jax.tree.map(lambda leaf: leaf * np.nan, teacher.params)
    longer = student_config(train={'num_steps': 6, 'report_every': 1, 'checkpoint_every': 1})
    broken_teacher = Teacher(teacher.model, broken, teacher.tokenizer)
    with pytest.raises(FloatingPointError, match='not finite at step 5'):
        train_student(longer, broken_teacher, DATA, tmp_path)
    assert [path.name for path in sorted((tmp_path / 'checkpoints').iterdir())] == ['2', '4']


def test_an_unknown_key_is_refused_with_the_nearest_name(teacher, tmp_path):
    config = student_config(stage1={'kd_wieght': 1.0})
    del config.stage1['kd_weight']
    with pytest.raises(ValueError, match="did you mean 'kd_weight'"):
        train_student(config, teacher, DATA, tmp_path)


@pytest.mark.slow
def test_training_exports_a_model_that_a_later_run_starts_from(tmp_path):
    config = tiny_teacher.get_config()
    config.mesh = {'data': 8}
    config.model.update(SMALL)
    config.model.sliding.update({'num_kv_heads': 1, 'head_dim': 8, 'window': 16})
    config.model.full.update({'head_dim': 8})
    config.data.batch_size, config.data.row_length = 8, 64
    config.data.sources = ({'kind': 'wordmath', 'split': 'train', 'size': 200},)
    config.train = {'num_steps': 2, 'report_every': 1, 'checkpoint_every': 2}
    state = train(config, tmp_path / 'first')
    model, params, tokenizer = load_model(tmp_path / 'first')
    assert isinstance(model, Gemma) and tokenizer is not None
    jax.tree.map(
        lambda ours, saved: np.testing.assert_allclose(ours, saved, rtol=1e-2, atol=1e-6),
        state.ema_params,
        params,
    )
    config.init = str(tmp_path / 'first')
    config.optimizer.learning_rate = 1e-9
    second = train(config, tmp_path / 'second')
    jax.tree.map(
        lambda ours, saved: np.testing.assert_allclose(ours, saved, atol=1e-6),
        second.ema_params,
        params,
    )


def losses(workdir):
    return [[row['loss'], row['loss/encode']] for row in reporting.read_metrics(workdir)]


@pytest.mark.slow
def test_a_run_on_stored_distributions_needs_no_teacher_and_has_its_losses(
    teacher, tmp_path, monkeypatch
):
    config = student_config(denoiser='shared')
    config.train.num_steps = config.stage2.first_step = 2  # only stage 1
    config.data.row_length, config.data.canvases_per_row = 64, 4
    config.targets.update(
        {
            'source': {'kind': 'wordmath', 'size': 60},
            'batch_size': 8,
            'sequence_level': False,  # the answers of a random teacher do not end
            'top_k_logits': teacher.tokenizer.vocab_size,
        }
    )
    experiment = Experiment.of(config)
    targets = write_targets(
        teacher.model,
        teacher.params,
        teacher.tokenizer,
        experiment.targets,
        tmp_path / 'targets',
        experiment.mesh.make(),
        seed=0,
    )
    made = setup.make_distillation_step

    def step_without_teacher(*args, **kwargs):
        step = made(*args, **kwargs)

        def checked(state, constants, batch):
            assert constants.teacher is None and not constants.student
            return step(state, constants, batch)

        return checked

    with monkeypatch.context() as patch:
        patch.setattr(setup, 'make_distillation_step', step_without_teacher)
        train_student(config, teacher.on_host(), targets, tmp_path / 'stored')
    config.targets.top_k_logits = 0
    train_student(config, teacher, targets, tmp_path / 'on_the_fly')
    stored, on_the_fly = losses(tmp_path / 'stored'), losses(tmp_path / 'on_the_fly')
    np.testing.assert_allclose(stored, on_the_fly, rtol=1e-3, atol=1e-4)
