"""Tests the masks of the three passes, and that the cache does not change results."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma.models import (
    DiffusionGemma,
    KVCache,
    Prefix,
    execution,
    for_inference,
    init_params,
)
from diffusiongemma.models.execution import Execution

FAMILIES = [
    'tiny_config',
    pytest.param('tiny_moe_config', marks=pytest.mark.slow),
    pytest.param('tiny_gemma3_config', marks=pytest.mark.slow),
    pytest.param('tiny_e2b_config', marks=pytest.mark.slow),
]


def random_params(model, seed=0):
    """Returns parameters in which no norm, scalar or output has its initial value; not compiled."""
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        noise = 0.2 * rng.standard_normal(shape.shape, np.float32)
        if path[-1].key == 'scale':
            return 0.6 - model.config.norm_scale_offset + noise  # 0.6: no saturated softmax
        return 1 + noise if path[-1].key.endswith(('_scalar', '_scale')) else noise

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(params=FAMILIES)
def model_and_params(request):
    model = DiffusionGemma(request.getfixturevalue(request.param))
    return model, random_params(model)


@functools.partial(jax.jit, static_argnames=('model', 'method'))
def apply(model, params, *args, method):
    return model.apply({'params': params}, *args, method=method)


def tokens_of(model, seed, *shape):
    return jax.random.randint(jax.random.key(seed), shape, 0, model.config.vocab_size)


def encode(model, params, tokens, first=0, prefix=None, segment_ids=None, positions=None):
    if positions is None:
        positions = jnp.broadcast_to(first + jnp.arange(tokens.shape[1]), tokens.shape)
    if segment_ids is None:
        segment_ids = jnp.ones_like(tokens)
    args = (tokens, positions, segment_ids, prefix)
    return apply(model, params, *args, method='encode')


@pytest.mark.slow
def test_encoding_in_blocks_through_the_cache_equals_one_causal_pass(model_and_params):
    model, params = model_and_params
    tokens = tokens_of(model, 2, 2, 17)
    whole, _ = encode(model, params, tokens)
    cache, parts, start = KVCache.create(model.config, 2, 17), [], 0
    for size in (6, 1, 1, 1, 6, 1, 1):
        block = tokens[:, start : start + size]
        hidden, kv = encode(model, params, block, start, cache.as_prefix())
        cache = cache.append(kv, jnp.full((2,), size))
        parts.append(hidden)
        start += size
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-5)


def test_a_packed_document_has_the_hidden_states_and_canvas_logits_of_running_alone(
    model_and_params,
):
    model, params = model_and_params
    a, b = tokens_of(model, 2, 1, 9), tokens_of(model, 3, 1, 8)
    packed = jnp.concatenate([a, b], axis=1)
    segment_ids = jnp.array([[1] * 9 + [2] * 8])
    positions = jnp.array([[*range(9), *range(8)]])
    canvases = tokens_of(model, 4, 1, 2, model.config.canvas_length)
    hidden, kv = encode(model, params, packed, segment_ids=segment_ids, positions=positions)
    logits = apply(
        model, params, canvases, jnp.array([[5, 4]]), jnp.array([[1, 2]]),
        Prefix(kv, positions, segment_ids), method='denoise',
    )  # fmt: skip
    for n, (document, start) in enumerate(((a, 5), (b, 4))):
        alone, kv = encode(model, params, document)
        where = slice(0, 9) if n == 0 else slice(9, 17)
        np.testing.assert_allclose(hidden[:, where], alone, atol=1e-5)
        ones = jnp.ones_like(document)
        prefix = Prefix(kv, jnp.arange(document.shape[1])[None], ones)
        alone_logits = apply(
            model, params, canvases[:, n : n + 1], jnp.array([[start]]), ones[:, :1], prefix,
            method='denoise',
        )  # fmt: skip
        np.testing.assert_allclose(logits[:, n], alone_logits[:, 0], atol=1e-5)


def test_a_later_canvas_never_changes_an_earlier_one(model_and_params):
    model, params = model_and_params
    length = model.config.canvas_length
    clean = tokens_of(model, 2, 1, 5 + 2 * length)
    noisy = tokens_of(model, 3, 1, 2, length)

    def logits(clean, noisy):
        _, kv = encode(model, params, clean)
        prefix = Prefix(kv, jnp.arange(clean.shape[1])[None], jnp.ones_like(clean))
        starts, segments = jnp.array([[5, 5 + length]]), jnp.ones((1, 2), jnp.int32)
        args = (noisy, starts, segments, prefix)
        return apply(model, params, *args, method='denoise')

    before = logits(clean, noisy)
    changed_clean = clean.at[0, 5 + length].set((clean[0, 5 + length] + 1) % 37)
    changed_noisy = noisy.at[0, 1, 2].set((noisy[0, 1, 2] + 1) % 37)
    after = logits(changed_clean, changed_noisy)
    np.testing.assert_array_equal(before[:, 0], after[:, 0])
    assert jnp.max(jnp.abs(before[:, 1] - after[:, 1])) > 1e-3


def test_a_canvas_sees_all_of_itself_and_its_self_conditioning(model_and_params):
    model, params = model_and_params
    prompt, canvas = tokens_of(model, 2, 1, 6), tokens_of(model, 3, 1, 1, 4)
    _, kv = encode(model, params, prompt)
    prefix = Prefix(kv, jnp.arange(6)[None], jnp.ones_like(prompt))
    ones = jnp.ones((1, 1), jnp.int32)

    def logits(canvas, soft=None):
        return apply(model, params, canvas, 6 * ones, ones, prefix, soft, method='denoise')

    base = logits(canvas)
    last_changed = logits(canvas.at[0, 0, 3].set((canvas[0, 0, 3] + 1) % 37))
    assert jnp.all(jnp.max(jnp.abs(base - last_changed), axis=-1) > 1e-6)  # every position
    soft = apply(model, params, base, method='soft_embed')
    assert jnp.max(jnp.abs(base - logits(canvas, soft))) > 1e-4
    np.testing.assert_allclose(base, logits(canvas, jnp.zeros_like(soft)), atol=1e-6)
    model = model.clone(config=model.config.replace(self_conditioning=False))
    np.testing.assert_allclose(base, logits(canvas, soft), atol=1e-6)


@pytest.mark.slow
def test_a_canvas_of_one_token_is_a_causal_step_where_embeddings_are_normed(model_and_params):
    """Only the scalars differ then: prefix, window, shared K/V, per-layer embeddings are equal."""
    model, params = model_and_params
    embedding = params['embedder']['embedding']
    normed = embedding / np.linalg.norm(embedding, axis=-1, keepdims=True)

    def with_equal_scalars(path, leaf):
        if path[-1].key == 'embedding' and path[0].key == 'embedder':
            return normed
        return np.ones_like(leaf) if path[-1].key.endswith('_scalar') else leaf

    params = jax.tree_util.tree_map_with_path(with_equal_scalars, params)
    tokens = tokens_of(model, 2, 2, 9)
    hidden, kv = encode(model, params, tokens)
    prefix = Prefix(kv, jnp.broadcast_to(jnp.arange(9), (2, 9)), jnp.ones_like(tokens))
    ones = jnp.ones((2, 1), jnp.int32)
    args = (tokens[:, None, -1:], 8 * ones, ones, prefix)
    logits = apply(model, params, *args, method='denoise')[:, 0, 0]
    causal = apply(model, params, hidden[:, -1], method='unembed')
    np.testing.assert_allclose(logits, causal, atol=1e-4)


@pytest.mark.slow
def test_a_separate_denoiser_may_compute_in_bfloat16_beside_a_float32_encode_pass(
    tiny_config, monkeypatch
):
    monkeypatch.setattr(execution, 'cpu_has_bfloat16', lambda: True)
    float32 = DiffusionGemma(tiny_config.replace(kind='separate'))
    mixed = float32.clone(execution=Execution(denoise_dtype='bfloat16'))
    params = random_params(float32)
    tokens = tokens_of(float32, 0, 2, 7)
    (one, _), (other, _) = (encode(model, params, tokens) for model in (float32, mixed))
    np.testing.assert_array_equal(one, other)
    logits = [model.apply({'params': params}, tokens[:, :4]) for model in (float32, mixed)]
    assert logits[1].dtype == jnp.float32
    difference = np.abs(logits[0] - logits[1])
    assert 0 < difference.max() < 0.2
    own = for_inference(mixed, params)[1]
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(own['denoise_backbone']))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(own['backbone']))
    monkeypatch.setattr(execution, 'cpu_has_bfloat16', lambda: False)
    emulated = mixed.clone()
    np.testing.assert_array_equal(logits[0], emulated.apply({'params': params}, tokens[:, :4]))
    own = for_inference(emulated, params)[1]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(own))
    shared = DiffusionGemma(tiny_config, execution=Execution(denoise_dtype='bfloat16'))
    found = shared.apply({'params': random_params(shared)}, tokens[:, :4])
    plain = DiffusionGemma(tiny_config)
    np.testing.assert_array_equal(
        found, plain.apply({'params': random_params(plain)}, tokens[:, :4])
    )


@pytest.mark.parametrize(
    'line, expected',
    [
        ('flags\t\t: fpu avx512f avx512_bf16 sha_ni', True),
        ('Features\t: fp asimd i8mm bf16', True),
        ('flags\t\t: fpu avx2 fma', False),
        ('model name\t: bf16', False),
    ],
)
def test_a_cpu_says_whether_it_multiplies_bfloat16(line, expected, tmp_path):
    cpuinfo = tmp_path / 'cpuinfo'
    cpuinfo.write_text(f'processor\t: 0\n{line}\n')
    assert execution.cpu_has_bfloat16(str(cpuinfo)) is expected
    assert not execution.cpu_has_bfloat16(str(tmp_path / 'missing'))
