"""Tests the objective that trains a denoiser for the accepted length of its drafts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from new_params import new_params

from diffusiongemma.data.packing import RowLayout, pack_examples
from diffusiongemma.data.pipeline import eval_examples
from diffusiongemma.data.sources import DataSpec, split_source
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.diffusion.corruption import MaskedCorruption
from diffusiongemma.distillation.anchors import anchor_places, draw_anchors, occurs_earlier
from diffusiongemma.distillation.draft_vocabulary import draft_vocabulary
from diffusiongemma.distillation.drafting import (
    Draft,
    Drafting,
    DraftingConfig,
    acceptance_by_position,
    accepted_lengths,
)
from diffusiongemma.distillation.position_weights import (
    AcceptedLengthWeights,
    DecayWeights,
    EqualWeights,
)
from diffusiongemma.distillation.step import (
    Constants,
    causal_pass,
    distillation_loss,
    draw_rows,
    teacher_states,
)
from diffusiongemma.distillation.student import (
    frozen_params,
    student_params_from_teacher,
    trained_params,
)
from diffusiongemma.models import DiffusionGemma, Gemma, LightConfig
from diffusiongemma.parallel import batch_sharding, make_mesh, on_mesh, param_shardings

TOKENIZER = Tokenizer.load('builtin')
MASK = TOKENIZER.mask_id
C = 4
PROCESS = {'corruption': MaskedCorruption(MASK), 'canvas_length': C}


@pytest.fixture(scope='module')
def batch():
    examples = eval_examples(DataSpec(kind='wordmath', size=6))
    packed = pack_examples(examples, TOKENIZER, RowLayout(256, 0, 0, TOKENIZER.pad_id))
    return {name: jnp.asarray(value) for name, value in packed.items()}


@pytest.fixture(scope='module')
def student(tiny_config):
    config = tiny_config.replace(
        vocab_size=TOKENIZER.vocab_size, canvas_length=C, predict_next=True, mask_id=MASK,
        kind='light', light=LightConfig(layers=(0, 2), serial_rank=2), self_conditioning=False,
    )  # fmt: skip
    model, teacher = DiffusionGemma(config), Gemma(config.autoregressive)
    # This teacher repeats the last token more often than those of other seeds.
    teacher_params, fresh = new_params(teacher, 9), new_params(model, 1)
    params = student_params_from_teacher(fresh, teacher_params, config)
    return model, teacher, frozen_params(config, teacher_params), trained_params(config, params)


probabilities = st.lists(st.floats(0.015625, 1, width=32), min_size=1, max_size=7)


@given(q=probabilities, smoothing=st.floats(0, 1, width=32), valid=st.integers(0, 7))
@settings(max_examples=50)
def test_accepted_length_weights_are_the_sums_of_the_formula(q, smoothing, valid):
    valid = np.arange(len(q)) < valid
    found = AcceptedLengthWeights(smoothing).weights(jnp.asarray(q), jnp.asarray(valid))
    smoothed = np.where(valid, (1 - smoothing) * np.array(q) + smoothing, 0.0)
    expected = [sum(np.prod(smoothed[: k + 1]) for k in range(j, len(q))) for j in range(len(q))]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@given(q=probabilities)
@settings(max_examples=30)
def test_without_smoothing_they_are_the_gradient_of_the_expected_accepted_length(q):
    def expected_length(log_q):
        return jnp.sum(jnp.cumprod(jnp.exp(log_q)))

    gradient = jax.grad(expected_length)(jnp.log(jnp.asarray(q)))
    weights = AcceptedLengthWeights(0.0).weights(jnp.asarray(q), jnp.ones(len(q), bool))
    np.testing.assert_allclose(weights, gradient, rtol=1e-4, atol=1e-6)


def test_nothing_counts_after_a_token_outside_of_the_draft_vocabulary():
    q, valid = jnp.array([0.5, 0.0, 0.9]), jnp.array([True, True, True])
    np.testing.assert_array_equal(AcceptedLengthWeights().weights(q, valid)[1:], 0)
    np.testing.assert_allclose(DecayWeights(2.0).weights(q, valid), np.exp([0, -0.5, -1]))
    np.testing.assert_array_equal(EqualWeights().weights(q, ~valid), 0)


def test_anchors_are_different_response_tokens_that_another_one_follows(batch):
    places = anchor_places(batch)
    anchors, used = draw_anchors(jax.random.key(0), places, 40)
    assert used.all()
    for row, chosen in enumerate(np.asarray(anchors)):
        assert len(set(chosen)) == 40
        assert np.asarray(batch['target_mask'])[row, chosen].all()
        segment = np.asarray(batch['segment_ids'])[row]
        np.testing.assert_array_equal(segment[chosen], segment[chosen + 1])
    few = places & (jnp.cumsum(places, axis=1) <= 3)
    anchors, used = draw_anchors(jax.random.key(0), few, 5)
    np.testing.assert_array_equal(used.sum(axis=1), 3)
    assert few[jnp.arange(len(few))[:, None], anchors][used].all()
    with pytest.raises(ValueError, match='anchors_per_row=256 do not fit a row of 256 tokens'):
        draw_anchors(jax.random.key(0), places, 256)


def test_accepted_lengths_by_hand():
    hits = jnp.array([[[True, True, False, True]], [[False, True, True, True]]])
    valid = jnp.array([[[True] * 4], [[True, True, False, False]]])
    q = jnp.array([[[0.5, 0.5, 0.5, 0.5]], [[0.25, 1.0, 1.0, 1.0]]])
    draft = Draft(-jnp.log(q), q, hits, None, valid)
    canvases = jnp.full((2, 1), 0.5)
    found = accepted_lengths(draft, canvases)
    np.testing.assert_allclose(found['accepted_length'], (3 + 1) / 2)
    np.testing.assert_allclose(found['expected_accepted_length'], (1.9375 + 1.5) / 2)
    np.testing.assert_allclose(acceptance_by_position(draft, canvases), [0.5, 1, 0, 0])


def loss_of(student, batch, objective, params=None):
    model, teacher, frozen, trained = student
    return value_and_grad(model, teacher, objective)(params or trained, frozen, batch)


@functools.cache
def value_and_grad(model, teacher, objective):
    def loss(trained, frozen, batch):
        rows = draw_rows(objective, jax.random.key(3), batch)
        constants = Constants(None, frozen)
        return distillation_loss(model, teacher, objective, 0.0, constants, trained, rows)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_the_loss_is_that_of_the_formula_over_the_drafts_of_the_sampler(student, batch):
    """A draft reads the pending token, noise, and the state of the token before it."""
    model, teacher, frozen, trained = student
    objective = Drafting(**PROCESS, weights=AcceptedLengthWeights(), anchors_per_row=8)
    (loss, metrics), _ = loss_of(student, batch, objective)
    params = frozen | jax.tree.map(lambda leaf: leaf, trained)
    draw = objective.draw(jax.random.key(3), batch)
    hidden, prefix = jax.jit(causal_pass, static_argnums=0)(model, params, batch)
    apply = jax.jit(model.apply, static_argnames='method')
    canvases = []
    tokens, positions = np.asarray(batch['tokens']), np.asarray(batch['positions'])
    segments = np.asarray(batch['segment_ids'])
    for row in range(len(tokens)):
        for anchor in np.asarray(draw.anchors)[row]:
            one = jax.tree.map(lambda leaf, row=row: leaf[..., row : row + 1, :, :, :], prefix.kv)
            alone = dataclasses.replace(
                prefix, kv=one, positions=prefix.positions[row : row + 1],
                segment_ids=prefix.segment_ids[row : row + 1],
            )  # fmt: skip
            output = apply(
                {'params': params}, jnp.full((1, 1, C), MASK),
                jnp.asarray([[positions[row, anchor] + 1]]), jnp.asarray([[segments[row, anchor]]]),
                alone, None, jnp.asarray([[tokens[row, anchor]]]),
                hidden[row, anchor - 1][None, None], method='denoise_hidden',
            )[0, 0]  # fmt: skip
            logits = apply({'params': params}, output, method='draft_logits')
            before = jnp.asarray(tokens[row, anchor : anchor + C])
            logits += apply({'params': params}, before, method='serial_logits')
            inside = np.arange(anchor + 1, anchor + 1 + C)
            valid = (inside < 256) & (
                segments[row, np.minimum(inside, 255)] == segments[row, anchor]
            )
            text = tokens[row, np.minimum(inside, 255)]
            log_q = np.asarray(jax.nn.log_softmax(logits))[np.arange(C), text]
            weight = objective.weights.weights(jnp.exp(log_q), jnp.asarray(valid))
            canvases.append(float(jnp.sum(weight * -log_q) / jnp.sum(weight)))
    np.testing.assert_allclose(loss, np.mean(canvases), rtol=1e-4)
    assert 1 <= metrics['accepted_length'] <= C + 1


@pytest.mark.parametrize(
    'axes',
    [{'data': 2, 'fsdp': 2, 'tensor': 2}, pytest.param({'fsdp': 8}, marks=pytest.mark.slow)],
)
def test_sharded_it_is_the_same(student, batch, axes):
    model, teacher, frozen, trained = student
    objective = Drafting(**PROCESS, anchors_per_row=8, refused_rate=0.5)
    repeated = {name: jnp.concatenate([value] * 8)[:8] for name, value in batch.items()}
    (loss, metrics), gradients = loss_of(student, repeated, objective)
    mesh = make_mesh(axes)
    model, teacher = on_mesh(model, mesh), on_mesh(teacher, mesh)
    placed = jax.device_put(frozen | trained, param_shardings(model, mesh))
    sharded = (
        model,
        teacher,
        {name: placed[name] for name in frozen},
        {name: placed[name] for name in trained},
    )
    rows = jax.device_put(repeated, batch_sharding(mesh, 8))
    (found, found_metrics), found_gradients = loss_of(sharded, rows, objective)
    np.testing.assert_allclose(found, loss, rtol=1e-5)
    for name, value in metrics.items():
        np.testing.assert_allclose(found_metrics[name], value, rtol=1e-5, atol=1e-6)
    for a, b in zip(jax.tree.leaves(found_gradients), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize('refused_rate', [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_a_few_steps_lengthen_what_is_accepted(student, batch, refused_rate):
    objective = Drafting(**PROCESS, weights='equal', anchors_per_row=16, refused_rate=refused_rate)
    trained = student[3]
    (first, _), gradients = loss_of(student, batch, objective)
    names = {name for name, value in gradients.items() if jax.tree.leaves(value)}
    assert names == {'denoise_backbone', 'serial', 'teacher_state'}
    params = trained
    for _ in range(3):
        _, gradients = loss_of(student, batch, objective, params)
        params = jax.tree.map(lambda p, g: p - 0.3 * g, params, gradients)
    (last, _), _ = loss_of(student, batch, objective, params)
    assert last < first - 0.1


def test_total_variation_is_one_minus_the_common_mass(student, batch):
    model, teacher, frozen, trained = student
    objective = Drafting(**PROCESS, weights=EqualWeights(), anchors_per_row=4, total_variation=1.0)
    params = frozen | trained

    @jax.jit
    def drafted(params, batch):
        draw = objective.draw(jax.random.key(0), batch)
        hidden, prefix = causal_pass(model, params, batch)
        said = teacher_states(model, teacher, params, Constants(None, frozen), batch, hidden)
        draft = objective.draft(model, params, draw.anchors, draw.noise, batch, prefix, said)
        return draw, draft, objective.loss(model, params, draw, batch, prefix, said)[0]

    draw, draft, loss = drafted(params, batch)
    assert ((draft.variation >= 0) & (draft.variation <= 1)).all()
    by_canvas = jnp.sum(draft.variation * draft.valid, -1) / jnp.sum(draft.valid, -1)
    np.testing.assert_allclose(loss, jnp.sum(by_canvas * draw.canvases), rtol=1e-5)


def test_in_prompts_the_draft_should_say_what_the_teacher_would_while_the_text_agrees(
    student, batch
):
    model, teacher, frozen, trained = student
    params = frozen | trained
    # A teacher with random weights often repeats the last token, as this text does in places.
    tokens, is_response = np.array(batch['tokens']), np.asarray(batch['target_mask'])
    tokens[:, 1::2] = tokens[:, 0:-1:2]
    batch = batch | {'tokens': jnp.asarray(tokens)}
    objective = Drafting(**PROCESS, anchors_per_row=200, prompts=True)
    plain = dataclasses.replace(objective, prompts=False)

    @jax.jit
    def drafts(params, batch):
        draw = objective.draw(jax.random.key(0), batch)
        hidden, prefix = causal_pass(model, params, batch)
        chosen = jnp.argmax(model.apply({'params': params}, hidden, method='unembed'), -1)
        said = teacher_states(model, teacher, params, Constants(None, frozen), batch, hidden)
        arguments = (model, params, draw.anchors, draw.noise, batch, prefix, said)
        return draw, chosen, objective.draft(*arguments), plain.draft(*arguments)

    draw, chosen, draft, as_text = jax.device_get(drafts(params, batch))
    segments, positions = np.asarray(batch['segment_ids']), np.asarray(batch['positions'])
    in_prompts, agreed = 0, 0
    for b, a in np.ndindex(*draw.anchors.shape):
        anchor, alive = int(draw.anchors[b, a]), True
        if not draw.canvases[b, a]:
            continue
        assert segments[b, anchor] > 0 and positions[b, anchor] > 0
        for k in range(C):
            place = anchor + 1 + k
            alive &= place < tokens.shape[1] and segments[b, place] == segments[b, anchor]
            assert draft.valid[b, a, k] == alive
            if not alive:
                break
            if is_response[b, place]:
                assert draft.cross_entropy[b, a, k] == as_text.cross_entropy[b, a, k]
            else:
                in_prompts += 1
                agrees = chosen[b, place - 1] == tokens[b, place]
                same = draft.cross_entropy[b, a, k] == as_text.cross_entropy[b, a, k]
                assert bool(same) == bool(agrees)
                agreed, alive = agreed + int(agrees), agrees
    assert 50 < in_prompts and 10 < agreed < in_prompts - 10


@given(st.integers(1, 3), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_no_canvas_starts_where_a_lookup_would_find_the_last_tokens(ngram, seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 4, (2, 16))
    segments = np.sort(rng.integers(1, 3, (2, 16)), axis=1)
    batch = {'tokens': jnp.asarray(tokens), 'segment_ids': jnp.asarray(segments)}
    found = np.asarray(occurs_earlier(batch, ngram))
    for b, i in np.ndindex(2, 16):
        document = [t for t, s in zip(tokens[b, : i + 1], segments[b], strict=False)
                    if s == segments[b, i]]  # fmt: skip
        last = document[-ngram:]
        earlier = [document[j : j + ngram] for j in range(len(document) - ngram)]
        assert found[b, i] == (len(document) >= ngram and last in earlier)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'lookup_ngram': -1}, r'lookup_ngram must be in \[0, 64\]'),
        ({'weights': 'best'}, "or weights of your own with their module, such as .*got 'best'"),
        ({'held_out': 0}, 'held_out must be >= 1'),
        ({'anchors_per_row': 0}, 'anchors_per_row must be >= 1'),
        ({'smoothing': 2.0}, 'smoothing must be in'),
        ({'weights': 'decay', 'gamma': 0.0}, 'gamma must be > 0'),
        ({'refused_rate': -1.0}, 'refused_rate must be in'),
    ],
)
def test_settings_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DraftingConfig(**fields)


def test_the_draft_vocabulary_has_frequent_tokens_and_what_any_text_may_need():
    examples = eval_examples(DataSpec(kind='wordmath', size=50))
    documents = [TOKENIZER.format_response(example['response']) for example in examples]
    ids = draft_vocabulary(documents, TOKENIZER, 400)
    assert ids.dtype == np.int32 and (np.diff(ids) > 0).all() and len(ids) == 400
    assert set(TOKENIZER.stop_ids) <= set(ids.tolist())
    assert set(TOKENIZER.encode('0 7 9')) <= set(ids.tolist())
    with pytest.raises(ValueError, match='has no room for the .* stop tokens'):
        draft_vocabulary(documents, TOKENIZER, 40)
    with pytest.raises(ValueError, match='larger than the vocabulary of 1024'):
        draft_vocabulary(documents, TOKENIZER, 1025)


def test_held_out_examples_are_the_last_and_never_trained_on():
    kept, held_out = split_source(DataSpec(kind='wordmath', size=100), 64)
    assert (len(kept), len(held_out)) == (90, 10)
    assert kept[89] != held_out[0]
    with pytest.raises(IndexError):
        kept[90]
    with pytest.raises(ValueError, match='too few to hold a tenth out'):
        split_source(DataSpec(kind='wordmath', size=9), 4)
