"""Checks the shapes, dtypes and types in signatures, only in test runs."""

import functools
import sys
from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

# The modules whose functions are checked. They must be imported after `install`.
CHECKED = (
    'diffusiongemma.data.packing',
    'diffusiongemma.diffusion.corruption',
    'diffusiongemma.distillation.canvases',
    'diffusiongemma.distillation.losses',
    'diffusiongemma.distillation.position_weights',
    'diffusiongemma.distillation.teacher',
    'diffusiongemma.models.attention',
    'diffusiongemma.models.cache',
    'diffusiongemma.models.denoiser',
    'diffusiongemma.models.layers',
    'diffusiongemma.models.light',
    'diffusiongemma.models.masks',
    'diffusiongemma.models.transformer',
    'diffusiongemma.models.vocabulary',
    'diffusiongemma.sampling.acceptance',
    'diffusiongemma.sampling.controls',
    'diffusiongemma.sampling.decoder',
    'diffusiongemma.sampling.epilogue',
    'diffusiongemma.sampling.gibbs',
    'diffusiongemma.sampling.passes',
    'diffusiongemma.sampling.remasking',
    'diffusiongemma.sampling.sampler',
    'diffusiongemma.sampling.schedule',
    'diffusiongemma.sampling.state',
    'diffusiongemma.sampling.stopping',
)

# These make pytrees of other things: None where a field is left out, shapes in place of arrays.
NOT_OF_ARRAYS = ('diffusiongemma.sampling.rows', 'diffusiongemma.planning')

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float


def typechecked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function` with checks of its arguments and result, for jaxtyping's import hook.

    Fields of a pytree are checked if this package creates it. JAX also creates pytrees, whose
    leaves need not be arrays, and other dataclasses check their fields themselves.
    """
    if function.__name__ != '__init__':
        return _check(function)
    checked = _check(function)

    @functools.wraps(function)
    def where_made(self: object, *args: Any, **fields: Any) -> Any:
        caller = _caller() if hasattr(self, '_flax_dataclass') else ''
        if caller.startswith('diffusiongemma') and not caller.startswith(NOT_OF_ARRAYS):
            checked(self, *args, **fields)

    return where_made


def _caller() -> str:
    """Returns the module that creates the dataclass whose `__init__` is being checked."""
    frame = sys._getframe(2)
    while frame.f_globals['__name__'].partition('.')[0] in ('jaxtyping', 'dataclasses'):
        assert frame.f_back is not None
        frame = frame.f_back
    return frame.f_globals['__name__']
