"""Tests FLOPs counted from a trace, throughput metrics, and the profile of a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma.accounting.devices import figures_of
from diffusiongemma.accounting.flops import Flops, count_flops
from diffusiongemma.checkpoints.store import CheckpointStore
from diffusiongemma.distillation import throughput
from diffusiongemma.distillation.loop import LoopConfig, fit
from diffusiongemma.distillation.reporting import read_metrics
from diffusiongemma.distillation.state import TrainState
from diffusiongemma.distillation.throughput import PROFILE_DIR, Throughput
from diffusiongemma.parallel import batch_sharding, make_mesh

LAYERS, ROWS, WIDTH, HIDDEN = 6, 8, 32, 64
FORWARD = 2 * 2 * ROWS * WIDTH * HIDDEN * LAYERS


def layers(weights, x, wrap=lambda f: f):
    layer = wrap(lambda x, w: jnp.tanh(x @ w) @ w.T)
    return jax.lax.scan(lambda x, w: (layer(x, w), None), x, weights)[0].sum()


def test_a_scan_counts_as_often_as_it_runs_and_a_gradient_thrice():
    arguments = jnp.ones((LAYERS, WIDTH, HIDDEN)), jnp.ones((ROWS, WIDTH))
    assert count_flops(layers, *arguments) == Flops(FORWARD, 0)
    gradient = jax.grad(jax.jit(layers), argnums=(0, 1))
    assert count_flops(gradient, *arguments) == Flops(3 * FORWARD, 0)


def test_what_rematerialisation_computes_again_is_counted_apart():
    arguments = jnp.ones((LAYERS, WIDTH, HIDDEN)), jnp.ones((ROWS, WIDTH))
    gradient = jax.grad(lambda *a: layers(*a, wrap=jax.checkpoint), argnums=(0, 1))
    counted = count_flops(gradient, *arguments)
    assert counted.model == 3 * FORWARD
    assert counted.recomputed == FORWARD / 2  # recomputing the second matmul is dead code


def test_each_row_of_a_ragged_product_meets_one_matrix():
    rows, groups = 64, 4
    sizes = jnp.full(groups, rows // groups)

    def loss(x, w):
        return jnp.sum(jax.lax.ragged_dot(x, w, sizes) ** 2)

    arguments = jnp.ones((rows, 16)), jnp.ones((groups, 16, 8))
    once = 2 * rows * 16 * 8
    assert count_flops(loss, *arguments).model == once
    assert count_flops(jax.grad(loss, argnums=(0, 1)), *arguments).model == 3 * once


def test_a_shard_map_counts_all_devices():
    mesh = make_mesh({'data': 8})
    rows = jax.sharding.PartitionSpec('data')
    product = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(rows, jax.sharding.PartitionSpec()), out_specs=rows
    )
    counted = count_flops(product, jnp.ones((16, 4)), jnp.ones((4, 8)))
    assert counted.model == 2 * 16 * 4 * 8


@pytest.mark.parametrize(
    ('kind', 'name'),
    [
        ('TPU v5 lite', 'v5e'),
        ('TPU v5', 'v5p'),
        ('TPU v6 lite', 'v6e'),
        ('NVIDIA H100 80GB HBM3', 'H100'),
        ('cpu', None),
    ],
)
def test_devices_are_known_by_their_kind(kind, name):
    figures = figures_of(kind)
    assert (figures and figures.name) == name


def test_utilisation_is_the_share_of_the_peak_of_all_devices(monkeypatch):
    clock = iter([0.0, 0.0, 1.0, 2.0])  # batch, a wait of one second, measured time
    monkeypatch.setattr(throughput.time, 'perf_counter', lambda: next(clock))
    monkeypatch.setattr(throughput, 'figures_of', lambda kind: figures_of('TPU v5 lite'))
    measure = Throughput(lambda state, batch: Flops(3e12, 1e12))
    with measure.waiting_for_data():
        pass
    measure.add(None, {'tokens': np.zeros((2, 5))})
    measured = measure.measure()
    assert measured['tokens_per_second'] == 5
    assert measured['data_wait_share'] == 0.5
    assert measured['model_tflops_per_step'] == 3
    assert measured['mfu'] == pytest.approx(3e12 / 2 / (197e12 * jax.device_count()))


class Batches:
    """An endless iterator of equal batches."""

    def __next__(self):
        return {'tokens': np.ones((8, 4), np.float32)}

    def get_state(self):
        return {}


def train_toy(workdir, **settings):
    """Runs six steps of a training that changes nothing."""

    @jax.jit
    def step(state, batch):
        loss = jnp.mean(batch['tokens'] @ state.params)
        return state.replace(step=state.step + 1), {'loss': loss}

    params = jnp.ones((4, 2))
    fit(
        step,
        TrainState(jnp.zeros((), jnp.int32), params, params, ()),
        Batches(),
        CheckpointStore(workdir),
        LoopConfig(num_steps=6, report_every=2, checkpoint_every=6, **settings),
        workdir=workdir,
        description='toy',
        batch_sharding=batch_sharding(make_mesh({'data': 8}), 8),
        batch_size=8,
    )


def test_an_unknown_metric_of_the_best_checkpoint_is_named_after_one_step(tmp_path):
    with pytest.raises(ValueError, match="config.train.best_metric='los' .* did you mean 'loss'"):
        train_toy(tmp_path, best_metric='los')
    assert read_metrics(tmp_path) == []


def test_a_run_writes_its_throughput_and_a_trace_of_a_few_steps(tmp_path):
    train_toy(tmp_path, profile_steps=2)
    rows = read_metrics(tmp_path)
    assert [row['step'] for row in rows] == [2, 4, 6]
    assert all(row['model_tflops_per_step'] == 2 * 8 * 4 * 2 / 1e12 for row in rows)
    assert all(0 <= row['data_wait_share'] <= 1 and row['tokens_per_second'] > 0 for row in rows)
    assert 'mfu' not in rows[0]  # the peak of a CPU is not known
    (trace,) = (tmp_path / PROFILE_DIR).rglob('*.xplane.pb')
    assert trace.stat().st_size
