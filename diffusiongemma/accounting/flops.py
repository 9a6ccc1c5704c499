"""Counts the floating point operations of a function from what jax traces, without running it.

XLA's own count takes the body of a loop once, so that layers in a scan would count as one layer.
Here a scan counts as often as it runs. Matrix products alone are counted, as model FLOPs usually
are (PaLM, arXiv:2204.02311, appendix B).
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import core

# Share of a kernel's products that another kernel has made already: the backward kernels of splash
# attention make the scores again, and both of them the gradient by the weights of attention.
_REPEATED_IN_KERNEL = {'splash_mha_dkv': 1 / 4, 'splash_mha_dq': 2 / 3}


# Shapes of a kernel's operands and results.
KernelShapes = tuple[tuple[int, ...], ...]


class Flops(NamedTuple):
    """Operations of a function over all devices; a multiplication and an addition are two.

    Attributes:
      model: without what rematerialization computes a second time.
      recomputed: that.
    """

    model: float
    recomputed: float

    def __add__(self, other: 'Flops') -> 'Flops':  # type: ignore[override]  # adds, not joins
        return Flops(self.model + other.model, self.recomputed + other.recomputed)

    def times(self, factor: float) -> 'Flops':
        return Flops(self.model * factor, self.recomputed * factor)


def count_flops(function: Callable[..., Any], *args: Any) -> Flops:
    """FLOPs of `function(*args)`; arrays or ShapeDtypeStructs do for the arguments.

    The body of a while loop counts once, and of a conditional the branch that costs most. A Pallas
    kernel without an estimate of its own counts what it does at each place of its grid.
    """
    return flops_of(jax.make_jaxpr(function)(*args))


def flops_of(traced: core.ClosedJaxpr) -> Flops:
    """FLOPs of what jax traced of a function, as `count_flops` counts them."""
    return _of_jaxpr(traced.jaxpr)


def kernel_flops(traced: core.ClosedJaxpr) -> dict[KernelShapes, float]:
    """FLOPs of one call of each Pallas kernel without an estimate of its own.

    The compiled text says nothing of what such a kernel computes (`executed.executed_flops`).

    Args:
      traced: what jax traced of a function.

    Returns:
      FLOPs by the shapes of the kernel's operands and then its results, on one device.
    """
    found: dict[KernelShapes, float] = {}
    pending = [traced.jaxpr]
    while pending:
        for equation in pending.pop().eqns:
            params = equation.params
            if equation.primitive.name != 'pallas_call':
                pending += _inner_jaxprs(params)
            elif params.get('cost_estimate') is None:
                shapes = (var.aval.shape for var in (*equation.invars, *equation.outvars))
                found[tuple(shapes)] = sum(_kernel_flops(params, again=False))
    return found


def _of_jaxpr(jaxpr: Any, again: bool = False) -> Flops:
    return sum((_of_equation(equation, again) for equation in jaxpr.eqns), Flops(0.0, 0.0))


def _of_equation(equation: Any, again: bool) -> Flops:
    """Of an equation, or of one of a function that is called `again`."""
    name, params = equation.primitive.name, equation.params
    again |= 'rematted_computation' in str(equation.source_info.name_stack)
    if name == 'dot_general':
        return _split(_dot_flops(equation), again)
    if name.startswith('ragged_dot'):
        return _split(_ragged_dot_flops(equation), again)
    if name == 'pallas_call':
        return _kernel_flops(params, again)
    inner = [_of_jaxpr(jaxpr, again) for jaxpr in _inner_jaxprs(params)]
    if not inner:
        return Flops(0.0, 0.0)
    if name == 'cond':
        # Ways of different platforms to compute the same: the last, for any platform, counts.
        return inner[-1] if params.get('branches_platforms') else max(inner)
    total = sum(inner, Flops(0.0, 0.0))
    if name == 'scan':
        return total.times(params['length'])
    if name == 'shard_map':  # its shapes are those of one device
        axes = params.get('newly_manual_axes') or params['manual_axes']  # the newer name first
        return total.times(math.prod(params['mesh'].shape[axis] for axis in axes))
    return total


def _split(flops: float, again: bool) -> Flops:
    return Flops(0.0, flops) if again else Flops(flops, 0.0)


def _kernel_flops(params: dict[str, Any], again: bool) -> Flops:
    """Of a Pallas kernel; what it skips, and its loops decide when they run, counts too."""
    estimate = params.get('cost_estimate')
    if estimate is not None:
        return _split(float(estimate.flops), again)
    flops = sum(_of_jaxpr(params['jaxpr'])) * math.prod(params['grid_mapping'].grid)
    name = str(params.get('name', ''))
    share = 1.0 if again else sum(s for k, s in _REPEATED_IN_KERNEL.items() if name.startswith(k))
    return Flops((1 - share) * flops, share * flops)


def _dot_flops(equation: Any) -> float:
    (contracted, _), _ = equation.params['dimension_numbers']
    lhs = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracted)


def _ragged_dot_flops(equation: Any) -> float:
    """Each row is multiplied with the matrix of its own group alone."""
    numbers = equation.params['ragged_dot_dimension_numbers']
    (contracted, _), _ = numbers.dot_dimension_numbers
    lhs, out = (var.aval.shape for var in (equation.invars[0], equation.outvars[0]))
    flops = 2.0 * math.prod(out) * math.prod(lhs[i] for i in contracted)
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
