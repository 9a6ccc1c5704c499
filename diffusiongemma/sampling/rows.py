"""Maps of what belongs to the rows of a batch, field by field."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import jax

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar('Record', bound='DataclassInstance')


def map_but(function: Callable[..., Any], *records: Record, **given: Any) -> Record:
    """`jax.tree.map` over pytree dataclasses, but for the fields whose results are `given`."""
    nothing = dict.fromkeys(given)  # None is a pytree without leaves
    mapped = jax.tree.map(function, *(dataclasses.replace(each, **nothing) for each in records))
    return dataclasses.replace(mapped, **given)
