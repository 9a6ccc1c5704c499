"""Counts the floating point operations of a function from its jaxpr, without running it.

XLA's own count takes the body of a loop once, so layers in a scan would count as one layer. This
module counts the body of a scan once per iteration. It counts only matmuls, which is the usual
definition of model FLOPs (PaLM, arXiv:2204.02311, appendix B).
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import core

# The share of a kernel's matmuls that repeats another kernel's: both backward kernels of splash
# attention recompute the scores, and both compute the gradient of the attention weights.
_REPEATED_IN_KERNEL = {'splash_mha_dkv': 1 / 4, 'splash_mha_dq': 2 / 3}


# The shapes of a kernel's operands and then of its results.
KernelShapes = tuple[tuple[int, ...], ...]


class Flops(NamedTuple):
    """The FLOPs of a function on all devices; a multiplication and an addition count as two.

    Attributes:
      model: the FLOPs without rematerialization.
      recomputed: the FLOPs that rematerialization adds.
    """

    model: float
    recomputed: float

    def __add__(self, other: 'Flops') -> 'Flops':  # type: ignore[override]  # adds, not joins
        return Flops(self.model + other.model, self.recomputed + other.recomputed)

    def times(self, factor: float) -> 'Flops':
        """Returns both counts multiplied by a factor."""
        return Flops(self.model * factor, self.recomputed * factor)


def count_flops(function: Callable[..., Any], *args: Any) -> Flops:
    """Returns the FLOPs of `function(*args)`; arguments may be arrays or ShapeDtypeStructs.

    The body of a while loop counts once. A conditional counts its most expensive branch. A Pallas
    kernel without a cost estimate counts its body once per grid position.
    """
    return flops_of(jax.make_jaxpr(function)(*args))


def flops_of(traced: core.ClosedJaxpr) -> Flops:
    """Returns the FLOPs of a traced function, as `count_flops` counts them."""
    return _jaxpr_flops(traced.jaxpr)


def kernel_flops(traced: core.ClosedJaxpr) -> dict[KernelShapes, float]:
    """Returns the FLOPs of one call of each Pallas kernel that has no cost estimate.

    The compiled text does not tell what such a kernel computes (`executed.executed_flops`).

    Args:
      traced: the jaxpr of the function.

    Returns:
      The FLOPs on one device; the keys are the shapes of a kernel's operands and results.
    """
    flops: dict[KernelShapes, float] = {}
    pending = [traced.jaxpr]
    while pending:
        for equation in pending.pop().eqns:
            params = equation.params
            if equation.primitive.name != 'pallas_call':
                pending += _inner_jaxprs(params)
            elif params.get('cost_estimate') is None:
                shapes = (var.aval.shape for var in (*equation.invars, *equation.outvars))
                flops[tuple(shapes)] = sum(_kernel_flops(params, again=False))
    return flops


def _jaxpr_flops(jaxpr: Any, again: bool = False) -> Flops:
    return sum((_equation_flops(equation, again) for equation in jaxpr.eqns), Flops(0.0, 0.0))


def _equation_flops(equation: Any, again: bool) -> Flops:
    """Returns the FLOPs of an equation; all are recomputed if `again` is true."""
    name, params = equation.primitive.name, equation.params
    again |= 'rematted_computation' in str(equation.source_info.name_stack)
    if name == 'dot_general':
        return _split(_dot_flops(equation), again)
    if name.startswith('ragged_dot'):
        return _split(_ragged_dot_flops(equation), again)
    if name == 'pallas_call':
        return _kernel_flops(params, again)
    inner = [_jaxpr_flops(jaxpr, again) for jaxpr in _inner_jaxprs(params)]
    if not inner:
        return Flops(0.0, 0.0)
    if name == 'cond':
        # Branches for different platforms compute the same; the last one, the default, counts.
        return inner[-1] if params.get('branches_platforms') else max(inner)
    total = sum(inner, Flops(0.0, 0.0))
    if name == 'scan':
        return total.times(params['length'])
    if name == 'shard_map':  # its shapes are those of one device
        axes = params.get('newly_manual_axes') or params['manual_axes']  # the newer name first
        return total.times(math.prod(params['mesh'].shape[axis] for axis in axes))
    return total


def _split(flops: float, again: bool) -> Flops:
    """Returns FLOPs that are recomputed if `again` is true."""
    return Flops(0.0, flops) if again else Flops(flops, 0.0)


def _kernel_flops(params: dict[str, Any], again: bool) -> Flops:
    """Returns the FLOPs of a Pallas kernel, including blocks that it may skip when it runs."""
    estimate = params.get('cost_estimate')
    if estimate is not None:
        return _split(float(estimate.flops), again)
    flops = sum(_jaxpr_flops(params['jaxpr'])) * math.prod(params['grid_mapping'].grid)
    name = str(params.get('name', ''))
    share = 1.0 if again else sum(s for k, s in _REPEATED_IN_KERNEL.items() if name.startswith(k))
    return Flops((1 - share) * flops, share * flops)


def _dot_flops(equation: Any) -> float:
    (contracted, _), _ = equation.params['dimension_numbers']
    lhs, out = (var.aval.shape for var in (equation.invars[0], equation.outvars[0]))
    flops: float = 2.0 * math.prod(out) * math.prod(lhs[i] for i in contracted)
    return flops


def _ragged_dot_flops(equation: Any) -> float:
    """Returns the FLOPs of a ragged matmul, where each row meets only the matrix of its group."""
    numbers = equation.params['ragged_dot_dimension_numbers']
    (contracted, _), _ = numbers.dot_dimension_numbers
    lhs, out = (var.aval.shape for var in (equation.invars[0], equation.outvars[0]))
    flops: float = 2.0 * math.prod(out) * math.prod(lhs[i] for i in contracted)
    if set(numbers.lhs_ragged_dimensions) & set(contracted):  # the groups share the rows
        flops /= equation.invars[2].aval.shape[-1]
    return flops


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
