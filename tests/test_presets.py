"""Tests that the presets have the published sizes and can be teachers and students."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.distillation.student import student_params_from_teacher
from diffusiongemma.models import (
    PRESETS,
    DiffusionGemma,
    Gemma,
    ModelConfig,
    cache_bytes,
    init_params,
    parameter_counts,
)

DOCS = Path(__file__).parents[1] / 'docs' / 'models.md'
counts_of = functools.cache(lambda name: parameter_counts(PRESETS[name]))

# Millions of parameters of the embedding and of the rest: Gemma 3 technical report,
# arXiv:2503.19786, table 1; the 270M from its announcement. The reported embeddings are up to 1.2%
# larger than 262,144 rows of the model's width.
GEMMA3 = {
    'gemma3_270m': (170, 100),
    'gemma3_1b': (302, 698),
    'gemma3_4b': (675, 3209),
    'gemma3_12b': (1012, 10_759),
    'gemma3_27b': (1416, 25_600),
}
# Billions of parameters, total and active, of the model cards, without towers.
GEMMA4 = {
    'gemma4_31b': (30.7, 30.7),
    'gemma4_26b_a4b': (25.2, 3.8),
}


@pytest.mark.parametrize('name', GEMMA3)
def test_gemma3_presets_have_the_reported_parameters(name):
    counts, (embedding, others) = counts_of(name), GEMMA3[name]
    assert counts.embedding / 1e6 == pytest.approx(embedding, rel=0.015)
    assert round((counts.total - counts.embedding) / 1e6) == others


@pytest.mark.parametrize('name', GEMMA4)
def test_large_gemma4_presets_have_the_parameters_of_their_model_cards(name):
    counts = counts_of(name)
    assert (round(counts.total / 1e9, 1), round(counts.active / 1e9, 1)) == GEMMA4[name]


@pytest.mark.parametrize(('name', 'total', 'active'), [('e2b', 5.1, 2.3), ('e4b', 8.0, 4.5)])
def test_small_gemma4_presets_fit_their_model_cards(name, total, active):
    counts = counts_of(f'gemma4_{name}')
    # The totals of the cards include towers, about 0.15B for images and 0.3B for audio.
    assert counts.total / 1e9 + 0.45 == pytest.approx(total, abs=0.1)
    # E4B has 4.64B without per-layer embeddings; its card says 4.5B.
    assert counts.active / 1e9 == pytest.approx(active, abs=0.15)


def test_the_12b_preset_and_its_input_projections_have_exactly_the_published_parameters():
    width, patch, sound = 3840, 48 * 48 * 3, 640
    image = patch * width + width + 2 * (patch + 2 * width) + 1120 * 2 * width
    projections = width * width + sound * width
    # The count that Hugging Face shows for google/gemma-4-12B.
    assert counts_of('gemma4_12b').total + image + projections == 11_959_730_224


def test_the_diffusion_preset_adds_self_conditioning_and_a_scalar_per_layer():
    config = PRESETS['diffusiongemma_26b_a4b']
    added = counts_of('diffusiongemma_26b_a4b').total - counts_of('gemma4_26b_a4b').total
    assert added == 3 * config.width * config.ffn_width + config.width + config.num_layers


@pytest.mark.parametrize('name', PRESETS)
def test_the_table_of_models_says_what_the_presets_have(name):
    config, counts = PRESETS[name], counts_of(name)
    row = (
        f'| `{name}` | {config.num_layers} | {config.width} | {counts.total / 1e9:.2f}B | '
        f'{counts.active / 1e9:.2f}B | {(counts.embedding + counts.per_layer) / 1e9:.2f}B | '
        f'{counts.bfloat16_bytes / 1e9:.1f} GB | {config.max_positions // 1024}K |'
    )
    assert row in DOCS.read_text(encoding='utf-8').splitlines()


@pytest.mark.parametrize('name', PRESETS)
def test_the_table_of_caches_says_what_the_cache_of_a_preset_takes(name):
    config = PRESETS[name]
    everywhere = config.replace(sliding=dataclasses.replace(config.sliding, window=None))

    def gigabytes(config, thousands):
        if thousands * 1024 > config.max_positions:
            return '-'
        return f'{cache_bytes(config, thousands * 1024) / 1e9:.2f}'

    cells = [gigabytes(c, context) for c in (config, everywhere) for context in (8, 32, 128, 256)]
    assert f'| `{name}` | {" | ".join(cells)} |' in DOCS.read_text(encoding='utf-8').splitlines()


@pytest.mark.parametrize('name', PRESETS)
def test_a_preset_survives_json_and_makes_a_student(name):
    config = PRESETS[name]
    assert ModelConfig.from_dict(config.to_dict()) == config
    student = config.replace(canvas_length=32)
    assert student.is_diffusion and student.autoregressive == config.autoregressive


def test_loading_a_preset_says_that_it_has_no_weights():
    with pytest.raises(FileNotFoundError, match='gemma3_1b is a preset, which has no weights: pa'):
        load_model('gemma3_1b')


FAMILIES = ['tiny_config', 'tiny_moe_config', 'tiny_gemma3_config', 'tiny_e2b_config']


@pytest.mark.slow
@pytest.mark.parametrize('separate', [False, True])
@pytest.mark.parametrize('family', FAMILIES)
def test_a_student_of_each_family_takes_all_weights_of_its_teacher(family, separate, request):
    config = request.getfixturevalue(family).replace(kind='separate' if separate else 'shared')

    def zeros_of(model):
        shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)

    teacher = jax.tree.map(lambda leaf: leaf + 1, zeros_of(Gemma(config.autoregressive)))
    params = student_params_from_teacher(zeros_of(DiffusionGemma(config)), teacher)
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    still = {path[0].key for path, leaf in flat if not jnp.any(leaf)}
    own = {'self_conditioning'}
    if not config.layer_scalar and not separate:
        own |= {'backbone'}  # its denoise scalars, which the teacher does not have
    assert still == own


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'num_kv_shared_layers': 6}, r'must lie in \[0, 5\] for 6 layers, got 6'),
        ({'num_kv_shared_layers': 5}, r"no layer of type \['full'\] before them"),
        ({'num_kv_shared_layers': 0}, 'kv_shared_ffn_width is set'),
        ({'vocab_size': 38}, 'of 37 tokens are too few for a vocabulary of 38'),
    ],
)
def test_impossible_sharing_and_per_layer_embeddings_are_named(tiny_e2b_config, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_e2b_config.replace(**changes)
