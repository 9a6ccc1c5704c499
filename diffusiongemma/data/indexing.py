"""The index of an example, for all sources."""

from collections.abc import Sized


def from_start(index: int, source: Sized) -> int:
    """Returns an index that may be negative as one in [0, len(source)).

    Raises:
      IndexError: if the source has no such example.
    """
    try:
        return range(len(source))[index]
    except IndexError:
        raise IndexError(f'index {index} is out of range for {source!r}.') from None
