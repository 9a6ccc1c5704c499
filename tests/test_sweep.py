"""Tests the sweep over sampling settings: its grid, its numbers, and a whole sweep."""

import csv
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from diffusiongemma.distillation.comparison import sweep_student
from diffusiongemma.distillation.experiment import Experiment
from diffusiongemma.evaluation.sweep import Grid, Point, summary
from diffusiongemma.models import DiffusionGemma
from diffusiongemma.sampling import EntropyBound, Margin, Sampler, SamplingConfig, TopK

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / 'configs'))
import tiny  # noqa: E402


def point(mode='diffusion', accuracy=1.0, tokens_per_denoise_pass=1.0, speedup=1.0):
    return Point(
        mode=mode,
        entropy_bound=0.1,
        max_denoising_steps=4,
        canvas_length=16,
        accuracy=accuracy,
        exact_match=0.5,
        teacher_nll=0.1,
        tokens_per_denoise_pass=tokens_per_denoise_pass,
        tokens_per_pass=tokens_per_denoise_pass / 2,
        steps_per_canvas=2.0,
        tokens_per_second=100 * speedup,
        speedup=speedup,
    )


TEACHER, LOSSLESS = point('autoregressive', 0.9), point('lossless', 0.9, 4.0, 1.5)


def test_a_grid_is_every_combination_and_what_it_leaves_out_stays_as_it_is(tiny_config):
    sampler = Sampler(DiffusionGemma(tiny_config), SamplingConfig(max_denoising_steps=7))
    students = Grid(entropy_bound=(0.1, 0.5), canvas_length=(4, 8)).over((sampler, 'params'))
    assert {params for _, params in students} == {'params'}
    found = [(s.model.config.canvas_length, s.config.entropy_bound) for s, _ in students]
    assert found == [(4, 0.1), (4, 0.5), (8, 0.1), (8, 0.5)]
    assert {s.config.max_denoising_steps for s, _ in students} == {7}


def test_a_grid_of_entropy_bounds_replaces_the_samplers_bound_and_refuses_another_rule(tiny_config):
    grid, model = Grid(entropy_bound=(0.1, 0.5)), DiffusionGemma(tiny_config)
    bound = Sampler(model, SamplingConfig(acceptance=EntropyBound(0.3)))
    rules = [s.config.acceptance_rule for s, _ in grid.over((bound, None))]
    assert rules == [EntropyBound(0.1), EntropyBound(0.5)]
    top_k = Sampler(model, SamplingConfig(acceptance=TopK(2)))
    with pytest.raises(ValueError, match=r'entropy_bound=0.1 has no effect beside .*TopK\(k=2\)'):
        grid.over((top_k, None))
    both = Grid(entropy_bound=(0.1,), acceptance=('TopK(k=3)', Margin(0.2))).over((top_k, None))
    rules = [s.config.acceptance_rule for s, _ in both]
    assert rules == [EntropyBound(0.1), TopK(3), Margin(0.2)]
    steps = Grid(max_denoising_steps=(2, 3)).over((top_k, None))
    assert [s.config.max_denoising_steps for s, _ in steps] == [2, 3]
    assert {s.config.acceptance_rule for s, _ in steps} == {TopK(2)}


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'max_denoising_steps': (4, 0)}, 'max_denoising_steps must be >= 1, got 0'),
        ({'canvas_length': (0,)}, 'canvas_length of this DiffusionGemma is 0|canvas_length > 0'),
    ],
)
def test_a_value_that_cannot_be_sampled_with_is_named(values, message, tiny_config):
    sampler = Sampler(DiffusionGemma(tiny_config))
    with pytest.raises(ValueError, match=message):
        Grid(**values).over((sampler, None))


def test_the_best_point_is_the_fastest_within_one_point_of_the_teacher():
    near, faster = point(accuracy=0.9), point(accuracy=0.89, speedup=2.0)
    too_bad = point(accuracy=0.88, speedup=9.0)
    found = summary([TEACHER, LOSSLESS, near, faster, too_bad])
    assert found['best'] == dataclasses.asdict(faster)
    assert found['num_points'] == 3
    assert summary([TEACHER, LOSSLESS, too_bad])['best'] is None


