"""Prints plans as tables and converts them to JSON."""

import dataclasses
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from diffusiongemma.accounting.devices import DeviceFigures
from diffusiongemma.planning.compiler import Layout, Plan


def print_plan(
    plan: Plan, figures: DeviceFigures, mesh: jax.sharding.Mesh, title: str, change: str
) -> None:
    """Prints memory, traffic, ratios and times of a program.

    Args:
      plan: the report on the compiled program.
      figures: the published figures of one device.
      mesh: the mesh of the devices.
      title: the config, the topology and the options, for the title of the table.
      change: the advice to print if the program does not fit.
    """
    axes = ', '.join(f'{name} {size}' for name, size in mesh.shape.items() if size > 1)
    table = Table(
        title=f'{plan.name}: {title}, {mesh.size} x {figures.name} ({axes or "one device"})'
    )
    table.add_column('per device')
    table.add_column('', justify='right')
    for kind, size in plan.kinds.items():
        table.add_row(f'{kind}, from shapes', _gigabytes(size))
    if (layout := plan.layout) is not None:
        table.add_row('arguments, as compiled', _gigabytes(layout.arguments))
        table.add_row('outputs that reuse no argument', _gigabytes(layout.outputs - layout.aliased))
        table.add_row('temporaries', _gigabytes(layout.temporaries))
        table.add_row('code', _gigabytes(layout.code))
    table.add_row('memory needed', _gigabytes(plan.needed))
    table.add_row('memory available', _gigabytes(figures.hbm_bytes))
    table.add_section()
    table.add_row(
        'TFLOPs of the model, with recomputation', f'{sum(plan.flops) / mesh.size / 1e12:.3f}'
    )
    if plan.hbm_traffic is not None:
        table.add_row('HBM traffic', _gigabytes(plan.hbm_traffic))
    for collective in plan.collectives:
        label = f'sent by {collective.count} {collective.kind} along {collective.axes}'
        table.add_row(label, _gigabytes(collective.sent_bytes))
    table.add_section()
    for name, ratio in plan.ratios(mesh.size).items():
        table.add_row(_ratio_label(name), f'{ratio:.3f}')
    if plan.copies is not None:
        table.add_row('float32 copies of the layers, besides the state', f'{plan.copies:.2f}')
    for resource, seconds in plan.times(figures, mesh.size).items():
        table.add_row(f'minimum time for {resource}', f'{1e3 * seconds:.3f} ms')
    Console(width=100).print(table)
    if mesh.devices.flat[0].platform == 'cpu':
        print(
            'The size of temporaries comes from the CPU compiler, which keeps bfloat16 matmuls in '
            'float32, so it is an estimate and usually too large. jax allocates 75% of the memory '
            'of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION sets another share.'
        )
    if plan.fits:
        print(f'{plan.name} fits {mesh.size} x {figures.name}.', flush=True)
    else:
        print(f'{plan.name} does not fit {mesh.size} x {figures.name}: {change}', flush=True)


def _ratio_label(name: str) -> str:
    return f'{name} / {"FLOPs of the model" if "FLOPs" in name else "needed"}'


def as_json(plan: Plan, figures: DeviceFigures, num_devices: int) -> dict[str, Any]:
    """Returns a plan as JSON types; sizes are bytes of one device, times are seconds."""
    times = plan.times(figures, num_devices)
    layout = dict.fromkeys(field.name for field in dataclasses.fields(Layout))
    if plan.layout is not None:
        layout = dataclasses.asdict(plan.layout)
    return {
        'name': plan.name,
        'fits': plan.fits,
        'needed': plan.needed,
        'arguments_by_kind': plan.kinds,
        **layout,
        'model_flops': plan.flops.model,
        'recomputed_flops': plan.flops.recomputed,
        'executed_flops': plan.executed,
        'hbm_traffic': plan.hbm_traffic,
        'least': None if plan.least is None else dataclasses.asdict(plan.least),
        'ratios': plan.ratios(num_devices),
        'float32_copies': plan.copies,
        'collectives': [dataclasses.asdict(collective) for collective in plan.collectives],
        'times': times,
        'roofline_seconds': max(times.values()),
        'tokens': plan.tokens,
        'compile_seconds': round(plan.compile_seconds, 1),
    }


def _gigabytes(size: float) -> str:
    return f'{size / 1e9:.3f} GB'
