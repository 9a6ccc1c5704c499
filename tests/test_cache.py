"""Tests that ring caches and chunked prefill do not change results."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_model import random_params, tokens_of
from toy_model import toy

from diffusiongemma.models import DiffusionGemma, Gemma, KVCache
from diffusiongemma.models.cache import cache_slots, ring_tokens, zeros_kv
from diffusiongemma.sampling import Sampler, SamplingConfig, pad_prompts, passes

BATCH, CAPACITY, WIDTH = 3, 40, 11  # the widest block is more than twice the ring
# Three more empty slots of a full-length cache change the outputs of 6 layers by 2e-5.
TOLERANCE = 1e-4


def prefill(model, params, tokens, lengths, capacity, chunk=None):
    """Encodes prompts into an empty cache, as the sampler does."""
    cache = passes.empty_cache(model, params, tokens.shape[0], capacity)
    return passes.prefill(model, params, cache, tokens, lengths, chunk, is_empty=True)


compiled_prefill = jax.jit(prefill, static_argnums=(0, 4, 5))


@functools.cache
def drawn_params(config):
    return random_params(DiffusionGemma(config))


class FullLengthCache(DiffusionGemma):
    """A copy of the model whose cache has no rings."""

    def empty_kv(self, batch_size, capacity):
        slots = dict.fromkeys(self.config.layer_types, capacity)
        return zeros_kv(self.config, batch_size, slots, self.dtype)


@pytest.fixture(
    params=[
        pytest.param('tiny_config', marks=pytest.mark.slow),
        pytest.param('tiny_e2b_config', marks=pytest.mark.slow),
        'predict_next',
    ]
)
def config(request):
    if request.param == 'predict_next':
        return request.getfixturevalue('tiny_config').replace(predict_next=True)
    return request.getfixturevalue(request.param)


@functools.partial(jax.jit, static_argnums=0)
def encode_denoise_append(model, params, cache, tokens, counts):
    """Returns hidden states, canvas logits after the cached tokens, and the extended cache."""
    active = jnp.ones(tokens.shape[:1], bool)
    hidden, kv = passes.encode_block(model, params, cache, tokens, active)
    canvas = tokens[:, : model.config.canvas_length]
    soft = passes.no_soft_embeddings(model, params, *canvas.shape)
    logits = passes.denoise(model, params, cache, canvas, soft, tokens[:, 0])
    return hidden, logits, cache.append(kv, counts)


row_counts = st.tuples(*[st.integers(0, WIDTH)] * BATCH)


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(appends=st.lists(row_counts, min_size=1, max_size=8), seed=st.integers(0, 99))
@example(appends=[(1, 0, 1)] * 7, seed=0)  # the edge of the window, token by token
@example(appends=[(11, 2, 0), (11, 11, 0), (11, 5, 11), (1, 1, 1)], seed=1)  # several rings
def test_a_ring_gives_what_a_cache_of_full_length_gives(config, appends, seed):
    model, params = DiffusionGemma(config), drawn_params(config)
    ring = KVCache.create(config, BATCH, CAPACITY)
    slots = dict.fromkeys(config.layer_types, CAPACITY)
    full = ring.replace(kv=zeros_kv(config, BATCH, slots, jnp.float32))
    for i, counts in enumerate([*appends, (0, 0, 0)]):
        counts = np.where(np.asarray(ring.lengths) + counts <= CAPACITY, counts, 0)
        tokens = tokens_of(model, seed + 100 * i, BATCH, WIDTH)
        *found, ring = encode_denoise_append(model, params, ring, tokens, counts)
        *expected, full = encode_denoise_append(model, params, full, tokens, counts)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=TOLERANCE)
    np.testing.assert_array_equal(ring.lengths, full.lengths)


@settings(deadline=None, max_examples=30)
@given(length=st.integers(0, 30), slots=st.integers(1, 12))
def test_a_ring_holds_the_last_tokens_each_in_its_slot(length, slots):
    positions, segment_ids = ring_tokens(jnp.array([length]), slots)
    held = [int(p) for p, s in zip(positions[0], segment_ids[0], strict=True) if s]
    assert sorted(held) == list(range(max(0, length - slots), length))
    assert all(positions[0, p % slots] == p for p in held)


def test_only_layers_with_a_window_have_rings(tiny_config):
    assert cache_slots(tiny_config, 100) == {'sliding': 5, 'full': 100}
    assert cache_slots(tiny_config, 3) == {'sliding': 3, 'full': 3}


def test_rows_that_append_nothing_keep_all_that_they_hold(tiny_config):
    kv = jax.tree.map(lambda leaf: leaf + 1, KVCache.create(tiny_config, 2, 9).kv)
    cache = KVCache(kv, jnp.array([9, 7]))
    block = zeros_kv(tiny_config, 2, {'sliding': 7, 'full': 7}, jnp.float32)
    longer = cache.append(block, jnp.array([0, 2]))
    for before, after in zip(jax.tree.leaves(kv), jax.tree.leaves(longer.kv), strict=True):
        assert jnp.all(jnp.take(after, 0, axis=-4) == jnp.take(before, 0, axis=-4))
        assert jnp.any(jnp.take(after, 1, axis=-4) != jnp.take(before, 1, axis=-4))


@pytest.mark.slow
@pytest.mark.parametrize('mode', ['diffusion', 'autoregressive', 'lossless'])
def test_sampling_is_the_same_with_rings_and_without(mode, tiny_config):
    params = drawn_params(tiny_config)
    config = SamplingConfig(
        max_new_tokens=18, max_denoising_steps=2, temperature=0, stop_ids=(), entropy_bound=2.0
    )
    tokens, lengths = pad_prompts([[5, 17, 20, 31, 8, 9, 3, 4, 6, 12, 7], [9, 14]], width=13)
    ring, full = (
        Sampler(model_type(tiny_config), config, mode)(
            params, tokens, lengths, rng=jax.random.key(0)
        )
        for model_type in (DiffusionGemma, FullLengthCache)
    )
    jax.tree.map(np.testing.assert_array_equal, ring, full)


@pytest.mark.slow
@pytest.mark.parametrize('chunk', [4, 7])  # shorter than the window, and longer than the ring
def test_a_prompt_in_chunks_is_encoded_as_in_one_pass(config, chunk):
    model, params, width = DiffusionGemma(config), drawn_params(config), 13
    lengths = jnp.arange(1, width + 1)  # one row of each kind
    tokens = tokens_of(model, 3, width, width)
    expected, whole = compiled_prefill(model, params, tokens, lengths, CAPACITY)
    last, cache = compiled_prefill(model, params, tokens, lengths, CAPACITY, chunk)
    np.testing.assert_allclose(last, expected, atol=TOLERANCE)
    np.testing.assert_array_equal(cache.lengths, lengths)
    for one, other in zip(jax.tree.leaves(cache.kv), jax.tree.leaves(whole.kv), strict=True):
        np.testing.assert_allclose(one, other, atol=TOLERANCE)


def test_a_model_of_another_make_may_prefill_in_chunks():
    model, params = toy()
    tokens, lengths = pad_prompts([[2, 5, 7, 11, 3, 1, 6], [4], [9, 9, 6]], width=8)
    outputs = [
        Sampler(model, SamplingConfig(max_new_tokens=9, prefill_chunk=chunk), 'lossless')(
            params, tokens, lengths, rng=jax.random.key(0)
        )
        for chunk in (None, 3)
    ]
    jax.tree.map(np.testing.assert_array_equal, *outputs)


def test_chunks_need_no_attention_over_the_square_of_a_prompt_nor_its_keys(tiny_config):
    """Keys and masks of a model with only sliding layers do not grow with the prompt."""
    model = Gemma(tiny_config.replace(layer_types=('sliding',) * 2).autoregressive)
    params, width = random_params(model), 1013

    def program(chunk):
        tokens, lengths = jnp.zeros((1, width), jnp.int32), jnp.array([width])
        return compiled_prefill.lower(model, params, tokens, lengths, 2 * width, chunk).as_text()

    as_long_as_the_prompt = rf'tensor<(\d+x)*({width}|{2 * width})x[^>]*(f32|i1)>'
    assert re.search(as_long_as_the_prompt, program(None))
    assert not re.search(as_long_as_the_prompt, program(32))
