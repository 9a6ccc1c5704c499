"""Tests that chunked logits, microbatches, rematerialization and bfloat16 keep the results."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_model import random_params

from diffusiongemma.diffusion import UniformCorruption
from diffusiongemma.distillation.ar_step import make_ar_train_step
from diffusiongemma.distillation.losses import over_positions
from diffusiongemma.distillation.stage1 import Stage1
from diffusiongemma.distillation.stage2 import Stage2
from diffusiongemma.distillation.state import create_state
from diffusiongemma.distillation.step import Constants, make_distillation_step
from diffusiongemma.models import DiffusionGemma, Gemma, init_params
from diffusiongemma.models.attention import attend_in_blocks
from diffusiongemma.models.execution import Execution
from diffusiongemma.models.inference import kernels_in_compute_dtype, with_execution
from diffusiongemma.models.masks import CausalMask, KeyTokens
from diffusiongemma.sampling import EntropyBound, TemperatureSchedule

OPTIMIZER = optax.sgd(1.0)  # the update is the gradient
VOCAB = 37


@pytest.fixture
def config(tiny_config):
    return tiny_config.replace(layer_types=('sliding', 'full'))


@pytest.fixture
def batch():
    """Returns four rows of 12 tokens with different numbers of trained tokens."""
    rng = np.random.default_rng(0)
    lengths = np.array([[12], [9], [7], [10]])
    index = np.arange(12)
    tokens = rng.integers(1, VOCAB, (4, 12)) * (index < lengths)
    starts = np.array([[4, 8], [4, 8], [3, 0], [5, 0]])
    used = starts > 0
    places = starts[..., None] + np.arange(4)
    canvas = np.where(places < lengths[..., None], tokens[np.arange(4)[:, None, None],
                      np.minimum(places, 11)], 0) * used[..., None]  # fmt: skip
    return {
        'tokens': tokens,
        'segment_ids': (index < lengths).astype(int),
        'positions': np.broadcast_to(index, (4, 12)),
        'target_mask': (index >= starts[:, :1]) & (index < lengths),
        'canvas_tokens': canvas,
        'canvas_segment_ids': used.astype(int),
        'canvas_starts': starts,
        'canvas_offsets': starts,
    }


def objective(name):
    shared = {'corruption': UniformCorruption(VOCAB), 'schedule': TemperatureSchedule()}
    if name == 'stage1':
        return Stage1(**shared)
    return Stage2(**shared, acceptance=EntropyBound(1.0), certainty_weight=0.5)


def step_and_state(config, name, microbatches=1, dtype=jnp.float32, **execution):
    """Returns a step and its arguments except the batch."""
    model = DiffusionGemma(config, dtype, Execution(**execution))
    teacher = Gemma(config.autoregressive, dtype)
    step = make_distillation_step(
        model,
        teacher,
        objective(name),
        OPTIMIZER,
        ar_weight=0.3,
        ema_decay=0.9,
        seed=0,
        microbatches=microbatches,
    )
    params = jax.tree.map(jnp.asarray, random_params(model))
    constants = Constants(jax.tree.map(jnp.asarray, random_params(teacher, 1)), {})
    return step, create_state(params, OPTIMIZER), constants


def assert_same(one, other):
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['stage1', 'stage2'])
def test_a_step_with_all_that_saves_memory_is_the_plain_step(name, config, batch):
    step, *arguments = step_and_state(config, name)
    expected = jax.jit(step)(*arguments, batch)
    for settings in (
        {'logits_chunk': 3},
        {'microbatches': 4, 'logits_chunk': 5, 'query_block': 5, 'remat': 'full'},
    ):
        step, *arguments = step_and_state(config, name, **settings)
        assert_same(jax.jit(step)(*arguments, batch), expected)


@pytest.mark.slow
def test_a_teachers_step_is_the_same_in_chunks_and_parts(config, batch):
    steps = []
    for microbatches, chunk in ((1, 0), (2, 5)):
        model = Gemma(config.autoregressive, execution=Execution(logits_chunk=chunk))
        step = make_ar_train_step(model, OPTIMIZER, 0.9, microbatches)
        state = create_state(jax.tree.map(jnp.asarray, random_params(model)), OPTIMIZER)
        steps.append(jax.jit(step)(state, batch))
    assert_same(*steps)


def shapes_in(jaxpr):
    """Returns the shapes of all arrays of a jaxpr and its inner jaxprs."""
    for equation in jaxpr.eqns:
        yield from (var.aval.shape for var in equation.outvars if hasattr(var.aval, 'shape'))
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')
        ):
            inner = getattr(inner, 'jaxpr', inner)
            if hasattr(inner, 'eqns'):
                yield from shapes_in(inner)


def largest_logits(config, name, batch, **settings):
    """Returns the size of the largest array with a vocabulary axis in a step."""
    step, *arguments = step_and_state(config.replace(vocab_size=VOCAB), name, **settings)
    shapes = shapes_in(jax.make_jaxpr(step)(*arguments, batch).jaxpr)
    return max(math.prod(shape) for shape in shapes if VOCAB in shape)


@pytest.mark.parametrize('name', ['stage1', pytest.param('stage2', marks=pytest.mark.slow)])
def test_no_array_has_logits_of_more_than_a_chunk(name, config, batch):
    embedding = VOCAB * config.width
    assert largest_logits(config, name, batch) == 4 * 12 * VOCAB
    assert 4 * 3 * VOCAB < embedding
    assert largest_logits(config, name, batch, logits_chunk=3) == embedding


@pytest.mark.parametrize('chunk', [0, 1, 4, 5, 11, 12, 100])
def test_chunks_of_any_size_give_every_position_its_own_score(chunk):
    values = {'a': jnp.arange(24.0).reshape(2, 3, 4), 'b': jnp.arange(48.0).reshape(2, 3, 4, 2)}

    def score(values):
        assert values['a'].shape[1] <= (chunk or 12)
        return values['a'] + 1, values['b'].sum(-1)

    one, two = over_positions(score, chunk, (2, 3, 4), values)
    np.testing.assert_array_equal(one, values['a'] + 1)
    np.testing.assert_array_equal(two, values['b'].sum(-1))


@functools.partial(jax.jit, static_argnums=0)
def squared_hidden(model, params, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    args = (tokens, positions, jnp.ones_like(tokens))
    hidden, _ = model.apply({'params': params}, *args, method='encode')
    return jnp.sum(jnp.square(hidden))


@pytest.mark.slow
@pytest.mark.parametrize(
    'family', ['tiny_config', pytest.param('tiny_moe_config', marks=pytest.mark.slow)]
)
def test_what_the_backward_pass_keeps_shrinks_and_the_gradient_stays(family, request):
    config = request.getfixturevalue(family).replace(layer_types=('sliding', 'full') * 2)
    tokens = jnp.arange(64).reshape(2, 32) % VOCAB
    kept, gradients = [], []
    for remat in ('none', 'dots', 'full'):
        model = Gemma(config.autoregressive, execution=Execution(remat=remat))
        params = jax.tree.map(jnp.asarray, random_params(model))
        loss = functools.partial(squared_hidden, model, tokens=tokens)
        residuals = jax.eval_shape(lambda p, loss=loss: jax.vjp(loss, p)[1], params)
        kept.append(sum(leaf.size for leaf in jax.tree.leaves(residuals)))
        gradients.append(jax.jit(jax.grad(loss))(params))
    assert kept[0] > 1.5 * kept[1] and kept[1] > 1.5 * kept[2]
    for other in gradients[1:]:
        for one, two in zip(jax.tree.leaves(gradients[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_bfloat16_step_updates_float32_masters_by_less_than_bfloat16_can_tell(config, batch):
    step, state, constants = step_and_state(config, 'stage1', dtype=jnp.bfloat16)
    exact = jax.jit(step_and_state(config, 'stage1')[0])(state, constants, batch)[0]
    after = jax.jit(step)(state, constants, batch)[0]
    assert {leaf.dtype for leaf in jax.tree.leaves((after.params, after.ema_params))} == {
        jnp.dtype('float32')
    }
    text = str(jax.make_jaxpr(step)(state, constants, batch))
    assert 'bf16' in text and 'preferred_element_type=float32' in text
    name = ('backbone', 'layers', 'layer_0', 'mlp', 'up')
    before, moved, truth = (
        functools.reduce(lambda tree, key: tree[key], name, s.params) for s in (state, after, exact)
    )
    tiny = np.abs(truth - before) < np.abs(before) * 2.0**-9
    assert tiny.any() and np.any(
        moved != before, where=tiny
    )  # would be lost if the parameters were bfloat16
    difference = np.linalg.norm(moved - truth) / np.linalg.norm(truth - before)
    assert difference < 0.1


@pytest.mark.parametrize('query_block', [1, 5, 8])
def test_queries_in_blocks_of_any_size_attend_as_all_at_once(query_block):
    keys = jax.random.split(jax.random.key(0), 5)
    query = jax.random.normal(keys[0], (2, 1, 13, 4, 8))
    kv = tuple(jax.random.normal(key, (2, 2, 1, 13, 8)) for key in keys[1:3])
    prefix_kv = tuple(jax.random.normal(key, (2, 2, 3, 8)) for key in keys[3:])
    positions = jnp.array([[*range(3, 11), *range(5)]] * 2)
    segments = jnp.array([[1] * 8 + [2] * 5, [1] * 8 + [2] * 3 + [0] * 2])
    prefix = KeyTokens(jnp.array([[0, 1, 2]] * 2), jnp.array([[1, 1, 1], [0, 1, 1]]))
    mask = CausalMask(positions, segments, prefix, window=4)

    def loss(query, kv, prefix_kv, block):
        one = mask if block else mask.all_rows()
        context = attend_in_blocks(query, kv, prefix_kv, one, block)
        return jnp.sum(jnp.sin(context)), context

    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
    assert_same(grad(query, kv, prefix_kv, query_block), grad(query, kv, prefix_kv, 0))


def test_a_long_row_has_no_square_mask_and_no_square_scores(config):
    length, block = 96, 8
    model = Gemma(config.autoregressive, execution=Execution(query_block=block, logits_chunk=8))
    plain = model.clone(execution=Execution())
    params = random_params(model)
    tokens = jnp.arange(length)[None] % VOCAB

    def largest_square(model):
        gradient = jax.make_jaxpr(jax.grad(lambda p: squared_hidden(model, p, tokens)))(params)
        shapes = shapes_in(gradient.jaxpr)
        return max((s[-2] * s[-1] for s in shapes if len(s) > 3 and s[-1] == length), default=0)

    assert largest_square(plain) >= length * length
    assert largest_square(model) <= length * config.num_heads * block


@pytest.mark.parametrize(
    ('settings', 'match'),
    [
        ({'remat': 'some'}, 'remat'),
        ({'logits_chunk': -1}, 'logits_chunk'),
        ({'query_block': -1}, 'query_block'),
    ],
)
def test_a_bad_setting_is_named(settings, match):
    with pytest.raises(ValueError, match=match):
        Execution(**settings)


def test_a_batch_that_does_not_divide_is_refused(config, batch):
    step, *arguments = step_and_state(config, 'stage1', microbatches=3)
    with pytest.raises(ValueError, match='4 rows does not divide into microbatches=3'):
        jax.eval_shape(step, *arguments, batch)


@pytest.mark.slow
def test_kernels_cast_before_the_passes_give_the_same_passes(tiny_moe_config):
    model = DiffusionGemma(tiny_moe_config, jnp.bfloat16)
    params = init_params(model, jax.random.key(0))
    cast = kernels_in_compute_dtype(model, params)
    layer = cast['backbone']['layers']['layer_0']
    assert layer['moe']['experts']['gate'].dtype == layer['mlp']['up'].dtype == jnp.bfloat16
    assert layer['attention']['query'].dtype == jnp.bfloat16
    kept = (layer['moe']['router']['kernel'], layer['pre_ffn_norm']['scale'])
    assert {leaf.dtype for leaf in (*kept, *cast['embedder'].values())} == {jnp.dtype('float32')}
    tokens = jnp.arange(12)[None] % tiny_moe_config.vocab_size
    encode = jax.jit(lambda p: model.apply({'params': p}, tokens))
    np.testing.assert_array_equal(encode(params), encode(cast))


def test_a_denoiser_s_own_kernels_are_cast_to_its_own_dtype(tiny_config):
    model = DiffusionGemma(tiny_config.replace(kind='separate'))
    model = with_execution(model, denoise_dtype='bfloat16', platform='tpu')
    params = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    cast = jax.eval_shape(lambda p: kernels_in_compute_dtype(model, p), params)
    dtypes = {
        name: {leaf.dtype for leaf in jax.tree.leaves(cast[name])}
        for name in ('backbone', 'denoise_backbone')
    }
    assert dtypes['backbone'] == {jnp.dtype('float32')}
    assert jnp.dtype('bfloat16') in dtypes['denoise_backbone']
