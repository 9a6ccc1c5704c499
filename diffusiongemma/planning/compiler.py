"""Compiles for devices that are not there, and reads what the compiler says.

For TPUs it is the real compiler. That of GPUs needs a GPU: in its place XLA's CPU compiler lays out
the same program over as many devices.
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

# libtpu asks these who it is; without them it looks for a TPU in this machine.
_ENVIRONMENT = {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_WORKER_ID': '0',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Bytes of one device as the compiler lays them out.

    Attributes:
      arguments, outputs, temporaries, code: of each kind.
      aliased: what outputs share with arguments.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def needed(self) -> int:
        """All of it at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the compiler says of a program; sizes are bytes of one device.

    Attributes:
      name: of the program.
      kinds: arguments by kind, from shapes and shardings.
      layout: of its memory; None where the program does not fit.
      needed: of HBM at the peak.
      fits: whether that is there.
      flops: that the model asks for, of the whole program over all devices.
      executed: FLOPs of the compiled program, one device; kernels by their own estimates, those of
        grouped matmuls by rows. None where they are not known.
      executed_tiles: the same with grouped matmuls by the tiles that they visit at most.
      hbm_traffic: read and written by one device; None where that is not known.
      collectives: what one device sends.
      least: what has to be moved at least; None where that is not known.
      copies: float32 copies of the shard of the trained layers that are held besides the state;
        None for a program that trains nothing.
      tokens: that the program trains on or writes.
      compile_seconds: it took.
      error: what the compiler said where the program does not fit.
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
        """Returns what the compiled program does over what is needed, where both are known."""
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
        """Bytes that one device sends."""
        return sum(collective.sent_bytes for collective in self.collectives)

    def times(self, figures: DeviceFigures, num_devices: int) -> dict[str, float]:
        """Seconds that each resource needs at its published best."""
        seconds = {'compute': sum(self.flops) / num_devices / figures.peak_flops}
        if self.hbm_traffic is not None:
            seconds['HBM'] = self.hbm_traffic / figures.hbm_bandwidth
        if self.layout is not None:
            seconds['interconnect'] = self.sent / figures.link_bandwidth
        return seconds


def topology_devices(name: str) -> tuple[list[Any], DeviceFigures]:
    """The devices of a topology such as 'v5p:2x2x2' or 'H100:8', and what one of them can do.

    Those of GPUs are stand-ins on the CPU.

    Raises:
      ValueError: there is no such topology, no figures for its devices, or no libtpu.
    """
    kind, _, count = name.partition(':')
    if kind in GPUS:
        return _stand_ins(name, count), figures_named(kind)
    if importlib.util.find_spec('libtpu') is None:
        raise ValueError("the TPU compiler is not installed: pip install -e '.[plan]'.")
    jax.config.update('jax_platforms', 'cpu')  # whatever this machine has
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        devices: list[Any] = topologies.get_topology_desc(name, platform='tpu').devices
    except Exception as error:
        raise ValueError(
            f'no TPU topology {name!r} ({str(error).splitlines()[0]}); known are for example '
            'v5e:2x4, v5e:4x4, v5p:2x2x2, v5p:4x4x4, v6e:2x2 and v6e:8x8, and of GPUs '
            f'{", ".join(f"{gpu}:8" for gpu in GPUS)}.'
        ) from error
    figures = figures_of(devices[0].device_kind)
    if figures is None:
        raise ValueError(
            f'{name}: there are no figures of {devices[0].device_kind} in accounting/devices.py; '
            'take a v5e, v5p or v6e.'
        )
    return devices, figures


def _stand_ins(name: str, count: str) -> list[Any]:
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
    """Compiles a program for the devices of a mesh.

    Args:
      program: what is compiled.
      mesh: over the devices.
      figures: of one of them.
      optimization_level: of the compiler: 'O2', its own default, or 'O1', which takes a third of
        the time and half of the host's memory, and finds a program that needs no less memory and
        moves more bytes.
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
        needed = _needed(str(error), sum(program.kinds.values()))
        if needed is None:
            raise
        return plan(
            layout=None, needed=needed, fits=False,
            executed=None, executed_tiles=None, hbm_traffic=None, collectives=[],
            compile_seconds=time.monotonic() - start, error=str(error),
        )  # fmt: skip
    seconds = time.monotonic() - start
    layout, text = _layout(compiled), Program(_text(compiled))
    # What a GPU's fusions read and write is not what those of a CPU do.
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
    memory = compiled.memory_analysis()
    assert memory is not None  # the compilers that plans are made with all say it
    return Layout(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
    )


def _text(compiled: jax.stages.Compiled) -> str:
    text = compiled.as_text()
    assert text is not None  # likewise
    return text


def float32_copies(text: Program, layers: Sequence[Any]) -> float:
    """Returns how many float32 copies of the shard of some parameters are alive at once.

    A buffer counts by its number of elements, if it is that of one of the parameters, so that views
    and other layouts count and what is small does not.

    Args:
      text: the compiled program.
      layers: the parameters, with shardings.
    """
    sizes = [math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in layers]
    large = {size for size in sizes if size > 1e-3 * sum(sizes)}

    def counts(shape: str) -> float:
        size = math.prod(dimensions(shape)) if shape.startswith('f32[') else 0
        return float(size) if size in large else 0.0

    return peak_bytes(text, counts) / sum(size for size in sizes if size in large)


def advice(
    kinds: Mapping[str, float], figures: DeviceFigures, mesh: jax.sharding.Mesh, what: str
) -> str:
    """What to change where a program does not fit.

    Args:
      kinds: bytes of each kind of argument on one device.
      figures: of the device.
      mesh: over the devices.
      what: 'step' or 'sampler'.
    """
    state = sum(kinds.values())
    splits = 'config.mesh.fsdp' if what == 'step' else 'config.mesh.tensor (or expert)'
    if state > 0.8 * figures.hbm_bytes:
        least = -(-int(state * mesh.size) // int(0.7 * figures.hbm_bytes))
        return (
            f'parameters, optimizer state and cache take {state / 1e9:.1f} GB of the '
            f'{figures.hbm_bytes / 1e9:.0f} GB of a device: use a topology of at least {least} '
            f'such devices and raise {splits}'
            + ('; or train adapters alone (--config.lora.rank=16).' if what == 'step' else '.')
        )
    rows = (
        'config.data.batch_size, row_length or canvases_per_row'
        if what == 'step'
        else ('--batch_size, --prompt_length or config.sampling.max_new_tokens')
    )
    return (
        f'parameters, optimizer state and cache fit ({state / 1e9:.1f} GB), activations do not: '
        f'lower {rows}, or use a topology with more devices and raise {splits}.'
    )


def _needed(message: str, arguments: float) -> float | None:
    """Bytes of HBM that a program needs, from the compiler's complaint; None for another one."""
    size = r'([\d.]+)([KMGT]?)'
    for pattern, others in (
        (rf'Used {size} of [\d.]+[KMGT]? hbm', 0.0),
        (rf'required for HLO temporaries \({size}\) exceeds', arguments),
        (rf'required for HLO arguments \({size}\) exceeds', 0.0),
    ):
        if match := re.search(pattern, message):
            return others + float(match[1]) * 1024.0 ** ' KMGT'.index(match[2] or ' ')
    return None


@contextlib.contextmanager
def _at_level(level: str) -> Iterator[None]:
    before = jax.config.values['jax_optimization_level']
    jax.config.update('jax_optimization_level', level)
    try:
        yield
    finally:
        jax.config.update('jax_optimization_level', before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """jax logs a failed compilation with all of its stack; the message is shown in our words."""
    logger = logging.getLogger('jax')
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
