"""Tests the distillation objectives: exact values, gradients, and the initialization."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from new_params import new_params

from diffusiongemma.diffusion import MaskedCorruption, UniformCorruption, sample_noise_levels
from diffusiongemma.distillation.canvases import (
    canvas_teacher,
    denoise,
    draw_noise,
    used_positions,
)
from diffusiongemma.distillation.losses import cross_entropy, denoise_loss
from diffusiongemma.distillation.stage1 import Stage1
from diffusiongemma.distillation.stage2 import Stage2, StepStatistics
from diffusiongemma.distillation.step import (
    Constants,
    causal_pass,
    distillation_loss,
    draw_rows,
)
from diffusiongemma.distillation.student import (
    frozen_params,
    student_params_from_teacher,
    trained_params,
)
from diffusiongemma.distillation.teacher import FullDistribution, TopKDistribution
from diffusiongemma.models import DiffusionGemma, Gemma
from diffusiongemma.sampling import (
    Ancestral,
    ConfidenceThreshold,
    EntropyBound,
    GibbsSweep,
    Margin,
    Remask,
    TemperatureSchedule,
    TopK,
)
from diffusiongemma.sampling.acceptance import reads_logits


@pytest.fixture(scope='module')
def tiny_config(tiny_config):
    """Returns a denoiser with one layer of each type: a loss does not depend on their number."""
    return tiny_config.replace(layer_types=('sliding', 'full'))


def test_losses_have_their_enumerated_values():
    logits = jnp.log(jnp.array([0.5, 0.25, 0.25]))
    target = FullDistribution(jnp.log(jnp.array([0.25, 0.5, 0.25])))
    np.testing.assert_allclose(cross_entropy(logits, jnp.array(1)), np.log(4), rtol=1e-6)
    expected = 0.25 * np.log(0.5) + 0.5 * np.log(2)
    np.testing.assert_allclose(target.kl(logits), expected, rtol=1e-5)
    mixed = denoise_loss(logits, jnp.array(1), target, jnp.array(0.25))
    np.testing.assert_allclose(mixed, 0.75 * np.log(4) + 0.25 * expected, rtol=1e-5)


@pytest.mark.parametrize('k', [1, 3, 10, 11])
def test_the_kl_of_the_likeliest_tokens_never_exceeds_the_full_one(k):
    keys = jax.random.split(jax.random.key(0))
    target, logits = (3 * jax.random.normal(key, (64, 11)) for key in keys)
    stored = TopKDistribution.of(target, k)
    full, full_grad = jax.vmap(jax.value_and_grad(lambda x, y: FullDistribution(y).kl(x)))(
        logits, target
    )
    found, grad = jax.vmap(jax.value_and_grad(lambda x, y: y.kl(x)))(logits, stored)
    assert np.isfinite(grad).all()
    if k < 10:
        assert (found >= 0).all() and (found < full).all()
    else:  # no tokens are merged; log-probabilities are rounded to float16
        np.testing.assert_allclose(found, full, atol=5e-3)
        np.testing.assert_allclose(grad, full_grad, atol=2e-3)


def test_the_kl_of_the_likeliest_tokens_has_its_enumerated_value():
    target = jnp.log(jnp.array([0.125, 0.5, 0.25, 0.125]))
    logits = jnp.log(jnp.array([0.25, 0.25, 0.25, 0.25]))
    stored = TopKDistribution.of(target, 1)  # the KL of (1/2, 1/2) and (1/4, 3/4)
    assert stored.ids == 1
    expected = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    np.testing.assert_allclose(stored.kl(logits), expected, rtol=1e-3)


def test_a_student_that_is_sure_of_the_likeliest_tokens_still_has_a_gradient():
    stored = TopKDistribution.of(jnp.zeros(5), 2)
    sure = jnp.array([90.0, 90.0, 0.0, 0.0, 0.0])  # the others have probability e^-90
    loss, grad = jax.value_and_grad(stored.kl)(sure)
    np.testing.assert_allclose(loss, 0.6 * 90, rtol=0.02)
    np.testing.assert_allclose(grad, [0.3, 0.3, -0.2, -0.2, -0.2], atol=1e-3)


def test_noise_levels_are_spread_evenly_over_the_batch():
    levels = np.sort(np.ravel(sample_noise_levels(jax.random.key(0), (4, 8), 0.0)))
    np.testing.assert_allclose(np.diff(levels), 1 / 32, atol=1e-5)


@pytest.mark.parametrize('process', [UniformCorruption(11), MaskedCorruption(4)])
def test_corruption_keeps_what_it_does_not_mark(process):
    tokens = jax.random.randint(jax.random.key(0), (64, 16), 0, 11)
    level = jnp.linspace(0, 1, 64)[:, None]
    noisy, corrupted = process.corrupt(jax.random.key(1), tokens, level)
    np.testing.assert_array_equal(noisy[~corrupted], tokens[~corrupted])
    assert not corrupted[0].any() and corrupted[-1].all()
    assert 0.4 < float(corrupted.mean()) < 0.6


@pytest.fixture
def batch():
    """Returns one row: a document of 4 prompt and 6 response tokens, in canvases of 4."""
    tokens = jnp.array([[5, 6, 7, 8, 11, 12, 13, 14, 15, 16, 0, 0]])
    return {
        'tokens': tokens,
        'segment_ids': jnp.array([[1] * 10 + [0] * 2]),
        'positions': jnp.array([[*range(10), 0, 0]]),
        'target_mask': jnp.array([[False] * 4 + [True] * 6 + [False] * 2]),
        'canvas_tokens': jnp.array([[[11, 12, 13, 14], [15, 16, 0, 0], [0, 0, 0, 0]]]),
        'canvas_segment_ids': jnp.array([[1, 1, 0]]),
        'canvas_starts': jnp.array([[4, 8, 0]]),
        'canvas_offsets': jnp.array([[4, 8, 0]]),
    }


def test_the_kl_at_full_noise_has_the_expectation_of_the_hard_label_and_less_variance():
    """Two tokens are enumerated: the teacher's conditional of the second knows the first token,
    about which a canvas of noise has no information."""
    rng = np.random.default_rng(0)
    first, second = rng.dirichlet(np.ones(3)), rng.dirichlet(np.ones(3), 3)  # p(x1), p(x2 | x1)
    logits = jnp.asarray(rng.normal(size=3), jnp.float32)
    pairs = [(i, j) for i in range(3) for j in range(3)]
    probs = np.array([first[i] * second[i, j] for i, j in pairs])

    def gradients(weight):
        def loss(logits, pair):
            teacher = FullDistribution(jnp.log(jnp.asarray(second[pair[0]], jnp.float32)))
            return denoise_loss(logits, jnp.array(pair[1]), teacher, jnp.array(weight))

        return np.stack([jax.grad(loss)(logits, pair) for pair in pairs])  # [9, V]

    hard, soft = gradients(0.0), gradients(1.0)
    np.testing.assert_allclose(probs @ hard, probs @ soft, atol=1e-6)
    variances = [probs @ (g - probs @ g) ** 2 for g in (hard, soft)]
    assert (variances[1] < variances[0]).all()


def test_what_the_teacher_says_of_a_canvas_is_what_predicts_its_tokens(batch):
    values = jnp.arange(12.0)[None, :, None]  # the index stands for the hidden state
    found, has_target = canvas_teacher(values, batch)
    np.testing.assert_array_equal(found[0, 0, :, 0], [3, 4, 5, 6])
    np.testing.assert_array_equal(found[0, 1, :2, 0], [7, 8])
    np.testing.assert_array_equal(has_target[0, 0], [True] * 4)
    np.testing.assert_array_equal(has_target[0, 1], [True, True, False, False])
    assert not has_target[0, 2].any()


def objective(name, config, **settings):
    shared = {
        'corruption': UniformCorruption(config.vocab_size),
        'schedule': TemperatureSchedule(),
    }
    if name == 'stage1':
        return Stage1(**shared, **settings)
    return Stage2(**shared, acceptance=EntropyBound(1.0), **settings)


def loss_of(model, params, batch, name='stage1', teacher_params=None, **settings):
    """Returns the loss with a separate teacher, or with the student's frozen encode pass."""
    teacher = Gemma(model.config.autoregressive)
    constants = Constants(teacher_params, {})
    if model.config.has_frozen_encoder:
        constants = Constants(None, frozen_params(model.config, teacher_params))
    stage = objective(name, model.config, **settings)
    rows = draw_rows(stage, jax.random.key(0), batch)
    return distillation_loss(model, teacher, stage, 0.1, constants, params, rows)


