"""Maps over the fields of dataclasses that belong to the rows of a batch."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import jax

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar('Record', bound='DataclassInstance')


def map_but(function: Callable[..., Any], *records: Record, **replacements: Any) -> Record:
    """Returns `jax.tree.map` over pytree dataclasses, with replacements for some fields.

    Args:
      function: the function of the leaves, with one argument per record.
      *records: dataclasses of the same type; fields that are not pytree nodes are those of the
        first one.
      **replacements: values of fields that are not mapped.
    """
    fields = (f for f in dataclasses.fields(records[0]) if f.metadata.get('pytree_node', True))
    names = [f.name for f in fields if f.name not in replacements]
    mapped = jax.tree.map(
        function, *({name: getattr(record, name) for name in names} for record in records)
    )
    return dataclasses.replace(records[0], **mapped, **replacements)
