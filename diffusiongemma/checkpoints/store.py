"""Training checkpoints: orbax, asynchronous, with the place in the data beside the state."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


class CheckpointStore:
    """Checkpoints of one run in `workdir`/checkpoints.

    A checkpoint holds the training state and the JSON state of the data iterator. It appears
    only when it is complete: an interrupted save leaves the ones before it untouched.
    """

    def __init__(self, workdir: Path | str, max_to_keep: int = 2):
        self.directory = Path(workdir).absolute() / 'checkpoints'
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, create=True),
        )

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data_state: dict[str, Any]) -> None:
        """Starts saving; returns once the state is copied off the device."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_state)
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
          ValueError: an array has another shape than asked for; the message names it.
        """
        step = self.latest_step
        if step is None:
            raise FileNotFoundError(
                f'no complete checkpoint in {self.directory}; check the path, or train first.'
            )
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
        saved = self._saved_shapes(step)
        wanted = {_name(path): leaf.shape for path, leaf in _leaves(abstract_state)}
        problems = [
            f'{name}: saved {saved.get(name, "nothing")}, expected {wanted.get(name, "nothing")}'
            for name in sorted(set(saved) | set(wanted))
            if saved.get(name) != wanted.get(name)
        ]
        if problems:
            shown = '; '.join(problems[:3])
            more = f' (and {len(problems) - 3} more)' if len(problems) > 3 else ''
            raise ValueError(
                f'checkpoint {self.directory / str(step)} does not fit this run: {shown}{more}. '
                'Use the config that the checkpoint was made with, or another workdir.'
            )

    def _saved_shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        directory = self.directory / str(step) / 'state'
        metadata = ocp.StandardCheckpointer().metadata(directory).item_metadata
        return {_name(path): tuple(leaf.shape) for path, leaf in _leaves(metadata.tree)}


def _leaves(tree: Any) -> list[tuple[tuple, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, 'shape'))[0]


def _name(path: tuple) -> str:
    parts = (getattr(key, 'name', getattr(key, 'key', getattr(key, 'idx', key))) for key in path)
    return '/'.join(str(part) for part in parts)
