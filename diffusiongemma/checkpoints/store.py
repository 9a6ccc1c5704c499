"""Saves and restores training checkpoints with orbax, asynchronously, including the data state."""

import contextlib
import json
import operator
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict
from orbax.checkpoint import checkpoint_managers as policies

from diffusiongemma.errors import CheckpointError
from diffusiongemma.models.config import ModelConfig

CHECKPOINTS_DIR = 'checkpoints'


def describe_model(config: ModelConfig, tokenizer_hash: str) -> dict[str, Any]:
    """Returns the `about` entry of a checkpoint, which identifies its model and tokenizer."""
    return {'model': config.to_dict(), 'tokenizer_hash': tokenizer_hash}


class CheckpointStore:
    """A store of the checkpoints of one run in `workdir`/checkpoints.

    A checkpoint contains the training state, the JSON state of the data iterator and an `about`
    entry with the model. Saves are atomic: an interrupted save does not affect earlier
    checkpoints, and the next run deletes its partial files.
    """

    def __init__(
        self,
        workdir: Path | str,
        max_to_keep: int = 2,
        about: Mapping[str, Any] | None = None,
        best_metric: str = '',
    ) -> None:
        """Opens the checkpoints of `workdir`, which need not exist yet.

        Args:
          workdir: the workdir of the run.
          max_to_keep: the number of newest checkpoints to keep; older ones are deleted.
          best_metric: the name of a metric; the checkpoint with its lowest value is kept as well.
          about: JSON values from `describe_model`. `restore` refuses a checkpoint with other
            values, and `load_model` needs them to open an unfinished run.
        """
        self.directory = Path(workdir).absolute() / CHECKPOINTS_DIR
        self._about = dict(about or {})
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_keep(max_to_keep, best_metric),
                create=True,
                cleanup_tmp_directories=True,
            ),
        )

    @property
    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None."""
        step: int | None = self._manager.latest_step()
        return step

    def save(
        self,
        step: int,
        state: Any,
        data_state: dict[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts to save a checkpoint; returns once the state is copied from the device.

        Args:
          step: the training step of the state.
          state: the training state, a pytree of arrays.
          data_state: the state of the data iterator as JSON values.
          metrics: the metrics at this step, which `best_metric` refers to.

        Raises:
          ValueError: if there is a checkpoint of this or a later step, which would take precedence.
          CheckpointError: if this or the previous checkpoint can't be written.
        """
        latest = self.latest_step
        if latest is not None and step <= latest:
            raise ValueError(
                f'step {step} cannot be saved: {self.directory} has step {latest} already. '
                'Resume from it, or use another workdir.'
            )
        with self._writing():
            self._manager.save(
                step,
                metrics=None if metrics is None else dict(metrics),
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=ocp.args.JsonSave(data_state),
                    about=ocp.args.JsonSave(self._about),
                ),
            )

    def wait(self) -> None:
        """Waits until all started saves are on disk.

        Raises:
          CheckpointError: if a checkpoint can't be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def finishing_saves(self) -> Iterator[None]:
        """Returns a context manager for training that completes started saves on any error."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(CheckpointError):  # report the first error
                self.wait()
            raise

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # from orbax, tensorstore or the system, also in a thread
            complete = [step for step in self._manager.all_steps() if self._is_complete(step)]
            kept = 'There is no complete checkpoint yet.'
            if complete:
                kept = f'The last complete checkpoint is of step {max(complete)}.'
            raise CheckpointError(
                f'a checkpoint in {self.directory} was not written: {_in_short(error)} {kept} Make '
                'room if the disk is full, and start again with the same workdir to go on.'
            ) from error

    def _is_complete(self, step: int) -> bool:
        return (self.directory / str(step) / 'state').is_dir()

    def restore(self, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """Returns the newest checkpoint as (state, data state).

        Args:
          abstract_state: the expected state as ShapeDtypeStructs with shardings.

        Raises:
          FileNotFoundError: if there is no complete checkpoint.
          ValueError: if the checkpoint is of another model or tokenizer, or an array has an
            unexpected shape; the message names the field or the array.
          CheckpointError: if the checkpoint is damaged.
        """
        step = self.latest_step
        if step is None:
            raise FileNotFoundError(
                f'no complete checkpoint in {self.directory}; check the path, or train first.'
            )
        with self._reading(step):
            about = _read_about(self.directory / str(step))
            saved = _saved_shapes(self.directory / str(step))
        _check_same(self._about, about, self.directory, step)
        self._check_shapes(step, saved, abstract_state)
        with self._reading(step):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore()
                ),
            )
        return restored.state, restored.data

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax raises various errors for damaged files
            earlier = [other for other in self._manager.all_steps() if other < step]
            then = f'go on from step {max(earlier)}' if earlier else 'start afresh'
            raise CheckpointError(
                f'the checkpoint {self.directory / str(step)} is damaged: {_in_short(error)} '
                f'Delete that directory to {then}.'
            ) from error

    def close(self) -> None:
        """Waits for started saves and stops the threads."""
        self._manager.close()

    def _check_shapes(
        self, step: int, saved: Mapping[str, tuple[int, ...]], abstract_state: Any
    ) -> None:
        expected = {_name(path): leaf.shape for path, leaf in _leaves(abstract_state)}
        problems = [
            f'{name}: {_shape_of(name, saved)} there, {_shape_of(name, expected)} here'
            for name in sorted(set(saved) | set(expected))
            if saved.get(name) != expected.get(name)
        ]
        if problems:
            raise ValueError(_misfit(self.directory, step, problems))


