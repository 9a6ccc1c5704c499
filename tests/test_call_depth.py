"""Tests that the call paths of a token and of a gradient are short."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import COMPILE_FAST

ROOT = Path(__file__).parents[1]


def calls_to(command, method, *arguments):
    """Returns 'file function' of each call of the package from a command's `main` to a method."""
    done = subprocess.run(
        [sys.executable, 'tests/call_depth.py', command, method, *arguments],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {'XLA_FLAGS': COMPILE_FAST},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def files(command, calls):
    return {f'{command}.py', *(call.split()[0] for call in calls)}


def test_from_the_command_to_the_acceptance_rule_it_takes_8_calls_in_4_files():
    method = 'EntropyBound.next_canvas'
    calls = calls_to('sample', f'sampling.acceptance:{method}', '--prompt=hi')
    assert calls[0] == 'sample.py answer' and calls[-1] == f'sampling/acceptance.py {method}'
    assert len(calls) <= 8, calls
    assert len(files('sample', calls)) <= 4, calls


@pytest.mark.parametrize(
    'config, method',
    [
        ('tiny', 'drafting:Drafting.loss'),
        pytest.param('tiny_diffusion', 'stage1:Stage1.loss', marks=pytest.mark.slow),
    ],
)
def test_from_the_command_to_the_loss_it_takes_8_calls_in_5_files(config, method, tmp_path):
    flags = (f'--config=configs/{config}.py', f'--workdir={tmp_path}')
    calls = calls_to('distill', f'distillation.{method}', *flags)
    assert calls[0] == 'distillation/run.py distill' and calls[-1].endswith(method.split(':')[1])
    assert len(calls) <= 8, calls
    assert len(files('distill', calls)) <= 5, calls