@pytest.fixture(params=['stage1', 'stage2'])
def stage(request):
    return request.param


@pytest.fixture(params=[False, True], ids=['shared', 'separate'])
def student(request, tiny_config):
    """Returns a student that differs from its teacher, its trained and its teacher's parameters."""
    model = DiffusionGemma(tiny_config.replace(kind='separate' if request.param else 'shared'))
    teacher_params = new_params(Gemma(tiny_config.autoregressive), 3)
    params = trained_params(model.config, new_params(model))
    return model, params, teacher_params


@pytest.mark.slow
def test_unused_canvas_slots_do_not_count(student, batch, stage):
    model, params, teacher_params = student
    changed = batch | {'canvas_tokens': batch['canvas_tokens'].at[0, 2].set(7)}
    loss = jax.jit(lambda b: loss_of(model, params, b, stage, teacher_params)[0])
    np.testing.assert_allclose(loss(batch), loss(changed), rtol=1e-6)


@pytest.mark.parametrize('rate', [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_a_step_on_all_canvases_is_the_average_of_steps_on_one(student, batch, rate):
    model, params, teacher_params = student

    def with_canvas(slot):
        only = jnp.arange(batch['canvas_segment_ids'].shape[1]) == slot
        ids = jnp.where(only, batch['canvas_segment_ids'], 0)
        return batch | {'canvas_segment_ids': ids}

    @jax.jit
    @jax.value_and_grad
    def loss(params, batch):
        settings = {'self_conditioning_rate': rate}
        return loss_of(model, params, batch, 'stage1', teacher_params, **settings)[1][
            'loss/denoise'
        ]

    together = loss(params, batch)
    weights = [int(jnp.sum(used_positions(with_canvas(slot)))) for slot in (0, 1)]
    assert sum(weights) == int(jnp.sum(used_positions(batch))) > max(weights)
    alone = [loss(params, with_canvas(slot)) for slot in (0, 1)]
    average = jax.tree.map(lambda *leaves: np.average(leaves, axis=0, weights=weights), *alone)
    for one, other in zip(jax.tree.leaves(together), jax.tree.leaves(average), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    ('student', 'stage'),
    [
        (False, 'stage2'),
        pytest.param(True, 'stage1', marks=pytest.mark.slow),
        pytest.param(False, 'stage1', marks=pytest.mark.slow),
        pytest.param(True, 'stage2', marks=pytest.mark.slow),
    ],
    indirect=True,
)
def test_the_loss_reaches_every_trained_parameter(student, batch, stage):
    model, params, teacher_params = student
    settings = {'self_conditioning_rate': 1.0} if stage == 'stage1' else {}
    grads = jax.jit(
        jax.grad(lambda p: loss_of(model, p, batch, stage, teacher_params, **settings)[0])
    )(params)
    flat, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(grads))
    # The self-conditioning starts with zero outputs: only its last matrix changes at first.
    still = {jax.tree_util.keystr(path) for path, leaf in flat if not leaf.any()}
    assert all('self_conditioning' in name and 'down' not in name for name in still), still


def test_stage_2_in_one_step_is_stage_1_without_self_conditioning(student, batch):
    model, params, teacher_params = student
    one_step = {'num_steps': 1, 'all_noise_rate': 0.0}

    @jax.jit
    def losses(params):
        first = loss_of(model, params, batch, 'stage1', teacher_params, self_conditioning_rate=0.0)
        return first[0], loss_of(model, params, batch, 'stage2', teacher_params, **one_step)[0]

    np.testing.assert_allclose(*losses(params), rtol=1e-6)


@pytest.mark.slow
def test_the_loss_of_a_stored_teacher_is_that_of_its_pass(student, batch, stage):
    model, params, teacher_params = student
    teacher = Gemma(model.config.autoregressive)
    hidden, _ = causal_pass(teacher, teacher_params, batch)
    logits = teacher.apply({'params': teacher_params}, hidden, method='unembed')
    stored = TopKDistribution.of(logits, model.config.vocab_size)
    stored = batch | {
        'teacher_ids': stored.ids,
        'teacher_log_probs': stored.log_probs,
        'teacher_log_rest': stored.log_rest,
    }
    frozen = frozen_params(model.config, teacher_params)

    @jax.jit
    def without_teacher(params):
        constants = Constants(None, frozen)
        stage_objective = objective(stage, model.config)
        rows = draw_rows(stage_objective, jax.random.key(0), stored)
        return distillation_loss(model, teacher, stage_objective, 0.1, constants, params, rows)

    loss, metrics = jax.jit(lambda p: loss_of(model, p, batch, stage, teacher_params))(params)
    stored_loss, stored_metrics = without_teacher(params)
    np.testing.assert_allclose(stored_loss, loss, rtol=1e-3)
    np.testing.assert_allclose(stored_metrics['loss/encode'], metrics['loss/encode'], rtol=1e-2)


def test_no_gradient_flows_from_one_step_to_the_next(student, batch):
    model, params, teacher_params = student
    full = frozen_params(model.config, teacher_params) | params
    logits = jax.random.normal(jax.random.key(4), (1, 3, 4, model.config.vocab_size))

    def what_is_fed_back(params, logits):
        stage2 = objective('stage2', model.config)
        statistics = stage2.step_statistics(model, params, logits, jnp.ones((1, 3, 4)))
        tokens, keys = batch['canvas_tokens'], jax.random.split(jax.random.key(0), (1, 3))
        canvas, _ = stage2.next_canvas(statistics, tokens, tokens, keys, jnp.ones((1, 3)))
        return jnp.sum(statistics.soft_embeddings) + jnp.sum(canvas)

    grads = jax.jit(jax.grad(what_is_fed_back, argnums=(0, 1)))(full, logits)
    assert not any(leaf.any() for leaf in jax.tree.leaves(jax.device_get(grads)))


def test_the_next_canvas_of_stage_2_keeps_what_is_accepted_and_renoises_the_rest(tiny_config):
    model = DiffusionGemma(tiny_config)
    params = new_params(model)
    sure = 40.0 * jax.nn.one_hot(jnp.array([3, 9, 9, 3]), tiny_config.vocab_size)
    logits = sure * jnp.array([1.0, 0.0, 1.0, 0.0])[:, None]  # certain of the first and the third
    stage2 = objective('stage2', tiny_config)
    statistics = stage2.step_statistics(model, params, logits[None, None], jnp.ones((1, 1, 4)))
    noise = jnp.array([[[20, 21, 22, 23]]])
    # The bound also accepts the argmax of the first of the two uncertain positions.
    best = jnp.argmax(logits[1])
    keys = jax.random.split(jax.random.key(0), (1, 1))
    canvas, _ = stage2.next_canvas(statistics, noise + 5, noise, keys, jnp.ones((1, 1)))
    np.testing.assert_array_equal(canvas[0, 0], [3, best, 9, 23])


def statistics_of(entropies, confidences, margins):
    """Returns the proposal of a step for one canvas with the candidates 0, 1, 2, 3."""
    numbers = (jnp.asarray(values)[None, None] for values in (entropies, confidences, margins))
    entropies, confidences, margins = numbers
    candidates = jnp.arange(4)[None, None]
    return StepStatistics(entropies, candidates, confidences, margins, jnp.zeros((1, 1, 4, 2)))


@pytest.mark.parametrize(
    'rule, uniform, masked',
    [
        (EntropyBound(0.22), [0, 21, 22, 3], [0, 7, 30, 3]),
        (TopK(2), [20, 1, 2, 23], [0, 7, 2, 30]),
        (ConfidenceThreshold(0.6), [20, 1, 2, 23], [30, 7, 2, 30]),
        (Margin(0.5), [20, 21, 2, 3], [30, 7, 2, 3]),
    ],
)
def test_stage_2_takes_its_steps_by_every_rule(rule, uniform, masked):
    """Positions of a masked canvas that have a token keep it and count as certain."""
    statistics = statistics_of([0.1, 0.2, 0.9, 0.15], [0.5, 0.8, 0.9, 0.3], [0.1, 0.2, 0.6, 0.7])
    keys, ones = jax.random.split(jax.random.key(0), (1, 1)), jnp.ones((1, 1))
    shared = {'schedule': TemperatureSchedule(), 'acceptance': rule}
    noise, canvas = jnp.array([[[20, 21, 22, 23]]]), jnp.array([[[30, 7, 30, 30]]])
    stage2 = Stage2(corruption=UniformCorruption(37), **shared)
    assert stage2.next_canvas(statistics, canvas, noise, keys, ones)[0][0, 0].tolist() == uniform
    stage2 = Stage2(corruption=MaskedCorruption(30), **shared)
    masks = jnp.full_like(canvas, 30)
    assert stage2.next_canvas(statistics, canvas, masks, keys, ones)[0][0, 0].tolist() == masked


def test_ancestral_steps_of_stage_2_unmask_as_many_positions_as_the_noise_level_falls():
    stage2 = Stage2(
        corruption=MaskedCorruption(30),
        schedule=TemperatureSchedule(num_steps=4),
        acceptance=Ancestral(),
    )
    shape = (50, 2, 40)
    zeros, masks = jnp.zeros(shape), jnp.full(shape, 30)
    statistics = StepStatistics(zeros, jnp.ones(shape, jnp.int32), zeros, zeros, zeros)
    keys = jax.random.split(jax.random.key(0), shape[:2])
    levels = jnp.broadcast_to(jnp.array([1.0, 0.5]), shape[:2])
    canvas, _ = stage2.next_canvas(statistics, masks, masks, keys, levels)
    # (t - s) / t with s = t - 1/4.
    np.testing.assert_allclose(jnp.mean(canvas == 1, axis=(0, 2)), [0.25, 0.5], atol=0.03)


EVERY_RULE = [TopK(2), ConfidenceThreshold(), Margin(), Ancestral()]


@pytest.mark.parametrize(
    'rule, masked',
    [
        *itertools.product(EVERY_RULE, (False, True)),
        (GibbsSweep(EntropyBound(), positions=2), False),
        (Remask(TopK(2), count=1), True),
    ],
)
def test_the_loss_of_stage_2_is_traced_with_every_rule(rule, masked, tiny_config, batch):
    model = DiffusionGemma(tiny_config.replace(kind='separate'))
    corruption = MaskedCorruption(30) if masked else UniformCorruption(tiny_config.vocab_size)
    stage2 = Stage2(
        corruption=corruption, schedule=TemperatureSchedule(), acceptance=rule, num_steps=2
    )
    teacher = Gemma(tiny_config.autoregressive)

    trained = trained_params(model.config, new_params(model))
    frozen = frozen_params(model.config, new_params(teacher))

    def loss(trained, key):
        rows = draw_rows(stage2, key, batch)
        constants = Constants(None, frozen)
        return distillation_loss(model, teacher, stage2, 0.1, constants, trained, rows)

    value, metrics = jax.eval_shape(loss, trained, jax.random.key(0))
    assert value.shape == () and 'loss/step_2' in metrics
    assert reads_logits(rule) == isinstance(rule, GibbsSweep)


def test_stage_2_hands_a_rule_its_logits_and_its_state_from_step_to_step(tiny_config):
    """Two tokens are settled, then the less certain one is masked again."""
    stage2 = Stage2(
        corruption=MaskedCorruption(30),
        schedule=TemperatureSchedule(),
        acceptance=Remask(TopK(4), count=1),
    )
    statistics = statistics_of([0.1, 0.2, 0.9, 0.15], [0.5, 0.8, 0.9, 0.3], [0.1, 0.2, 0.6, 0.7])
    keys, ones = jax.random.split(jax.random.key(0), (1, 1)), jnp.ones((1, 1))
    masks = jnp.full((1, 1, 4), 30)
    state = Remask().first_state(masks[0])
    canvas, state = stage2.next_canvas(statistics, masks, masks, keys, ones, state)
    assert canvas[0, 0].tolist() == [0, 1, 2, 30]
    np.testing.assert_allclose(state.confidences, [[0.5, 0.8, 0.9, 0.3]], rtol=1e-6)
    # A corrector for uniform noise reads the logits and redraws tokens.
    sweep = Stage2(
        corruption=UniformCorruption(37),
        schedule=TemperatureSchedule(),
        acceptance=GibbsSweep(TopK(4), 1, 4),
    )
    here = jnp.array([[[5, 6, 7, 8]]])
    logits = 3.0 * jax.nn.one_hot(here, 37) + 1.0 * jax.nn.one_hot(here + 10, 37)
    statistics = statistics._replace(logits=logits)
    state = (
        GibbsSweep()
        .first_state(here[0])
        .replace(phase=jnp.array([1]), noise_level=jnp.full((1, 1), 0.5))
    )
    canvas, _ = sweep.next_canvas(statistics, here, here, keys, ones, state)
    assert canvas[0, 0].tolist() == [15, 16, 17, 18]


def test_what_rejected_positions_become_is_drawn_anew_for_each_step(tiny_config, batch):
    stage2 = objective('stage2', tiny_config, num_steps=3)
    batch = jax.tree.map(lambda leaf: jnp.repeat(leaf, 16, axis=0), batch)
    first, second = stage2.draw(jax.random.key(0), batch).renoise
    assert first.shape == second.shape == batch['canvas_tokens'].shape
    assert jnp.mean(first == second) < 0.1 and len(jnp.unique(first)) == tiny_config.vocab_size


@pytest.mark.slow
def test_the_certainty_term_is_the_entropy_where_the_argmax_is_right(tiny_config, batch):
    model = DiffusionGemma(tiny_config)
    params = new_params(model)
    teacher_params = new_params(Gemma(tiny_config.autoregressive), 3)
    one_step = {'num_steps': 1, 'all_noise_rate': 1.0}

    # The canvases are noise, independent of the clean tokens, so half of them can be correct.
    key = jax.random.split(jax.random.key(0))[0]
    noisy = draw_noise(
        key,
        batch['canvas_tokens'],
        UniformCorruption(tiny_config.vocab_size),
        min_noise_level=1e-3,
        all_noise_rate=1.0,
    )
    _, prefix = causal_pass(model, params, batch)
    hidden = denoise(model, params, batch, prefix, noisy.tokens)
    logits = model.apply({'params': params}, hidden, method='unembed')
    right = jnp.zeros((1, 3, 4), bool).at[0, 0].set(True).at[0, 1, 1].set(True)
    best = jnp.argmax(logits, axis=-1)
    batch = batch | {'canvas_tokens': jnp.where(right, best, (best + 1) % tiny_config.vocab_size)}

    def loss(weight):
        settings = one_step | {'certainty_weight': weight}
        return jax.jit(lambda p: loss_of(model, p, batch, 'stage2', teacher_params, **settings)[0])(
            params
        )

    log_probs = jax.nn.log_softmax(logits)
    entropies = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
    expected = jnp.sum(entropies * right) / 8  # two canvases of four are used
    np.testing.assert_allclose(loss(2.0) - loss(1.0), expected, rtol=1e-4)


@pytest.mark.slow
def test_a_fresh_student_encodes_exactly_as_its_teacher(tiny_config):
    teacher = Gemma(tiny_config.replace(canvas_length=0))
    student = DiffusionGemma(tiny_config)
    teacher_params = new_params(teacher, 3)
    params = student_params_from_teacher(new_params(student), teacher_params)
    tokens = jnp.arange(8)[None]
    args = (tokens, tokens, jnp.ones_like(tokens))
    ours, _ = student.apply({'params': params}, *args, method='encode')
    theirs, _ = teacher.apply({'params': teacher_params}, *args, method='encode')
    np.testing.assert_array_equal(ours, theirs)


def test_a_teacher_of_another_shape_is_refused_by_name(tiny_config):
    teacher = Gemma(tiny_config.replace(canvas_length=0, ffn_width=40))
    student_params = new_params(DiffusionGemma(tiny_config))
    with pytest.raises(ValueError, match='mlp.*40'):
        student_params_from_teacher(student_params, new_params(teacher))
