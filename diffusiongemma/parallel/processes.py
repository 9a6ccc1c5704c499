"""Several processes that run one program together: how they join, and what they share.

Every process runs the same code on its own devices. What one of them must do alone (write a file,
print a table) the *writer* does, process 0. A single process is the writer and all of the data.
"""

import json
import os
import secrets
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout_s: int = 300,
) -> None:
    """Waits for the other processes; call it before anything that touches a device.

    When some process does not come in time, this one ends with a message and exit code 1.

    Args:
      coordinator: HOST:PORT of process 0, the same in every process.
      num_processes: how many there are.
      process_id: which one this is, from 0. All three None: jax asks the environment (SLURM,
        GKE, a TPU VM, MPI).
      timeout_s: seconds to wait for the last one.

    Raises:
      ValueError: some of the three are given and some are not, they can't be, or the environment
        knows of no other process.
    """
    given = (coordinator, num_processes, process_id)
    if None in given and given != (None, None, None):
        raise ValueError(
            f'coordinator={coordinator}, num_processes={num_processes}, process_id={process_id}: '
            'give all three, or none of them where the environment knows (SLURM, GKE, TPU VM).'
        )
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise ValueError(f'process_id={process_id} must lie in [0, num_processes={num_processes}).')
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')  # of the CPU backend alone
    watch = threading.Timer(timeout_s, _give_up, (coordinator, num_processes, timeout_s))
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(*given, initialization_timeout=timeout_s + 60)
    except (ValueError, RuntimeError) as error:  # no cluster was found, or it is not reached
        raise ValueError(
            f'the processes of this run are not known: {error} Give --coordinator=HOST:PORT, '
            '--num_processes and --process_id, or start it by SLURM or on a TPU slice.'
        ) from error
    finally:
        watch.cancel()
    logging.info('process %d of %d', jax.process_index(), jax.process_count())


def _give_up(coordinator: str | None, num_processes: int | None, timeout_s: int) -> None:
    """Ends this process: jax would do so too, but with a stack trace of C++ as its message."""
    many = 'all' if num_processes is None else f'all {num_processes}'
    where = '' if coordinator is None else f' at {coordinator}'
    print(
        f'error: not {many} processes joined process 0{where} within {timeout_s} s. Look for one '
        'that failed earlier, check that every host reaches that address, or raise '
        '--join_timeout_s.',
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def is_writer() -> bool:
    """Whether this process writes the files of the run and prints its tables."""
    return jax.process_index() == 0


def abandon(code: int) -> None:
    """Ends a process that failed, where others wait for it; returns if it is the only one.

    The usual way out would wait for the others, which wait for this one.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def gather_json(value: Any) -> list[Any]:
    """The JSON value that each process passed, in their order, in every process."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(text.size, np.int32)).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def as_writer_says(value: Any) -> Any:
    """The JSON value that the writer passed, in every process."""
    return gather_json(value)[0]


def check_shared(directory: Path) -> None:
    """Creates `directory`; raises ValueError unless every process sees the same one."""
    directory.mkdir(parents=True, exist_ok=True)
    if jax.process_count() == 1:
        return
    token = as_writer_says(secrets.token_hex(8))
    marker = directory / f'.shared-{token}'
    if is_writer():
        marker.touch()
    multihost_utils.sync_global_devices('marker')
    seen = gather_json(marker.exists())
    if is_writer():
        marker.unlink()
    if not all(seen):
        raise ValueError(
            f'{directory} is not the same directory in processes '
            f'{[i for i, there in enumerate(seen) if not there]} as in process 0; use one that '
            'all hosts share (NFS, Filestore, a mounted bucket).'
        )


def on_host(tree: Any) -> Any:
    """The arrays of `tree`, whole, as numpy arrays in the memory of every process.

    Leaves that lie on devices of other processes are gathered one after the other.
    """

    def fetch(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        ):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return jax.device_get(leaf)

    return jax.tree.map(fetch, tree)


def in_shards(tree: Any, shardings: Any) -> Any:
    """Arrays that every process has, or that lie somewhere already, in the given shards.

    Args:
      tree: pytree of numpy or jax arrays; those of the host have the same values in each process.
      shardings: pytree of shardings like it, or one for all.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)

    def put(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        # device_put would send the whole array around to see that it is the same everywhere.
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(put, tree, shardings)


def data_shard(sharding: jax.sharding.Sharding, batch_size: int) -> tuple[int, int]:
    """Which part of each batch this process reads: (index, count).

    Processes whose devices hold the same rows read the same part.

    Args:
      sharding: of the rows of a batch.
      batch_size: rows, over all processes.

    Raises:
      ValueError: the rows of two processes overlap without being the same.
    """
    rows: dict[int, set[int]] = {}
    places: Mapping[Any, tuple[slice, ...]] = sharding.devices_indices_map((batch_size,))
    for device, (where, *_) in places.items():
        rows.setdefault(device.process_index, set()).update(range(*where.indices(batch_size)))
    parts = sorted({tuple(sorted(held)) for held in rows.values()})
    if sum(map(len, parts)) != batch_size or len({len(part) for part in parts}) > 1:
        raise ValueError(
            f'the mesh spreads the {batch_size} rows of a batch over {len(rows)} processes so '
            'that some of them share only a part of their rows. Make data x fsdp x expert a '
            'multiple of the number of processes, or a divisor of it.'
        )
    return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


def global_batch(
    batch: Mapping[str, np.ndarray], sharding: jax.sharding.Sharding, batch_size: int
) -> dict[str, jax.Array]:
    """The rows that the processes read (see `data_shard`) as arrays of `batch_size` rows."""
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))
        for name, rows in batch.items()
    }
