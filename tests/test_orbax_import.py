"""Tests Google's orbax layout on checkpoints that are written from tiny published ones."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

from diffusiongemma.checkpoints import orbax_import
from diffusiongemma.checkpoints.convert import convert
from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.parallel import make_mesh, param_shardings

DATA = Path(__file__).parent / 'data'


def google_layer(tensors, prefix, config, layer):
    """Returns one layer with the names and shapes of the modules of google-deepmind/gemma."""
    attention = config.attention(config.layer_types[layer])
    n, k, h, d = config.num_heads, attention.num_kv_heads, attention.head_dim, config.width

    def get(name):
        return tensors[f'{prefix}layers.{layer}.{name}']

    def heads(name, count):  # [count * H, D] -> [count, D, H]
        return get(f'self_attn.{name}.weight').reshape(count, h, d).transpose(0, 2, 1)

    def mlp(gate, up, down):
        return {'gating_einsum': np.stack([gate, up]), 'linear': down.T}

    def norm(name):
        return {'scale': get(f'{name}.weight')}

    attn = {
        'q_einsum': {'w': heads('q_proj', n)},
        'attn_vec_einsum': {
            'w': get('self_attn.o_proj.weight').reshape(d, n, h).transpose(1, 2, 0)
        },
        'query_norm': norm('self_attn.q_norm'),
        'key_norm': norm('self_attn.k_norm'),
    }
    if attention.value_is_key:
        attn['k_einsum'] = {'w': heads('k_proj', k)}
    else:
        attn['kv_einsum'] = {'w': np.stack([heads('k_proj', k), heads('v_proj', k)])}
    dense = mlp(*(get(f'mlp.{name}_proj.weight') for name in ('gate', 'up', 'down')))
    block = {
        'attn': attn,
        'skip_scale': get('layer_scalar'),
        'pre_attention_norm': norm('input_layernorm'),
        'post_attention_norm': norm('post_attention_layernorm'),
        'post_ffw_norm': norm('post_feedforward_layernorm'),
    }
    if config.moe is None:
        return block | {'mlp': dense, 'pre_ffw_norm': norm('pre_feedforward_layernorm')}
    e, f = config.moe.num_experts, config.moe.expert_width
    return block | {
        'mlp2': dense,
        'mlp': {
            'gating_einsum': {'w': get('experts.gate_up_proj').reshape(e, 2, f, d)},
            'linear': {'w': get('experts.down_proj').swapaxes(1, 2)},
            'router_logits': {'w': get('router.proj.weight').T},
            'router_scale': get('router.scale'),
            'per_expert_scale': get('router.per_expert_scale'),
        },
        'pre_ffw2_norm': norm('pre_feedforward_layernorm'),
        'post_ffw2_norm': norm('post_feedforward_layernorm_1'),
        'pre_ffw_norm': norm('pre_feedforward_layernorm_2'),
        'post_ffw1_norm': norm('post_feedforward_layernorm_2'),
    }


def google_tree(name):
    """Returns the tiny checkpoint `name` in Google's nested layout."""
    tensors = load_file(DATA / name / 'model.safetensors')
    config = load_model(DATA / name)[0].config
    prefix = 'model.decoder.' if config.is_diffusion else 'model.'
    tree = {
        f'layer_{layer}': google_layer(tensors, prefix, config, layer)
        for layer in range(config.num_layers)
    } | {
        'embedder': {'input_embedding': tensors[f'{prefix}embed_tokens.weight']},
        'final_norm': {'scale': tensors[f'{prefix}norm.weight']},
    }
    if config.is_diffusion:
        gate, up, down, norm = (
            tensors[f'{prefix}self_conditioning.{part}.weight']
            for part in ('gate_proj', 'up_proj', 'down_proj', 'pre_norm')
        )
        tree['self_conditioner'] = {
            'pre_norm': {'scale': norm},
            'ffw': {'gating_einsum': np.stack([gate, up]), 'linear': down.T},
        }
        tree['vision_encoder'] = {'entry': {'w': np.ones((2, 2), np.float32)}}
    return jax.tree.map(np.ascontiguousarray, tree)


def write(directory, tree, config_of=None):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory.absolute(), tree)
    if config_of is not None:
        shutil.copyfile(DATA / config_of / 'config.json', directory / 'config.json')
    return directory


