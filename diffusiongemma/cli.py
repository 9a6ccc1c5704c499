"""Shared code of the entry points: flags, config keys on the command line, one-line errors."""

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
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.errors import FIXABLE, CheckpointError, Preempted
from diffusiongemma.parallel import processes
from diffusiongemma.sampling.config import SamplingConfig
from diffusiongemma.view.interrupt import call_interruptibly, is_busy

# Device files of the chips on a TPU machine.
_TPU_FILES = ('/dev/accel[0-9]*', '/dev/vfio/[0-9]*')
# The extra of this package that installs a module which the core install does not include.
EXTRAS = {
    'PIL': 'view', 'array_record': 'train', 'grain': 'train', 'matplotlib': 'train',
    'optax': 'train', 'qwix': 'quant', 'starlette': 'serve', 'tensorboardX': 'train',
    'tensorflow_datasets': 'train', 'uvicorn': 'serve',
}  # fmt: skip
_INSTALL = " (for a GPU pip install -e '.[cuda]', for a TPU '.[tpu]')"


def required(flag: str, value: str | None) -> str:
    """Returns the value of a required flag.

    Raises:
      ValueError: if the flag is not set.
    """
    if value is None:
        raise ValueError(f'--{flag} is needed.')
    return value


def output_directory(flag: str, value: str | None) -> Path:
    """Returns the path of the directory in a required flag.

    Raises:
      ValueError: if the flag is not set, or is a URL, which would become a local directory name.
    """
    value = required(flag, value)
    if '://' in value:
        raise ValueError(
            f'--{flag}={value} is a URL, and files are written to directories: mount the bucket '
            '(gcsfuse, Filestore, NFS) and give the directory where it is mounted.'
        )
    return Path(value)


def student_sampling(checkpoint: str, tokenizer: Tokenizer, **flags: Any) -> SamplingConfig:
    """Returns the sampling config of a checkpoint.

    Flags that are not None take precedence over the settings with which the model was evaluated
    (`about.sampling` of a bundle), and these settings over the defaults, with a maximum of 128
    tokens.

    Args:
      checkpoint: the path of the model, see `load_model`.
      tokenizer: the tokenizer of the model.
      **flags: fields of `SamplingConfig`.

    Raises:
      ValueError: if a field is unknown or out of range.
    """
    fields = SamplingConfig.tokenizer_fields(tokenizer) | {'max_new_tokens': 128}
    overrides = {name: value for name, value in flags.items() if value is not None}
    evaluated = dict(about_model(checkpoint).get('sampling', {}))
    for name, other in (('acceptance', 'entropy_bound'), ('entropy_bound', 'acceptance')):
        if name in overrides:  # replaces the other, because both together are an error
            evaluated.pop(other, None)
    fields |= evaluated | overrides
    return configuration.build(SamplingConfig, fields, 'sampling')


