"""The interface of all readers of published tensors."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np


class Reader(Protocol):
    """A reader of tensors by their published names, from a file of any format."""

    directory: Path  # the directory or file, for error messages

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the shape of every tensor by name."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor."""
        ...

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Returns rows [start, stop) of one tensor, clipped to its size."""
        ...

    def check_weights(self, names: Collection[str]) -> None:
        """Raises ValueError if one of these tensors is stored in an unsupported dtype."""
        ...
