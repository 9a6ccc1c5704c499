"""Tests that adapters and bundles with inconsistent files raise one error with a remedy."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from new_params import new_params
from safetensors.numpy import load_file, save_file
from test_fuzz import LORA, TINY

from diffusiongemma.checkpoints.adapters import fingerprint, read_adapters, save_adapters
from diffusiongemma.checkpoints.bundle import load_bundle, save_bundle
from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.models import Gemma
from diffusiongemma.models.lora import init_lora

FACTOR = 'backbone/layers/layer_0/mlp/down/lora_b'


@pytest.fixture
def directory(tmp_path):
    """Returns a directory with a bundle and adapters of it."""
    params = new_params(Gemma(TINY))
    save_bundle(tmp_path / 'bundle', TINY, params, Tokenizer.load())
    adapters = init_lora(LORA, params, jax.random.key(1))
    save_adapters(
        tmp_path / 'adapters', LORA, adapters, TINY,
        base='../bundle', base_fingerprint=fingerprint(params),
    )  # fmt: skip
    return tmp_path


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_adapters_have_exactly_the_factors_of_their_config(directory):
    path = directory / 'adapters' / 'adapter.safetensors'
    tensors = load_file(path)
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != FACTOR}, f'{FACTOR} is missing'),
        (tensors | {'x/lora_b': tensors[FACTOR]}, 'x/lora_b is unknown'),
        (tensors | {FACTOR: np.ones((1, 3, 4), np.float32)}, f'{FACTOR} has shape'),
        (tensors | {FACTOR: tensors[FACTOR].astype(np.int32)}, f'{FACTOR} is stored as I32'),
    ):
        save_file(changed, path)
        with pytest.raises(ValueError, match=message):
            read_adapters(directory / 'adapters')
    save_file(tensors, path)
    path = directory / 'adapters' / 'adapter.json'
    change(path, lora=json.loads(path.read_text())['lora'] | {'rank': 4})  # another scale
    with pytest.raises(ValueError, match='adapter.json asks for .* Copy both files'):
        read_adapters(directory / 'adapters')


def test_adapters_that_adapt_themselves_are_refused(directory):
    change(directory / 'adapters' / 'adapter.json', base='../adapters')
    with pytest.raises(ValueError, match='adapts itself; change "base"'):
        load_model(directory / 'adapters')


def test_a_bundle_without_its_base_says_where_it_looked(directory):
    for base in ('../elsewhere', '../adapters'):
        change(directory / 'bundle' / 'config.json', base=base)
        with pytest.raises(FileNotFoundError, match=f'bundle \'{base}\'.* change "base"'):
            load_bundle(directory / 'bundle', jnp.float32)
    change(directory / 'bundle' / 'config.json', base=3)
    with pytest.raises(ValueError, match='"base" must be the path of a bundle, got 3'):
        load_bundle(directory / 'bundle', jnp.float32)


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'num_heads': True}, 'num_heads must be an integer >= 1, got True'),
        ({'width': 4.0}, 'width must be an integer >= 1, got 4.0'),
        ({'layer_types': 'full'}, 'layer_types must be a list'),
        ({'full': None}, "'full' must be an object, got None"),
        ({'full': {'num_kv_heads': 1, 'head_dim': 0}}, 'head_dim must be an integer >= 1, got 0'),
        ({'norm_eps': float('nan')}, 'norm_eps must be a number > 0, got nan'),
        ({'value_norm': 1}, 'value_norm must be true or false, got 1'),
        ({'nonsense': 1}, r"unknown keys \['nonsense'\]"),
    ],
)
def test_a_field_of_another_type_is_one_line_that_names_it(directory, values, message):
    path = directory / 'bundle' / 'config.json'
    change(path, model=json.loads(path.read_text())['model'] | values)
    with pytest.raises(ValueError, match=f'config.json.*{message}'):
        load_bundle(directory / 'bundle', jnp.float32)
