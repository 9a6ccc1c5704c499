"""Tests that damaged and unusual files are read exactly or raise one error with a remedy."""

import copy
import json
import math
import random
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import strategies as st
from new_params import new_params
from test_safetensors import RELEASED

from diffusiongemma.checkpoints.adapters import read_adapters, save_adapters
from diffusiongemma.checkpoints.bundle import load_bundle, save_bundle
from diffusiongemma.checkpoints.hf_config import model_config_from_hf, read_hf_config
from diffusiongemma.data.jsonl import JsonlSource
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.models import AttentionConfig, Gemma, ModelConfig
from diffusiongemma.models.lora import LoraConfig, init_lora

DATA = Path(__file__).parent / 'data'
CONFIGS = [
    *(json.loads(path.read_text()) for path in sorted(DATA.glob('tiny_*/config.json'))),
    *RELEASED.values(),
]
VALUES = (
    None, True, False, 0, 1, 2, -1, 7, 1.5, 2.0, 0.0, -0.5, 1e6, 1e4, 10**12, 10**400, math.inf,
    math.nan, '', 'x', '8', 'full_attention', 'yarn', 'linear', 'vision', [], [1], ['x'],
    ['full_attention'], ['sliding_attention', 'full_attention'], {}, {'x': 1}, {'0': {}},
    {'1': {'head_dim': 4}}, {'head_dim': 4},
    {'rope_type': 'linear', 'factor': 8.0}, {'type': 'linear', 'factor': 8.0},
    {'rope_type': 'default'}, {'rope_theta': 5e5}, {'full_attention': None},
    {'full_attention': {'rope_type': 'linear', 'factor': 2.0}},
    {'full_attention': {'rope_theta': 1e5}, 'sliding_attention': {'rope_theta': 2e4}},
)  # fmt: skip
MORE_KEYS = (
    'rope_scaling', 'rope_theta', 'rope_local_base_freq', 'partial_rotary_factor', 'layer_types',
    'sliding_window_pattern', 'per_layer_config', 'global_head_dim', 'query_pre_attn_scalar',
    'num_global_key_value_heads', 'use_bidirectional_attention', 'num_experts', 'attention_k_eq_v',
    'final_logit_softcapping', 'attn_logit_softcapping', 'max_position_embeddings', 'canvas_length',
)  # fmt: skip
TINY = ModelConfig(
    vocab_size=1024,
    width=4,
    num_heads=1,
    ffn_width=4,
    layer_types=('full',),
    sliding=AttentionConfig(num_kv_heads=1, head_dim=2, window=2),
    full=AttentionConfig(num_kv_heads=1, head_dim=2),
)
LORA = LoraConfig(rank=2, passes='both')


def fuzz(number):
    """Runs a test on this many cases by default and ten times as many in the slow suite."""

    def decorate(check):
        def made(count):
            given = hypothesis.given(seed=st.integers(0, 2**32 - 1))
            settings = hypothesis.settings(
                max_examples=count,
                deadline=None,
                suppress_health_check=list(hypothesis.HealthCheck),
            )

            @settings
            @given
            def test(files, seed):
                check(files, random.Random(seed))

            return test

        name = check.__name__.removeprefix('check_')
        globals()[f'test_{name}'] = made(number)
        globals()[f'test_{name}_at_length'] = pytest.mark.slow(made(10 * number))
        return check

    return decorate


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Returns a directory with a bundle and adapters of it."""
    directory = tmp_path_factory.mktemp('fuzz')
    params = new_params(Gemma(TINY))
    save_bundle(directory / 'bundle', TINY, params, Tokenizer.load())
    adapters = init_lora(LORA, params, jax.random.key(1))
    save_adapters(directory / 'adapters', LORA, adapters, TINY, base='x', base_fingerprint='0')
    return directory


def refused(load, *arguments):
    """Returns the loaded value, or None if it is rejected in one line with a remedy."""
    try:
        return load(*arguments)
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
        assert message and '\n' not in message.strip() and len(message) < 2000, message
        assert ' ' in message.strip(), message  # a sentence rather than the name of a key
        return None


def mutate(rng, content):
    """Changes, adds or removes a value anywhere in JSON content."""
    where = content
    while True:
        inside = [k for k in where if isinstance(where[k], dict) and where[k]]
        if not inside or rng.random() < 0.3:
            break
        where = where[rng.choice(sorted(inside))]
    key = rng.choice([*sorted(where), *MORE_KEYS] if rng.random() < 0.4 else [*sorted(where), 'x'])
    if key in where and rng.random() < 0.15:
        del where[key]
    else:
        where[key] = copy.deepcopy(rng.choice(VALUES))


def flip(rng, data):
    """Changes, drops or repeats a few bytes."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(data))
        match rng.randrange(4):
            case 0:
                data[place] = rng.randrange(256)
            case 1:
                del data[place : place + rng.randint(1, 8)]
            case 2:
                data[place:place] = bytes(data[place : place + rng.randint(1, 8)])
            case 3:
                data[place] = rng.choice(b'0123456789"{}[],:')
        if not data:
            return b''
    return bytes(data)


