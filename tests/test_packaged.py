"""Tests weights from optional packages: assembly, checks, and the error if one is missing."""

import dataclasses
import hashlib
import sys
import types

import pytest

from diffusiongemma.checkpoints import packaged
from diffusiongemma.checkpoints.load import load_model, model_directory

CONTENT = (b'first part,', b' second part')


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Makes a package 'tiny' whose file has two parts, and an empty cache."""
    parts = [tmp_path / f'part{i}' for i in range(len(CONTENT))]
    for path, content in zip(parts, CONTENT, strict=True):
        path.write_bytes(content)
    module = types.ModuleType('tiny_gguf')
    module.chunk_paths = lambda: parts
    monkeypatch.setitem(sys.modules, 'tiny_gguf', module)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    model = packaged.PackagedModel(
        package='tiny-gguf',
        module='tiny_gguf',
        file='tiny.gguf',
        sha256=hashlib.sha256(b''.join(CONTENT)).hexdigest(),
        extra='tiny',
        terms='the terms of tiny',
    )
    monkeypatch.setattr(packaged, 'PACKAGED', {'tiny': model})
    return model, parts


def test_parts_are_assembled_once_and_the_license_is_named_once(package, tmp_path, caplog):
    path = packaged.packaged_file('tiny')
    assert path == tmp_path / 'cache/diffusiongemma/tiny.gguf'
    assert path.read_bytes() == b''.join(CONTENT)
    assert [path] == list(path.parent.iterdir())
    assert caplog.text.count('the terms of tiny apply') == 1
    for part in package[1]:
        part.unlink()
    assert packaged.packaged_file('tiny') == path  # from the cache
    assert caplog.text.count('the terms of tiny apply') == 1


def test_the_cache_is_below_the_home_directory_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    monkeypatch.setenv('HOME', str(tmp_path))
    assert packaged.cache_directory() == tmp_path / '.cache/diffusiongemma'


def test_a_wrong_hash_is_refused_and_leaves_nothing(package, tmp_path):
    package[1][1].write_bytes(b'something else')
    with pytest.raises(ValueError, match='tiny.gguf has the SHA-256 .*: pip install --force-re'):
        packaged.packaged_file('tiny')
    assert not list((tmp_path / 'cache/diffusiongemma').iterdir())


def test_a_damaged_file_in_the_cache_is_named_with_its_remedy(package):
    path = packaged.packaged_file('tiny')
    path.write_bytes(b'damaged')
    with pytest.raises(ValueError, match='has the SHA-256 .*: delete it and load tiny again'):
        packaged.packaged_file('tiny')


def test_a_missing_part_is_named(package):
    package[1][0].unlink()
    with pytest.raises(FileNotFoundError, match='part0 is missing: pip install --force-reinstall'):
        packaged.packaged_file('tiny')


def test_without_the_extra_the_error_is_one_line_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    model = packaged.PACKAGED['gemma3-270m']
    monkeypatch.setitem(sys.modules, model.module, None)
    with pytest.raises(FileNotFoundError, match=r"pip install -e '\.\[gemma\]'$") as error:
        load_model('gemma3-270m')
    assert '\n' not in str(error.value)


def test_a_name_nobody_has_is_answered_with_the_known_ones():
    with pytest.raises(FileNotFoundError, match='builtin-teacher.*gemma3-270m'):
        model_directory('gemma3-270')


def test_packaged_models_are_frozen_values():
    with pytest.raises(dataclasses.FrozenInstanceError):
        packaged.PACKAGED['gemma3-270m'].sha256 = ''
