"""Tests the prediction of canvas tokens at the previous position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from new_params import new_params

from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.data.packing import RowLayout, pack_examples
from diffusiongemma.data.pipeline import eval_examples
from diffusiongemma.data.sources import DataSpec
from diffusiongemma.distillation import canvases
from diffusiongemma.distillation.losses import mean_weights
from diffusiongemma.distillation.step import causal_pass
from diffusiongemma.distillation.student import student_params_from_teacher
from diffusiongemma.models import DiffusionGemma
from diffusiongemma.sampling import Sampler, SamplingConfig, passes


def fresh_student(predict_next):
    """Returns an untrained student of the shipped teacher, its parameters and tokenizer."""
    teacher, teacher_params, tokenizer = load_model('builtin-teacher')
    config = teacher.config.replace(canvas_length=16, kind='separate', predict_next=predict_next)
    model = DiffusionGemma(config)
    fresh = new_params(model)
    return model, student_params_from_teacher(fresh, teacher_params), tokenizer


@pytest.fixture(scope='module')
def batch():
    _, _, tokenizer = load_model('builtin-teacher')
    examples = eval_examples(DataSpec(kind='wordmath', split='test', size=6))
    return jax.tree.map(
        jnp.asarray, pack_examples(examples, tokenizer, RowLayout(128, 5, 16, tokenizer.pad_id))
    )


@pytest.mark.slow
@pytest.mark.parametrize('predict_next', [True, False])
def test_what_the_teacher_knows_holds_before_any_training_only_if_shifted(predict_next, batch):
    model, params, _ = fresh_student(predict_next)

    @jax.jit
    def accuracy(params):
        _, prefix = causal_pass(model, params, batch)
        hidden = canvases.denoise(model, params, batch, prefix, batch['canvas_tokens'])
        logits = model.apply({'params': params}, hidden, method='unembed')
        hits = canvases.hits(logits, batch['canvas_tokens'])
        return jnp.sum(hits * mean_weights(batch['canvas_tokens'] > 0))

    found = float(accuracy(params))
    assert found > 0.9 if predict_next else found < 0.2


@pytest.mark.slow
def test_a_canvas_behind_the_cache_has_the_logits_of_the_packed_row(batch):
    model, params, _ = fresh_student(True)
    offset, start = int(batch['canvas_offsets'][0, 1]), int(batch['canvas_starts'][0, 1])
    assert batch['canvas_segment_ids'][0, 1] == 1  # the second canvas of the first document
    noisy = jax.random.randint(jax.random.key(1), batch['canvas_tokens'].shape, 0, 1024)
    soft = jax.random.normal(jax.random.key(2), (*noisy.shape, model.config.width))

    @jax.jit
    def both(params):
        _, prefix = causal_pass(model, params, batch)
        packed = canvases.denoise(model, params, batch, prefix, noisy, soft)[:1, 1]
        packed = model.apply({'params': params}, packed, method='unembed')
        before = jnp.asarray(batch['tokens'][:1, offset - start : offset])
        cache = passes.empty_cache(model, params, 1, before.shape[1])
        _, cache = passes.prefill(model, params, cache, before, jnp.array([start]))
        cached = passes.denoise(model, params, cache, noisy[:1, 1], soft[:1, 1], before[:, -1])
        return packed, cached

    np.testing.assert_allclose(*both(params), atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize('mode', ['diffusion', 'lossless'])
def test_rows_of_a_ragged_batch_equal_single_runs(mode, tiny_config):
    model = DiffusionGemma(tiny_config.replace(predict_next=True))
    params = new_params(model)
    config = SamplingConfig(max_new_tokens=10, temperature=0, stop_ids=(), max_denoising_steps=1)
    sampler = Sampler(model, config, mode)
    keys = jax.random.split(jax.random.key(0), 2)
    batch = sampler(params, jnp.array([[5, 6, 7], [9, 0, 0]]), jnp.array([3, 1]), rng=keys)
    for row, prompt in enumerate(([5, 6, 7], [9])):
        tokens, lengths = jnp.array([prompt]), jnp.array([len(prompt)])
        single = sampler(params, tokens, lengths, rng=keys[row : row + 1])
        np.testing.assert_array_equal(single.tokens[0], batch.tokens[row])
