"""Where a compute dtype pays."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp

_CPU_FLAGS = {'avx512_bf16', 'amx_bf16', 'bf16'}  # the last one on Arm


@functools.cache
def cpu_has_bfloat16(cpuinfo: str = '/proc/cpuinfo') -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; False where the file is missing."""
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
    """The dtype to compute in where `name` is asked for.

    That is float32 instead of bfloat16 on a CPU that has no products of bfloat16: it would convert
    every operand first, and take longer than in float32.

    Args:
      name: of a float dtype.
      platform: of the devices that compute; None for that of the default backend.
    """
    on_cpu = (platform or jax.default_backend()) == 'cpu'
    emulated = on_cpu and name == 'bfloat16' and not cpu_has_bfloat16()
    return jnp.dtype('float32' if emulated else name)
