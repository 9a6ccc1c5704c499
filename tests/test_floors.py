"""Tests that a file imports only from the floors below its own (docs/architecture.md)."""

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / 'diffusiongemma'
# Floors from top to bottom; parts of the same floor do not import each other.
FLOORS = (
    {'train', 'distill', 'sample', 'serve', 'evaluate', 'convert', 'generate_targets', 'verify',
     'plan'},
    {'sampling_flags'},
    {'cli', 'process_flags', '__main__'},
    {'planning', 'serving'},
    {'distillation'},
    {'view', 'evaluation', '__init__'},
    {'sampling'},
    {'constraints'},
    {'checkpoints'},
    {'accounting', 'data'},
    {'parallel'},
    {'diffusion', 'models'},
    {'configuration'},
    {'errors'},
)  # fmt: skip
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
FILES = [path for path in sorted(PACKAGE.rglob('*.py')) if 'assets' not in path.parts]


def part(path):
    """Returns the package of a file, or the module directly below the root."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported(path):
    """Returns the parts of the package that a file imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('diffusiongemma'):
            _, *inside = node.module.split('.')
            yield from inside[:1] or [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            names = (alias.name.split('.') for alias in node.names)
            yield from (name[1] for name in names if name[0] == 'diffusiongemma' and name[1:])


MOST_LINES, MOST_LINES_OF_A_FUNCTION = 350, 60
TABLES = {'comparison_table'}  # a row of a table in a few lines each


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_can_be_read_at_once(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name not in TABLES:
            documented = len((ast.get_docstring(node) or '').splitlines())
            assert node.end_lineno - node.lineno + 1 - documented <= MOST_LINES_OF_A_FUNCTION


def test_every_part_has_a_floor():
    assert {part(path) for path in FILES} <= set(FLOOR)


@pytest.mark.parametrize('name', sorted({part(path) for path in FILES}))
def test_a_part_imports_from_the_floors_below_alone(name):
    found = {other for path in FILES if part(path) == name for other in imported(path)}
    known = {other for other in found if other in FLOOR} - {name}
    wrong = {other for other in known if FLOOR[other] <= FLOOR[name]}
    assert not wrong, f'{name} imports {sorted(wrong)}, which are not below it'


def test_no_file_imports_itself_through_others():
    modules = {'.'.join(path.relative_to(PACKAGE.parent).with_suffix('').parts) for path in FILES}
    graph = {}
    for path in FILES:
        name = '.'.join(path.relative_to(PACKAGE.parent).with_suffix('').parts)
        graph[name] = {target for target in targets(path) if target in modules}
    assert graph['diffusiongemma.configuration'] == {'diffusiongemma.errors'}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def targets(path):
    """Returns the modules that a file imports at its top."""
    for node in ast.parse(path.read_text(encoding='utf-8')).body:
        if isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f'{node.module}.{alias.name}' for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
