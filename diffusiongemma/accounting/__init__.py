"""Counts the FLOPs, traffic and memory of programs, and lists published figures of devices."""

from diffusiongemma.accounting.devices import DeviceFigures, figures_named, figures_of
from diffusiongemma.accounting.executed import executed_flops
from diffusiongemma.accounting.flops import Flops, count_flops, flops_of, kernel_flops
from diffusiongemma.accounting.hlo import Collective, Program
from diffusiongemma.accounting.liveness import peak_bytes

__all__ = [
    'Collective',
    'DeviceFigures',
    'Flops',
    'Program',
    'count_flops',
    'executed_flops',
    'figures_named',
    'figures_of',
    'flops_of',
    'kernel_flops',
    'peak_bytes',
]
