"""Counts the floating point operations that a compiled program executes, from its HLO text.

`accounting.flops` counts what the model asks for. The compiler may execute more: it may expand an
operation, compute a value again, or fill up tiles. XLA's own `cost_analysis` counts a loop's body
once; here it counts as often as it runs (`hlo.Program`). Matrix multiplications alone are counted:
TPUs have them as `convolution`, CPUs as `dot`, and kernels bring an estimate of their own.
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
    """Returns the FLOPs of one device; a multiplication and an addition are two.

    A loop whose end is not known counts once, and of a conditional the branch that costs most.
    A kernel that has no estimate and is not in `kernels` counts nothing.

    Args:
      program: the compiled program.
      whole_tiles: counts grouped matmuls by the tiles that they visit at most, and not by rows.
        A tile of rows in which groups meet is multiplied once for each of them.
      kernels: FLOPs of kernels without an estimate (`flops.kernel_flops`).
    """
    known: dict[str, float] = {}

    def of_computation(name: str) -> float:
        if name not in known:
            instructions = program.computations.get(name, [])
            shapes = {i.name: i.shape for i in instructions}
            known[name] = sum(of_instruction(i, shapes) for i in instructions)
        return known[name]

    def of_instruction(instruction: Instruction, shapes: Mapping[str, str]) -> float:
        if instruction.op == 'convolution':
            return _convolution_flops(instruction, shapes)
        if instruction.op == 'dot':
            return _dot_flops(instruction, shapes)
        if instruction.op == 'custom-call':
            if not _ESTIMATE.search(instruction.rest):
                return kernels.get(_kernel_shapes(instruction, shapes), 0.0)
            return _kernel_flops(instruction, shapes, whole_tiles)
        inner = [of_computation(name) for name in instruction.called()]
        if instruction.op == 'conditional':
            return max(inner, default=0.0)
        return program.trips(instruction) * sum(inner)

    return of_computation(program.entry)


def _dot_flops(instruction: Instruction, shapes: Mapping[str, str]) -> float:
    contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', instruction.rest)
    lhs = dimensions(shapes[instruction.operands[0]])
    sizes = [lhs[int(i)] for i in contracted[1].split(',')] if contracted and contracted[1] else []
    return 2.0 * math.prod(dimensions(instruction.shape)) * math.prod(sizes)


def _convolution_flops(instruction: Instruction, shapes: Mapping[str, str]) -> float:
    """Counts the products of a kernel's place with an input, not those with padding or holes.

    A batched matmul is a convolution over a dilated dimension: each of its places meets one
    element, and the rest of its window lies in the holes.
    """
    lhs, kernel = (dimensions(shapes[name]) for name in instruction.operands[:2])
    result = dimensions(instruction.shape)
    labels = _LABELS.search(instruction.rest)
    if labels is None:
        return 0.0
    of_lhs, of_kernel, of_result = labels.groups()
    window = _window(instruction.rest)
    flops = 2.0 * result[of_result.index('b')] * result[of_result.index('f')]
    flops *= kernel[of_kernel.index('i')]
    for axis in (label for label in of_kernel if label.isdigit()):
        flops *= _meetings(
            lhs[of_lhs.index(axis)],
            kernel[of_kernel.index(axis)],
            result[of_result.index(axis)],
            {name: sizes[int(axis)] for name, sizes in window.items()},
        )
    return flops


def _window(rest: str) -> dict[str, list[tuple[int, ...]]]:
    """Attributes of a window by name, for each spatial axis: 'pad=1_2x0_0' is [(1, 2), (0, 0)]."""
    match = _WINDOW.search(rest)
    fields = dict(field.split('=') for field in match[1].split()) if match else {}
    return {
        name: [tuple(int(number) for number in axis.split('_')) for axis in value.split('x')]
        for name, value in fields.items()
        if name != 'rhs_reversal'
    }


def _meetings(size: int, kernel: int, result: int, window: Mapping[str, tuple[int, ...]]) -> float:
    """Pairs of a result's place and a kernel's place that meet an element of the input."""
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
    """Returns the estimate that a kernel brings.

    A grouped matmul is known by its first operands: how many visits, where each of E groups begins
    [E + 1], and group and tile of each visit, of which there are as many as tiles and E - 1 more.
    """
    match = _ESTIMATE.search(instruction.rest)
    if match is None:
        return 0.0
    flops = float(match[1])
    lists = [dimensions(shapes.get(name, '')) for name in instruction.operands[:4]]
    grouped = len(lists) == 4 and lists[2] == lists[3] and len(lists[1]) == len(lists[2]) == 1
    if not (whole_tiles and grouped):
        return flops
    visits, groups = lists[2][0], lists[1][0] - 1
    return flops * visits / (visits - groups + 1)
