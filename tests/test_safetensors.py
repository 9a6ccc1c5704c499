"""Tests reading the published format: files, index, config and mapping to parameters."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffusiongemma.checkpoints import hf_import
from diffusiongemma.checkpoints.hf_config import model_config_from_hf, read_hf_config
from diffusiongemma.checkpoints.hf_import import load_hf
from diffusiongemma.checkpoints.safetensors_reader import TensorReader
from diffusiongemma.models import PRESETS, DiffusionGemma, Gemma

HELDOUT = Path(__file__).parent / 'data' / 'tiny_heldout'
INDEX = 'model.safetensors.index.json'
DOWN_PROJ = 'model.decoder.layers.1.mlp.down_proj.weight'


@pytest.fixture(scope='module')
def tensors():
    return load_file(HELDOUT / 'model.safetensors')


@pytest.fixture(scope='module')
def params():
    return load_hf(HELDOUT, jnp.float32)[1]


def write(directory, tensors, config=None):
    """Writes a checkpoint of one file."""
    directory.mkdir(exist_ok=True)
    shutil.copyfile(HELDOUT / 'config.json', directory / 'config.json')
    if config is not None:
        (directory / 'config.json').write_text(json.dumps(config))
    save_file(tensors, directory / 'model.safetensors')
    return directory


def write_sharded(directory, tensors):
    """Writes a checkpoint of three files with an index; returns the index."""
    shutil.copyfile(HELDOUT / 'config.json', directory / 'config.json')
    names = sorted(tensors)
    weight_map = {}
    for i in range(3):
        file = f'model-{i + 1:05d}-of-00003.safetensors'
        save_file({name: tensors[name] for name in names[i::3]}, directory / file)
        weight_map |= dict.fromkeys(names[i::3], file)
    index = {'metadata': {'total_size': 0}, 'weight_map': weight_map}
    (directory / INDEX).write_text(json.dumps(index))
    return index


def hf_config(**changes):
    """Returns config.json of the held-out checkpoint with other text values; None deletes a key."""
    content = json.loads((HELDOUT / 'config.json').read_text())
    text = content['text_config'] | changes
    content['text_config'] = {
        name: v for name, v in text.items() if name not in changes or v is not None
    }
    return content


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(left, right)


def test_shards_with_an_index_equal_the_single_file(tmp_path, tensors, params):
    write_sharded(tmp_path, tensors)
    assert_trees_equal(load_hf(tmp_path, jnp.float32)[1], params)


def test_stacked_parameters_hold_the_tensors_of_their_layers(tensors, params):
    # Layers 1 and 3 are the second layer of the pattern in its two repetitions.
    down = params['backbone']['layers']['layer_1']['mlp']['down']
    np.testing.assert_array_equal(down[0], tensors[DOWN_PROJ].T)
    np.testing.assert_array_equal(down[1], tensors[DOWN_PROJ.replace('.1.', '.3.')].T)


def test_encode_and_denoise_scalars_come_from_encoder_and_decoder(tensors, params):
    layer = params['backbone']['layers']['layer_0']
    encoder = [tensors[f'model.encoder.language_model.layers.{i}.layer_scalar'] for i in (0, 2)]
    decoder = [tensors[f'model.decoder.layers.{i}.layer_scalar'] for i in (0, 2)]
    np.testing.assert_array_equal(layer['encode_scalar'], np.concatenate(encoder))
    np.testing.assert_array_equal(layer['denoise_scalar'], np.concatenate(decoder))


def test_bfloat16_tensors_are_read_as_they_are_stored(tmp_path, tensors):
    stored = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}
    loaded = load_hf(write(tmp_path, stored), jnp.bfloat16)[1]
    norm = loaded['backbone']['final_norm']['scale']
    assert norm.dtype == jnp.bfloat16
    np.testing.assert_array_equal(norm, stored['model.decoder.norm.weight'])


def test_tensors_of_the_vision_tower_are_left_out(tmp_path, tensors, params):
    more = {
        'model.encoder.vision_tower.patch_embedder.input_proj.weight': np.ones((2, 2), np.float32),
        'model.encoder.embed_vision.embedding_projection.weight': np.ones((2, 2), np.float32),
    }
    assert_trees_equal(load_hf(write(tmp_path, tensors | more), jnp.float32)[1], params)


def test_tied_copies_of_the_decoder_are_left_out(tmp_path, tensors, params):
    copies = {
        'lm_head.weight': tensors['model.decoder.embed_tokens.weight'],
        DOWN_PROJ.replace('decoder', 'encoder.language_model'): tensors[DOWN_PROJ],
    }
    assert_trees_equal(load_hf(write(tmp_path, tensors | copies), jnp.float32)[1], params)


def test_every_tied_copy_that_is_left_out_is_logged(tmp_path, tensors, caplog):
    copies = {
        'lm_head.weight': tensors['model.decoder.embed_tokens.weight'].astype(np.float64),
        DOWN_PROJ.replace('decoder', 'encoder.language_model'): tensors[DOWN_PROJ],
    }
    with caplog.at_level('INFO', logger='absl'):
        load_hf(write(tmp_path, tensors | copies), jnp.float32)
    for name in copies:
        assert name in caplog.text


@pytest.mark.parametrize('rows', [slice(0, 1), slice(-1, None), slice(None)])
def test_a_head_with_other_values_than_the_embedding_is_an_error(tmp_path, tensors, rows):
    head = tensors['model.decoder.embed_tokens.weight'].copy()
    head[rows] += 1e-6
    with pytest.raises(ValueError, match='lm_head.weight has other values .* delete lm_head'):
        load_hf(write(tmp_path, tensors | {'lm_head.weight': head}), jnp.float32)
    with pytest.raises(ValueError, match='lm_head.weight has other shape'):
        load_hf(write(tmp_path, tensors | {'lm_head.weight': head[1:].copy()}), jnp.float32)


def test_encoder_weights_other_than_the_decoders_are_an_error(tmp_path, tensors):
    name = DOWN_PROJ.replace('decoder', 'encoder.language_model')
    changed = tensors[DOWN_PROJ].copy()
    changed[-1, -1] *= 2
    with pytest.raises(ValueError, match=f'{name} has other values than {DOWN_PROJ}'):
        load_hf(write(tmp_path, tensors | {name: changed}), jnp.float32)


def test_a_tied_copy_is_compared_some_rows_at_a_time(tmp_path, tensors, monkeypatch):
    monkeypatch.setattr(hf_import, '_COMPARED', 100)
    head = tensors['model.decoder.embed_tokens.weight'].copy()
    load_hf(write(tmp_path, tensors | {'lm_head.weight': head}), jnp.float32)
    head[-1, -1] += 1
    with pytest.raises(ValueError, match='lm_head.weight has other values'):
        load_hf(write(tmp_path, tensors | {'lm_head.weight': head}), jnp.float32)


@pytest.mark.parametrize('dtype', [np.int8, ml_dtypes.float8_e4m3fn])
def test_a_weight_that_is_no_float_is_named_before_any_tensor_is_read(tmp_path, tensors, dtype):
    path = write(tmp_path, tensors) / 'model.safetensors'
    data = path.read_bytes()
    size = int.from_bytes(data[:8], 'little')
    header = json.loads(data[8 : 8 + size])
    about = header[DOWN_PROJ]
    stored = {np.int8: 'I8', ml_dtypes.float8_e4m3fn: 'F8_E4M3'}[dtype]
    about['dtype'], about['shape'] = stored, [*about['shape'][:-1], 4 * about['shape'][-1]]
    header = json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, 'little') + header + data[8 + size :])
    with pytest.raises(ValueError, match=f'{DOWN_PROJ}'):
        load_hf(tmp_path, jnp.float32)
    with pytest.raises(ValueError, match=f'{DOWN_PROJ} is stored as {stored}.*dequantize'):
        TensorReader(tmp_path).check_weights([DOWN_PROJ])


def test_what_is_left_out_is_logged_by_part(tmp_path, caplog):
    shutil.copytree(HELDOUT.parent / 'tiny_gemma3_scaled', tmp_path, dirs_exist_ok=True)
    with caplog.at_level('INFO', logger='absl'):
        config = load_hf(tmp_path, jnp.float32)[0].config
    assert config.full.rope_scale == 8.0 and config.sliding.rope_scale == 1.0
    assert re.search(r'left out.*: multi_modal_projector \(2\), vision_tower \(\d\d\)', caplog.text)


def test_keys_and_values_that_a_file_still_has_for_sharing_layers_are_left_out(tmp_path, caplog):
    source = HELDOUT.parent / 'tiny_gemma4_e2b'
    _, expected = load_hf(source, jnp.float32)
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / 'model.safetensors')
    tensors |= {
        name.replace('.4.', '.6.'): value
        for name, value in tensors.items()
        if re.search(r'\.4\.self_attn\.[kv]_', name)
    }
    save_file(tensors, tmp_path / 'model.safetensors')
    with caplog.at_level('INFO', logger='absl'):
        assert_trees_equal(load_hf(tmp_path, jnp.float32)[1], expected)
    assert 'keys and values of layers that share those of an earlier one (3)' in caplog.text


def test_keys_of_a_layer_that_does_not_exist_are_unknown(tmp_path, tensors):
    name = 'model.decoder.layers.1.self_attn.k_proj.weight'
    more = {name.replace('.1.', '.4.'): tensors[name]}
    with pytest.raises(ValueError, match='layers.4.self_attn.k_proj.weight is unknown'):
        load_hf(write(tmp_path, tensors | more), jnp.float32)


def test_a_truncated_file_is_named(tmp_path, tensors):
    path = write(tmp_path, tensors) / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match='model.safetensors is damaged or truncated'):
        load_hf(tmp_path, jnp.float32)


def test_a_truncated_shard_is_found_before_any_tensor_is_read(tmp_path, tensors):
    write_sharded(tmp_path, tensors)
    shard = tmp_path / 'model-00002-of-00003.safetensors'
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match='model-00002-of-00003.safetensors is damaged'):
        TensorReader(tmp_path)


def test_a_file_that_is_no_safetensors_is_named(tmp_path, tensors):
    (write(tmp_path, tensors) / 'model.safetensors').write_bytes(b'version https://git-lfs')
    with pytest.raises(ValueError, match='model.safetensors is damaged'):
        load_hf(tmp_path, jnp.float32)


def test_a_missing_shard_is_named(tmp_path, tensors):
    write_sharded(tmp_path, tensors)
    (tmp_path / 'model-00003-of-00003.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='model-00003-of-00003.safetensors is missing'):
        load_hf(tmp_path, jnp.float32)


def test_an_index_that_places_a_tensor_in_the_wrong_shard_is_an_error(tmp_path, tensors):
    index = write_sharded(tmp_path, tensors)
    wrong = next(
        f for f in set(index['weight_map'].values()) if f != index['weight_map'][DOWN_PROJ]
    )
    index['weight_map'][DOWN_PROJ] = wrong
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f'places {DOWN_PROJ} in {wrong}'):
        load_hf(tmp_path, jnp.float32)


def test_a_tensor_that_the_index_does_not_know_is_named(tmp_path, tensors):
    index = write_sharded(tmp_path, tensors)
    del index['weight_map'][DOWN_PROJ]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f'holds {DOWN_PROJ}, which {INDEX} does not place there'):
        load_hf(tmp_path, jnp.float32)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('{"weight_map": ', 'not an index with a "weight_map"'),
        ('{"metadata": {}}', 'not an index with a "weight_map"'),
        ('{"weight_map": {"a": "../elsewhere.safetensors"}}', 'not a file beside it'),
    ],
)
def test_an_index_of_another_form_is_an_error(tmp_path, content, message):
    shutil.copyfile(HELDOUT / 'config.json', tmp_path / 'config.json')
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_hf(tmp_path, jnp.float32)


def test_a_directory_without_weights_says_what_it_looked_for(tmp_path):
    shutil.copyfile(HELDOUT / 'config.json', tmp_path / 'config.json')
    with pytest.raises(FileNotFoundError, match='neither model.safetensors nor'):
        load_hf(tmp_path, jnp.float32)


def test_missing_unknown_and_misshaped_tensors_are_all_named(tmp_path, tensors):
    changed = dict(tensors)
    del changed[DOWN_PROJ]
    changed['model.decoder.layers.9.mlp.down_proj.weight'] = tensors[DOWN_PROJ]
    changed['model.decoder.norm.weight'] = np.ones(7, np.float32)
    with pytest.raises(ValueError) as error:
        load_hf(write(tmp_path, changed), jnp.float32)
    message = str(error.value)
    assert f'{DOWN_PROJ} is missing (for backbone/layers/layer_1/mlp/down)' in message
    assert 'model.decoder.layers.9.mlp.down_proj.weight is unknown' in message
    assert 'norm.weight has shape (7,), the config asks for (48,)' in message
    assert 'backbone/final_norm/scale' in message


def test_a_model_without_experts_is_dense(tmp_path, tensors):
    moe = ('.experts.', '.router.', 'layernorm_1.', 'layernorm_2.')
    dense = {name: v for name, v in tensors.items() if not any(part in name for part in moe)}
    model, loaded = load_hf(write(tmp_path, dense, hf_config(num_experts=0)), jnp.float32)
    assert model.config.moe is None
    assert 'moe' not in loaded['backbone']['layers']['layer_0']


def test_the_kind_of_model_follows_from_its_type():
    assert isinstance(load_hf(HELDOUT, jnp.float32)[0], DiffusionGemma)
    teacher = load_hf(HELDOUT.parent / 'tiny_gemma4', jnp.float32)[0]
    assert type(teacher) is Gemma


def test_per_layer_config_and_the_older_global_keys_mean_the_same():
    older = hf_config(per_layer_config=None, global_head_dim=16, num_global_key_value_heads=2)
    assert model_config_from_hf(older) == read_hf_config(HELDOUT)


def test_values_that_are_left_out_take_the_defaults_of_the_format():
    short = hf_config(layer_types=None, rope_parameters=None, per_layer_config=None)
    short['text_config'] |= {'num_hidden_layers': 12}
    config = model_config_from_hf(short)
    assert config.layer_types == (*['sliding'] * 5, 'full') * 2
    assert (config.sliding.rope_theta, config.full.rope_theta) == (1e4, 1e6)
    assert (config.sliding.rope_fraction, config.full.rope_fraction) == (1.0, 0.25)
    assert (config.full.head_dim, config.full.num_kv_heads) == (512, 3)
    assert config.final_logit_softcap == 30.0


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'attention_bias': True}, 'attention_bias'),
        ({'hidden_activation': 'silu'}, 'hidden_activation=silu'),
        ({'tie_word_embeddings': False}, 'tie_word_embeddings'),
        ({'use_bidirectional_attention': 'all'}, 'use_bidirectional_attention'),
        ({'hidden_size_per_layer_input': 8}, 'hidden_size_per_layer_input'),
        ({'num_kv_shared_layers': 2}, 'num_kv_shared_layers'),
        ({'num_hidden_layers': 5}, 'num_hidden_layers is 5, but layer_types has 4'),
        ({'layer_types': ['full_attention', 'linear_attention'] * 2}, 'linear_attention'),
        ({'per_layer_config': {'1': {'head_dim': 16}}}, 'layers of one type must be alike'),
        ({'per_layer_config': {str(i): {'intermediate_size': 8} for i in range(4)}}, 'intermed'),
        (
            {'rope_parameters': {
                'full_attention': {'rope_type': 'yarn', 'rope_theta': 1e6},
                'sliding_attention': {'rope_theta': 1e4},
            }},
            'rotary embedding .* full layers is not supported',
        ),
        ({'hidden_size': None}, "lacks the key 'hidden_size'"),
        ({'num_key_value_heads': 4}, 'num_heads=6 is not a multiple of the 4'),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_an_error_that_names_it(tmp_path, changes, message):
    (tmp_path / 'config.json').write_text(json.dumps(hf_config(**changes)))
    with pytest.raises(ValueError, match=f'config.json.*{message}'):
        read_hf_config(tmp_path)


def test_another_model_type_is_an_error_that_lists_the_known_ones(tmp_path):
    (tmp_path / 'config.json').write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="'llama' cannot be read; supported: .*diffusion_gemma"):
        read_hf_config(tmp_path)


# Values of the released models; the Gemma 3 case omits keys with default values.
RELEASED = {
    'gemma3_4b': {
        'model_type': 'gemma3',
        'text_config': {
            'hidden_size': 2560, 'intermediate_size': 10_240, 'num_hidden_layers': 34,
            'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'}, 'sliding_window': 1024,
        },
    },
    'gemma4_e2b': {
        'model_type': 'gemma4',
        'text_config': {
            'hidden_size': 1536, 'intermediate_size': 6144, 'num_hidden_layers': 35,
            'num_attention_heads': 8, 'num_key_value_heads': 1, 'head_dim': 256,
            'global_head_dim': 512, 'vocab_size': 262_144, 'vocab_size_per_layer_input': 262_144,
            'num_kv_shared_layers': 20, 'hidden_size_per_layer_input': 256,
            'use_double_wide_mlp': True, 'sliding_window': 512, 'final_logit_softcapping': 30.0,
            'layer_types': [*['sliding_attention'] * 4, 'full_attention'] * 7,
        },
    },
    'gemma4_12b': {
        'model_type': 'gemma4_unified',
        'text_config': {
            'hidden_size': 3840, 'intermediate_size': 15_360, 'num_hidden_layers': 48,
            'num_attention_heads': 16, 'num_key_value_heads': 8, 'head_dim': 256,
            'num_global_key_value_heads': 1, 'attention_k_eq_v': True, 'vocab_size': 262_144,
            'sliding_window': 1024, 'final_logit_softcapping': 30.0,
        },
    },
    'diffusiongemma_26b_a4b': {
        'model_type': 'diffusion_gemma',
        'canvas_length': 256,
        'text_config': {
            'vocab_size': 262_144, 'hidden_size': 2816, 'intermediate_size': 2112,
            'num_hidden_layers': 30, 'num_attention_heads': 16, 'num_key_value_heads': 8,
            'head_dim': 256, 'global_head_dim': 512, 'num_global_key_value_heads': 2,
            'sliding_window': 1024, 'num_experts': 128, 'top_k_experts': 8,
            'moe_intermediate_size': 704, 'attention_k_eq_v': True, 'enable_moe_block': True,
            'max_position_embeddings': 262_144,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize('name', RELEASED)
def test_a_released_config_is_the_preset(name):
    config = model_config_from_hf(RELEASED[name])
    if name == 'gemma3_4b':  # 64 additional rows for images
        assert config.vocab_size == 262_208
        config = config.replace(vocab_size=262_144)
    assert config == PRESETS[name]
