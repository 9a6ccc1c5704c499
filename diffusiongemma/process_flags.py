"""The flags by which the processes of one run find each other; entry points import it."""

from absl import flags

from diffusiongemma.parallel import processes

_DISTRIBUTED = flags.DEFINE_bool(
    'distributed', False, 'One of several processes; SLURM, GKE or the TPU VM knows the others.'
)
_COORDINATOR = flags.DEFINE_string(
    'coordinator', None, 'HOST:PORT of process 0, where nothing in the environment knows it.'
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'Goes with --coordinator.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Goes with --coordinator; from 0.')
_JOIN_TIMEOUT_S = flags.DEFINE_integer(
    'join_timeout_s', 300, 'Seconds to wait for the other processes.'
)


def join() -> None:
    """Joins the other processes if the flags say that there are some."""
    given = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if _DISTRIBUTED.value or given != (None, None, None):
        processes.join(*given, timeout_s=_JOIN_TIMEOUT_S.value)
