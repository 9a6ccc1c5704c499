"""Tests that wrong types in config.json are named, and that all layouts of RoPE are read."""

import json

import pytest
from test_safetensors import RELEASED, hf_config

from diffusiongemma.checkpoints.hf_config import model_config_from_hf, read_hf_config

GEMMA3 = {
    'model_type': 'gemma3_text', 'hidden_size': 64, 'intermediate_size': 128, 'head_dim': 16,
    'num_hidden_layers': 6, 'num_attention_heads': 4, 'num_key_value_heads': 2, 'vocab_size': 300,
    'sliding_window': 8,
}  # fmt: skip
FULL = {'rope_type': 'default', 'rope_theta': 1e6}
SLIDING = {'rope_type': 'default', 'rope_theta': 1e4}
LINEAR = {'rope_type': 'linear', 'factor': 8.0}
NESTED = {'full_attention': FULL, 'sliding_attention': SLIDING}


@pytest.mark.parametrize(
    ('settings', 'full', 'sliding'),
    [
        ({}, (1e6, 1), 1e4),
        ({'rope_parameters': None}, (1e6, 1), 1e4),
        ({'rope_theta': 5e5, 'rope_local_base_freq': 2e4}, (5e5, 1), 2e4),
        ({'rope_scaling': LINEAR}, (1e6, 8), 1e4),
        ({'rope_parameters': NESTED, 'rope_scaling': LINEAR}, (1e6, 8), 1e4),
        (
            {
                'rope_parameters': {'full_attention': LINEAR},
                'rope_theta': 5e5,
                'rope_local_base_freq': 2e4,
            },
            (5e5, 8),
            2e4,
        ),
        ({'rope_parameters': {'full_attention': {'type': 'linear', 'factor': 8}}}, (1e6, 8), 1e4),
        ({'rope_parameters': NESTED, 'rope_theta': 1e6}, (1e6, 1), 1e4),
        ({'rope_parameters': NESTED, 'rope_scaling': None}, (1e6, 1), 1e4),
    ],
)
def test_rope_settings_of_gemma_3_in_every_layout(settings, full, sliding):
    config = model_config_from_hf(GEMMA3 | settings)
    assert (config.full.rope_theta, config.full.rope_scale) == full
    assert (config.sliding.rope_theta, config.sliding.rope_scale) == (sliding, 1)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'rope_parameters': FULL}, "'rope_theta', 'rope_type'.*in place of"),
        ({'rope_parameters': NESTED | FULL}, 'beside or in place of'),
        ({'rope_parameters': {'full_attention': 3}}, 'must be an object or null, got 3'),
        ({'rope_parameters': NESTED, 'rope_theta': 5e5}, 'rope_theta=500000.0 contradicts'),
        ({'rope_parameters': NESTED, 'rope_local_base_freq': 2e4}, 'rope_local_base_freq=20000.0'),
        (
            {'rope_parameters': {'full_attention': LINEAR}, 'rope_scaling': LINEAR | {'factor': 4}},
            'rope_scaling has factor=4, and rope_parameters .* keep one',
        ),
        ({'rope_scaling': {'type': 'linear', 'factor': 8.0}}, 'name the type'),
        ({'rope_scaling': {'rope_type': 'yarn', 'factor': 8.0}}, 'yarn.*is not supported'),
        ({'rope_scaling': {'rope_type': 'linear'}}, 'without a factor'),
        ({'rope_scaling': LINEAR | {'factor': True}}, 'factor .* must be a number > 0, got True'),
        ({'rope_scaling': LINEAR | {'beta_fast': 32}}, r"\['beta_fast'\] .* not supported"),
        ({'rope_scaling': LINEAR | {'type': 'yarn'}}, "rope_type='linear' and type='yarn'"),
        ({'rope_theta': 0}, 'rope_theta must be a number > 0, got 0'),
        ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5 outside of'),
    ],
)
def test_rope_settings_that_are_contradictory_or_unknown_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        model_config_from_hf(GEMMA3 | settings)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'rope_parameters': FULL}, 'in place of'),
        ({'rope_parameters': {'full_attention': FULL}}, 'nothing for the sliding_attention'),
        ({'rope_parameters': {**NESTED, 'full_attention': {'rope_type': 'default'}}}, 'rope_theta'),
        ({'rope_scaling': LINEAR}, 'rope_scaling contradicts rope_parameters'),
        ({'rope_theta': 5e5}, 'rope_theta=500000.0 contradicts'),
        ({'sliding_window_pattern': 2, 'layer_types': None}, 'sliding_window_pattern=2 has no'),
        ({'layer_types': ['full_attention', 'sliding_attention'] * 2}, 'the last of layer_types'),
        ({'per_layer_config': {'9': {'head_dim': 4}}}, r'layers \[9\], but there are 4'),
        ({'per_layer_config': {'1': {'head_dim': 4}, '01': {}}}, 'a layer twice'),
        ({'num_experts': 4, 'top_k_experts': 8}, 'top_k must lie in'),
        ({'use_bidirectional_attention': True}, 'use_bidirectional_attention'),
    ],
)
def test_what_would_be_another_model_in_transformers_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        model_config_from_hf(hf_config(**changes))


