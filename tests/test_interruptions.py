"""Tests runs that are killed or preempted, a full disk, and damaged checkpoints."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.checkpoints.store import CheckpointError, CheckpointStore, read_ema
from diffusiongemma.distillation.experiment import TeacherTraining
from diffusiongemma.distillation.guard import LossGuard
from diffusiongemma.distillation.reporting import read_metrics
from diffusiongemma.parallel import make_mesh
from diffusiongemma.train import train

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / 'configs'))
import tiny_teacher  # noqa: E402

SMALL_TEACHER = {
    'mesh.data': 8, 'model.width': 16, 'model.num_heads': 2, 'model.ffn_width': 16,
    'model.layer_types': ('sliding', 'full'), 'model.sliding.num_kv_heads': 1,
    'model.sliding.head_dim': 8, 'model.full.head_dim': 8, 'data.batch_size': 8,
    'data.row_length': 128, 'train.report_every': 1,
}  # fmt: skip


def start(workdir, num_steps, checkpoint_every, *flags, limit=None):
    """Starts a training process; `limit` is the maximum size of a file in bytes."""

    def set_limit():
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [
            sys.executable, '-m', 'diffusiongemma.train', '--config=configs/tiny_teacher.py',
            f'--workdir={workdir}', *(f'--config.{k}={v}' for k, v in SMALL_TEACHER.items()),
            f'--config.train.num_steps={num_steps}',
            f'--config.train.checkpoint_every={checkpoint_every}', *flags,
        ],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=set_limit,
    )  # fmt: skip


def train_here(workdir, num_steps):
    """Runs the same training in this process, with a checkpoint at its end."""
    config = tiny_teacher.get_config()
    config.update_from_flattened_dict(SMALL_TEACHER)
    config.train.update({'num_steps': num_steps, 'checkpoint_every': 1000})
    train(TeacherTraining.of(config), workdir)


def finish(process, code=0):
    out, err = process.communicate()
    assert process.returncode == code, out[-2000:] + err[-2000:]
    return err


def wait_for(process, condition):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)


def steps(workdir):
    directory = workdir / 'checkpoints'
    return sorted(int(path.name) for path in directory.glob('*') if path.name.isdigit())


def test_a_run_survives_sigterm_and_a_kill_in_the_middle_of_a_save(tmp_path):
    whole, cut = tmp_path / 'whole', tmp_path / 'cut'
    train_here(whole, 30)

    process = start(cut, 30, 1000)  # no checkpoint before the end, except after SIGTERM
    wait_for(process, lambda: (cut / 'metrics.jsonl').exists() and read_metrics(cut))
    process.send_signal(signal.SIGTERM)
    assert 'stopped by SIGTERM' in finish(process)
    (stopped,) = steps(cut)
    assert stopped == read_metrics(cut)[-1]['step'] < 30

    process = start(cut, 30, 1)
    saving = cut / 'checkpoints'
    wait_for(process, lambda: len(steps(cut)) > 1 and list(saving.glob('*.orbax-checkpoint-tmp*')))
    complete = steps(cut)[-1]
    process.kill()
    process.communicate()
    assert steps(cut)[-1] >= complete

    train_here(cut, 30)
    assert not list(saving.glob('*.orbax-checkpoint-tmp*'))
    jax.tree.map(np.testing.assert_array_equal, read_ema(whole)[2], read_ema(cut)[2])
    losses = [[row['loss'] for row in read_metrics(workdir)] for workdir in (whole, cut)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_disk_without_room_is_one_clear_error_and_training_resumes_with_room(tmp_path):
    """The full disk is simulated by a file size limit below the size of a checkpoint's arrays."""
    finish(start(tmp_path, 2, 2))
    error = finish(start(tmp_path, 6, 2, limit=40_000), code=1)
    lines = [line for line in error.splitlines() if line.startswith('error: ')]
    assert len(lines) == 1 and 'was not written' in lines[0]
    assert 'The last complete checkpoint is of step 2' in lines[0] and 'Make room' in lines[0]
    assert steps(tmp_path) == [2]
    finish(start(tmp_path, 6, 2))
    assert steps(tmp_path) == [4, 6]


def state(value):
    return {'w': jnp.full((64, 64), float(value))}


def abstract():
    return jax.eval_shape(lambda: state(0))


def test_a_save_that_fails_keeps_what_is_there_and_names_it(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    store.save(1, state(1), {})
    store.wait()

    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(Path, 'rename', full)
        patch.setattr(os, 'rename', full)
        with pytest.raises(CheckpointError, match='No space left on device.*is of step 1'):
            store.save(2, state(2), {})
            store.wait()
    store = CheckpointStore(tmp_path)  # as a new run does
    assert store.latest_step == 1
    store.save(2, state(2), {})
    store.wait()
    np.testing.assert_array_equal(store.restore(abstract())[0]['w'], state(2)['w'])


@pytest.mark.parametrize('damage', ['truncated', 'lost', 'empty'])
def test_a_damaged_checkpoint_is_named_with_the_one_before_it(damage, tmp_path):
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(step, state(step), {})
    store.close()
    newest = tmp_path / 'checkpoints' / '2'
    files = [path for path in newest.rglob('*') if path.is_file()]
    for path in files:
        if damage == 'truncated' and path.parent.name == 'd':
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        elif damage == 'empty' or (damage == 'lost' and path.name == 'manifest.ocdbt'):
            path.unlink()
    with pytest.raises(CheckpointError, match='/2 is damaged.*Delete that directory to go on'):
        CheckpointStore(tmp_path).restore(abstract())


def test_a_state_is_restored_onto_another_mesh_shape(tmp_path):
    def sharding(axes, *spec):
        return NamedSharding(make_mesh(axes), PartitionSpec(*spec))

    store = CheckpointStore(tmp_path)
    values = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
    before = sharding({'fsdp': 8}, 'fsdp')
    store.save(1, {'w': jax.device_put(values, before)}, {})
    store.wait()
    after = sharding({'fsdp': 2, 'tensor': 4}, 'fsdp', 'tensor')
    wanted = {'w': jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=after)}
    restored = store.restore(wanted)[0]['w']
    assert restored.sharding == after
    np.testing.assert_array_equal(restored, values)


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    store = CheckpointStore(tmp_path, max_to_keep=1, best_metric='loss')
    for step, loss in enumerate((3.0, 1.0, 2.0, 2.5), 1):
        store.save(step, state(step), {}, {'loss': loss})
    store.close()
    assert steps(tmp_path) == [2, 4]


@pytest.mark.parametrize(
    ('losses', 'message'),
    [
        ((2.0, 1.0, float('nan')), 'loss is not finite at step 12, which took batch 11'),
        ((2.0, 1.0, 3.0, 11.5), 'exploded to 11.5 from 1 .* at step 13, which took batch 12'),
        ((2.0, 1.0, 3.0, 10.5), None),
    ],
)
def test_a_loss_that_went_wrong_names_its_batch(losses, message):
    guard = LossGuard(max_increase=10.0)
    guard.check(10, [{'loss': losses[0]}])
    rest = [{'loss': loss} for loss in losses[1:]]
    if message is None:
        guard.check(11, rest)
    else:
        with pytest.raises(FloatingPointError, match=message):
            guard.check(11, rest)


@pytest.mark.slow
def test_a_checkpoint_opens_by_its_directory(tmp_path):
    finish(start(tmp_path, 3, 1))
    _, newest, _ = load_model(tmp_path / 'checkpoints' / '3')
    _, older, _ = load_model(tmp_path / 'checkpoints' / '2')
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), newest, older)
    assert any(jax.tree.leaves(changed))