@contextlib.contextmanager
def extra_named(program: str) -> Iterator[None]:
    """Returns a context manager that turns imports of missing extras into a one-line error.

    Args:
      program: the `__name__` of the importing module; errors are unchanged unless it is '__main__'.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = _missing_extra(error)
        if program != '__main__' or missing is None:
            raise
        _fail(missing)


def _missing_extra(error: ModuleNotFoundError) -> str | None:
    """Returns the error message with the extra to install; None if no extra has the module."""
    extra = EXTRAS.get((error.name or '').partition('.')[0])
    return f"{error.name} is not installed: pip install -e '.[{extra}]'." if extra else None


def keep_compiled_programs() -> None:
    """Enables a cache of compiled programs on disk, which makes later starts faster.

    The directory is $XDG_CACHE_HOME/diffusiongemma (default ~/.cache/diffusiongemma), or
    JAX_COMPILATION_CACHE_DIR; JAX_ENABLE_COMPILATION_CACHE=false turns the cache off.
    """
    config: Any = jax.config
    if config.jax_compilation_cache_dir is None:
        home = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
        jax.config.update('jax_compilation_cache_dir', str(Path(home) / 'diffusiongemma'))


def without_missing_tpu() -> None:
    """Selects the CPU backend if this machine has no accelerator and JAX_PLATFORMS is not set.

    Otherwise an installed libtpu searches for a TPU and prints a dozen lines of errors. Plugins of
    other accelerators are respected.
    """
    config: Any = jax.config
    if config.jax_platforms or any(map(glob.glob, _TPU_FILES)):
        return
    if not importlib.metadata.entry_points(group='jax_plugins'):
        jax.config.update('jax_platforms', 'cpu')


def say_devices() -> None:
    """Prints the devices to stderr; call it after `process_flags.join`."""
    if processes.is_writer():
        kinds = Counter(device.device_kind for device in jax.devices())
        text = ', '.join(f'{count} x {kind}' for kind, count in sorted(kinds.items()))
        hint = '' if jax.default_backend() != 'cpu' else _INSTALL
        print(f'computing on {text}{hint}', file=sys.stderr, flush=True)


class _OwnMessages(py_logging.Filter):
    """A log filter that passes all messages of this package, and warnings of other packages."""

    PACKAGE = str(Path(__file__).parent)
    # orbax logs this warning for an optional file in each part of a checkpoint.
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
    """Runs an absl program; errors that the user can fix become one line on stderr and exit code 1.

    The traceback is logged with --verbosity=1.

    Args:
      main: the function to run with the arguments that are not flags.
      config: the dataclass of --config; all of its keys can be set on the command line.
      is_interruptible: returns whether Ctrl-C ends `main` at once, even while XLA compiles, for
        which `main` runs in another thread. It is called when the flags are known.
    """

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            _fail(f'unexpected arguments {argv[1:]}; flags start with --, see --help.')
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
        except Preempted as stopped:
            logging.info('%s', stopped)
        except KeyboardInterrupt:
            print('stopped by Ctrl-C.', file=sys.stderr, flush=True)
            _leave_compiling_thread(130)
            processes.abandon(130)
            sys.exit(130)
        except (*FIXABLE, OSError) as error:
            message = str(error)
            if isinstance(error, OSError) and error.strerror is not None:  # from the system
                if error.filename is None:
                    raise
                message = f'{error.filename}: {error.strerror}; use another path.'
            logging.debug('where it happened:', exc_info=True)
            # The threads of a failed save may abort a normal exit, which would hide the exit code.
            _fail(message, at_once=isinstance(error, CheckpointError))
        except ModuleNotFoundError as error:
            missing = _missing_extra(error)
            if missing is None:
                raise
            _fail(missing)

    app.run(guarded, flags_parser=functools.partial(_parse_flags, config=config))


def _leave_compiling_thread(code: int) -> None:
    """Ends the process if a thread still compiles after Ctrl-C; otherwise returns.

    Such a thread cannot be stopped, and would crash the process at a normal interpreter exit.
    """
    if is_busy():
        _exit_at_once(code)


def _exit_at_once(code: int) -> NoReturn:
    """Ends the process without waiting for its threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _parse_flags(argv: list[str], config: type | None = None) -> list[str]:
    """Parses the flags; the error for an override of an unknown config key names the key."""
    for argument in argv[1:]:
        name, _, path = argument.lstrip('-').partition('=')
        if name == 'config' and not Path(path.partition(':')[0]).is_file():
            _fail(f'no config file {path}; the ones of this project are in configs/.')
    if config is not None:
        flag = flags.FLAGS['config']
        flag.parser = _WithDefaults(flag.parser, config, argv)
    try:
        return flags.FLAGS(argv)
    except SystemExit:  # after --help, which absl ends with 1, as if it had failed
        sys.exit(0)
    except flags.Error as error:
        missing_flag = re.search(r'Flag (--\w+) must have a value other than None', str(error))
        _fail(f'{missing_flag[1]} is required; see --help.' if missing_flag else str(error))
    except (AttributeError, KeyError, TypeError) as error:
        # ml_collections names only the last part of the key, and the nearest key if there is one.
        missing = next(iter(re.findall(r'\w+', str(error))), '')
        nearest = re.findall(r'Did you mean "(\w+)"', str(error))
        hint = f'did you mean {nearest[0]!r}?' if nearest else 'docs/configs.md lists the keys.'
        for argument in argv[1:]:
            parents, _, last = argument.lstrip('-').partition('=')[0].rpartition('.')
            if parents.startswith('config') and last == missing:
                _fail(f'{parents} has no key {last!r}; {hint}')
        _fail(f'{error}; check the overrides of --config.')


class _WithDefaults(flags.ArgumentParser[Any]):
    """A flag parser that loads a config and adds the missing keys of its dataclass.

    This is needed because ml_collections can only override keys that a config has.
    """

    def __init__(self, parser: flags.ArgumentParser[Any], cls: type, argv: list[str]) -> None:
        self._parser, self._cls = parser, cls
        matches = (re.match(r'--?(?:no)?config\.([\w.]+)', argument) for argument in argv)
        self._overridden = [match[1] for match in matches if match]

    def _check_kind(self, config: ConfigDict) -> None:
        """Raises ValueError if a config lacks keys of this command and has those of another one."""
        known, needed = configuration.keys_of(self._cls)
        unknown, missing = sorted(set(config) - known), sorted(needed - set(config))
        if unknown and missing:
            raise ValueError(
                f'this config is not for this command: it has {unknown} and lacks {missing}; use '
                'train for the training of a teacher, and distill for that of a student.'
            )

    def parse(self, argument: Any) -> Any:
        config = self._parser.parse(argument)
        if isinstance(config, ConfigDict):
            self._check_kind(config)
            configuration.complete(config, self._cls, self._overridden)
        return config

    def flag_type(self) -> str:
        return self._parser.flag_type()


def _fail(message: str, *, at_once: bool = False) -> NoReturn:
    print(f'error: {message}', file=sys.stderr)
    processes.abandon(1)
    if at_once:
        _exit_at_once(1)
    sys.exit(1)
