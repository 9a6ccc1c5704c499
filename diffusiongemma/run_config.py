"""What the entry points share: flags, config keys on the command line, errors as one line."""

import contextlib
import functools
import glob
import importlib.metadata
import logging as py_logging
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict

from diffusiongemma import configuration
from diffusiongemma.checkpoints.load import about_model
from diffusiongemma.checkpoints.store import CheckpointError
from diffusiongemma.configuration import complete
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.distillation import guard
from diffusiongemma.parallel import processes
from diffusiongemma.sampling.config import SamplingConfig
from diffusiongemma.view.interrupt import call_interruptibly, is_busy

# What the chips of a TPU are on the machine that they belong to.
_TPU_FILES = ('/dev/accel[0-9]*', '/dev/vfio/[0-9]*')
# Which extra of this package brings a module that the core install leaves out.
EXTRAS = {
    'PIL': 'view', 'array_record': 'train', 'grain': 'train', 'matplotlib': 'train',
    'optax': 'train', 'qwix': 'quant', 'starlette': 'serve', 'tensorboardX': 'train',
    'tensorflow_datasets': 'train', 'uvicorn': 'serve',
}  # fmt: skip
_INSTALL = " (for a GPU pip install -e '.[cuda]', for a TPU '.[tpu]')"


def given(flag: str, value: str | None) -> str:
    """The value of a flag that has to be there.

    Raises:
      ValueError: it is not.
    """
    if value is None:
        raise ValueError(f'--{flag} is needed.')
    return value


def output_directory(flag: str, value: str | None) -> Path:
    """Returns the directory that a flag names.

    Raises:
      ValueError: it was not given, or is a URL, which as a path would be a directory of this
        machine.
    """
    value = given(flag, value)
    if '://' in value:
        raise ValueError(
            f'--{flag}={value} is a URL, and files are written to directories: mount the bucket '
            '(gcsfuse, Filestore, NFS) and give the directory where it is mounted.'
        )
    return Path(value)


def student_sampling(checkpoint: str, tokenizer: Tokenizer, **flags: Any) -> SamplingConfig:
    """Returns how to sample a checkpoint: by flags that are not None, else as it was evaluated.

    A bundle says so under `about.sampling`; what it leaves open has the defaults, and responses
    have at most 128 tokens.

    Args:
      checkpoint: of `load_model`.
      tokenizer: of the checkpoint.
      **flags: fields of `SamplingConfig`.

    Raises:
      ValueError: a field is unknown or out of range.
    """
    fields = SamplingConfig.tokenizer_fields(tokenizer) | {'max_new_tokens': 128}
    given = {name: value for name, value in flags.items() if value is not None}
    own = dict(about_model(checkpoint).get('sampling', {}))
    for name, other in (('acceptance', 'entropy_bound'), ('entropy_bound', 'acceptance')):
        if name in given:  # takes the place of the other, which would be refused beside it
            own.pop(other, None)
    fields |= own | given
    return configuration.build(SamplingConfig, fields, 'sampling')


@contextlib.contextmanager
def extra_named(program: str) -> Iterator[None]:
    """Ends a program whose imports lack an extra of this package in one line that names it.

    Args:
      program: `__name__` of the module that imports; of one that is not run, errors are left alone.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = _missing_extra(error)
        if program != '__main__' or missing is None:
            raise
        _fail(missing)


def _missing_extra(error: ModuleNotFoundError) -> str | None:
    """Returns what to install; None where no extra of this package has the module."""
    extra = EXTRAS.get((error.name or '').partition('.')[0])
    return f"{error.name} is not installed: pip install -e '.[{extra}]'." if extra else None


def keep_compiled_programs() -> None:
    """Compiled programs are kept on disk, so that a second start need not compile them again.

    In $XDG_CACHE_HOME/diffusiongemma (~/.cache), or wherever JAX_COMPILATION_CACHE_DIR says;
    JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    config: Any = jax.config
    if config.jax_compilation_cache_dir is None:
        home = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
        jax.config.update('jax_compilation_cache_dir', str(Path(home) / 'diffusiongemma'))


def without_missing_tpu() -> None:
    """Keeps jax from looking for a TPU that this machine does not have.

    An installed libtpu writes a dozen lines of errors otherwise. JAX_PLATFORMS and plugins of other
    accelerators are left alone.
    """
    config: Any = jax.config
    if config.jax_platforms or any(map(glob.glob, _TPU_FILES)):
        return
    if not importlib.metadata.entry_points(group='jax_plugins'):
        jax.config.update('jax_platforms', 'cpu')