def _keep(max_to_keep: int, best_metric: str) -> policies.PreservationPolicy:
    """Returns the policy that keeps the newest checkpoints and the one with the lowest metric."""
    newest = policies.LatestN(max_to_keep)
    if not best_metric:
        return newest

    best = policies.BestN(
        get_metric_fn=operator.itemgetter(best_metric),
        reverse=True,
        n=1,
        keep_checkpoints_without_metrics=False,
    )
    return policies.AnyPreservationPolicy([newest, best])


def _in_short(error: Exception) -> str:
    """Returns the first line of an error message, without a trailing reference to C++ source."""
    line = (str(error).splitlines() or [''])[0] or type(error).__name__
    return line.split(' [source')[0][:300].rstrip('. ') + '.'


def read_ema(workdir: Path, step: int | None = None) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Reads the parameters to evaluate from a complete checkpoint onto one device.

    They are the average of the parameters, or the parameters if the run keeps no average.

    Args:
      workdir: the workdir of a run, which need not be finished.
      step: the step of the checkpoint; None for the newest.

    Returns:
      The step, the `about` entry, and the parameters as a nested dict.

    Raises:
      FileNotFoundError: if there is no such complete checkpoint.
    """
    directory = Path(workdir).absolute() / CHECKPOINTS_DIR
    options = ocp.CheckpointManagerOptions(read_only=True, create=False)
    steps = []
    if directory.is_dir():
        with ocp.CheckpointManager(directory, options=options) as manager:
            steps = sorted(manager.all_steps())
    if not steps or step not in (None, *steps):
        raise FileNotFoundError(
            f'no complete checkpoint {"" if step is None else f"of step {step} "}in {directory}; '
            'check the path, or train first.'
        )
    step = steps[-1] if step is None else step
    # The arrays go to one device, independent of the mesh of the run.
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with ocp.PyTreeCheckpointer() as checkpointer:
        saved = checkpointer.metadata(directory / str(step) / 'state').item_metadata.tree
        name = 'ema_params' if saved.get('ema_params') else 'params'
        abstract = {
            name: jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                saved[name],
                is_leaf=_is_array,
            )
        }
        restored = checkpointer.restore(
            directory / str(step) / 'state',
            args=ocp.args.PyTreeRestore(
                abstract,
                restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                partial_restore=True,
            ),
        )
    return step, _read_about(directory / str(step)), restored[name]


def _read_about(step_directory: Path) -> dict[str, Any]:
    path = step_directory / 'about' / 'metadata'
    about = json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}
    if 'model' in about:  # fields that were added after the checkpoint get their defaults
        about['model'] = ModelConfig.from_dict(about['model']).to_dict()
    return about


def _check_same(
    ours: Mapping[str, Any], saved: Mapping[str, Any], directory: Path, step: int
) -> None:
    """Raises ValueError if an entry that both have differs."""
    shared = set(ours) & set(saved)
    if 'model' in shared:  # older checkpoints store the same config in another form
        saved = {**saved, 'model': ModelConfig.from_dict(saved['model']).to_dict()}
    ours, saved = (
        flatten_dict({name: about[name] for name in shared}, sep='.') for about in (ours, saved)
    )
    problems = [
        f'{name}: saved {saved.get(name)!r}, now {ours.get(name)!r}'
        for name in sorted(set(ours) | set(saved))
        if ours.get(name) != saved.get(name)
    ]
    if problems:
        raise ValueError(_misfit(directory, step, problems))


def _misfit(directory: Path, step: int, problems: list[str]) -> str:
    more = f' (and {len(problems) - 3} more)' if len(problems) > 3 else ''
    if all(problem.startswith('ema_params/') for problem in problems):
        more += '; only one of checkpoint and run keeps an average (config.optimizer.average)'
    return (
        f'checkpoint {directory / str(step)} does not fit this run: {"; ".join(problems[:3])}'
        f'{more}. Use the config that the checkpoint was made with, or another workdir.'
    )


def _shape_of(name: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    return f'shape {shapes[name]}' if name in shapes else 'none'


def _saved_shapes(step_directory: Path) -> dict[str, tuple[int, ...]]:
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.metadata(step_directory / 'state').item_metadata.tree
    return {_name(path): tuple(leaf.shape) for path, leaf in _leaves(tree)}


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, 'shape')


def _leaves(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_array)[0]


def _name(path: tuple[Any, ...]) -> str:
    parts = (getattr(key, 'name', getattr(key, 'key', getattr(key, 'idx', key))) for key in path)
    return '/'.join(str(part) for part in parts)
