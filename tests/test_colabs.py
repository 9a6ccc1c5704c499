"""Tests that the notebooks run from top to bottom and are stored without outputs."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / 'colabs').glob('*.ipynb'))
PRINTED = {  # a part of the output of each notebook
    'distill_your_own': 'tokens per draft pass',
    'gemma_to_diffusion': 'equal: True',
    'sample': 'canvas 1: step 1',
    'sampler_in_your_code': 'The answer is ',
}


def every_notebook(test):
    return pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)(test)


@every_notebook
def test_a_notebook_is_valid_and_holds_no_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert 'google.colab' in code[0].source and '%pip install' in code[0].source
    assert set(PRINTED) == {path.stem for path in NOTEBOOKS}


@pytest.mark.slow
@every_notebook
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', '')  # as users run it: on one device
    # The kernel must import the tested package, even if another one is installed.
    monkeypatch.setenv('PYTHONPATH', f'{path.parents[1]}{os.pathsep}{os.getenv("PYTHONPATH", "")}')
    notebook = nbformat.read(path, as_version=4)
    resources = {'metadata': {'path': str(tmp_path)}}
    NotebookClient(notebook, timeout=1800, kernel_name='python3', resources=resources).execute()
    printed = ''.join(
        output.get('text', '') for cell in notebook.cells for output in cell.get('outputs', ())
    )
    assert PRINTED[path.stem] in printed
