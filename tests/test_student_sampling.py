"""Tests that `sample` and `serve` use the settings of a student's evaluation by default."""

import pytest

from diffusiongemma.cli import student_sampling
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.sampling import EntropyBound, Remask, TopK

TOKENIZER = Tokenizer.load()


def test_a_bundle_says_how_its_student_is_sampled():
    config = student_sampling('builtin', TOKENIZER, temperature=None)
    assert (config.max_new_tokens, config.max_denoising_steps) == (96, 4)
    assert config.stability_threshold == 0 and config.temperature == 0
    assert config.stop_ids == TOKENIZER.stop_ids and config.pad_id == TOKENIZER.pad_id
    assert student_sampling('builtin-sudoku', TOKENIZER).acceptance_rule == EntropyBound(0.01)
    assert student_sampling('builtin-teacher', TOKENIZER).max_new_tokens == 128


def test_a_flag_counts_more_and_a_rule_takes_the_place_of_an_entropy_bound():
    config = student_sampling(
        'builtin-sudoku', TOKENIZER, acceptance='Remask(TopK(k=2), 4)', max_new_tokens=90
    )
    assert config.acceptance_rule == Remask(TopK(2), 4) and config.max_new_tokens == 90
    assert config.max_denoising_steps == 64
    loose = student_sampling('builtin-sudoku', TOKENIZER, entropy_bound=0.5)
    assert loose.acceptance_rule == EntropyBound(0.5)


def test_a_flag_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match='names no rule'):
        student_sampling('builtin', TOKENIZER, acceptance='TopP(4)')
    with pytest.raises(ValueError, match='has no effect beside'):
        student_sampling('builtin', TOKENIZER, acceptance='TopK(4)', entropy_bound=0.1)
