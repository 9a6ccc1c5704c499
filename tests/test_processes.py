"""Tests training with several processes, which communicate over gloo on one CPU."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.checkpoints.store import read_ema
from diffusiongemma.distillation.reporting import read_metrics
from diffusiongemma.parallel import batch_sharding, make_mesh, processes

ROOT = Path(__file__).parents[1]
SMALL_TEACHER = (
    '--config.model.width=16', '--config.model.num_heads=2', '--config.model.ffn_width=16',
    "--config.model.layer_types=('sliding','full')", '--config.model.sliding.num_kv_heads=1',
    '--config.model.sliding.head_dim=8', '--config.model.full.head_dim=8',
    '--config.data.batch_size=4', '--config.data.row_length=128',
    '--config.train.report_every=1', '--config.train.checkpoint_every=2',
)  # fmt: skip


def environment(program):
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    return os.environ | {'PROGRAM': program, 'DEVICES_PER_PROCESS': '1', 'PATH': path}


def launch(count, workdir, *flags, program='train', config='tiny_teacher', code=0):
    """Returns the output of `count` processes of an entry point."""
    script = str(ROOT / 'launch' / 'local_multiprocess.sh')
    done = subprocess.run(
        [script, str(count), f'configs/{config}.py', str(workdir), *flags],
        cwd=ROOT,
        env=environment(program),
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def train(count, workdir, num_steps):
    return launch(count, workdir, *SMALL_TEACHER, f'--config.train.num_steps={num_steps}')


def check_training_and_resuming(count, tmp_path):
    train(count, tmp_path / 'whole', 4)
    # This simulates a run that was interrupted after its first checkpoint.
    shutil.copytree(tmp_path / 'whole', tmp_path / 'cut')
    shutil.rmtree(tmp_path / 'cut' / 'checkpoints' / '4')
    lines = (tmp_path / 'cut' / 'metrics.jsonl').read_text().splitlines(keepends=True)
    (tmp_path / 'cut' / 'metrics.jsonl').write_text(''.join(lines[:2]))
    train(count, tmp_path / 'cut', 4)
    whole, resumed = (read_ema(tmp_path / name)[2] for name in ('whole', 'cut'))
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    rows = [read_metrics(tmp_path / name) for name in ('whole', 'cut')]
    assert [row['loss'] for row in rows[0]] == [row['loss'] for row in rows[1]]
    # Only one process wrote: each step has one row, and there is one event file.
    assert len((tmp_path / 'whole' / 'metrics.jsonl').read_text().splitlines()) == 4
    assert len(list((tmp_path / 'whole' / 'tensorboard').iterdir())) == 1
    assert load_model(tmp_path / 'whole')[2] is not None


def test_two_processes_train_and_resume_as_if_they_had_not_been_cut(tmp_path):
    check_training_and_resuming(2, tmp_path)
    data = json.loads(next((tmp_path / 'whole').glob('checkpoints/4/data/metadata')).read_text())
    shards = [place['fingerprint']['process'] for place in data['processes']]
    assert shards == [[0, 2], [1, 2]]  # each reads its own part


@pytest.mark.slow
def test_four_processes_train_and_resume_as_if_they_had_not_been_cut(tmp_path):
    check_training_and_resuming(4, tmp_path)


@pytest.mark.slow
def test_two_processes_distil_from_targets_to_evaluation(tmp_path):
    train(2, tmp_path / 'teacher', 2)
    launch(
        2,
        tmp_path / 'student',
        f'--config.teacher={tmp_path / "teacher"}',
        '--config.canvas_length=8',
        '--config.targets.source.size=32',
        '--config.targets.batch_size=16',
        '--config.targets.sequence_level=False',  # the answers of a random teacher do not end
        '--config.targets.top_k_logits=4',
        '--config.data.batch_size=4',
        '--config.data.row_length=128',
        '--config.train.num_steps=2',
        '--config.stage2.first_step=1',
        '--config.sampling.max_new_tokens=16',
        '--config.eval.source.size=4',
        '--config.eval.batch_size=4',
        '--config.eval.speed_batches=1',
        '--config.eval.speed_batch_sizes=(1,)',
        program='distill',
        config='tiny_diffusion',
    )
    assert json.loads((tmp_path / 'student' / 'evaluation.json').read_text())['num_examples'] == 4
    assert (tmp_path / 'student' / 'distillation.png').exists()


@pytest.mark.parametrize('process_id', [0, 1])
def test_a_process_that_never_joins_is_one_clear_error(process_id, tmp_path):
    done = subprocess.run(
        [
            sys.executable, '-m', 'diffusiongemma.train', '--config=configs/tiny_teacher.py',
            f'--workdir={tmp_path}', '--coordinator=127.0.0.1:19873', '--num_processes=2',
            f'--process_id={process_id}', '--join_timeout_s=1',
        ],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert 'not all 2 processes joined process 0 at 127.0.0.1:19873 within 1 s' in error
    assert 'Traceback' not in done.stderr


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        ({'num_processes': 2, 'process_id': 0}, 'give all three'),
        ({'coordinator': 'a:1', 'num_processes': 2, 'process_id': 2}, r'must lie in \[0'),
    ],
)
def test_what_says_too_little_about_the_processes_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        processes.join(**given)


@pytest.mark.parametrize(
    ('held', 'shards'),
    [
        ([[(0, 4)], [(4, 8)]], [(0, 2), (1, 2)]),
        ([[(0, 4), (4, 8)], [(0, 4), (4, 8)]], [(0, 1), (0, 1)]),  # tensor parallel over processes
        ([[(0, 2)], [(0, 2)], [(2, 4)], [(2, 4)]], [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ([[(0, 4)], [(2, 6)]], None),
    ],
)
def test_processes_with_the_same_rows_read_the_same_data(held, shards, monkeypatch):
    class Device(SimpleNamespace):
        __hash__ = object.__hash__

    places = {
        Device(process_index=process): (slice(*span),)
        for process, spans in enumerate(held)
        for span in spans
    }
    sharding = SimpleNamespace(devices_indices_map=lambda shape: places)
    size = max(stop for spans in held for _, stop in spans)
    for process in range(len(held)):
        monkeypatch.setattr(jax, 'process_index', lambda process=process: process)
        if shards is None:
            with pytest.raises(ValueError, match='share only a part of their rows'):
                processes.data_shard(sharding, size)
        else:
            assert processes.data_shard(sharding, size) == shards[process]


def test_one_process_reads_all_rows_and_puts_them_where_the_mesh_wants_them():
    rows = batch_sharding(make_mesh({'data': 4, 'tensor': 2}), 8)
    assert processes.data_shard(rows, 8) == (0, 1)
    batch = {'tokens': np.arange(16).reshape(8, 2)}
    placed = processes.global_batch(batch, rows, 8)['tokens']
    np.testing.assert_array_equal(placed, batch['tokens'])
    assert placed.sharding == rows


@pytest.mark.slow
def test_two_processes_that_are_told_to_stop_save_the_same_step_and_go_on(tmp_path):
    script = str(ROOT / 'launch' / 'local_multiprocess.sh')
    flags = [*SMALL_TEACHER, '--config.train.num_steps=100000']
    process = subprocess.Popen(
        [script, '2', 'configs/tiny_teacher.py', str(tmp_path), *flags],
        cwd=ROOT,
        env=environment('train'),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = tmp_path / 'metrics.jsonl'
    while not (metrics.exists() and metrics.read_text().count('\n') > 3):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    logs = [(tmp_path / 'logs' / f'process_{i}.log').read_text() for i in range(2)]
    stopped = [re.search(r'stopped by SIGTERM; step (\d+) is saved', log)[1] for log in logs]
    assert stopped[0] == stopped[1] and (tmp_path / 'checkpoints' / stopped[0]).is_dir()
    train(2, tmp_path, int(stopped[0]) + 2)
