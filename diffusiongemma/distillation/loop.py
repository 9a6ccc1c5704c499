"""The training loop of teacher training and distillation."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from absl import logging

from diffusiongemma.accounting.flops import count_flops
from diffusiongemma.checkpoints.store import CheckpointStore
from diffusiongemma.data.packing import Features
from diffusiongemma.distillation.guard import LossGuard, Preemption
from diffusiongemma.distillation.reporting import Reporter
from diffusiongemma.distillation.state import TrainState
from diffusiongemma.distillation.throughput import PROFILE_DIR, Throughput, Trace
from diffusiongemma.errors import Preempted, check_range, nearest
from diffusiongemma.parallel import init_sharded, processes, state_shardings

StepFn = Callable[..., tuple[TrainState, dict[str, jax.Array]]]
STEPS_AHEAD = 2  # the number of steps that are dispatched while one is running


class ResumableBatches(Protocol):
    """An endless, resumable iterator over batches, such as `data.pipeline.TrainIterator`."""

    def __next__(self) -> Features:
        """Returns the rows of this process."""
        ...

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the last batch, as JSON values."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from such a position; raises ValueError if it belongs to another stream."""
        ...


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """The length of a run, and the intervals of reports and checkpoints.

    Attributes:
      num_steps: the number of optimizer steps.
      report_every: the number of steps between reports; metrics are only fetched from the device
        for a report.
      checkpoint_every: the number of steps between checkpoints; the last step is always saved.
      max_to_keep: the number of newest checkpoints to keep.
      best_metric: a metric, such as 'loss'; the checkpoint with its lowest value is also kept.
      max_loss_increase: the run stops if the loss exceeds the lowest one so far by this many nats
        per token.
      profile_steps: the number of steps to trace for xprof, to `workdir`/profile; 0 for none.
    """

    num_steps: int
    report_every: int = 20
    checkpoint_every: int = 200
    max_to_keep: int = 2
    best_metric: str = ''
    max_loss_increase: float = 10.0
    profile_steps: int = 0

    def __post_init__(self) -> None:
        for name in ('num_steps', 'report_every', 'checkpoint_every', 'max_to_keep'):
            check_range(name, getattr(self, name), 1)
        check_range('profile_steps', self.profile_steps, 0)
        if not self.max_loss_increase > 0:
            raise ValueError(f'max_loss_increase must be > 0, got {self.max_loss_increase}.')


def fit(
    train_step: StepFn,
    state: TrainState,
    batches: ResumableBatches,
    store: CheckpointStore,
    config: LoopConfig,
    *,
    workdir: Path,
    description: str,
    batch_sharding: jax.sharding.Sharding,
    batch_size: int,
    constants: tuple[Any, ...] = (),
    evaluate: Callable[[Any], dict[str, jax.Array]] | None = None,
) -> TrainState:
    """Trains until `config.num_steps`, starting from `state` and the position of `batches`.

    Args:
      train_step: the compiled step: (state, *constants, batch) -> (state, metrics).
      state: the state to start from; it is donated.
      batches: the training batches; their position is saved in checkpoints.
      store: the store of checkpoints.
      config: the number of steps and the intervals.
      workdir: the directory of TensorBoard files and metrics.
      description: the text before the progress bar.
      batch_sharding: the sharding of batches.
      batch_size: the number of rows of a batch over all processes.
      constants: arguments that every step reads and none changes.
      evaluate: returns additional metrics of the averaged parameters for every report.

    Returns:
      The state after the last step.

    Raises:
      FloatingPointError: if a metric is not finite or the loss exploded; nothing since the last
        checkpoint is saved.
      ValueError: if `config.best_metric` is not a metric.
      Preempted: if SIGTERM was received; the state is saved.
      CheckpointError: if a checkpoint can't be written.
    """
    first_step = int(state.step)
    guard, steps_metrics = LossGuard(config.max_loss_increase), []
    throughput = Throughput(functools.partial(count_flops, train_step))
    trace = Trace(workdir / PROFILE_DIR, first_step, config.profile_steps)
    reporter = Reporter(workdir, description, first_step, config.num_steps)
    with store.finishing_saves(), reporter, trace, Preemption() as preemption:
        for step in range(first_step + 1, config.num_steps + 1):
            with throughput.waiting_for_data():
                batch = processes.global_batch(next(batches), batch_sharding, batch_size)
            throughput.add(state, *constants, batch)
            with trace.step(step):
                state, metrics = train_step(state, *constants, batch)
            if step == first_step + 1:
                _check_metric(config.best_metric, metrics, evaluate, state)
            steps_metrics.append(metrics)
            # A few queued steps keep the device busy; more would only delay a stop.
            jax.block_until_ready(steps_metrics[-STEPS_AHEAD - 1 : -STEPS_AHEAD])
            stop = preemption.reached(step)
            save = stop or step == config.num_steps or step % config.checkpoint_every == 0
            if save or step % config.report_every == 0:
                rows = [_floats(row) for row in jax.device_get(steps_metrics)]
                guard.check(step + 1 - len(rows), rows)
                measured = throughput.measure()
                if evaluate is not None:
                    rows[-1] |= _floats(jax.device_get(evaluate(state.evaluated_params)))
                reporter.report(step, rows[-1], measured)
                steps_metrics = []
            if save:
                places = processes.gather_json(batches.get_state())
                store.save(step, state, {'processes': places}, rows[-1])
            if stop and step < config.num_steps:
                store.wait()
                raise Preempted(
                    f'stopped by SIGTERM; step {step} is saved. Start again with the same workdir '
                    'to go on from it.'
                )
    store.wait()
    return state


def _check_metric(
    name: str,
    metrics: dict[str, jax.Array],
    evaluate: Callable[[Any], dict[str, jax.Array]] | None,
    state: TrainState,
) -> None:
    """Raises ValueError if checkpoints are compared by a metric that the run does not have."""
    if not name or name in metrics:
        return
    evaluated = {} if evaluate is None else jax.eval_shape(evaluate, state.evaluated_params)
    if name not in evaluated:
        hint = nearest(name, [*metrics, *evaluated])
        raise ValueError(f'config.train.best_metric={name!r} is not a metric of this run; {hint}')


def _floats(metrics: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def start_or_resume(
    init: Callable[..., TrainState],
    params_sharding: Any,
    mesh: jax.sharding.Mesh,
    store: CheckpointStore,
    batches: ResumableBatches,
    *args: Any,
) -> TrainState:
    """Returns the state to train from: the newest checkpoint, or `init(*args)` if there is none.

    On resume, `batches` is set to the position in the data of the checkpoint.

    Raises:
      ValueError: if the checkpoint has other shapes, another number of processes or another data
        stream.
    """
    if store.latest_step is None:
        state: TrainState = init_sharded(init, params_sharding, mesh, *args)[0]
        return state
    abstract = jax.eval_shape(init, *args)
    shardings = state_shardings(abstract, params_sharding, mesh)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )
    state, data_state = store.restore(abstract)
    # One position per process; older checkpoints have the position of their only process.
    places = data_state.get('processes', [data_state])
    if len(places) != jax.process_count():
        raise ValueError(
            f'{store.directory} has the data positions of {len(places)} processes, but this run '
            f'has {jax.process_count()} processes: start {len(places)}, or use another workdir.'
        )
    batches.set_state(places[jax.process_index()])
    logging.info('resuming from step %d of %s', store.latest_step, store.directory)
    return state
