"""Functions for several processes that run one program together.

Every process runs the same code on its own devices. Only the *writer*, process 0, writes files and
prints tables. A single process is the writer and reads all of the data.
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
    """Connects this process with the others; must be called before any device is used.

    If a process does not join in time, this process ends with an error message and exit code 1.

    Args:
      coordinator: HOST:PORT of process 0, the same in every process.
      num_processes: the number of processes.
      process_id: the index of this process, from 0. If all three are None, jax reads them from the
        environment (SLURM, GKE, a TPU VM, MPI).
      timeout_s: the maximum waiting time in seconds.

    Raises:
      ValueError: if only some of the three are set, if they are invalid, or if the environment
        does not describe a cluster.
    """
    cluster = (coordinator, num_processes, process_id)
    if None in cluster and cluster != (None, None, None):
        raise ValueError(
            f'coordinator={coordinator}, num_processes={num_processes}, process_id={process_id}: '
            'give all three, or none of them if the environment sets them (SLURM, GKE, TPU VM).'
        )
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise ValueError(f'process_id={process_id} must lie in [0, num_processes={num_processes}).')
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')  # affects only the CPU backend
    watch = threading.Timer(timeout_s, _give_up, (coordinator, num_processes, timeout_s))
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(*cluster, initialization_timeout=timeout_s + 60)
    except (ValueError, RuntimeError) as error:  # there is no cluster, or it cannot be reached
        raise ValueError(
            f'the processes of this run are not known: {error} Give --coordinator=HOST:PORT, '
            '--num_processes and --process_id, or start it by SLURM or on a TPU slice.'
        ) from error
    finally:
        watch.cancel()
    logging.info('process %d of %d', jax.process_index(), jax.process_count())


def _give_up(coordinator: str | None, num_processes: int | None, timeout_s: int) -> None:
    """Ends this process with an error message; jax would only print a C++ stack trace."""
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
    """Returns whether this process writes the files of the run and prints its tables."""
    return jax.process_index() == 0


def abandon(code: int) -> None:
    """Ends a failed process immediately if there are other processes; returns if there are none.

    A normal exit would wait for the other processes, which in turn wait for this one.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def gather_json(value: Any) -> list[Any]:
    """Returns in every process the list of JSON values that the processes passed, by index."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(text.size, np.int32)).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def broadcast_from_writer(value: Any) -> Any:
    """Returns in every process the JSON value that process 0 passed (a broadcast)."""
    return gather_json(value)[0]


def check_shared(directory: Path) -> None:
    """Creates `directory`; raises ValueError unless all processes share the same directory."""
    directory.mkdir(parents=True, exist_ok=True)
    if jax.process_count() == 1:
        return
    token = broadcast_from_writer(secrets.token_hex(8))
    marker = directory / f'.shared-{token}'
    if is_writer():
        marker.touch()
    multihost_utils.sync_global_devices('marker')
    visible = gather_json(marker.exists())
    if is_writer():
        marker.unlink()
    if not all(visible):
        raise ValueError(
            f'{directory} is not the same directory in processes '
            f'{[i for i, ok in enumerate(visible) if not ok]} as in process 0; use one '
            'that all hosts share (NFS, Filestore, a mounted bucket).'
        )


def on_host(tree: Any) -> Any:
    """Returns the arrays of `tree`, gathered to the host of every process as numpy arrays.

    Leaves with shards on devices of other processes are gathered one after the other.
    """

    def fetch(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        ):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return jax.device_get(leaf)

    return jax.tree.map(fetch, tree)


def in_shards(tree: Any, shardings: Any) -> Any:
    """Returns the arrays of `tree` with the given shardings (device_put for several processes).

    Args:
      tree: a pytree of numpy or jax arrays; host arrays must have equal values in all processes.
      shardings: a pytree of shardings with the same structure, or one sharding for all leaves.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)

    def put(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            array: jax.Array = jax.device_put(leaf, sharding)
            return array
        # device_put would exchange the whole array to check that all processes have equal values.
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(put, tree, shardings)


def data_shard(sharding: jax.sharding.Sharding, batch_size: int) -> tuple[int, int]:
    """Returns the part of each batch that this process reads, as (index, count).

    Processes whose devices hold the same rows read the same part.

    Args:
      sharding: the sharding of the rows of a batch.
      batch_size: the number of rows over all processes.

    Raises:
      ValueError: if the rows of two processes overlap but are not equal.
    """
    rows: dict[int, set[int]] = {}
    places: Mapping[Any, tuple[slice, ...]] = sharding.devices_indices_map((batch_size,))
    for device, (where, *_) in places.items():
        rows.setdefault(device.process_index, set()).update(range(*where.indices(batch_size)))
    parts = sorted({tuple(sorted(indices)) for indices in rows.values()})
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
    """Returns global arrays of `batch_size` rows from the rows that each process has read."""
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))
        for name, rows in batch.items()
    }
