"""Maps over the fields of dataclasses that belong to the rows of a batch."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import jax

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar('Record', bound='DataclassInstance')


def map_but(function: Callable[..., Any], *records: Record, **given: Any) -> Record:
    """Returns `jax.tree.map` over pytree dataclasses, except for fields with `given` results."""
    nothing = dict.fromkeys(given)  # None is a pytree without leaves
    mapped = jax.tree.map(function, *(dataclasses.replace(each, **nothing) for each in records))
    return dataclasses.replace(mapped, **given)
