"""Tests that export writes bitwise equal checkpoints, or an error with the reason."""

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from dense_student import save_dense_student
from flax.traverse_util import flatten_dict
from new_params import new_params
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from sentencepiece import sentencepiece_model_pb2

from diffusiongemma.checkpoints.convert import convert
from diffusiongemma.checkpoints.hf_config import model_config_from_hf
from diffusiongemma.checkpoints.hf_config_export import TokenIds, hf_config
from diffusiongemma.checkpoints.hf_export import save_hf, with_null_expert
from diffusiongemma.checkpoints.hf_tensors import TOWERS
from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.models import DiffusionGemma, init_params

DATA = Path(__file__).parent / 'data'
AUTOREGRESSIVE = (
    'tiny_gemma3', 'tiny_gemma3_scaled', 'tiny_gemma4', 'tiny_gemma4_moe', 'tiny_gemma4_e2b',
)  # fmt: skip
NAMES = ('tiny_moe', 'tiny_heldout', 'tiny_padded') + AUTOREGRESSIVE
FAST = ('tiny_moe', 'tiny_gemma3_scaled', 'tiny_gemma4_e2b')
PLACEHOLDER = ('vision_tower.patch_embedder.', 'embed_vision.')


def stored_tensors(directory):
    """Returns all tensors of a checkpoint directory."""
    tensors = {}
    for path in directory.glob('*.safetensors'):
        tensors |= load_file(path)
    return tensors


def text_tensors(directory):
    """Returns the text tensors of an autoregressive model, named as without a vision tower."""
    return {
        name.replace('language_model.', ''): value
        for name, value in stored_tensors(directory).items()
        if not TOWERS.match(name)
    }


def assert_same_tensors(directory, reference, *, allow=()):
    is_text = reference.name in AUTOREGRESSIVE
    ours, theirs = (
        stored_tensors(directory),
        (text_tensors if is_text else stored_tensors)(reference),
    )
    extra = [name for name in set(ours) - set(theirs) if not any(part in name for part in allow)]
    assert not extra and not set(theirs) - set(ours)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert ours[name].tobytes() == value.tobytes(), name


def bfloat16_copy(directory, target):
    """Writes a copy of a checkpoint with bfloat16 tensors."""
    shutil.copytree(directory, target)
    tensors = load_file(directory / 'model.safetensors')
    cast = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}
    save_file(cast, target / 'model.safetensors')
    return target


@pytest.mark.parametrize(
    'name',
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in NAMES],
)
def test_what_was_read_is_written_back_bit_for_bit(tmp_path, name):
    convert(DATA / name, tmp_path / 'out', 'hf')
    # Denoisers without the vision tower of a base get one without layers.
    allow = PLACEHOLDER if name in ('tiny_heldout', 'tiny_padded') else ()
    assert_same_tensors(tmp_path / 'out', DATA / name, allow=allow)
    configs = [load_model(directory)[0].config for directory in (DATA / name, tmp_path / 'out')]
    assert configs[0] == configs[1]


def test_keys_and_values_that_a_sharing_layer_does_not_use_are_not_written(tmp_path):
    source = tmp_path / 'source'
    shutil.copytree(DATA / 'tiny_gemma4_e2b', source)
    tensors = load_file(source / 'model.safetensors')
    unused = {
        f'model.layers.7.self_attn.{name}.weight': tensors[
            f'model.layers.1.self_attn.{name}.weight'
        ]
        for name in ('k_proj', 'v_proj', 'k_norm')
    }
    save_file(tensors | unused, source / 'model.safetensors')
    convert(source, tmp_path / 'out', 'hf')
    assert_same_tensors(tmp_path / 'out', DATA / 'tiny_gemma4_e2b')


def first_pieces(count):
    """The built-in tokenizer.model cut to its special pieces and some others, without bytes."""
    path = Path(__file__).parents[1] / 'diffusiongemma' / 'assets' / 'tokenizer.model'
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    byte = sentencepiece_model_pb2.ModelProto.SentencePiece.BYTE
    kept = [piece for piece in model.pieces if piece.type != byte][:count]
    del model.pieces[:]
    model.pieces.extend(kept)
    model.trainer_spec.byte_fallback = False
    return model.SerializeToString()


