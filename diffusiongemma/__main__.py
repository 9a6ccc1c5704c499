"""The console command: `diffusiongemma sample ...` is `python -m diffusiongemma.sample ...`."""

import runpy
import sys

COMMANDS = (
    'sample',
    'serve',
    'distill',
    'train',
    'generate_targets',
    'evaluate',
    'convert',
    'verify',
    'plan',
)


def main() -> None:
    """Runs the command that the first argument names, with all further arguments."""
    command = sys.argv[1] if len(sys.argv) > 1 else ''
    usage = f'usage: diffusiongemma COMMAND --flag=value ...; commands: {", ".join(COMMANDS)}'
    if command in ('help', '--help', '-h'):
        print(usage)
        return
    if command not in COMMANDS:
        sys.exit(f'{command!r} is not a command; {usage}' if command else usage)
    sys.argv = [f'diffusiongemma {command}', *sys.argv[2:]]
    runpy.run_module(f'diffusiongemma.{command}', run_name='__main__', alter_sys=False)


if __name__ == '__main__':
    main()
