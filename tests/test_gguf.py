"""Tests reading GGUF files: names, config, quantization, vocabulary, placement, bad input."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from new_params import new_params

from diffusiongemma.checkpoints.convert import convert
from diffusiongemma.checkpoints.gguf_config import read_gguf_config
from diffusiongemma.checkpoints.gguf_import import find_gguf, load_gguf
from diffusiongemma.checkpoints.gguf_reader import GgufFile
from diffusiongemma.checkpoints.hf_export import save_hf
from diffusiongemma.checkpoints.hf_import import load_hf
from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.data.chat_template import default_template
from diffusiongemma.models import Gemma
from diffusiongemma.parallel import make_mesh

gguf = pytest.importorskip('gguf')
gguf_files = pytest.importorskip('gguf_files')
WIDTH = 64  # rows of quantized tensors are multiples of 32 values


def autoregressive(config):
    """Returns a config for both formats: no denoiser, and full attention in the last layer."""
    per_layer = config.per_layer
    if per_layer is not None:
        per_layer = dataclasses.replace(per_layer, vocab_size=gguf_files.VOCAB_SIZE)
    return config.autoregressive.replace(
        per_layer=per_layer,
        vocab_size=gguf_files.VOCAB_SIZE,
        width=WIDTH,
        max_positions=128,
        layer_types=(*config.layer_types[:-1], 'full'),
    )


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    """Writes a random model of a config in the published format, once for each name."""
    made = {}

    def write(name, config):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            params = new_params(Gemma(config))
            noise = np.random.default_rng(0)
            params = jax.tree.map(
                lambda leaf: leaf + 0.1 * noise.standard_normal(leaf.shape, np.float32),
                jax.device_get(params),
            )
            save_hf(made[name], config, params)
        return made[name]

    return write


@pytest.fixture
def gemma3(tiny_gemma3_config, published):
    """Returns a Gemma 3 and its directory in the published format."""
    config = autoregressive(tiny_gemma3_config)
    return config, published('gemma3', config)


@pytest.fixture
def gemma3_file(gemma3, tmp_path):
    config, directory = gemma3
    return gguf_files.write_gguf(tmp_path / 'model.gguf', directory, config)


def assert_trees_close(a, b, atol=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(left, right, atol=atol, rtol=0)


@pytest.mark.parametrize('family', ['gemma3', 'gemma4', 'gemma4_moe', 'gemma4_e2b'])
def test_a_file_holds_the_model_that_it_was_made_of(
    family, request, published, tmp_path, tiny_config, tiny_moe_config
):
    config = {
        'gemma3': lambda: request.getfixturevalue('tiny_gemma3_config'),
        'gemma4': lambda: tiny_config,
        'gemma4_moe': lambda: tiny_moe_config,
        'gemma4_e2b': lambda: request.getfixturevalue('tiny_e2b_config'),
    }[family]()
    config = autoregressive(config)
    if family == 'gemma4_e2b':  # full layers with values have as many heads as sliding ones
        config = config.replace(full=dataclasses.replace(config.full, num_kv_heads=2))
    directory = published(family, config)
    path = gguf_files.write_gguf(tmp_path / 'model.gguf', directory, config)
    expected_model, expected = load_hf(directory, jnp.float32)
    model, params, tokenizer = load_gguf(path, jnp.float32)
    assert model.config == expected_model.config == config
    assert_trees_close(params, expected)  # 1 + w - 1 rounds the norms of Gemma 3
    assert tokenizer.vocab_size == config.vocab_size


def test_a_file_is_read_into_the_shards_of_a_mesh(gemma3_file):
    _, expected, _ = load_gguf(gemma3_file, None)
    mesh = make_mesh({'fsdp': 8})
    _, params, _ = load_gguf(gemma3_file, None, mesh)
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(params)} == {mesh}
    assert_trees_close(params, expected, atol=0)


def test_quantized_tensors_are_dequantized_by_the_package(gemma3, tmp_path):
    config, directory = gemma3
    types = {
        'token_embd.weight': gguf.GGMLQuantizationType.Q8_0,
        'blk.0.attn_q.weight': gguf.GGMLQuantizationType.Q5_0,
        'blk.1.attn_q.weight': gguf.GGMLQuantizationType.BF16,
        'output_norm.weight': gguf.GGMLQuantizationType.F16,
    }
    path = gguf_files.write_gguf(tmp_path / 'q.gguf', directory, config, types=types)
    file = GgufFile(path)
    assert [file.type_name(name) for name in types] == ['Q8_0', 'Q5_0', 'BF16', 'F16']
    _, params, _ = load_gguf(path, None)
    _, expected = load_hf(directory, None)
    embedding = np.asarray(params['embedder']['embedding'])
    exact = np.asarray(expected['embedder']['embedding'])
    blocks = np.abs(exact).reshape(len(exact), -1, 32)
    step = np.repeat(blocks.max(-1) / 127, 32, axis=-1)
    assert np.all(np.abs(embedding - exact) <= 0.51 * step + 1e-3 * np.abs(exact))
    assert not np.array_equal(embedding, exact)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}


def test_every_type_that_the_package_dequantizes_is_read(tmp_path):
    rng = np.random.default_rng(0)
    path, stored = tmp_path / 'all.gguf', {}
    writer = gguf.GGUFWriter(path, 'gemma3')
    for qtype in gguf.GGMLQuantizationType:
        block, size = gguf.GGML_QUANT_SIZES[qtype]
        data = rng.integers(0, 60, (3, 2 * size), dtype=np.uint8)
        try:
            stored[qtype.name] = gguf.dequantize(data, qtype)
        except NotImplementedError:
            continue
        if qtype.name in ('F32', 'F16'):
            data = data.view(np.float32 if qtype.name == 'F32' else np.float16)
        writer.add_tensor(qtype.name, data, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(path)
    assert len(stored) > 20 and {'Q4_K', 'Q6_K', 'IQ2_XS', 'TQ1_0', 'MXFP4'} <= set(stored)
    for name, expected in stored.items():
        np.testing.assert_array_equal(file.read(name), expected, err_msg=name)


def test_metadata_equals_what_the_package_reads(gemma3_file):
    ours, theirs = GgufFile(gemma3_file), gguf.GGUFReader(gemma3_file)
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith('GGUF.')}
    assert set(ours.metadata) == set(fields)
    for key, value in fields.items():
        if isinstance(value, float):
            assert ours.metadata[key] == pytest.approx(value, rel=1e-7), key
        else:
            assert ours.metadata[key] == value, key
    assert ours.metadata['gemma3.attention.layer_norm_rms_epsilon'] == 1e-6


def test_load_model_opens_a_file_and_a_directory_with_one(gemma3_file):
    for path in (gemma3_file, str(gemma3_file), gemma3_file.parent):
        assert load_model(path)[2].vocab_size == gguf_files.VOCAB_SIZE
    shutil.copyfile(gemma3_file, gemma3_file.with_name('other.gguf'))
    with pytest.raises(ValueError, match='holds several GGUF files .model.gguf, other.gguf.; pass'):
        load_model(gemma3_file.parent)
    (gemma3_file.parent / 'config.json').write_text('{}')
    assert find_gguf(gemma3_file.parent) is None


def test_a_chat_template_in_the_file_makes_prompts_turns(gemma3, tmp_path):
    config, directory = gemma3
    plain = load_gguf(gguf_files.write_gguf(tmp_path / 'a.gguf', directory, config), None)[2]
    template = default_template(
        '<start_of_turn>', '<end_of_turn>', has_system_turn=False, thinks=False, empty_thought=False
    )
    path = gguf_files.write_gguf(
        tmp_path / 'b.gguf', directory, config, change=lambda w: w.add_chat_template(template)
    )
    tuned = load_gguf(path, None)[2]
    assert not plain.chat_turns and tuned.chat_turns
    assert plain.format_prompt('a 1') == [plain.bos_id, *plain.encode('a 1')]
    assert plain.stop_ids == (plain.eos_id,)
    assert tuned.format_prompt('a 1')[1] == tuned.turn_start_id


def test_a_file_converts_to_the_published_format_and_to_a_bundle(gemma3_file, tmp_path):
    _, expected, tokenizer = load_model(gemma3_file)
    for format in ('hf', 'bundle'):
        convert(gemma3_file, tmp_path / format, format)
        _, params, read = load_model(tmp_path / format)
        assert_trees_close(params, expected, atol=0)
        assert read.content_hash == tokenizer.content_hash and not read.chat_turns


@pytest.mark.slow
def test_the_sample_command_continues_text_and_does_not_talk(gemma3_file):
    command = [sys.executable, '-m', 'diffusiongemma.sample', f'--checkpoint={gemma3_file}']
    root = Path(__file__).parents[1]
    asked = [*command, '--prompt=a b', '--max_new_tokens=3', '--json']
    done = subprocess.run(asked, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer['denoising_steps'] == len(answer['tokens']) <= 3  # autoregressive by default
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, input='')
    assert done.returncode == 1
    assert 'is a pretrained model, which cannot chat: pass a --prompt' in done.stderr


def test_towers_beside_the_text_are_left_out(gemma3, tmp_path, caplog):
    config, directory = gemma3

    def add_tower(writer):
        writer.add_uint32('gemma3.vision.block_count', 1)
        for name in ('v.blk.0.attn_q.weight', 'mm.input_projection.weight'):
            writer.add_tensor(name, np.ones((2, 2), np.float32))

    path = gguf_files.write_gguf(tmp_path / 'a.gguf', directory, config, change=add_tower)
    with caplog.at_level('INFO', logger='absl'):
        load_gguf(path, None)
    assert re.search(r'left out.*: multi_modal_projector \(1\), vision_tower \(1\)', caplog.text)


@pytest.mark.parametrize('part', [0, 3, 40, 3000, -1])
def test_a_truncated_file_is_named_before_it_is_read(gemma3_file, part):
    content = gemma3_file.read_bytes()
    gemma3_file.write_bytes(content[:part])
    with pytest.raises(
        ValueError, match=r'model\.gguf is truncated: .*; copy it again\.$'
    ) as error:
        load_model(gemma3_file)
    assert '\n' not in str(error.value)


def test_a_file_that_is_no_gguf_is_named(tmp_path):
    path = tmp_path / 'model.gguf'
    path.write_bytes(b'PK\x03\x04 something else')
    with pytest.raises(ValueError, match='model.gguf is not a GGUF file'):
        load_model(path)
    with pytest.raises(FileNotFoundError, match='no model at .*nowhere.gguf'):
        load_model(tmp_path / 'nowhere.gguf')


def test_another_architecture_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / 'llama.gguf', 'llama')
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="architecture 'llama'; supported: gemma3, gemma4"):
        load_model(tmp_path / 'llama.gguf')


def test_a_type_that_cannot_be_dequantized_is_named(tmp_path):
    path = tmp_path / 'q.gguf'
    writer = gguf.GGUFWriter(path, 'gemma3')
    qtype = gguf.GGMLQuantizationType.Q8_K
    size = gguf.GGML_QUANT_SIZES[qtype][1]
    writer.add_tensor('token_embd.weight', np.zeros((2, size), np.uint8), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match='token_embd.weight is stored as Q8_K, which the package'):
        load_model(path)
    content = path.read_bytes()
    path.write_bytes(content.replace(bytes([qtype, 0, 0, 0]), bytes([99, 0, 0, 0])))
    with pytest.raises(
        ValueError, match='token_embd.weight is stored as type 99, which is unknown'
    ):
        load_model(path)


def test_a_missing_vocabulary_is_named(gemma3, tmp_path):
    config, directory = gemma3
    path = gguf_files.write_gguf(
        tmp_path / 'a.gguf', directory, config, leave_out=('tokenizer.ggml.tokens',)
    )
    with pytest.raises(ValueError, match='has no vocabulary: tokenizer.ggml.tokens is missing'):
        load_model(path)


def test_a_vocabulary_of_another_size_than_the_embedding_is_refused(gemma3, tmp_path):
    config, directory = gemma3

    def shrink(writer):
        info = writer.tensors[0]['token_embd.weight']
        info.tensor = info.tensor[:-1]
        info.shape, info.nbytes = info.tensor.shape, info.tensor.nbytes

    path = gguf_files.write_gguf(tmp_path / 'a.gguf', directory, config, change=shrink)
    with pytest.raises(ValueError, match='tokenizer has 400 tokens, its embedding 399 rows'):
        load_model(path)


def test_missing_and_unknown_tensors_are_named(gemma3, tmp_path):
    config, directory = gemma3
    path = gguf_files.write_gguf(
        tmp_path / 'a.gguf',
        directory,
        config,
        leave_out=('blk.1.ffn_up.weight',),
        change=lambda w: w.add_tensor('blk.0.ffn_extra.weight', np.ones(2, np.float32)),
    )
    with pytest.raises(ValueError) as error:
        load_model(path)
    assert 'layers.1.mlp.up_proj.weight is missing' in str(error.value)
    assert 'blk.0.ffn_extra.weight is unknown' in str(error.value)


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda w: w.add_uint32('gemma3.something_new', 3), 'gemma3.something_new is set, which'),
        (lambda w: w.add_float32('gemma3.attn_logit_softcapping', 50.0), 'attn_logit_softcapping'),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "type 'yarn' is not"),
        (lambda w: w.add_uint16('split.count', 2), 'is one of 2 parts; merge them'),
        (
            lambda w: w.add_tensor('output.weight', np.ones((2, 2), np.float32)),
            'has a separate output head',
        ),
    ],
)
def test_what_would_be_another_model_is_refused(
    gemma3, tiny_gemma3_config, published, tmp_path, change, message
):
    config = gemma3[0].replace(
        full=gemma3[0].full.__class__(num_kv_heads=1, head_dim=8, rope_theta=1e6)
    )
    directory = published('unscaled', config)
    path = gguf_files.write_gguf(tmp_path / 'a.gguf', directory, config, change=change)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_model(path)


def test_a_missing_package_is_one_line_with_its_remedy(gemma3_file, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'gguf', None)
    with pytest.raises(FileNotFoundError, match='needs the package gguf: pip install gguf'):
        load_model(gemma3_file)


def test_the_config_of_a_file_without_swa_keys_is_that_of_llama_cpp(gemma3_file):
    assert read_gguf_config(GgufFile(Path(gemma3_file))).sliding.rope_theta == 10_000.0