def say_devices() -> None:
    """Prints to stderr what the program computes on; call it after `process_flags.join`."""
    if processes.is_writer():
        kinds = Counter(device.device_kind for device in jax.devices())
        text = ', '.join(f'{count} x {kind}' for kind, count in sorted(kinds.items()))
        hint = '' if jax.default_backend() != 'cpu' else _INSTALL
        print(f'computing on {text}{hint}', file=sys.stderr, flush=True)


class _OwnMessages(py_logging.Filter):
    """Lets through what this package says, and warnings and errors of others."""

    PACKAGE = str(Path(__file__).parent)
    # Of orbax, which looks for such a file in each part of a checkpoint and needs none.
    EXPECTED = 'Metadata file does not exist'

    def filter(self, record: py_logging.LogRecord) -> bool:
        if record.pathname.startswith(self.PACKAGE):
            return True
        return record.levelno >= py_logging.WARNING and self.EXPECTED not in record.getMessage()


def run_main(
    main: Callable[[list[str]], None],
    config: type | None = None,
    is_interruptible: Callable[[], bool] = lambda: False,
) -> None:
    """Runs an absl program; what the user can mend ends in one line on stderr and exit code 1.

    The traceback is logged with --verbosity=1.

    Args:
      main: takes the arguments that are no flags.
      config: the dataclass that reads --config; all its keys can be set on the command line.
      is_interruptible: whether Ctrl-C ends `main` at once, even while XLA compiles; it then runs in
        another thread. Asked when flags are known.
    """

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f'unexpected arguments {argv[1:]}')
        keep_compiled_programs()
        without_missing_tpu()
        if flags.FLAGS.verbosity <= 0:
            logging.get_absl_handler().addFilter(_OwnMessages())
        try:
            if is_interruptible():
                call_interruptibly(functools.partial(main, argv))
            else:
                main(argv)
            _leave_compiling_thread(0)
        except guard.Preempted as stopped:
            logging.info('%s', stopped)
        except KeyboardInterrupt:
            print('stopped by Ctrl-C.', file=sys.stderr, flush=True)
            _leave_compiling_thread(130)
            processes.abandon(130)
            sys.exit(130)
        except (ValueError, FileNotFoundError, FloatingPointError, CheckpointError) as error:
            logging.debug('where it happened:', exc_info=True)
            _fail(str(error))
        except ModuleNotFoundError as error:
            missing = _missing_extra(error)
            if missing is None:
                raise
            _fail(missing)

    app.run(guarded, flags_parser=functools.partial(_parse_flags, config=config))


def _leave_compiling_thread(code: int) -> None:
    """Ends the process where a thread still compiles what Ctrl-C has stopped; else returns.

    Such a thread cannot be stopped, and aborts the process when the interpreter ends before it.
    """
    if is_busy():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _parse_flags(argv: list[str], config: type | None = None) -> list[str]:
    """Parses the flags; an override of a config key that does not exist is named."""
    for argument in argv[1:]:
        name, _, path = argument.lstrip('-').partition('=')
        if name == 'config' and not Path(path.partition(':')[0]).is_file():
            _fail(f'no config file {path}; the ones of this project are in configs/.')
    if config is not None:
        flag = flags.FLAGS['config']
        flag.parser = _WithDefaults(flag.parser, config, argv)
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        _fail(str(error))
    except (AttributeError, KeyError, TypeError) as error:
        # ml_collections names only the last part of the key, and the nearest one if there is one.
        missing = next(iter(re.findall(r'\w+', str(error))), '')
        nearest = re.findall(r'Did you mean "(\w+)"', str(error))
        hint = f'did you mean {nearest[0]!r}?' if nearest else 'its keys are in the config file.'
        for argument in argv[1:]:
            parents, _, last = argument.lstrip('-').partition('=')[0].rpartition('.')
            if parents.startswith('config') and last == missing:
                _fail(f'{parents} has no key {last!r}; {hint}')
        _fail(f'{error}; check the overrides of --config.')


class _WithDefaults(flags.ArgumentParser):
    """Loads a config and adds the keys of a dataclass that it leaves out.

    ml_collections overrides only keys that a config has.
    """

    def __init__(self, parser: flags.ArgumentParser, cls: type, argv: list[str]) -> None:
        self._parser, self._cls = parser, cls
        matches = (re.match(r'--?(?:no)?config\.([\w.]+)', argument) for argument in argv)
        self._overridden = [match[1] for match in matches if match]

    def parse(self, argument: Any) -> Any:
        config = self._parser.parse(argument)
        if isinstance(config, ConfigDict):
            complete(config, self._cls, self._overridden)
        return config

    def flag_type(self) -> str:
        return self._parser.flag_type()


def _fail(message: str) -> NoReturn:
    print(f'error: {message}', file=sys.stderr)
    processes.abandon(1)
    sys.exit(1)