@fuzz(100)
def check_a_config_json_is_read_as_it_is_or_refused(files, rng):
    content = copy.deepcopy(rng.choice(CONFIGS))
    for _ in range(rng.randint(1, 2)):
        mutate(rng, content)
    config = refused(model_config_from_hf_in_a_file, files, content, rng)
    if config is None:
        return
    text = content.get('text_config', content)
    whole = {
        'vocab_size': (config.vocab_size, 262_208),
        'hidden_size': (config.width, None),
        'intermediate_size': (config.ffn_width, None),
        'num_hidden_layers': (config.num_layers, config.num_layers),
        'num_attention_heads': (config.num_heads, 8),
    }
    for name, (value, default) in whole.items():
        assert type(value) is int and value == text.get(name, default), name
    unified = content['model_type'].startswith('gemma4_unified')
    longest = text.get('max_position_embeddings', 262_144 if unified else 131_072)
    assert config.max_positions == longest and config.max_positions is not None
    assert config.norm_eps == text.get('rms_norm_eps', 1e-6)
    if 'sliding' in config.layer_types:
        assert config.sliding.window == text.get('sliding_window', 4096) is not None
    if config.is_diffusion:
        assert config.canvas_length == content.get('canvas_length', 256)
    for attention in (config.full, config.sliding):
        assert attention.rope_theta > 0 and attention.rope_scale > 0 and attention.head_dim > 0


def model_config_from_hf_in_a_file(files, content, rng):
    """Reads the config, half of the time from a file whose text may be damaged too."""
    if rng.random() < 0.5:
        return model_config_from_hf(content) if 'model_type' in content else None
    directory = files / 'config'
    directory.mkdir(exist_ok=True)
    data = json.dumps(content).encode()
    is_damaged = rng.random() < 0.3
    (directory / 'config.json').write_bytes(flip(rng, data) if is_damaged else data)
    config = read_hf_config(directory)
    return None if is_damaged else config


@fuzz(30)
def check_a_safetensors_file_gives_its_tensors_or_is_refused(files, rng):
    path = files / 'bundle' / 'params.safetensors'
    original = path.read_bytes()
    size = int.from_bytes(original[:8], 'little')
    header, rest = original[8 : 8 + size], original[8 + size :]
    if rng.random() < 0.6:  # other values in a header that is still JSON
        content = json.loads(header)
        names = sorted(content)
        name, other = rng.choice(names), rng.choice(names)
        match rng.randrange(5):
            case 0:
                content[name], content[other] = content[other], content[name]
            case 1:
                content[name] = content.get(other)
            case 2:
                content[rng.choice(['x', name + 'x'])] = content.pop(name)
            case 3 if name != '__metadata__':
                content[name]['dtype'] = rng.choice(['F16', 'BF16', 'I32', 'F8_E4M3', 'x', 3])
            case _:
                mutate(rng, content)
        header = json.dumps(content).encode()
        data = len(header).to_bytes(8, 'little') + header + rest
    else:
        data = flip(rng, original[: 8 + size]) + rest
    path.write_bytes(data)
    try:
        loaded = refused(load_bundle, files / 'bundle', None)
    finally:
        path.write_bytes(original)
    if loaded is not None:
        expected = tensors_of(data)
        params = flatten_dict(loaded[1], sep='/')
        assert set(params) == set(expected)
        for name, value in params.items():
            np.testing.assert_array_equal(np.asarray(value), expected[name])


