"""Prints the calls between a command's `main` and a method that it ends in, outermost first.

    python tests/call_depth.py sample sampling.acceptance:EntropyBound.next_canvas --prompt=hi

Each line is a file and a function of the package, without `main` and with the method last. The
command runs until it traces the method. The stages of a distillation before its steps are
shortened: its targets are the problems of its source, and no FLOPs are counted.
"""

import functools
import importlib
import inspect
import sys
from pathlib import Path
from typing import Any, NoReturn

from absl import flags

PACKAGE = Path(__file__).parents[1] / 'diffusiongemma'


class Reached(Exception):
    """An exception that is raised when the method is called."""


def calls_of_package(frame: Any) -> list[str]:
    """Returns 'file function' of the frames of this package, from `main` (excluded) to `frame`."""
    calls: list[str] = []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            if path.parent == PACKAGE and frame.f_code.co_name == 'main':
                break
            calls.append(f'{path.relative_to(PACKAGE)} {frame.f_code.co_qualname}')
        frame = frame.f_back
    return calls[::-1]


def stop_at(owner: type, name: str) -> list[str]:
    """Makes a method end the program; returns a list that then contains the calls up to it."""
    method, calls = getattr(owner, name), []

    @functools.wraps(method)
    def reached(*args: Any, **kwargs: Any) -> NoReturn:
        own = f'{Path(inspect.getfile(method)).relative_to(PACKAGE)} {method.__qualname__}'
        calls[:] = [*calls_of_package(sys._getframe(1)), own]
        raise Reached

    setattr(owner, name, reached)
    return calls


def shorten_distillation() -> None:
    """Skips the stages before a step that do not belong to its call path."""
    from diffusiongemma.distillation import loop, run

    run.write_targets = lambda *args, **kwargs: args[3].source
    loop.Throughput.add = lambda self, *args: None


def main() -> None:
    command, target, *arguments = sys.argv[1:]
    module, _, path = target.partition(':')
    owner, _, name = path.partition('.')
    program = importlib.import_module(f'diffusiongemma.{command}')
    if command == 'distill':
        shorten_distillation()
    calls = stop_at(getattr(importlib.import_module(f'diffusiongemma.{module}'), owner), name)
    flags.FLAGS([command, *arguments])
    try:
        program.main([command])
    except Reached:
        print('\n'.join(calls))


if __name__ == '__main__':
    main()