@pytest.mark.slow
@pytest.mark.parametrize('name', ['tiny_moe', 'tiny_gemma3', 'tiny_gemma4_e2b'])
def test_bfloat16_goes_to_a_bundle_and_back_bit_for_bit(tmp_path, name):
    source = bfloat16_copy(DATA / name, tmp_path / 'bfloat16')
    small = json.loads((source / 'config.json').read_text())
    vocab_size = small.get('text_config', small)['vocab_size']
    (source / 'tokenizer.model').write_bytes(first_pieces(vocab_size))
    convert(source, tmp_path / 'bundle', 'bundle')
    assert (tmp_path / 'bundle' / 'params.safetensors').exists()
    convert(tmp_path / 'bundle', tmp_path / 'out', 'hf', base=source)
    assert_same_tensors(tmp_path / 'out', source)


@pytest.mark.parametrize('name', NAMES)
def test_the_config_says_what_the_reference_says(tmp_path, name):
    convert(DATA / name, tmp_path / 'out', 'hf')
    ours = json.loads((tmp_path / 'out' / 'config.json').read_text())
    theirs = json.loads((DATA / name / 'config.json').read_text())
    left_out = {'transformers_version', '_sliding_window_pattern'}
    if name in AUTOREGRESSIVE:  # only the text part of a model with a vision tower is written
        theirs = theirs.get('text_config', theirs)
    elif theirs['vision_config'] is None:  # transformers cannot load a model without vision tower
        left_out.add('vision_config')
        assert ours['vision_config']['num_hidden_layers'] == 0
    ours, theirs = flatten_dict(ours, sep='.'), flatten_dict(theirs, sep='.')
    different = {
        key: (value, ours.get(key, 'nothing'))
        for key, value in theirs.items()
        if ours.get(key) != value and key not in left_out
    }
    # A denoiser has no per-layer embeddings; other configs may have 0 or a number of tokens.
    unused = {'text_config.vocab_size_per_layer_input', 'text_config.hidden_size_per_layer_input'}
    if not ours.get('hidden_size_per_layer_input'):
        unused.add('vocab_size_per_layer_input')
    assert set(different) <= unused, different


def test_a_config_without_longest_position_has_that_of_transformers():
    for name, longest in (('tiny_gemma3', 131_072), ('tiny_gemma4', 131_072)):
        content = json.loads((DATA / name / 'config.json').read_text())
        del content['max_position_embeddings']
        assert model_config_from_hf(content).max_positions == longest
    content |= {'model_type': 'gemma4_unified_text', 'hidden_size_per_layer_input': 0}
    assert model_config_from_hf(content).max_positions == 262_144


@pytest.mark.parametrize('longest', [1000, None])
def test_the_longest_position_is_the_models_own_or_else_its_bases(longest):
    config = load_model(DATA / 'tiny_gemma4')[0].config.replace(max_positions=longest)
    content = hf_config(config, 'float32', TokenIds(), {'max_position_embeddings': 32})
    assert model_config_from_hf(content).max_positions == (longest or 32)


def test_without_a_base_the_config_still_describes_the_same_model():
    config = load_model(DATA / 'tiny_moe')[0].config
    content = hf_config(config, 'float32', TokenIds())
    assert model_config_from_hf(json.loads(json.dumps(content))) == config


def test_the_vision_tower_of_a_base_that_is_no_denoiser_is_not_taken_over():
    """Its tensors have other names than those of a denoiser."""
    config = load_model(DATA / 'tiny_moe')[0].config
    base = json.loads((DATA / 'tiny_moe' / 'config.json').read_text())
    for model_type, layers in (('diffusion_gemma', 1), ('gemma4', 0)):
        content = hf_config(config, 'float32', TokenIds(), base | {'model_type': model_type})
        assert content['vision_config']['num_hidden_layers'] == layers


