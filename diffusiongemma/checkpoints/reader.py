"""The interface of all readers of published tensors."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np


class Reader(Protocol):
    """A reader of tensors by their published names, from a file of any format."""

    directory: Path

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str) -> np.ndarray: ...

    def rows(self, name: str, start: int, stop: int) -> np.ndarray: ...

    def check_weights(self, names: Collection[str]) -> None: ...
