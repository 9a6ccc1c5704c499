"""Errors that end a command with one line, and hints for their messages."""

import difflib
from collections.abc import Iterable


class CheckpointError(RuntimeError):
    """An error: a checkpoint can't be written or read. The message says what to do."""


class Preempted(Exception):
    """An exception: a run was asked to stop, and its state is saved."""


# Errors that the user can fix. Their messages say how; all others are bugs.
FIXABLE = (ValueError, FileNotFoundError, FloatingPointError, CheckpointError)


def nearest(name: str, known: Iterable[str], they: str = 'known') -> str:
    """Returns a hint for an unknown name: the nearest known name, or the list of all known ones.

    `they` is the word before that list.
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f'did you mean {near[0]!r}?' if near else f'{they}: {known}.'
