"""Compiles programs for devices that this machine lacks, and reads memory and traffic from them.

Programs for TPUs are compiled by the real TPU compiler. XLA's GPU compiler needs a GPU, so programs
for GPUs are compiled by XLA's CPU compiler instead, for the same number of devices.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from diffusiongemma.accounting.devices import GPUS, DeviceFigures, figures_named, figures_of
from diffusiongemma.accounting.executed import executed_flops
from diffusiongemma.accounting.flops import Flops, flops_of, kernel_flops
from diffusiongemma.accounting.hlo import Collective, Program, dimensions
from diffusiongemma.accounting.liveness import peak_bytes
from diffusiongemma.planning.needed import Needed
from diffusiongemma.planning.programs import PlannedProgram

# libtpu reads these variables; without them it looks for a TPU on this machine.
_ENVIRONMENT = {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_WORKER_ID': '0',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """The memory layout of a compiled program, in bytes of one device.

    Attributes:
      arguments: bytes of the arguments.
      outputs: bytes of the outputs, including `aliased`.
      aliased: bytes of outputs that reuse the memory of arguments.
      temporaries: bytes of all other buffers.
      code: bytes of the generated code.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def needed(self) -> int:
        """Returns the bytes that the program needs on one device."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Plan:
    """A report on one compiled program; sizes are bytes of one device.

    Attributes:
      name: the name of the program.
      kinds: the bytes of each kind of argument, from shapes and shardings.
      layout: the memory layout; None if the program does not fit.
      needed: the peak HBM use.
      fits: whether a device has that much HBM.
      flops: the FLOPs of the model, for the whole program on all devices.
      executed: the FLOPs that one device executes. Kernels count by their own cost estimates, and
        grouped matmuls by their rows. None if they are not known.
      executed_tiles: the same, but grouped matmuls count by the maximum number of tiles that they
        visit.
      hbm_traffic: the bytes that one device reads and writes; None if they are not known.
      collectives: the collectives with the bytes that one device sends.
      least: the minimum bytes that have to be moved; None if they are not known.
      copies: the number of float32 copies of the trained layers' shard that are alive at once, in
        addition to the state; None for a program that trains nothing.
      tokens: the number of tokens that the program trains on or generates.
      compile_seconds: the compile time.
      error: the compiler's message if the program does not fit.
    """

    name: str
    kinds: dict[str, float]
    layout: Layout | None
    needed: float
    fits: bool
    flops: Flops
    executed: float | None
    executed_tiles: float | None
    hbm_traffic: float | None
    collectives: list[Collective]
    tokens: int
    compile_seconds: float
    least: Needed | None = None
    copies: float | None = None
    error: str = ''

    def ratios(self, num_devices: int) -> dict[str, float]:
        """Returns the ratios of actual to needed FLOPs and bytes, as far as both are known."""
        model = self.flops.model / num_devices
        ratios = {}
        if self.executed is not None and self.executed_tiles is not None and model:
            ratios['executed FLOPs'] = self.executed / model
            ratios['executed FLOPs, whole tiles'] = self.executed_tiles / model
            ratios['recomputed FLOPs'] = self.flops.recomputed / num_devices / model
        if self.least is not None and self.hbm_traffic is not None:
            ratios['HBM bytes'] = self.hbm_traffic / self.least.hbm
        if self.least is not None and self.least.sent and self.layout is not None:
            ratios['bytes sent'] = self.sent / self.least.sent
        return ratios

    @property
    def sent(self) -> float:
        """Returns the bytes that one device sends."""
        return sum(collective.sent_bytes for collective in self.collectives)

    def times(self, figures: DeviceFigures, num_devices: int) -> dict[str, float]:
        """Returns the seconds that each resource needs at its published peak."""
        seconds = {'compute': sum(self.flops) / num_devices / figures.peak_flops}
        if self.hbm_traffic is not None:
            seconds['HBM'] = self.hbm_traffic / figures.hbm_bandwidth
        if self.layout is not None:
            seconds['interconnect'] = self.sent / figures.link_bandwidth
        return seconds


def topology_devices(name: str) -> tuple[list[Any], DeviceFigures]:
    """Returns the devices of a topology such as 'v5p:2x2x2' or 'H100:8', and their figures.

    GPUs are represented by CPU devices.

    Raises:
      ValueError: if the topology does not exist, if the table of figures lacks its devices, or if
        libtpu is not installed.
    """
    kind, _, count = name.partition(':')
    kind = {gpu.lower(): gpu for gpu in GPUS}.get(kind.lower(), kind)
    if kind in GPUS:
        return _stand_ins(name, count), figures_named(kind)
    if importlib.util.find_spec('libtpu') is None:
        raise ValueError("the TPU compiler is not installed: pip install -e '.[plan]'.")
    jax.config.update('jax_platforms', 'cpu')  # even if this machine has an accelerator
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        devices: list[Any] = topologies.get_topology_desc(name, platform='tpu').devices
    except Exception as error:
        raise ValueError(
            f'no TPU topology {name!r} ({str(error).splitlines()[0]}); examples are '
            'v5e:2x4, v5e:4x4, v5p:2x2x2, v5p:4x4x4, v6e:2x2 and v6e:8x8, and for GPUs '
            f'{", ".join(f"{gpu}:8" for gpu in GPUS)}.'
        ) from error
    figures = figures_of(devices[0].device_kind)
    if figures is None:
        raise ValueError(
            f'{name}: accounting/devices.py has no figures for {devices[0].device_kind}; '
            'use v5e, v5p or v6e.'
        )
    return devices, figures


def _stand_ins(name: str, count: str) -> list[Any]:
    """Returns as many CPU devices as a topology has GPUs."""
    if not count.isdecimal() or not int(count):
        raise ValueError(f'--topology={name}: write how many GPUs, for example H100:8.')
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', int(count))
    return jax.devices()


def compile_program(
    program: PlannedProgram,
    mesh: jax.sharding.Mesh,
    figures: DeviceFigures,
    optimization_level: str = 'O2',
) -> Plan:
    """Compiles a program for the devices of a mesh and returns the report on it.

    Args:
      program: the function and its abstract arguments.
      mesh: the mesh of the devices.
      figures: the published figures of one device.
      optimization_level: the optimization level of the compiler. 'O2' is its default. 'O1' takes a
        third of the time and half of the host memory, but the compiled program needs no less
        memory and moves more bytes.
    """
    function = jax.jit(program.function, donate_argnums=program.donated)
    traced = function.trace(*program.arguments)
    plan = functools.partial(
        Plan,
        name=program.name,
        kinds=dict(program.kinds),
        flops=flops_of(traced.jaxpr),
        tokens=program.tokens,
        least=program.needed,
    )
    start = time.monotonic()
    lowered = traced.lower()
    try:
        with _quiet(), _at_level(optimization_level):
            compiled = lowered.compile()
    except Exception as error:
        needed = _needed(str(error))
        if needed is None:
            raise
        return plan(
            layout=None, needed=needed, fits=False,
            executed=None, executed_tiles=None, hbm_traffic=None, collectives=[],
            compile_seconds=time.monotonic() - start, error=str(error),
        )  # fmt: skip
    seconds = time.monotonic() - start
    layout, text = _layout(compiled), Program(_text(compiled))
    # The fusions of the CPU compiler do not tell the memory traffic of a GPU.
    is_tpu = mesh.devices.flat[0].platform != 'cpu'
    kernels = kernel_flops(traced.jaxpr)
    return plan(
        layout=layout, needed=layout.needed, fits=layout.needed <= figures.hbm_bytes,
        executed=executed_flops(text, kernels=kernels) if is_tpu else None,
        executed_tiles=executed_flops(text, whole_tiles=True, kernels=kernels) if is_tpu else None,
        hbm_traffic=text.hbm_bytes() if is_tpu else None,
        collectives=text.collectives(mesh.shape), compile_seconds=seconds,
        copies=float32_copies(text, program.layers) if is_tpu and program.layers else None,
    )  # fmt: skip


def _layout(compiled: jax.stages.Compiled) -> Layout:
    """Returns the memory layout of a compiled program."""
    memory = compiled.memory_analysis()
    assert memory is not None  # the TPU and CPU compilers both support it
    return Layout(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
    )


def _text(compiled: jax.stages.Compiled) -> str:
    """Returns the HLO text of a compiled program."""
    text = compiled.as_text()
    assert text is not None  # the TPU and CPU compilers both support it
    return text


def float32_copies(text: Program, layers: Sequence[Any]) -> float:
    """Returns the maximum number of float32 copies of some parameters that are alive at once.

    A buffer counts as a copy if its number of elements equals that of the shard of a large
    parameter. This includes views and other layouts, and excludes small buffers.

    Args:
      text: the compiled program.
      layers: the parameters as ShapeDtypeStructs with shardings.
    """
    sizes: list[int] = [math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in layers]
    large = {size for size in sizes if size > 1e-3 * sum(sizes)}

    def counts(shape: str) -> float:
        size = math.prod(dimensions(shape)) if shape.startswith('f32[') else 0
        return float(size) if size in large else 0.0

    return peak_bytes(text, counts) / sum(size for size in sizes if size in large)


def advice(
    kinds: Mapping[str, float], figures: DeviceFigures, mesh: jax.sharding.Mesh, what: str
) -> str:
    """Returns a sentence that says what to change if a program does not fit.

    Args:
      kinds: the bytes of each kind of argument on one device.
      figures: the published figures of the device.
      mesh: the mesh of the devices.
      what: the kind of program, 'step' or 'sampler'.
    """
    state = sum(kinds.values())
    copies = mesh.shape.get('data', 1) * mesh.shape.get('sequence', 1)  # these axes do not split it
    axis = 'config.mesh.fsdp' if what == 'step' else 'config.mesh.tensor (or expert)'
    if state > 0.8 * figures.hbm_bytes:
        num_devices = -(-int(state * mesh.size / copies) // int(0.7 * figures.hbm_bytes))
        adapters_help = what == 'step' and not kinds.get('frozen student')
        return (
            f'parameters, optimizer state and cache take {state / 1e9:.1f} GB of the '
            f'{figures.hbm_bytes / 1e9:.0f} GB of a device: use a topology of at least '
            f'{num_devices} such devices and raise {axis}'
            + ('; or train only adapters (--config.lora.rank=16).' if adapters_help else '.')
        )
    rows = (
        'config.data.batch_size, row_length or canvases_per_row'
        if what == 'step'
        else ('--batch_size, --prompt_length or config.sampling.max_new_tokens')
    )
    return (
        f'parameters, optimizer state and cache fit ({state / 1e9:.1f} GB), but activations do '
        f'not: lower {rows}, or use a topology with more devices and raise {axis}.'
    )


def _needed(message: str) -> float | None:
    """Returns the HBM bytes that an out-of-memory error names, or None for any other error.

    What the compiler calls temporaries includes the arguments, if they fit.
    """
    for pattern in (
        r'Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm',
        r'required for HLO (?:temporaries|arguments) \(([\d.]+)([KMGT]?)\) exceeds',
    ):
        if match := re.search(pattern, message):
            return float(match[1]) * 1024.0 ** ' KMGT'.index(match[2] or ' ')
    return None


@contextlib.contextmanager
def _at_level(level: str) -> Iterator[None]:
    """Sets the optimization level of the compiler inside a `with` block."""
    before = jax.config.values['jax_optimization_level']
    jax.config.update('jax_optimization_level', level)
    try:
        yield
    finally:
        jax.config.update('jax_optimization_level', before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses the log of a failed compilation with its stack trace; the plan reports it."""
    logger = logging.getLogger('jax')
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
