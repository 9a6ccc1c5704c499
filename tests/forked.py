"""Runs commands in forks of one process that has already imported their modules.

A command of this package takes seconds for its imports, which tests of messages should not repeat.
Each command runs as with `python -m`: as `__main__`, with its own flags, output and exit code. It
must not be a command that needs to run before jax is initialized.

    echo '[["sample", "--prompt= "]]' | python tests/forked.py

The last line of the output is JSON: [[exit code, standard error], ...].
"""

import importlib
import json
import os
import runpy
import sys
import tempfile
import traceback

from absl import flags

import diffusiongemma


def forget_flags(program: str) -> None:
    """Removes the flags of a program, so that another program can define its own."""
    for name in (program, 'sampling_flags'):
        for flag in flags.FLAGS.get_flags_for_module(f'diffusiongemma.{name}'):
            delattr(flags.FLAGS, flag.name)
    # The flags that programs share are defined again with the next one.
    sys.modules.pop('diffusiongemma.sampling_flags', None)
    vars(diffusiongemma).pop('sampling_flags', None)


def run(program: str, *arguments: str) -> tuple[int, str]:
    """Returns the exit code and standard error of `python -m diffusiongemma.<program>`."""
    sys.stdout.flush()
    with tempfile.TemporaryFile('w+') as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.argv = [f'{program}.py', *arguments]
            code = 0
            try:
                runpy.run_module(f'diffusiongemma.{program}', run_name='__main__', alter_sys=True)
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read()


def main() -> None:
    commands = json.load(sys.stdin)
    for program in {command[0] for command in commands}:
        importlib.import_module(f'diffusiongemma.{program}')
        forget_flags(program)
    print(json.dumps([run(*command) for command in commands]))


if __name__ == '__main__':
    main()