def test_the_aup_of_a_sweep_is_that_of_its_frontier():
    beaten = point(accuracy=0.5, tokens_per_denoise_pass=1.5)
    points = [point(accuracy=0.9, tokens_per_denoise_pass=2.0), beaten]
    assert summary([TEACHER, LOSSLESS, *points])['aup'] == pytest.approx(2 * 90)
    points.append(point(accuracy=0.87, tokens_per_denoise_pass=3.0))
    expected = 2 * 90 + (90 + 87 * math.exp(-3 * (1 - 87 / 90))) / 2
    assert summary([TEACHER, LOSSLESS, *points])['aup'] == pytest.approx(expected)


@pytest.mark.slow
def test_a_sweep_of_the_shipped_student_leaves_a_table_and_a_plot(tmp_path):
    program = [
        *(sys.executable, '-m', 'diffusiongemma.evaluate', '--config=configs/tiny.py'),
        *('--sweep', f'--output={tmp_path / "out"}'),
        '--config.eval.source.size=4',
        '--config.eval.batch_size=4',
        '--config.eval.speed_batches=1',
        '--config.eval.speed_batch_sizes=(1,)',
        '--config.eval.sweep.entropy_bound=(0.1,)',
        "--config.eval.sweep.acceptance=('TopK(k=4)',)",
        '--config.eval.sweep.max_denoising_steps=(2,)',
        '--config.eval.sweep.canvas_length=(8,)',
    ]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {
        'best', 'aup', 'teacher_accuracy', 'lossless_accuracy', 'lossless_speedup', 'num_points',
    }  # fmt: skip
    assert found['num_points'] == 2 and found['aup'] >= 0
    assert 'tok/denoise' in done.stdout
    with (tmp_path / 'out' / 'sweep.csv').open() as file:
        teacher, lossless, swept, by_rule = csv.DictReader(file)
    assert (teacher['mode'], lossless['mode']) == ('autoregressive', 'lossless')
    assert teacher['entropy_bound'] == teacher['canvas_length'] == ''
    assert float(teacher['tokens_per_denoise_pass']) == float(teacher['speedup']) == 1
    assert float(lossless['exact_match']) == 1  # its denoiser is separate
    assert float(lossless['teacher_nll']) == pytest.approx(float(teacher['teacher_nll']))
    settings = [swept[name] for name in ('entropy_bound', 'max_denoising_steps', 'canvas_length')]
    assert settings == ['0.1', '2', '8'] and swept['acceptance'] == ''
    assert (by_rule['entropy_bound'], by_rule['acceptance']) == ('', 'TopK(k=4)')
    assert 1 <= float(swept['steps_per_canvas']) <= 2
    assert float(swept['teacher_nll']) > float(teacher['teacher_nll'])
    assert (tmp_path / 'out' / 'sweep.png').read_bytes().startswith(b'\x89PNG')


def test_a_sweep_over_nothing_is_refused(tmp_path):
    config = tiny.get_config()
    for name in config.eval.sweep:
        config.eval.sweep[name] = ()
    with pytest.raises(ValueError, match='config.eval.sweep is empty; list values'):
        sweep_student(Experiment.of(config), 'builtin', tmp_path)
    config.eval.sweep = {'entropy_bounds': (0.1,)}
    with pytest.raises(ValueError, match="did you mean 'entropy_bound'"):
        sweep_student(Experiment.of(config), 'builtin', tmp_path)


def test_an_output_that_cannot_be_written_is_named_before_the_sweep(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(ValueError, match='cannot write to .*file/out: Not a directory'):
        sweep_student(Experiment.of(tiny.get_config()), 'builtin', tmp_path / 'file' / 'out')


def test_a_student_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='no model at /nowhere'):
        sweep_student(Experiment.of(tiny.get_config()), '/nowhere', tmp_path)
