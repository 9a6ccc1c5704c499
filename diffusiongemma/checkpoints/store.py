"""Training checkpoints: orbax, asynchronous, with the place in the data beside the state."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from diffusiongemma.models.config import ModelConfig

CHECKPOINTS_DIR = 'checkpoints'


def describe_model(config: ModelConfig, tokenizer_hash: str) -> dict[str, Any]:
    """What a checkpoint says about its model: see `CheckpointStore`, `about`."""
    return {'model': config.to_dict(), 'tokenizer_hash': tokenizer_hash}


class CheckpointStore:
    """Checkpoints of one run in `workdir`/checkpoints.

    A checkpoint holds the training state, the JSON state of the data iterator and what the run
    says about its model. It appears only when it is complete: an interrupted save leaves the
    ones before it untouched.
    """

    def __init__(
        self,
        workdir: Path | str,
        max_to_keep: int = 2,
        about: Mapping[str, Any] | None = None,
    ):
        """Opens the checkpoints of `workdir`, which need not exist yet.

        Args:
          workdir: of the run.
          max_to_keep: older checkpoints are deleted.
          about: JSON values, from `describe_model`; `restore` refuses a checkpoint that says
            something else, and `load_model` needs it to open a run that is not finished.
        """
        self.directory = Path(workdir).absolute() / CHECKPOINTS_DIR
        self._about = dict(about or {})
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, create=True),
        )

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data_state: dict[str, Any]) -> None:
        """Starts saving; returns once the state is copied off the device.

        Raises:
          ValueError: there is a checkpoint of this step or a later one, which would win.
        """
        latest = self.latest_step
        if latest is not None and step <= latest:
            raise ValueError(
                f'step {step} cannot be saved: {self.directory} has step {latest} already. '
                'Resume from it, or use another workdir.'
            )
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave(data_state),
                about=ocp.args.JsonSave(self._about),
            ),
        )

    def wait(self) -> None:
        """Blocks until everything that was handed to `save` is on disk."""
        self._manager.wait_until_finished()

    def restore(self, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """The newest checkpoint as (state, data state).

        Args:
          abstract_state: ShapeDtypeStructs with shardings; arrays are read into them.

        Raises:
          FileNotFoundError: there is no complete checkpoint.
          ValueError: the checkpoint is of another model or tokenizer, or an array has another
            shape than asked for; the message names the field or the array.
        """
        step = self.latest_step
        if step is None:
            raise FileNotFoundError(
                f'no complete checkpoint in {self.directory}; check the path, or train first.'
            )
        _check_same(self._about, _read_about(self.directory / str(step)), self.directory, step)
        self._check_shapes(step, abstract_state)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore()
            ),
        )
        return restored.state, restored.data

    def close(self) -> None:
        """Waits for saves and frees the threads."""
        self._manager.close()

    def _check_shapes(self, step: int, abstract_state: Any) -> None:
        saved = _saved_shapes(self.directory / str(step))
        wanted = {_name(path): leaf.shape for path, leaf in _leaves(abstract_state)}
        problems = [
            f'{name}: saved {saved.get(name, "nothing")}, expected {wanted.get(name, "nothing")}'
            for name in sorted(set(saved) | set(wanted))
            if saved.get(name) != wanted.get(name)
        ]
        if problems:
            raise ValueError(_misfit(self.directory, step, problems))


def read_ema(workdir: Path) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """The averaged parameters of a run's newest complete checkpoint, on one device.

    Args:
      workdir: of a run, finished or not.

    Returns:
      Its step, its `about`, and the parameters as a nested dict.

    Raises:
      FileNotFoundError: there is no complete checkpoint.
    """
    directory = Path(workdir).absolute() / CHECKPOINTS_DIR
    options = ocp.CheckpointManagerOptions(read_only=True, create=False)
    step = None
    if directory.is_dir():
        with ocp.CheckpointManager(directory, options=options) as manager:
            step = manager.latest_step()
    if step is None:
        raise FileNotFoundError(
            f'no complete checkpoint in {directory}; check the path, or train first.'
        )
    # Whatever the run was spread over, here one device is enough to say where arrays go.
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with ocp.PyTreeCheckpointer() as checkpointer:
        saved = checkpointer.metadata(directory / str(step) / 'state').item_metadata.tree
        wanted = {
            'ema_params': jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                saved['ema_params'],
                is_leaf=_is_array,
            )
        }
        restored = checkpointer.restore(
            directory / str(step) / 'state',
            args=ocp.args.PyTreeRestore(
                wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=True,
            ),
        )
    return step, _read_about(directory / str(step)), restored['ema_params']


def _read_about(step_directory: Path) -> dict[str, Any]:
    path = step_directory / 'about' / 'metadata'
    return json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}


def _check_same(
    ours: Mapping[str, Any], saved: Mapping[str, Any], directory: Path, step: int
) -> None:
    """Raises ValueError where both say something and it differs."""
    shared = set(ours) & set(saved)
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
    return (
        f'checkpoint {directory / str(step)} does not fit this run: {"; ".join(problems[:3])}'
        f'{more}. Use the config that the checkpoint was made with, or another workdir.'
    )


def _saved_shapes(step_directory: Path) -> dict[str, tuple[int, ...]]:
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.metadata(step_directory / 'state').item_metadata.tree
    return {_name(path): tuple(leaf.shape) for path, leaf in _leaves(tree)}


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, 'shape')


def _leaves(tree: Any) -> list[tuple[tuple, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_array)[0]


def _name(path: tuple) -> str:
    parts = (getattr(key, 'name', getattr(key, 'key', getattr(key, 'idx', key))) for key in path)
    return '/'.join(str(part) for part in parts)
