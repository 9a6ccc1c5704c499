"""Tests distillation runs that train only adapters (`config.lora`)."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from new_params import new_params

from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.data.sources import DataSpec
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.distillation.experiment import Experiment
from diffusiongemma.distillation.loading import Teacher
from diffusiongemma.distillation.lora import ADAPTERS_DIR, LoraSettings, lora_student
from diffusiongemma.distillation.run import train_student
from diffusiongemma.models import DiffusionGemma, Gemma

sys.path.insert(0, str(Path(__file__).parents[1] / 'configs'))
import tiny_diffusion  # noqa: E402

DATA = DataSpec(kind='wordmath', size=100)


@pytest.fixture
def teacher(tiny_config) -> Teacher:
    """Returns a random teacher with the vocabulary of the built-in tokenizer."""
    tokenizer = Tokenizer.load('builtin')
    config = tiny_config.replace(
        vocab_size=tokenizer.vocab_size, canvas_length=0, layer_types=('full', 'full')
    )
    model = Gemma(config)
    params = new_params(model)
    return Teacher(model, params, tokenizer)


def lora_config(**changes):
    config = tiny_diffusion.get_config()
    config.mesh = {'data': 1, 'fsdp': 4, 'tensor': 2}
    config.canvas_length = 8
    config.data = {'batch_size': 4, 'row_length': 64, 'canvases_per_row': 4}
    config.train = {'num_steps': 2, 'report_every': 1, 'checkpoint_every': 2}
    config.stage2.first_step = 2  # only stage 1
    config.lora.rank = 2
    config.update(changes)
    return config


@pytest.mark.slow
def test_only_adapters_are_trained_and_the_encode_pass_stays_the_teachers(teacher, tmp_path):
    setup, state = train_student(Experiment.of(lora_config()), teacher, DATA, tmp_path)
    names = flatten_dict(state.params, sep='/')
    assert all(
        name.startswith('self_conditioning/') or name.endswith(('/lora_a', '/lora_b'))
        for name in names
    )
    assert not any(name.startswith(('backbone/', 'embedder/')) for name in names)
    moved = [name for name, value in names.items() if name.endswith('lora_b') and value.any()]
    assert moved and all(name.startswith('denoise_backbone/') for name in moved)

    # The run can be loaded before its export, and its encode pass is the teacher's.
    run, params, tokenizer = load_model(tmp_path)
    assert tokenizer is not None
    for name in ('backbone', 'embedder'):
        for ours, theirs in zip(
            jax.tree.leaves(params[name]), jax.tree.leaves(teacher.params[name]), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)

    # The adapters on the same teacher give the same model.
    student = setup.lora
    base = tmp_path / 'base'  # the run's copy of the teacher
    student.save(tmp_path, state.ema_params, teacher.params, str(base), {})
    found, adapted, _ = load_model(tmp_path / ADAPTERS_DIR)
    assert found.config == setup.student.config and found.execution == run.execution
    merged = student.combine(student.base(teacher.params, setup.mesh), state.ema_params)
    assert jax.tree.structure(adapted) == jax.tree.structure(merged)
    for ours, theirs in zip(jax.tree.leaves(adapted), jax.tree.leaves(merged), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_adapters_of_one_pass_need_a_denoiser_of_its_own(teacher):
    settings = LoraSettings(rank=2, passes='denoise')
    model = DiffusionGemma(teacher.model.config.replace(canvas_length=8))
    with pytest.raises(ValueError, match="lora.passes='denoise' needs .*denoiser='separate'"):
        lora_student(settings, model, seed=0)


def test_rank_0_trains_everything(teacher):
    model = DiffusionGemma(teacher.model.config.replace(canvas_length=8))
    assert lora_student(LoraSettings(), model, seed=0) is None
