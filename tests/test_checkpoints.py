"""Tests training checkpoints, model bundles, and `load_model` on all kinds of paths."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from new_params import new_params
from safetensors.numpy import load_file, save_file

from diffusiongemma.checkpoints import int8_storage
from diffusiongemma.checkpoints.bundle import load_bundle, save_bundle
from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.checkpoints.safetensors_writer import save_tensors
from diffusiongemma.checkpoints.store import CheckpointStore, describe_model, read_ema
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.distillation.state import OptimizerConfig, create_state, make_optimizer
from diffusiongemma.models import (
    AttentionConfig,
    DenoiserConfig,
    DiffusionGemma,
    Gemma,
    ModelConfig,
    MoEConfig,
)

CONFIG = ModelConfig(
    vocab_size=37,
    width=16,
    num_heads=2,
    ffn_width=24,
    layer_types=('sliding', 'full'),
    sliding=AttentionConfig(num_kv_heads=2, head_dim=8, window=4),
    full=AttentionConfig(num_kv_heads=1, head_dim=8, value_is_key=True),
    moe=MoEConfig(num_experts=3, top_k=2, expert_width=8),
    denoiser=DenoiserConfig(canvas_length=4),
)
OPTIMIZER = make_optimizer(OptimizerConfig(), 10)
first_state = jax.jit(lambda params: create_state(params, OPTIMIZER))
DATA_STATE = {'version': 1, 'grain': {'next_index': 12}}


def make_state(config=CONFIG, seed=0):
    """A training state whose EMA differs from its parameters."""
    params = new_params(DiffusionGemma(config), seed)
    state = first_state(params)
    ema = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf) + 1), params)
    return state.replace(step=jnp.asarray(seed, jnp.int32), ema_params=ema)


def abstract(state):
    return jax.eval_shape(lambda: state)


def about(config=CONFIG, tokenizer_hash='0123'):
    return describe_model(config, tokenizer_hash)


def save(workdir, *steps, **kwargs):
    """Saves one state per step, with the step as its seed."""
    store = CheckpointStore(workdir, about=about(), **kwargs)
    for step in steps:
        store.save(step, make_state(seed=step), DATA_STATE | {'step': step})
    store.close()


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


def test_the_newest_state_and_place_in_the_data_come_back(tmp_path):
    save(tmp_path, 3, 7)
    state, data_state = CheckpointStore(tmp_path, about=about()).restore(abstract(make_state()))
    assert_trees_equal(state, make_state(seed=7))
    assert data_state == DATA_STATE | {'step': 7}


def test_a_checkpoint_from_before_a_field_of_the_config_has_its_default(tmp_path):
    save(tmp_path, 3)
    path = tmp_path / 'checkpoints' / '3' / 'about' / 'metadata'
    saved = json.loads(path.read_text())
    # In old versions the denoiser had fewer fields, which were fields of the model config.
    denoiser = saved['model'].pop('denoiser')
    saved['model'] |= {name: denoiser[name] for name in ('canvas_length', 'predict_next')}
    saved['model'] |= {'separate_denoiser': False, 'scan_layers': True, 'denoise_dtype': None}
    path.write_text(json.dumps(saved))
    CheckpointStore(tmp_path, about=about()).restore(abstract(make_state()))
    trained_otherwise = about(CONFIG.replace(mask_id=4))
    with pytest.raises(ValueError, match='mask_id: saved None, now 4'):
        CheckpointStore(tmp_path, about=trained_otherwise).restore(abstract(make_state()))


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 4, max_to_keep=2)
    assert sorted(path.name for path in (tmp_path / 'checkpoints').iterdir()) == ['3', '4']


def test_a_state_is_saved_as_it_was_although_its_buffers_are_donated(tmp_path):
    add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {'w': jnp.zeros((512, 2048))}
    store = CheckpointStore(tmp_path)
    store.save(1, state, {})
    for _ in range(3):
        state = add(state)
    store.wait()
    restored, _ = store.restore(abstract(state))
    np.testing.assert_array_equal(restored['w'], 0.0)


def test_arrays_are_restored_into_the_shardings_that_are_asked_for(tmp_path):
    save(tmp_path, 1)
    mesh = Mesh(np.asarray(jax.devices()[:1]), ('fsdp',))
    sharding = NamedSharding(mesh, PartitionSpec())
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract(make_state()),
    )
    state, _ = CheckpointStore(tmp_path).restore(wanted)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(state))


def test_a_checkpoint_without_its_last_file_is_not_seen(tmp_path):
    save(tmp_path, 3)
    directory = tmp_path / 'checkpoints'
    partial = directory / '9.orbax-checkpoint-tmp-0'  # the name of a save in progress
    shutil.copytree(directory / '3', partial)
    (partial / 'state' / 'manifest.ocdbt').unlink()
    store = CheckpointStore(tmp_path)
    assert store.latest_step == 3
    assert_trees_equal(store.restore(abstract(make_state()))[0], make_state(seed=3))


def test_a_process_that_dies_while_saving_leaves_a_complete_checkpoint(tmp_path):
    script = textwrap.dedent(
        """
        import os, sys
        import numpy as np
        from diffusiongemma.checkpoints.store import CheckpointStore
        store = CheckpointStore(sys.argv[1])
        store.save(1, {'w': np.full((64, 64), 1.0)}, {'step': 1})
        store.wait()
        store.save(2, {'w': np.full((2048, 2048), 2.0)}, {'step': 2})
        os._exit(9)
        """
    )
    environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
    done = subprocess.run([sys.executable, '-c', script, str(tmp_path)], env=environment)
    assert done.returncode == 9
    store = CheckpointStore(tmp_path)
    # Step 2 may have been completed; the newest checkpoint must be complete.
    size = {1: 64, 2: 2048}[store.latest_step]
    wanted = {'w': jax.ShapeDtypeStruct((size, size), np.float64)}
    state, data_state = store.restore(wanted)
    assert data_state == {'step': store.latest_step}
    np.testing.assert_array_equal(state['w'], store.latest_step)
    store.save(3, {'w': np.zeros(2)}, {})  # and the run can continue
    store.wait()
    assert store.latest_step == 3


def test_a_step_that_is_there_already_is_not_dropped_silently(tmp_path):
    save(tmp_path, 5)
    with pytest.raises(ValueError, match='step 4 cannot be saved: .* has step 5 already'):
        CheckpointStore(tmp_path).save(4, make_state(), {})


def test_restoring_from_a_directory_without_checkpoints_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match='no complete checkpoint in'):
        CheckpointStore(tmp_path / 'new').restore(abstract(make_state()))


def test_restoring_into_another_shape_names_the_parameter(tmp_path):
    save(tmp_path, 1)
    wider = abstract(make_state(CONFIG.replace(ffn_width=32)))
    with pytest.raises(
        ValueError, match=r'mlp/down: shape \(1, 24, 16\) there, shape \(1, 32, 16\) here'
    ):
        CheckpointStore(tmp_path).restore(wider)


def test_restoring_into_another_structure_names_what_is_missing(tmp_path):
    save(tmp_path, 1)
    dense = abstract(make_state(CONFIG.replace(moe=None)))
    with pytest.raises(ValueError, match=r'moe/experts/down: shape \(.*\) there, none here'):
        CheckpointStore(tmp_path).restore(dense)


@pytest.mark.parametrize(
    ('other', 'message'),
    [
        (about(CONFIG.replace(norm_eps=1e-5)), 'model.norm_eps: saved 1e-06, now 1e-05'),
        (about(tokenizer_hash='4567'), "tokenizer_hash: saved '0123', now '4567'"),
    ],
)
def test_a_checkpoint_of_another_model_or_tokenizer_is_refused(tmp_path, other, message):
    """Neither changes the shapes, so no other check would detect it."""
    save(tmp_path, 1)
    with pytest.raises(ValueError, match=message):
        CheckpointStore(tmp_path, about=other).restore(abstract(make_state()))


def test_averaged_parameters_are_read_without_the_rest(tmp_path):
    save(tmp_path, 1, 2)
    step, description, ema = read_ema(tmp_path)
    assert step == 2
    assert ModelConfig.from_dict(description['model']) == CONFIG
    assert_trees_equal(ema, make_state(seed=2).ema_params)


def test_without_an_average_the_parameters_are_read(tmp_path):
    state = make_state(seed=1).replace(ema_params=None)
    store = CheckpointStore(tmp_path, about=about())
    store.save(1, state, DATA_STATE)
    store.close()
    restored, _ = CheckpointStore(tmp_path, about=about()).restore(abstract(state))
    assert_trees_equal(restored, state)
    assert_trees_equal(read_ema(tmp_path)[2], state.params)
    with pytest.raises(ValueError, match='and run keeps an average .config.optimizer'):
        CheckpointStore(tmp_path, about=about()).restore(abstract(make_state()))


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
def test_a_bundle_comes_back_bit_for_bit(tmp_path, dtype):
    params = jax.device_get(new_params(DiffusionGemma(CONFIG)))
    cast = jax.tree.map(lambda leaf: jnp.asarray(leaf.astype(dtype)), params)
    save_bundle(tmp_path, CONFIG, cast, Tokenizer.load('builtin'))
    model, params, tokenizer = load_model(tmp_path, dtype)
    assert_trees_equal(params, cast)
    assert model == DiffusionGemma(CONFIG, dtype)
    assert tokenizer.content_hash == Tokenizer.load('builtin').content_hash


@given(
    st.integers(1, 3),
    st.integers(0, 40),
    st.integers(0, 10**6),
    st.sampled_from([1e-6, 1.0, 1e4]),
)
@settings(max_examples=30, deadline=None)
def test_eight_bits_round_a_weight_by_at_most_half_a_step_of_its_block(more, odd, seed, size):
    value = np.random.default_rng(seed).normal(0, size, (more, 5461 + odd, 3)).astype(np.float32)
    value[0, :100] = 0
    stored = int8_storage.to_int8('w', value)
    if value.size < int8_storage.SMALLEST:
        assert list(stored) == ['w'] and stored['w'] is value
        return
    back = int8_storage.from_int8(stored['w'], stored['w' + int8_storage.SCALE])
    steps = np.repeat(stored['w' + int8_storage.SCALE].astype(np.float32), int8_storage.BLOCK)
    steps = steps[: value.size].reshape(value.shape)
    # The scale is rounded too, by at most one part in 256, so the largest value may be clipped.
    assert np.all(np.abs(back - value) <= steps * (0.5 + 127 / 256))
    assert np.all(back[0, :100] == 0) and stored['w'].dtype == np.int8


def test_tensors_may_be_read_by_whoever_may_read_files(tmp_path):
    path, plain = tmp_path / 'x.safetensors', tmp_path / 'plain'
    save_tensors({'x': np.ones(3, np.float32)}, path, {'format': 'pt'})
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
    np.testing.assert_array_equal(load_file(path)['x'], 1.0)


def test_a_bundle_in_eight_bits_is_small_and_a_scale_that_is_missing_is_named(tmp_path):
    config = CONFIG.replace(ffn_width=1200)
    params = new_params(DiffusionGemma(config), 0)
    for name, dtype in (('whole', None), ('small', 'int8')):
        save_bundle(tmp_path / name, config, params, Tokenizer.load('builtin'), dtype=dtype)
    bytes_of = {n: (tmp_path / n / 'params.safetensors').stat().st_size for n in ('whole', 'small')}
    assert bytes_of['small'] < 0.4 * bytes_of['whole']
    loaded = load_bundle(tmp_path / 'small', jnp.float32)[1]
    for path, value in flatten_dict(jax.device_get(params)).items():
        error = np.abs(flatten_dict(loaded)[path] - value)
        assert np.all(error <= 0.01 * np.abs(value).max()), path
    path = tmp_path / 'small' / 'params.safetensors'
    tensors = load_file(path)
    scale = next(name for name in tensors if name.endswith(int8_storage.SCALE))
    save_file(tensors | {scale: tensors[scale][:-1]}, path)
    with pytest.raises(ValueError, match='with scales of shape'):
        load_bundle(tmp_path / 'small', jnp.float32)
    del tensors[scale]
    save_file(tensors, path)
    with pytest.raises(ValueError, match='is stored as I8'):
        load_bundle(tmp_path / 'small', jnp.float32)


def test_arrays_that_lie_in_another_order_in_memory_are_bundled_right(tmp_path):
    params = jax.device_get(new_params(DiffusionGemma(CONFIG), 0))
    turned = jax.tree.map(np.asfortranarray, params)
    turned = jax.tree.map(lambda leaf, like: leaf.reshape(like.shape), turned, params)
    save_bundle(tmp_path, CONFIG, turned, Tokenizer.load('builtin'))
    assert_trees_equal(jax.device_get(load_model(tmp_path)[1]), params)


def test_a_bundle_with_another_config_names_the_parameter_and_both_shapes(tmp_path):
    params = new_params(DiffusionGemma(CONFIG), 0)
    save_bundle(tmp_path, CONFIG.replace(width=32), params, Tokenizer.load('builtin'))
    message = r'final_norm/scale has shape \(16,\), the config asks for \(32,\)'
    with pytest.raises(ValueError, match=message):
        load_bundle(tmp_path, jnp.float32)


def test_a_damaged_bundle_is_named(tmp_path):
    params = new_params(DiffusionGemma(CONFIG), 0)
    save_bundle(tmp_path, CONFIG, params, Tokenizer.load('builtin'))
    path = tmp_path / 'params.safetensors'
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match='params.safetensors is damaged'):
        load_model(tmp_path)


def test_an_unfinished_run_opens_as_its_averaged_parameters(tmp_path):
    save(tmp_path, 2)
    Tokenizer.load('builtin').save(tmp_path / 'tokenizer.model')
    model, params, tokenizer = load_model(tmp_path)
    assert model == DiffusionGemma(CONFIG, jnp.float32)
    assert_trees_equal(params, make_state(seed=2).ema_params)
    assert tokenizer.vocab_size == Tokenizer.load('builtin').vocab_size


def test_a_finished_run_opens_as_the_student_that_it_exported(tmp_path):
    save(tmp_path, 2)
    exported = new_params(DiffusionGemma(CONFIG), 99)
    save_bundle(tmp_path / 'model', CONFIG, exported, Tokenizer.load('builtin'))
    assert_trees_equal(load_model(tmp_path)[1], exported)


def test_a_model_without_canvas_opens_as_a_gemma(tmp_path):
    config = CONFIG.replace(canvas_length=0)
    params = new_params(Gemma(config), 0)
    save_bundle(tmp_path, config, params, Tokenizer.load('builtin'))
    assert type(load_model(tmp_path)[0]) is Gemma


def test_a_path_without_a_model_is_an_error_that_lists_the_shipped_ones(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="nowhere: pass a directory, a .gguf file, or one of .'builtin'"
    ):
        load_model(tmp_path / 'nowhere')


def test_the_workdir_of_a_run_without_any_checkpoint_says_so(tmp_path):
    (tmp_path / 'checkpoints').mkdir()
    (tmp_path / 'config.json').write_text(json.dumps({'seed': 0}))
    with pytest.raises(FileNotFoundError, match='no complete checkpoint in'):
        load_model(Path(tmp_path))


def test_a_bundle_takes_what_it_lacks_from_its_base(tmp_path):
    tokenizer = Tokenizer.load('builtin')
    config = CONFIG.replace(kind='separate')
    params = new_params(DiffusionGemma(config), 0)
    teacher = {name: params[name] for name in ('embedder', 'backbone')}
    own = {name: value for name, value in params.items() if name not in teacher}
    save_bundle(tmp_path / 'teacher', CONFIG.autoregressive, teacher, tokenizer)
    save_bundle(tmp_path / 'student', config, own, tokenizer, base='../teacher')
    _, found = load_bundle(tmp_path / 'student', jnp.float32)
    assert_trees_equal(found, params)
    shutil.rmtree(tmp_path / 'teacher')
    with pytest.raises(FileNotFoundError, match='teacher'):
        load_bundle(tmp_path / 'student', jnp.float32)
