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
    fields = dataclasses.fields(records[0])
    names = [f.name for f in fields if f.metadata.get('pytree_node', True) and f.name not in given]
    mapped = jax.tree.map(
        function, *({name: getattr(record, name) for name in names} for record in records)
    )
    return dataclasses.replace(records[0], **mapped, **given)
