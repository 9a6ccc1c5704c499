"""Compiles the programs of a config for devices that this machine lacks, and reports their cost."""

from diffusiongemma.planning.compiler import Layout, Plan, compile_program, topology_devices
from diffusiongemma.planning.fit import largest_that_fits
from diffusiongemma.planning.programs import PlannedProgram, training_step
from diffusiongemma.planning.report import as_json, print_plan

__all__ = [
    'Layout',
    'Plan',
    'PlannedProgram',
    'as_json',
    'compile_program',
    'largest_that_fits',
    'print_plan',
    'topology_devices',
    'training_step',
]
