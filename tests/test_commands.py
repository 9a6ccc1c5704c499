"""Tests the commands of the README, each in its own process, as a user runs them."""

import glob
import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from conftest import COMPILE_FAST
from PIL import Image

from diffusiongemma import cli
from diffusiongemma.checkpoints.load import about_model

ROOT = Path(__file__).parents[1]
TINY_MOE = 'tests/data/tiny_moe'
# Commands run as for users: on one device, with all of XLA's optimizations.
ENVIRONMENT = os.environ | {'XLA_FLAGS': ''}
QUICK = os.environ | {
    'XLA_FLAGS': COMPILE_FAST
}  # for commands that compile much and compute little
PROMPT = 'Paul is 17 years old. Omar is 4 years older than Paul. How old is Omar?'


def run(program, *arguments, code=0, stdin='', environment=ENVIRONMENT):
    """Returns the standard output and error of `python -m diffusiongemma.<program>`."""
    done = subprocess.run(
        [sys.executable, '-m', f'diffusiongemma.{program}', *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        input=stdin,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    """Returns the workdir of the main job, shortened to two steps."""
    directory = tmp_path_factory.mktemp('run')
    out, _ = run(
        'distill',
        '--config=configs/tiny.py',
        f'--workdir={directory}',
        '--config.targets.source.size=32',
        '--config.targets.batch_size=32',
        '--config.train.num_steps=2',
        '--config.eval.source.size=4',
        '--config.eval.batch_size=4',
        '--config.eval.speed_batches=1',
        '--config.eval.speed_batch_sizes=(4,)',  # the programs of the evaluation
        environment=QUICK,
    )
    (directory / 'stdout').write_text(out)
    return directory


def test_the_main_job_shows_a_table_samples_and_leaves_a_plot_and_a_checkpoint(workdir):
    out = (workdir / 'stdout').read_text()
    for row in (
        'accuracy',
        'accepted length',
        'tokens per denoise pass',
        'tokens per pass, all counted',
        'tokens/s',
        'speed-up at batch 4',
    ):
        assert row in out
    assert out.count('teacher:') == out.count('student:') - 1 == 3  # samples; and where it is
    assert (workdir / 'distillation.png').read_bytes().startswith(b'\x89PNG')
    assert (workdir / 'checkpoints' / '2').is_dir()
    result = json.loads((workdir / 'evaluation.json').read_text())
    assert result['teacher_accuracy'] > 0 and result['lossless_exact_match'] == 1.0
    assert {
        'teacher_accuracy', 'student_accuracy', 'tokens_per_denoise_pass', 'tokens_per_pass',
        'denoising_steps_per_canvas', 'speedup', 'exact_match', 'teacher_nll', 'token_entropy',
        'repetition_4', 'implausible_within', 'implausible_across',
    } <= set(result)  # fmt: skip
    lines = out.splitlines()
    assert json.loads(lines[-2])['lossless_exact_match'] == 1.0  # the last JSON line
    assert lines[-1].startswith('next: python -m diffusiongemma.sample')
    assert list((workdir / 'tensorboard').iterdir())
    assert json.loads((workdir / 'config.json').read_text())['train']['num_steps'] == 2
    assert about_model(workdir)['sampling']['stability_threshold'] == 0


@pytest.mark.slow
def test_evaluate_ends_with_one_json_line(workdir):
    out, _ = run(
        'evaluate',
        f'--checkpoint={workdir}',
        '--config=configs/tiny.py',
        '--config.eval.source.size=4',
        '--config.eval.batch_size=4',
        '--config.eval.speed_batches=1',
        '--config.eval.speed_batch_sizes=(4,)',
        environment=QUICK,
    )
    result = json.loads(out.splitlines()[-1])
    assert result['num_examples'] == 4
    assert 1 <= result['denoising_steps_per_canvas'] <= 16


@pytest.mark.slow
def test_sample_answers_with_the_student_of_a_run(workdir):
    out, _ = run('sample', f'--checkpoint={workdir}', f'--prompt={PROMPT}', '--max_new_tokens=32')
    assert 'tokens per pass' in out


@pytest.mark.parametrize(
    'mode',
    [
        pytest.param(mode, marks=pytest.mark.slow)
        for mode in ('diffusion', 'autoregressive', 'lossless')
    ],
)
def test_sample_answers_at_once_with_the_shipped_student(mode):
    out, _ = run('sample', f'--prompt={PROMPT}', f'--mode={mode}', '--json')
    answer = json.loads(out.splitlines()[-1])
    assert set(answer) == {
        'text',
        'tokens',
        'denoising_steps',
        'tokens_per_denoise_pass',
        'tokens_per_pass',
        'seconds',
    }
    assert 'The answer is ' in answer['text']
    assert answer['denoising_steps'] >= 1


@pytest.mark.slow
def test_the_denoise_steps_are_shown_and_written(tmp_path):
    out, _ = run(
        'sample', f'--prompt={PROMPT}', '--watch', f'--gif={tmp_path}/a.gif',
        f'--html={tmp_path}/a.html',
    )  # fmt: skip
    *steps, text, cost = out.splitlines()
    assert steps[0].startswith('canvas 1: noise | ') and steps[1].startswith('canvas 1: step 1, ')
    assert steps[-1].endswith(f' | {text}') and cost.endswith(' tokens/s]')
    with Image.open(tmp_path / 'a.gif') as gif:
        assert gif.n_frames == len(steps)
    assert (tmp_path / 'a.html').read_text().startswith('<!doctype html>')


@pytest.mark.slow
def test_without_a_prompt_it_is_a_chat():
    out, _ = run('sample', '--mode=autoregressive', stdin=f'{PROMPT}\n/mode\n/stop\n/quit\n')
    answer, cost, mode, error = out.splitlines()
    assert 'The answer is ' in answer and ' passes, ' in cost
    assert mode == '[mode autoregressive]' and error.startswith('error: no command /stop')


@pytest.mark.slow
def test_an_answer_matches_the_schema_that_is_asked_for(tmp_path):
    schema = {'type': 'object', 'properties': {'apples': {'type': 'integer'}}}
    schema |= {'required': ['apples']}
    (tmp_path / 'schema.json').write_text(json.dumps(schema))
    out, _ = run(
        'sample', f'--prompt={PROMPT}', f'--json_schema={tmp_path}/schema.json', '--mode=lossless',
        '--json', '--max_new_tokens=40',
    )  # fmt: skip
    answer = json.loads(json.loads(out.splitlines()[-1])['text'])
    assert isinstance(answer['apples'], int)


@pytest.mark.slow
def test_verify_compares_a_published_checkpoint_with_golden_outputs():
    out, _ = run('verify', f'--checkpoint={TINY_MOE}', f'--golden={TINY_MOE}/golden.npz')
    found = json.loads(out.splitlines()[-1])
    assert found['accepted'] == 0
    assert max(found.values()) <= 1e-4


BAD_INPUT = [
    ('sample', ['--checkpoint=/nowhere', '--prompt=hi'], 'error: no model at /nowhere'),
    ('sample', [f'--prompt={"word " * 300}'], 'Shorten the prompt.'),
    ('sample', ['--prompt=hi', '--regex=a(b'], 'a(b'),
    ('sample', ['--watch'], 'need a --prompt'),
    ('sample', ['--prompt= '], 'error: --prompt is empty: give a text to answer'),
    (
        'sample',
        ['--prompt=hi', '--checkpoint=gs://bucket/model'],
        'error: gs://bucket/model is a URL, and models are read from directories: copy it',
    ),
    (
        'distill',
        ['--config=configs/tiny.py', '--workdir=gs://bucket/run'],
        'error: --workdir=gs://bucket/run is a URL, and files are written to directories',
    ),
    (
        'sample',
        ['--prompt=hi', '--watch', '--mode=autoregressive'],
        'has no canvas to watch',
    ),
    (
        'sample',
        ['--prompt=hi', '--json_schema=/nowhere.json'],
        'error: --json_schema=/nowhere.json: there is no such file.',
    ),
    (
        'sample',
        ['--prompt=hi', '--mode=autoregressive', '--acceptance=TopK(4)'],
        "error: --acceptance has no effect in the mode 'autoregressive'; leave it out.",
    ),
    (
        'sample',
        ['--prompt=hi', '--draft_length=4'],
        "error: --draft_length has no effect in the mode 'diffusion'; leave it out.",
    ),
    (
        'sample',
        ['--prompt=hi', '--mode=lossless', '--draft_length=400'],
        'error: draft_length=400 is longer than the canvas',
    ),
    (
        'sample',
        ['--prompt=hi', '--mode=lossless', '--drafts=PromptLookup(8)', '--draft_length=4'],
        'error: --draft_length=4 has no effect with --drafts=PromptLookup(8)',
    ),
    ('verify', ['--checkpoint=/nowhere'], 'error: --golden is required; see --help.'),
    (
        'sample',
        ['--prompt=hi', '--gif=/nowhere/x.gif'],
        'error: --gif=/nowhere/x.gif: there is no directory /nowhere.',
    ),
    (
        'distill',
        [
            '--config=configs/tiny.py',
            '--workdir={tmp}',
            "--config.compute.rules={{'mlp': 'tensor'}}",
        ],
        "error: config.compute.rules['mlp'] must be a tuple of different mesh axes",
    ),
    (
        'verify',
        ['--checkpoint=/nowhere', f'--golden={TINY_MOE}/golden.npz'],
        'error: no model at /nowhere',
    ),
    (
        'distill',
        ['--config=configs/tiny.py', '--workdir={tmp}', '--config.train.num_step=3'],
        "error: config.train has no key 'num_step'; did you mean 'num_steps'?",
    ),
    (
        'evaluate',
        ['--config=configs/tiny.py', '--sweep'],
        'error: a sweep needs both --sweep and --output=DIRECTORY.',
    ),
    (
        'train',
        ['--config=configs/tiny.py', '--workdir={tmp}'],
        "error: flag --config=configs/tiny.py: this config is not for this command: it has ['ar_w",
    ),
    (
        'convert',
        ['--input=builtin', '--output=setup.py', '--format=bundle'],
        'error: setup.py: File exists; use another path.',
    ),
    ('sample', ['--prompt=hi', 'more'], "error: unexpected arguments ['more']"),
    ('distill', ['--config=configs/none.py', '--workdir={tmp}'], 'configs/none.py'),
    (
        'distill',
        ['--config=configs/tiny.py', '--workdir={tmp}', '--config.teacher=/nowhere'],
        'error: no model at /nowhere',
    ),
]


@pytest.fixture(scope='module')
def bad_input(tmp_path_factory):
    """Returns the exit code and output of each command of `BAD_INPUT`."""
    tmp = str(tmp_path_factory.mktemp('bad'))
    commands = [
        [program, *(argument.format(tmp=tmp) for argument in arguments)]
        for program, arguments, _ in BAD_INPUT
    ]
    done = subprocess.run(
        [sys.executable, 'tests/forked.py'],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, input=json.dumps(commands),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize('number', range(len(BAD_INPUT)), ids=lambda n: BAD_INPUT[n][2][:40])
def test_bad_input_ends_in_one_clear_message(number, bad_input):
    code, output = bad_input[number]
    assert code == 1 and BAD_INPUT[number][2] in output, output
    assert 'Traceback' not in output


@pytest.mark.skipif(
    bool(entry_points(group='jax_plugins')) or any(map(glob.glob, cli._TPU_FILES)),
    reason='this machine has an accelerator',
)
def test_a_tpu_that_is_not_there_is_not_looked_for():
    """Without a TPU, an installed libtpu writes a dozen lines of errors."""
    code = 'from diffusiongemma import cli as r; r.without_missing_tpu(); r.say_devices()'
    environment = {name: value for name, value in ENVIRONMENT.items() if name != 'JAX_PLATFORMS'}
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    (line,) = done.stderr.splitlines()
    assert line.startswith('computing on 1 x cpu (for a GPU pip install')


def test_a_student_is_sampled_as_it_was_evaluated():
    about = about_model('builtin')
    assert about['sampling'] == {
        'max_new_tokens': 96,
        'max_denoising_steps': 4,
        'stability_threshold': 0,
        'temperature': 0.0,
    }
    assert about_model('builtin-sudoku')['sampling']['entropy_bound'] == 0.01
    assert about_model('builtin-teacher').get('sampling') is None
    assert about_model(TINY_MOE) == {}


def benchmark(name, *arguments):
    program = [sys.executable, f'benchmarks/{name}.py', *arguments]
    return subprocess.run(program, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.mark.slow
def test_the_benchmark_of_the_decode_modes_prints_a_ratio():
    done = benchmark('sampler', '--batches=2', '--batch_sizes=1', '--max_new_tokens=32')
    assert done.returncode == 0, done.stderr
    assert 'ratio' in done.stdout and 'x' in done.stdout


@pytest.mark.slow
def test_the_roofline_of_the_full_size_is_one_read_of_the_weights():
    preset = '--preset=diffusiongemma_26b_a4b'
    done = benchmark('roofline', preset, '--device=H200', '--prefix=4096')
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    read = 1e3 * 2 * 25.2e9 / 4.8e12  # 25.2 billion weights in bfloat16 at the data sheet's rate
    assert read < found['limit_ms']['denoise step'] < 1.1 * read
    active = 1e3 * 2 * 3.8e9 / 4.8e12
    assert active < found['limit_ms']['autoregressive token'] < 1.2 * active
    done = benchmark('roofline', preset, '--device=H300')
    assert done.returncode == 1 and "unknown device 'H300'; known: [" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'arguments'),
    [
        ('roofline', ['--checkpoint=builtin']),
        ('growth', ['--sizes=canvas,experts', '--repetitions=2']),
        ('distillation_step', ['--depths=6', '--batch_size=2', '--repetitions=2']),
    ],
)
def test_a_benchmark_ends_with_its_numbers(name, arguments):
    done = benchmark(name, *arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])
