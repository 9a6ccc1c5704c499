"""Counts the floating point operations that a compiled program executes, from its HLO text.

`accounting.flops` counts the FLOPs of the model. The compiled program may execute more, because the
compiler may expand an operation, recompute a value, or pad tiles. XLA's own `cost_analysis` counts
the body of a loop once; this module counts it once per iteration (`hlo.Program`). It counts only
matmuls: they are `convolution` instructions on TPUs and `dot` instructions on CPUs, and kernels
come with a cost estimate.
"""

import math
import re
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from diffusiongemma.accounting.flops import KernelShapes
from diffusiongemma.accounting.hlo import Instruction, Program, arrays_of, dimensions

_ESTIMATE = re.compile(r'"cost_estimate":\{"flops":"?(\d+)')
_WINDOW = re.compile(r'window=\{([^}]*)\}')
_LABELS = re.compile(r'dim_labels=(\w+)_(\w+)->(\w+)')


def executed_flops(
    program: Program,
    *,
    whole_tiles: bool = False,
    kernels: Mapping[KernelShapes, float] = MappingProxyType({}),
) -> float:
    """Returns the FLOPs of one device; a multiplication and an addition count as two.

    A loop with an unknown number of iterations counts once. A conditional counts its most expensive
    branch. A kernel that has no estimate and is not in `kernels` counts as zero.

    Args:
      program: the compiled program.
      whole_tiles: whether grouped matmuls count by the maximum number of tiles that they visit
        instead of by rows. A tile with rows of several groups is multiplied once per group.
      kernels: the FLOPs of kernels without an estimate (`flops.kernel_flops`).
    """
    flops_by_name: dict[str, float] = {}

    def computation_flops(name: str) -> float:
        if name not in flops_by_name:
            instructions = program.computations.get(name, [])
            shapes = {i.name: i.shape for i in instructions}
            flops_by_name[name] = sum(instruction_flops(i, shapes) for i in instructions)
        return flops_by_name[name]

    def instruction_flops(instruction: Instruction, shapes: Mapping[str, str]) -> float:
        if instruction.op == 'convolution':
            return _convolution_flops(instruction, shapes)
        if instruction.op == 'dot':
            return _dot_flops(instruction, shapes)
        if instruction.op == 'custom-call':
            if not _ESTIMATE.search(instruction.tail):
                return kernels.get(_kernel_shapes(instruction, shapes), 0.0)
            return _kernel_flops(instruction, shapes, whole_tiles)
        inner = [computation_flops(name) for name in instruction.called()]
        if instruction.op == 'conditional':
            return max(inner, default=0.0)
        return program.trips(instruction) * sum(inner)

    return computation_flops(program.entry)


def _dot_flops(instruction: Instruction, shapes: Mapping[str, str]) -> float:
    contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', instruction.tail)
    lhs = dimensions(shapes[instruction.operands[0]])
    sizes = [lhs[int(i)] for i in contracted[1].split(',')] if contracted and contracted[1] else []
    return 2.0 * math.prod(dimensions(instruction.shape)) * math.prod(sizes)


def _convolution_flops(instruction: Instruction, shapes: Mapping[str, str]) -> float:
    """Returns the FLOPs of a convolution, without multiplications by padding or dilation holes.

    XLA writes a batched matmul as a convolution over a dilated dimension: at each output position,
    one position of the window meets an input element, and all others lie in holes.
    """
    lhs, kernel = (dimensions(shapes[name]) for name in instruction.operands[:2])
    result = dimensions(instruction.shape)
    labels = _LABELS.search(instruction.tail)
    if labels is None:
        return 0.0
    lhs_labels, kernel_labels, result_labels = labels.groups()
    window = _window(instruction.tail)
    flops = 2.0 * result[result_labels.index('b')] * result[result_labels.index('f')]
    flops *= kernel[kernel_labels.index('i')]
    for axis in (label for label in kernel_labels if label.isdigit()):
        flops *= _overlaps(
            lhs[lhs_labels.index(axis)],
            kernel[kernel_labels.index(axis)],
            result[result_labels.index(axis)],
            {name: sizes[int(axis)] for name, sizes in window.items()},
        )
    return flops


def _window(tail: str) -> dict[str, list[tuple[int, ...]]]:
    """Returns the attributes of a window for each spatial axis: 'pad=1_2x0_0' is [(1, 2), (0, 0)].

    The keys are the names of the attributes.
    """
    match = _WINDOW.search(tail)
    fields = dict(field.split('=') for field in match[1].split()) if match else {}
    return {
        name: [tuple(int(number) for number in axis.split('_')) for axis in value.split('x')]
        for name, value in fields.items()
        if name != 'rhs_reversal'
    }


def _overlaps(size: int, kernel: int, result: int, window: Mapping[str, tuple[int, ...]]) -> float:
    """Returns the number of (output, kernel) position pairs that read an element of the input."""
    if size == kernel == result == 1:
        return 1.0
    stride, (low, *_) = window.get('stride', (1,))[0], window.get('pad', (0, 0))
    spread, holes = window.get('rhs_dilate', (1,))[0], window.get('lhs_dilate', (1,))[0]
    places = np.arange(result)[:, None] * stride + np.arange(kernel) * spread - low
    inside = (places >= 0) & (places <= (size - 1) * holes)
    return float(np.count_nonzero(inside & (places % holes == 0)))


def _kernel_shapes(instruction: Instruction, shapes: Mapping[str, str]) -> KernelShapes:
    operands = [shapes.get(name, '') for name in instruction.operands]
    arrays = (*operands, *arrays_of(instruction.shape))
    return tuple(tuple(dimensions(array)) for array in arrays)


def _kernel_flops(instruction: Instruction, shapes: Mapping[str, str], whole_tiles: bool) -> float:
    """Returns the cost estimate of a kernel, for grouped matmuls optionally by whole tiles.

    A grouped matmul of E groups is recognized by its first four operands: the number of visits, the
    offset of each group [E + 1], and the group and the tile of each visit. The last two have one
    element per tile, plus E - 1.
    """
    match = _ESTIMATE.search(instruction.tail)
    if match is None:
        return 0.0
    flops = float(match[1])
    sizes = [dimensions(shapes.get(name, '')) for name in instruction.operands[:4]]
    grouped = len(sizes) == 4 and sizes[2] == sizes[3] and len(sizes[1]) == len(sizes[2]) == 1
    if not (whole_tiles and grouped):
        return flops
    visits, groups = sizes[2][0], sizes[1][0] - 1
    return flops * visits / (visits - groups + 1)