def test_small_shards_have_an_index_and_the_format_that_torch_readers_want(tmp_path):
    convert(DATA / 'tiny_heldout', tmp_path / 'out', 'hf', max_shard_bytes=100_000)
    files = sorted((tmp_path / 'out').glob('model-*.safetensors'))
    index = json.loads((tmp_path / 'out' / 'model.safetensors.index.json').read_text())
    assert len(files) > 3 and files[0].name == f'model-00001-of-{len(files):05d}.safetensors'
    assert all(path.stat().st_size < 110_000 for path in files)
    for path in files:
        with safe_open(path, 'numpy') as file:
            assert file.metadata() == {'format': 'pt'}
            assert {n for n, where in index['weight_map'].items() if where == path.name} == set(
                file.keys()
            )
    total = sum(value.nbytes for value in stored_tensors(tmp_path / 'out').values())
    assert index['metadata']['total_size'] == total
    assert_same_tensors(tmp_path / 'out', DATA / 'tiny_heldout', allow=PLACEHOLDER)


def test_a_dtype_that_is_asked_for_is_that_of_all_text_tensors(tmp_path):
    convert(DATA / 'tiny_gemma4', tmp_path / 'out', 'hf', dtype=ml_dtypes.bfloat16)
    assert {v.dtype for v in stored_tensors(tmp_path / 'out').values()} == {np.dtype('bfloat16')}
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['dtype'] == 'bfloat16'


@pytest.mark.slow
def test_a_bundle_gets_tokenizer_files_and_sampling_settings(tmp_path):
    student = save_dense_student(tmp_path / 'student')
    convert(student, tmp_path / 'out', 'hf', generation=lambda config: {'t_max': 0.8})
    names = {path.name for path in (tmp_path / 'out').iterdir()}
    assert {'tokenizer.model', 'tokenizer_config.json', 'chat_template.jinja'} <= names
    generation = json.loads((tmp_path / 'out' / 'generation_config.json').read_text())
    tokenizer = load_model(student)[2]
    assert generation['eos_token_id'] == list(tokenizer.stop_ids)
    assert generation['t_max'] == 0.8
    special = json.loads((tmp_path / 'out' / 'tokenizer_config.json').read_text())
    assert special['extra_special_tokens'] == ['<|turn>', '<turn|>']


@pytest.mark.slow
def test_a_dense_denoiser_with_an_expert_that_writes_zeros_is_the_same_function(tiny_config):
    config = tiny_config.replace(layer_types=('full',))
    params = new_params(DiffusionGemma(config))
    moe_config, moe_params = with_null_expert(config, params)
    tokens = np.arange(8).reshape(2, 4)

    def logits(config, params):
        apply = jax.jit(DiffusionGemma(config).apply)
        return apply({'params': params}, tokens)

    ours, theirs = logits(config, params), logits(moe_config, moe_params)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'kind': 'separate'}, 'has layers of its own; distill'),
        ({'layer_types': ('full', 'sliding')}, 'last layer .* sliding'),
        ({'query_scale': 0.5}, 'query_scale=0.5 would be read as 1.0'),
        ({'final_logit_softcap': None}, 'final_logit_softcap is None'),
        ({'layer_scalar': False}, 'layer_scalar=False would be read as True'),
    ],
)
def test_a_model_that_the_format_cannot_hold_is_an_error_that_says_what_to_do(
    tmp_path, tiny_moe_config, changes, message
):
    config = tiny_moe_config.replace(**({'layer_types': ('sliding', 'full')} | changes))
    params = jax.eval_shape(lambda: init_params(DiffusionGemma(config), jax.random.key(0)))
    with pytest.raises(ValueError, match=f'cannot hold this model: .*{message}.*--format=bundle'):
        save_hf(tmp_path / 'out', config, params)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('format', ['hf', 'bundle'])
def test_a_directory_that_holds_a_model_is_not_written_into(tmp_path, format):
    with pytest.raises(ValueError, match='already; choose a new directory'):
        convert(DATA / 'tiny_heldout', DATA / 'tiny_moe', format)


def test_a_bundle_needs_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match='has no tokenizer.model or tokenizer.json'):
        convert(DATA / 'tiny_heldout', tmp_path / 'out', 'bundle')