def with_one_scalar(params):
    """Uses the denoise pass's scalar for both passes, since Google's layout has only one."""
    flat = flatten_dict(params)
    for path in flat:
        if path[-1] == 'encode_scalar' and (*path[:-1], 'denoise_scalar') in flat:
            flat[path] = flat[*path[:-1], 'denoise_scalar']
    return unflatten_dict(flat)


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.fixture(scope='module')
def moe_checkpoint(tmp_path_factory):
    return write(tmp_path_factory.mktemp('orbax') / 'moe', google_tree('tiny_moe'), 'tiny_moe')


@pytest.mark.slow
def test_a_diffusion_checkpoint_of_google_equals_the_published_one(moe_checkpoint):
    model, params, tokenizer = load_model(moe_checkpoint)
    published, wanted, _ = load_model(DATA / 'tiny_moe')
    assert model == published and tokenizer is None
    assert_trees_equal(params, with_one_scalar(wanted))


@pytest.mark.slow
def test_it_goes_into_the_shards_of_a_mesh_in_another_dtype(moe_checkpoint):
    mesh = make_mesh({'fsdp': 4, 'tensor': 2})
    model, params, _ = load_model(moe_checkpoint, jnp.bfloat16, mesh)
    placed = jax.tree.map(lambda leaf: leaf.sharding, params)
    assert placed == param_shardings(model, mesh)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('bfloat16')}


def test_the_flat_layout_with_its_older_names_is_read_too(tmp_path):
    nested = flatten_dict(google_tree('tiny_gemma4'), sep='/')
    flat = {}
    for name, value in nested.items():
        name = name.replace('/key_norm/', '/_key_norm/').replace('/query_norm/', '/_query_norm/')
        name = name + '/w' if name.endswith(('gating_einsum', 'linear')) else name
        parent, leaf = name.rsplit('/', 1)
        flat.setdefault(f'transformer/{parent}', {})[leaf] = value
    directory = write(tmp_path / 'flat', flat, 'tiny_gemma4')
    assert_trees_equal(load_model(directory)[1], load_model(DATA / 'tiny_gemma4')[1])


def test_missing_unknown_and_misshaped_leaves_are_named(tmp_path):
    tree = google_tree('tiny_gemma4')
    del tree['layer_1']['attn']['q_einsum']
    tree['layer_0']['post_attention_norm']['scale'] = np.ones(7, np.float32)
    tree['layer_3']['mlp3'] = np.ones(3, np.float32)
    with pytest.raises(ValueError) as error:
        load_model(write(tmp_path / 'broken', tree, 'tiny_gemma4'))
    message = str(error.value)
    assert 'model.layers.1.self_attn.q_proj.weight is missing' in message
    assert 'post_attention_layernorm.weight has shape (7,)' in message
    assert 'layer_3/mlp3 is unknown' in message


def test_sizes_of_no_released_model_ask_for_a_config(tmp_path):
    directory = write(tmp_path / 'model', google_tree('tiny_gemma4'))
    with pytest.raises(ValueError, match='put the config.json of the published model'):
        load_model(directory)


@pytest.mark.slow
def test_sizes_of_a_released_model_need_no_config(tmp_path, monkeypatch):
    """The test declares a tiny model as released."""
    numbers = {
        'sliding_window': 8,
        'max_position_embeddings': 512,
        'top_k_experts': 2,
        'canvas_length': 16,
    }
    monkeypatch.setattr(orbax_import, '_RELEASED', {(64, 6): numbers})
    directory = write(tmp_path / 'model', google_tree('tiny_moe'))
    assert load_model(directory)[0] == load_model(DATA / 'tiny_moe')[0]


def test_another_tree_is_an_error_that_shows_what_it_holds(tmp_path):
    directory = write(tmp_path / 'other', {'step': np.zeros(3), 'w': np.ones((2, 2))})
    with pytest.raises(ValueError, match='no layer_0.*first leaves'):
        load_model(directory)


def test_it_is_converted_to_the_published_format(moe_checkpoint, tmp_path):
    convert(moe_checkpoint, tmp_path / 'out', 'hf')
    ours = load_file(tmp_path / 'out' / 'model.safetensors')
    for name, value in load_file(DATA / 'tiny_moe' / 'model.safetensors').items():
        if 'vision' not in name and not name.startswith('model.encoder.'):
            np.testing.assert_array_equal(ours[name], value)
