"""Tests the light denoiser: its layers on the teacher's cache, head, and serial correction."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from new_params import new_params

from diffusiongemma.distillation.student import (
    frozen_params,
    layer_params,
    student_params_from_teacher,
    trained_params,
)
from diffusiongemma.models import (
    DiffusionGemma,
    Gemma,
    LightConfig,
    Prefix,
    for_inference,
    quantize_weights,
)
from diffusiongemma.models.inference import gather_draft_head
from diffusiongemma.sampling import Controls, Sampler, SamplingConfig, passes
from diffusiongemma.sampling.drafts import light_draft
from diffusiongemma.sampling.sampler import prefilled


def random_params(model, seed=0):
    """Returns new parameters in which every scale, scalar and zero is changed."""
    rng = np.random.default_rng(seed + 100)

    def moved(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return leaf
        return jnp.asarray(leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32))

    return jax.tree.map(moved, jax.device_get(new_params(model, seed)))


def light_config(config, **fields):
    fields = {'layers': tuple(range(config.num_layers)), 'teacher_state': False} | fields
    return config.replace(kind='light', light=LightConfig(**fields))


def light_student(config, seed=0, **fields):
    """Returns a student with random weights whose teacher part is a random teacher."""
    model = DiffusionGemma(light_config(config, **fields))
    teacher = random_params(Gemma(config.autoregressive), seed + 1)
    params = random_params(model, seed)
    return model, params | teacher


def pass_arguments(config, seed=3):
    rng = np.random.default_rng(seed)
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, (2, 11)))
    canvas = jnp.asarray(rng.integers(0, config.vocab_size, (2, 3, config.canvas_length)))
    starts = jnp.asarray([[4, 7, 11], [2, 9, 10]])
    return tokens, canvas, starts


@functools.partial(jax.jit, static_argnums=0)
def denoise_after_encoding(model, params, tokens, canvas, starts, previous=None):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    ones = jnp.ones_like(tokens)
    hidden, kv = model.apply({'params': params}, tokens, positions, ones, method='encode')
    prefix = Prefix(kv, positions, ones)
    state = jnp.take_along_axis(hidden, starts[..., None] - 2, axis=1)  # [B, M, D]
    args = (canvas, starts, jnp.ones_like(starts), prefix, None, previous)
    more = {'teacher_state': state} if model.light is not None else {}
    return model.apply({'params': params}, *args, **more, method='denoise')


@pytest.mark.parametrize(
    'family',
    [
        'tiny_config',
        pytest.param('tiny_gemma3_config', marks=pytest.mark.slow),
        pytest.param('tiny_e2b_config', marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize('shifted', [False, True])
def test_with_all_layers_and_no_extras_it_is_the_separate_denoiser(request, family, shifted):
    config = request.getfixturevalue(family).replace(predict_next=shifted)
    separate = DiffusionGemma(config.replace(kind='separate'))
    teacher = random_params(Gemma(config.autoregressive))
    fresh = new_params(separate, 1)
    params = student_params_from_teacher(fresh, teacher)
    light = DiffusionGemma(light_config(config, teacher_state=True, serial_rank=2))
    own = student_params_from_teacher(new_params(light, 2), teacher, light.config)
    own['self_conditioning'] = params['self_conditioning']
    tokens, canvas, starts = pass_arguments(config)
    previous = jnp.take_along_axis(tokens, starts - 1, axis=1) if shifted else None
    expected = denoise_after_encoding(separate, params, tokens, canvas, starts, previous)
    found = denoise_after_encoding(light, own, tokens, canvas, starts, previous)
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max(), rtol=0)


@pytest.mark.slow
def test_its_layers_start_from_the_dense_part_of_those_of_a_mixture(tiny_moe_config):
    config = light_config(tiny_moe_config, layers=(1, 2))
    teacher = random_params(Gemma(config.autoregressive))
    model = DiffusionGemma(config)
    params = student_params_from_teacher(new_params(model, 0), teacher, config)
    assert 'moe' not in params['denoise_backbone']['layer_0']
    started = params['denoise_backbone']['layer_1']['attention']['query']
    np.testing.assert_array_equal(
        started, layer_params(config, teacher['backbone'], 2)['attention']['query']
    )
    tokens, canvas, starts = pass_arguments(config)
    assert np.isfinite(denoise_after_encoding(model, params, tokens, canvas, starts)).all()


@pytest.mark.slow
def test_a_layer_without_keys_of_its_own_gets_some_where_its_source_is_no_draft_layer(
    tiny_e2b_config,
):
    config = light_config(
        tiny_e2b_config, layers=(0, 4)
    )  # layer 4 shares the keys and values of layer 1
    teacher = random_params(Gemma(config.autoregressive))
    model = DiffusionGemma(config)
    params = student_params_from_teacher(new_params(model, 0), teacher, config)
    attention = params['denoise_backbone']['layer_1']['attention']
    assert {'key', 'value', 'query'} <= set(attention)
    mlp = params['denoise_backbone']['layer_1']['mlp']
    assert mlp['gate'].shape == (32, 96)  # the wide MLP of the layers that share
    with_source = DiffusionGemma(light_config(tiny_e2b_config, layers=(1, 4)))
    attention = new_params(with_source, 0)['denoise_backbone']['layer_1']
    assert 'key' not in attention['attention']


def test_only_its_own_parameters_are_trained(tiny_config):
    config = light_config(tiny_config, layers=(0,), draft_vocab_size=20, serial_rank=2)
    params = new_params(DiffusionGemma(config), 0)
    trained = trained_params(config, params)
    assert set(trained) == {'denoise_backbone', 'self_conditioning', 'serial'}
    teacher = {name: params[name] for name in ('embedder', 'backbone')}
    ids = jnp.arange(20)
    assert set(frozen_params(config, teacher, ids) | trained) == set(params)


def draft_vocabulary_student(config, **fields):
    model, params = light_student(config, layers=(0, 2), draft_vocab_size=11, **fields)
    params['draft_ids'] = jnp.asarray([0, 2, 3, 7, 8, 11, 15, 21, 22, 30, 36], jnp.int32)
    return model, params


def test_a_draft_vocabulary_scores_its_tokens_as_the_whole_head_does(tiny_config):
    model, params = draft_vocabulary_student(tiny_config)
    tokens, canvas, starts = pass_arguments(tiny_config)
    found = denoise_after_encoding(model, params, tokens, canvas, starts)
    whole = DiffusionGemma(light_config(tiny_config, layers=(0, 2)))
    rest = {name: value for name, value in params.items() if name != 'draft_ids'}
    expected = denoise_after_encoding(whole, rest, tokens, canvas, starts)
    ids = np.asarray(params['draft_ids'])
    np.testing.assert_allclose(found[..., ids], expected[..., ids], rtol=1e-5, atol=1e-6)
    others = np.setdiff1d(np.arange(37), ids)
    assert np.isneginf(found[..., others]).all()
    gathered = gather_draft_head(model, params)
    again = denoise_after_encoding(*gathered, tokens, canvas, starts)
    np.testing.assert_allclose(again[..., ids], expected[..., ids], rtol=1e-5, atol=1e-6)


PROMPTS = np.random.default_rng(0).integers(3, 37, (12, 9))
LENGTHS = np.random.default_rng(1).integers(1, 10, 12)


@pytest.mark.parametrize(
    ('fields', 'settings'),
    [
        pytest.param({'teacher_state': True}, {}, marks=pytest.mark.slow),
        pytest.param({'serial_rank': 3}, {'draft_length': 3}, marks=pytest.mark.slow),
        ({'serial_rank': 3, 'draft_vocab_size': 11}, {}),
        pytest.param({'teacher_state': True}, {'max_draft_steps': 2}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize('temperature', [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_lossless_text_is_that_of_autoregression(tiny_config, fields, settings, temperature):
    config = tiny_config.replace(predict_next='draft_length' not in settings)
    model, params = light_student(config, layers=(0, 2), **fields)
    if 'draft_vocab_size' in fields:
        _, params = draft_vocabulary_student(config, serial_rank=3)
    sampling = SamplingConfig(max_new_tokens=15, stop_ids=(3,), temperature=temperature, **settings)
    expected, found = (
        Sampler(model, sampling, mode)(params, PROMPTS, LENGTHS, rng=jax.random.key(4))
        for mode in ('autoregressive', 'lossless')
    )
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.lengths, expected.lengths)


def test_the_serial_correction_is_resolved_from_left_to_right(tiny_config):
    config = tiny_config.replace(predict_next=True, canvas_length=6)
    model, params = light_student(config, layers=(0,), serial_rank=4)
    params['serial'] = jax.tree.map(lambda leaf: 4 * leaf, params['serial'])
    prompts, lengths = jnp.asarray(PROMPTS), jnp.asarray(LENGTHS)
    pending, canvas = prompts[:, 0], jnp.full((12, 6), 5)

    @jax.jit
    def both_ways(params):
        sampling = SamplingConfig(max_new_tokens=8)
        prepared = prefilled(
            model, sampling, params, prompts, lengths, jax.random.key(0), Controls()
        )
        cache, hidden = prepared[0].cache, prepared[1]
        greedy = (0.0, None, None, None)
        draft = light_draft(model, params, cache, canvas, pending, hidden, prompts, *greedy)
        output = passes.denoise_hidden(model, params, cache, canvas, pending, hidden)
        variables = {'params': params}
        logits = model.apply(variables, output, method='draft_logits')
        plain, before = [], pending
        for place in range(6):
            gain = model.apply(variables, before, method='serial_logits')
            before = jnp.argmax(logits[:, place] + gain, axis=-1)
            plain.append(before)
        return draft.tokens, jnp.stack(plain, axis=1), jnp.argmax(logits, axis=-1)

    found, expected, alone = both_ways(params)
    np.testing.assert_array_equal(found, expected)
    assert (found != alone).any()


@pytest.mark.parametrize(
    'family', ['tiny_config', pytest.param('tiny_moe_config', marks=pytest.mark.slow)]
)
def test_quantized_teachers_and_the_layout_for_sampling_stay_lossless(family, request):
    config = request.getfixturevalue(family)
    model, params = light_student(config, layers=(1, 2), teacher_state=True)
    model, params = for_inference(model, params)
    params = quantize_weights(model, params, 'int8')
    sampling = SamplingConfig(max_new_tokens=10, stop_ids=(), temperature=0.0)
    expected, found = (
        Sampler(model, sampling, mode)(params, PROMPTS, LENGTHS, rng=jax.random.key(4))
        for mode in ('autoregressive', 'lossless')
    )
    np.testing.assert_array_equal(found.tokens, expected.tokens)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'layers': (0, 3)}, r'light.layers=\(0, 3\), but the teacher has layers 0 to 2'),
        ({'layers': ()}, 'increasing numbers of teacher layers'),
        ({'layers': (2, 1)}, 'increasing numbers of teacher layers'),
        ({'draft_vocab_size': 38}, 'draft_vocab_size=38 is larger than the vocabulary of 37'),
        ({'serial_rank': -1}, 'serial_rank must be >= 0'),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tiny_config, fields, message):
    with pytest.raises(ValueError, match=message):
        light_config(tiny_config, **fields)


def test_the_diffusion_mode_refuses_a_light_denoiser(tiny_config):
    model = DiffusionGemma(light_config(tiny_config))
    with pytest.raises(ValueError, match="use mode='lossless'"):
        Sampler(model, SamplingConfig())
    with pytest.raises(ValueError, match='draft_length=5 is longer than the canvas of 4'):
        Sampler(model, SamplingConfig(draft_length=5), 'lossless')
