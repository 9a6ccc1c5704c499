"""Flags that connect the processes of one run; entry points import this module."""

from absl import flags

from diffusiongemma.parallel import processes

_DISTRIBUTED = flags.DEFINE_bool(
    'distributed', False, 'Run as one of several processes that SLURM, GKE or the TPU VM started.'
)
_COORDINATOR = flags.DEFINE_string(
    'coordinator', None, 'HOST:PORT of process 0, if the environment does not provide it.'
)
_NUM_PROCESSES = flags.DEFINE_integer(
    'num_processes', None, 'Number of processes; needed with --coordinator.'
)
_PROCESS_ID = flags.DEFINE_integer(
    'process_id', None, 'Index of this process, from 0; needed with --coordinator.'
)
_JOIN_TIMEOUT_S = flags.DEFINE_integer(
    'join_timeout_s', 300, 'Seconds to wait for the other processes.'
)


def join() -> None:
    """Joins the other processes if the flags say that there are any."""
    cluster = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if _DISTRIBUTED.value or cluster != (None, None, None):
        processes.join(*cluster, timeout_s=_JOIN_TIMEOUT_S.value)
