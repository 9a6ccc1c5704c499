"""Selects a compute dtype that the hardware supports natively."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp

_CPU_FLAGS = {'avx512_bf16', 'amx_bf16', 'bf16'}  # the last one is for Arm


@functools.cache
def cpu_has_bfloat16(cpuinfo: str = '/proc/cpuinfo') -> bool:
    """Returns whether this CPU has native bfloat16 matmuls; False if the file is missing."""
    try:
        lines = Path(cpuinfo).read_text().splitlines()
    except OSError:
        return False
    return any(
        _CPU_FLAGS & set(line.split(':', 1)[1].split())
        for line in lines
        if line.lower().startswith(('flags', 'features'))
    )


def native_dtype(name: str, platform: str | None = None) -> jnp.dtype:
    """Returns the dtype to compute in if `name` is requested.

    It is float32 instead of bfloat16 on a CPU without native bfloat16 matmuls, which would convert
    every operand first and be slower than in float32.

    Args:
      name: the name of a float dtype.
      platform: the platform of the devices; None for that of the default backend.
    """
    on_cpu = (platform or jax.default_backend()) == 'cpu'
    emulated = on_cpu and name == 'bfloat16' and not cpu_has_bfloat16()
    return jnp.dtype('float32' if emulated else name)
