"""Tests each Gemma family against golden outputs that tests/data/make_goldens.py wrote."""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from diffusiongemma import verify
from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.models import KVCache

DATA = Path(__file__).parent / 'data'
FAMILIES = [
    'tiny_gemma3',
    'tiny_gemma3_scaled',
    'tiny_gemma4',
    'tiny_gemma4_moe',
    'tiny_gemma4_e2b',
]
SLOW = ('tiny_gemma3_scaled', 'tiny_gemma4', 'tiny_gemma4_e2b')
load = functools.cache(lambda name: load_model(DATA / name)[:2])


def golden_of(name, file='golden.npz'):
    return dict(np.load(DATA / name / file))


@functools.partial(jax.jit, static_argnums=0)
def encode(model, params, tokens, lengths, prefix):
    """Returns logits and K/V of tokens after `lengths` earlier ones."""
    with jax.default_matmul_precision('highest'):
        positions = lengths[:, None] + jnp.arange(tokens.shape[1])
        args = (tokens, positions, jnp.ones_like(tokens), prefix)
        hidden, kv = model.apply({'params': params}, *args, method='encode')
        return model.apply({'params': params}, hidden, method='unembed'), kv


@pytest.mark.parametrize('name', FAMILIES)
def test_a_causal_pass_agrees(name):
    (model, params), golden = load(name), golden_of(name)
    lengths = jnp.zeros(len(golden['tokens']), jnp.int32)
    logits, _ = encode(model, params, golden['tokens'], lengths, None)
    np.testing.assert_allclose(logits, golden['logits'], atol=verify.TOLERANCE)


@pytest.mark.parametrize(
    'name',
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FAMILIES],
)
def test_decoding_through_the_cache_agrees_across_the_edge_of_the_window(name):
    (model, params), golden = load(name), golden_of(name)
    tokens = jnp.asarray(golden['tokens'])
    assert model.config.sliding.window < tokens.shape[1] / 2
    cache, found, start = KVCache.create(model.config, *tokens.shape), [], 0
    for size in golden['block_sizes']:
        block = tokens[:, start : start + size]
        logits, kv = encode(model, params, block, cache.lengths, cache.as_prefix())
        cache = cache.append(kv, jnp.full(len(tokens), size))
        found.append(logits)
        start += size
    found = jnp.concatenate(found, axis=1)
    np.testing.assert_allclose(found, golden['cached_logits'], atol=verify.TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize('side', ['left', 'right'])
def test_all_passes_on_prompts_padded_on_one_side_agree(side):
    (model, params), golden = load('tiny_padded'), golden_of('tiny_padded', f'golden_{side}.npz')
    assert len(set(golden['prompt_mask'].sum(axis=1))) == len(golden['prompt'])
    found = verify.differences(verify.golden_passes(model, params, golden), golden)
    assert verify.holds(found), found


@pytest.mark.slow
def test_a_row_of_a_padded_batch_is_the_row_run_alone():
    (model, params), golden = load('tiny_padded'), golden_of('tiny_padded', 'golden_left.npz')
    row = 2  # the shortest
    mask = golden['prompt_mask'][row]
    alone = {name: value if value.ndim == 0 else value[[row]] for name, value in golden.items()}
    for name in ('prompt', 'prompt_mask', 'encoder_hidden', 'encoder_logits'):
        alone[name] = alone[name][:, mask]
    found = verify.differences(verify.golden_passes(model, params, alone), alone)
    del found['ar_ce']  # of row 0
    assert verify.holds(found), found


def test_goldens_have_no_trivial_norms_or_scalars():
    for name in [*FAMILIES, 'tiny_padded']:
        for tensor, value in load_file(DATA / name / 'model.safetensors').items():
            assert np.ptp(value) > 0.1 or value.size == 1, (name, tensor)
            assert value.size > 1 or abs(value.item() - 1) > 1e-4, (name, tensor)


@pytest.mark.parametrize('name', [*FAMILIES, 'tiny_padded'])
def test_transformers_still_gives_the_goldens(name, tmp_path):
    pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    if transformers.__version__ != '5.17.0':
        pytest.skip(f'the goldens are of transformers 5.17.0, not {transformers.__version__}')
    spec = importlib.util.spec_from_file_location('make_goldens', DATA / 'make_goldens.py')
    make_goldens = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_goldens)
    make_goldens.make(name, tmp_path)
    committed, made = (load_file(d / name / 'model.safetensors') for d in (DATA, tmp_path))
    assert committed.keys() == made.keys()
    for tensor, value in committed.items():
        np.testing.assert_array_equal(value, made[tensor], err_msg=tensor)
    for file in sorted((DATA / name).glob('*.npz')):
        again = dict(np.load(tmp_path / name / file.name))
        for array, value in golden_of(name, file.name).items():
            np.testing.assert_allclose(value, again[array], atol=2e-5, err_msg=array)
