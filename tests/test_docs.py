"""Tests that the examples of the documentation run and print what the pages show."""

import doctest
import pathlib

import pytest

from diffusiongemma.data import tokenizer

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [path for path in sorted((ROOT / 'docs').glob('*.md')) if '>>> ' in path.read_text()]


@pytest.mark.parametrize(
    'path',
    [pytest.param(path, marks=[pytest.mark.slow] * (path.stem == 'sampling')) for path in PAGES],
    ids=lambda path: path.stem,
)
def test_the_examples_of_a_page_run_as_printed(path):
    result = doctest.testfile(str(path), module_relative=False)
    assert result.attempted and not result.failed


def test_the_examples_of_the_tokenizer_run_as_printed():
    result = doctest.testmod(tokenizer)
    assert result.attempted and not result.failed


def test_links_between_pages_lead_somewhere():
    import re

    for page in [ROOT / 'README.md', *(ROOT / 'docs').rglob('*.md')]:
        for target in re.findall(r'\]\(([^)#]+)\)', page.read_text()):
            if '://' not in target:
                assert (page.parent / target).exists(), f'{page.name} links to {target}'
