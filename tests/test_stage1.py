"""The distillation objective: exact values, gradients, and the start from the teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma.diffusion import MaskedCorruption, UniformCorruption, sample_noise_levels
from diffusiongemma.distillation.losses import cross_entropy, denoise_loss, kl_divergence
from diffusiongemma.distillation.stage1 import (
    Stage1Config,
    canvas_teacher_logits,
    draw_noise,
    stage1_loss,
    student_params_from_teacher,
)
from diffusiongemma.models import DiffusionGemma, Gemma
from diffusiongemma.models import init_params as init_params_eagerly
from diffusiongemma.sampling import TemperatureSchedule

init_params = jax.jit(init_params_eagerly, static_argnums=0)


def test_losses_have_their_enumerated_values():
    logits = jnp.log(jnp.array([0.5, 0.25, 0.25]))
    target = jnp.log(jnp.array([0.25, 0.5, 0.25]))
    np.testing.assert_allclose(cross_entropy(logits, jnp.array(1)), np.log(4), rtol=1e-6)
    expected = 0.25 * np.log(0.5) + 0.5 * np.log(2)
    np.testing.assert_allclose(kl_divergence(target, logits), expected, rtol=1e-5)
    mixed = denoise_loss(logits, jnp.array(1), target, jnp.array(0.25))
    np.testing.assert_allclose(mixed, 0.75 * np.log(4) + 0.25 * expected, rtol=1e-5)


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
    """One row: a document of 4 prompt and 6 response tokens, in canvases of 4."""
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


def test_teacher_logits_of_a_canvas_are_those_that_predict_its_tokens(batch):
    logits = jnp.arange(12.0)[None, :, None]  # the row index stands for the logits
    found, has_target = canvas_teacher_logits(logits, batch)
    np.testing.assert_array_equal(found[0, 0, :, 0], [3, 4, 5, 6])
    np.testing.assert_array_equal(found[0, 1, :2, 0], [7, 8])
    np.testing.assert_array_equal(has_target[0, 0], [True] * 4)
    np.testing.assert_array_equal(has_target[0, 1], [True, True, False, False])
    assert not has_target[0, 2].any()


def loss_of(model, params, batch, key=0, **settings):
    teacher_logits = jax.random.normal(jax.random.key(9), (1, 12, model.config.vocab_size))
    config = Stage1Config(**settings)
    process = UniformCorruption(model.config.vocab_size)
    noisy = draw_noise(jax.random.key(key), batch['canvas_tokens'], process, config)
    schedule = TemperatureSchedule()
    return stage1_loss(model, params, teacher_logits, batch, noisy, config, schedule)


def test_unused_canvas_slots_do_not_count(tiny_config, batch):
    model = DiffusionGemma(tiny_config)
    params = init_params(model, jax.random.key(0))
    changed = batch | {'canvas_tokens': batch['canvas_tokens'].at[0, 2].set(7)}
    loss = jax.jit(lambda b: loss_of(model, params, b, self_conditioning_rate=0.0)[0])
    before, after = loss(batch), loss(changed)
    np.testing.assert_allclose(before, after, rtol=1e-6)


def test_the_denoise_loss_reaches_every_parameter_but_the_unused_scalar(tiny_config, batch):
    model = DiffusionGemma(tiny_config)
    params = init_params(model, jax.random.key(0))
    grads = jax.jit(
        jax.grad(lambda p: loss_of(model, p, batch, ar_weight=0.1, self_conditioning_rate=1.0)[0])
    )(params)
    flat, _ = jax.tree_util.tree_flatten_with_path(grads)
    # The self-conditioning starts at a zero output: only its last matrix moves at first.
    still = {
        jax.tree_util.keystr(path) for path, leaf in flat if float(jnp.max(jnp.abs(leaf))) == 0
    }
    assert all('self_conditioning' in name and 'down' not in name for name in still), still


def test_a_fresh_student_encodes_exactly_as_its_teacher(tiny_config):
    teacher = Gemma(tiny_config.replace(canvas_length=0))
    student = DiffusionGemma(tiny_config)
    teacher_params = init_params(teacher, jax.random.key(3))
    params = student_params_from_teacher(init_params(student, jax.random.key(0)), teacher_params)
    tokens = jnp.arange(8)[None]
    args = (tokens, tokens, jnp.ones_like(tokens))
    ours, _ = student.apply({'params': params}, *args, method='encode')
    theirs, _ = teacher.apply({'params': teacher_params}, *args, method='encode')
    np.testing.assert_array_equal(ours, theirs)


def test_a_teacher_of_another_shape_is_refused_by_name(tiny_config):
    teacher = Gemma(tiny_config.replace(canvas_length=0, ffn_width=40))
    student_params = init_params(DiffusionGemma(tiny_config), jax.random.key(0))
    with pytest.raises(ValueError, match='mlp.*40'):
        student_params_from_teacher(student_params, init_params(teacher, jax.random.key(0)))
