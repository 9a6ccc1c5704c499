"""Errors that end a command with one line, and hints for their messages."""

import difflib
import math
from collections.abc import Iterable


class CheckpointError(RuntimeError):
    """Raised if a checkpoint can't be written or read; the message says what to do."""


class Preempted(Exception):
    """Raised after a run that was asked to stop has saved its state."""


# Errors that the user can fix. Their messages say how; all others are bugs.
FIXABLE = (ValueError, FileNotFoundError, FloatingPointError, CheckpointError)


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Checks that a setting is a finite number within limits.

    Raises:
      ValueError: if it is not; the message has the name, the limits and the value.
    """
    if not low <= value <= high or value == math.inf:  # `math.isinf` fails on huge integers
        limits = f'>= {low}' if math.isinf(high) else f'in [{low}, {high}]'
        raise ValueError(f'{name} must be {limits}, got {value}.')


def nearest(name: str, known: Iterable[str], they: str = 'known') -> str:
    """Returns a hint for an unknown name: the nearest known name, or the list of all known ones.

    Args:
      name: the unknown name.
      known: the known names.
      they: the words before the list, such as 'known keys'.
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f'did you mean {near[0]!r}?' if near else f'{they}: {known}.'
