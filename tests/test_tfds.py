"""Tests the built-in tasks as TFDS datasets, and TFDS datasets as sources."""

import subprocess
import sys

import pytest

from diffusiongemma.data.sources import DataSpec, load_source

tfds = pytest.importorskip('tensorflow_datasets')

NAME = 'diffusiongemma_wordmath/small'


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    """Returns a data directory with the small word problems."""
    from diffusiongemma.data import tfds_builders

    directory = tmp_path_factory.mktemp('tfds')
    tfds_builders.prepare(NAME, data_dir=directory)
    return str(directory)


def test_a_data_source_has_the_examples_of_the_task(data_dir):
    rows = tfds.data_source(NAME, split='test', data_dir=data_dir)
    task = load_source(DataSpec(kind='wordmath', split='test', size=200))
    prompts = {row['prompt'].decode() for row in rows}
    assert len(rows) == 200
    assert prompts == {task[i]['prompt'] for i in range(200)}


def test_a_spec_of_a_tfds_dataset_opens_it(data_dir):
    source = load_source(DataSpec(kind='tfds', name=NAME, path=data_dir, split='test'))
    task = load_source(DataSpec(kind='wordmath', split='test', size=200))
    by_prompt = {task[i]['prompt']: task[i] for i in range(200)}
    assert len(source) == 200
    for i in range(0, 200, 17):
        assert source[i] == by_prompt[source[i]['prompt']]


def test_a_slice_of_a_split_and_other_features_can_be_named(data_dir):
    source = load_source(
        DataSpec(
            kind='tfds',
            name=NAME,
            path=data_dir,
            split='train[:10]',
            prompt_feature='response',
            response_feature='answer',
        )
    )
    assert len(source) == 10
    assert source[0]['response'] in source[0]['prompt']


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'name': 'no_such_dataset_anywhere'}, "TFDS has no dataset 'no_such_dataset_anywhere'"),
        ({'split': 'dev'}, r"no split 'dev'; it has \['test', 'train'\]"),
        ({'prompt_feature': 'question'}, r"no feature \['question'\]; it has \['answer'"),
    ],
)
def test_what_a_dataset_does_not_have_is_named(data_dir, changes, message):
    values = {'kind': 'tfds', 'name': NAME, 'path': data_dir} | changes
    with pytest.raises(ValueError, match=message):
        load_source(DataSpec(**values))


def test_tfds_load_prepares_and_reads_a_built_in_dataset(tmp_path):
    """It uses TFRecord files, because TFDS reads ArrayRecord files only as data sources."""
    pytest.importorskip('tensorflow')
    script = (
        'import sys, tensorflow_datasets as tfds\n'
        'from diffusiongemma.data import tfds_builders\n'
        f'kwargs = {{"file_format": "tfrecord"}}\n'
        f'rows = tfds.load({NAME!r}, split="test", data_dir=sys.argv[1], builder_kwargs=kwargs)\n'
        'print(len(rows), next(iter(rows))["prompt"].numpy().decode())\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    count, prompt = done.stdout.splitlines()[-1].split(' ', 1)
    task = load_source(DataSpec(kind='wordmath', split='test', size=200))
    assert count == '200'
    assert prompt in {task[i]['prompt'] for i in range(200)}