def tensors_of(data):
    """Returns the tensors of a safetensors file, read without the library."""
    size = int.from_bytes(data[:8], 'little')
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    dtypes = {'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16, 'F64': np.float64}
    return {
        name: np.frombuffer(rest[slice(*about['data_offsets'])], dtypes[about['dtype']])
        .reshape(about['shape'])
        .astype(np.float32 if about['dtype'] == 'F64' else dtypes[about['dtype']])
        for name, about in header.items()
        if name != '__metadata__'
    }


def with_other_config(path, rng, load):
    """Loads with a mutated or damaged JSON file; returns the loaded value and the parsed file."""
    original = path.read_bytes()
    content = json.loads(original)
    if rng.random() < 0.8:
        mutate(rng, content)
        data = json.dumps(content).encode()
    else:
        data = flip(rng, original)
    path.write_bytes(data)
    try:
        return refused(load), data
    finally:
        path.write_bytes(original)


@fuzz(20)
def check_a_bundle_is_the_model_that_its_config_says_or_is_refused(files, rng):
    directory = files / 'bundle'
    loaded, data = with_other_config(
        directory / 'config.json', rng, lambda: load_bundle(directory, jnp.float32)
    )
    if loaded is not None:
        assert same(loaded[0].config.to_dict(), json.loads(data)['model'])


@fuzz(20)
def check_adapters_are_those_that_their_config_says_or_are_refused(files, rng):
    directory = files / 'adapters'
    if rng.random() < 0.3:
        path = directory / 'adapter.safetensors'
        original = path.read_bytes()
        path.write_bytes(flip(rng, original[:400]) + original[400:])
        try:
            refused(read_adapters, directory)
        finally:
            path.write_bytes(original)
        return
    found, data = with_other_config(
        directory / 'adapter.json', rng, lambda: read_adapters(directory)
    )
    if found is not None:
        content = json.loads(data)
        assert same(found.model.to_dict(), content['model'])
        for name in ('rank', 'alpha', 'passes'):
            assert getattr(found.lora, name) == content['lora'].get(
                name, getattr(LoraConfig(), name)
            )
        assert (found.base, found.base_fingerprint) == (
            content['base'],
            content['base_fingerprint'],
        )


def same(config, content):
    """Returns whether a config has the values of a file, and defaults for missing keys."""
    return all(
        same(config[name], value) if isinstance(value, dict) else config[name] == value
        for name, value in content.items()
    )


@fuzz(30)
def check_jsonl_rows_are_what_the_file_says_or_are_refused(files, rng):
    lines = []
    for _ in range(rng.randint(0, 4)):
        row = {'prompt': rng.choice(['a', 'é', '\u2028', ' ', '']), 'response': 'b', 'n': 1}
        if rng.random() < 0.3:
            mutate(rng, row)
        lines.append(json.dumps(row, ensure_ascii=rng.random() < 0.5).encode())
        lines += [b''] * (rng.random() < 0.2)
    data = rng.choice([b'\n', b'\r\n']).join(lines)
    data = rng.choice([b'', b'', b'\xef\xbb\xbf']) + data
    if data and rng.random() < 0.4:
        data = flip(rng, data)
    path = files / 'rows.jsonl'
    path.write_bytes(data)
    source = refused(JsonlSource, path)
    if source is not None:
        texts = [line.removeprefix(b'\xef\xbb\xbf').strip() for line in data.split(b'\n')]
        rows = [json.loads(text) for text in texts if text]
        assert len(source) == len(rows)
        for i, row in enumerate(rows):
            assert json.dumps(source[i], sort_keys=True) == json.dumps(row, sort_keys=True)
            assert isinstance(source[i]['prompt'], str) and isinstance(source[i]['response'], str)


def transformers_rope(content):
    """Returns the frequencies of both layer types in transformers; None if it rejects them."""
    import transformers
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding

    gemma3 = content['model_type'].startswith('gemma3')
    cls = transformers.Gemma3TextConfig if gemma3 else transformers.Gemma4TextConfig
    rotary = Gemma3RotaryEmbedding if gemma3 else Gemma4TextRotaryEmbedding
    try:
        module = rotary(cls(**copy.deepcopy(content)))
        names = sorted(set(module.layer_types))
        return {name: getattr(module, f'{name}_inv_freq').numpy() for name in names}
    except Exception:
        return None


@pytest.mark.slow
@hypothesis.settings(max_examples=400, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**32 - 1))
def test_rope_settings_are_those_of_transformers_or_are_refused(seed):
    """For random layouts: if this library accepts one, transformers has the same frequencies."""
    pytest.importorskip('transformers')
    rng = random.Random(seed)
    content = copy.deepcopy(rng.choice([c for c in CONFIGS if 'text_config' not in c]))

    def rope():
        keys = {
            'rope_type': ['default', 'linear', 'proportional', 'yarn'],
            'type': ['linear'],
            'factor': [1.0, 4.0, 8.0],
            'rope_theta': [1e4, 1e6, 5e5],
            'partial_rotary_factor': [0.25, 1.0],
        }
        return {k: rng.choice(v) for k, v in keys.items() if rng.random() < 0.5}

    for name in ('rope_theta', 'rope_local_base_freq'):
        if rng.random() < 0.3:
            content[name] = rng.choice([1e4, 1e6, 5e5])
    if rng.random() < 0.4:
        content['rope_scaling'] = rng.choice([rope(), {'full_attention': rope()}])
    match rng.randrange(4):
        case 0:
            content.pop('rope_parameters', None)
        case 1:
            content['rope_parameters'] = rope()
        case 2:
            nested = {'full_attention': rope(), 'sliding_attention': rng.choice([None, rope()])}
            content['rope_parameters'] = nested
    config = refused(model_config_from_hf, content)
    if config is None:
        return
    theirs = transformers_rope(content)
    assert theirs is not None, content
    for name, frequencies in theirs.items():
        ours = config.attention(name.removesuffix('_attention'))
        half = ours.head_dim // 2
        rotating = int(ours.rope_fraction * half)
        expected = ours.rope_theta ** -(np.arange(half) / half) / ours.rope_scale
        expected[rotating:] = 0.0
        np.testing.assert_allclose(frequencies, expected, rtol=1e-5)