@pytest.mark.parametrize(
    ('name', 'values', 'words'),
    [
        ('sliding_window', ([8], 0, -1, True, 8.0, '8'), 'an integer >= 1 or null'),
        ('layer_types', (4, 'full_attention', [1], []), 'a list of 1 to 4096 strings or null'),
        ('head_dim', ('16', 0, 2.5, False, None), 'an integer >= 1'),
        ('hidden_size', (0, 48.0, None, [48]), 'an integer >= 1'),
        ('num_attention_heads', (6.0, 2.5, True), 'an integer >= 1'),
        ('num_hidden_layers', (10**9, 0), r'an integer in \[1, 4096\]'),
        ('vocab_size', (2**31, True), 'an integer >= 1'),
        ('per_layer_config', (3, [], None), 'an object'),
        ('max_position_embeddings', (None, '512', True, 1e3), 'an integer >= 1'),
        ('rms_norm_eps', (0, -1e-6, '1e-6', float('nan'), None), 'a number > 0'),
        ('final_logit_softcapping', (0, True, [30]), 'a number > 0 or null'),
        ('tie_word_embeddings', (None, 1, 'true'), 'true or false'),
        ('num_experts', (True, 2.0, -1), 'an integer >= 0 or null'),
        ('hidden_activation', (None, 1), 'a string'),
    ],
)
def test_a_value_of_another_type_is_one_line_that_names_it(tmp_path, name, values, words):
    for value in values:
        content = hf_config()
        content['text_config'][name] = value
        (tmp_path / 'config.json').write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f'text_config.{name} must be {words}, got') as error:
            read_hf_config(tmp_path)
        assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('[1]', 'is not a JSON object'),
        ('{"model_type":"gemma3","text_config":null}', 'text_config must be an object, got null'),
        ('{"model_type":["gemma3"]}', 'cannot be read; supported'),
        ('{"model_type":"gemma3"', 'is not valid JSON'),
        ('{"model_type":"diffusion_gemma"}', "lacks the key 'text_config'"),
    ],
)
def test_a_file_of_another_form_is_one_line(tmp_path, text, message):
    (tmp_path / 'config.json').write_text(text)
    with pytest.raises(ValueError, match=f'config.json.*{message}'):
        read_hf_config(tmp_path)


def test_a_missing_layer_pattern_ends_in_a_full_layer_where_transformers_makes_it_one():
    text = RELEASED['gemma4_e2b']['text_config'] | {'num_kv_shared_layers': 0}
    text = {k: v for k, v in text.items() if k not in ('layer_types', 'use_double_wide_mlp')}
    config = model_config_from_hf({'model_type': 'gemma4', 'text_config': text})
    assert config.layer_types == (*(*['sliding'] * 5, 'full') * 5, *['sliding'] * 4, 'full')
    assert model_config_from_hf(GEMMA3 | {'num_hidden_layers': 7}).layer_types[-1] == 'sliding'
