"""Tests the comparison of a student with its teacher on a random tiny model."""

import dataclasses
import json

import jax
import pytest
from new_params import new_params

from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.evaluation.compare import EvalConfig, compare, looking_up
from diffusiongemma.models import DiffusionGemma, Gemma
from diffusiongemma.sampling import Sampler, SamplingConfig


@pytest.mark.slow
def test_the_comparison_measures_both_and_times_every_batch_size(tiny_config):
    tokenizer = Tokenizer.load('builtin')
    config = tiny_config.replace(vocab_size=tokenizer.vocab_size)
    model = DiffusionGemma(config)
    params = new_params(model)
    gemma = Gemma(config.autoregressive)
    teacher = new_params(gemma, 1)
    sampling = SamplingConfig.for_tokenizer(tokenizer, max_new_tokens=6, temperature=0.0)
    examples = [{'prompt': text, 'response': 'x'} for text in ('One?', 'Two?')]
    comparison, *_ = compare(
        (Sampler(gemma, sampling, mode='autoregressive'), teacher),
        (Sampler(model, dataclasses.replace(sampling, max_denoising_steps=2)), params),
        tokenizer,
        examples,
        EvalConfig(batch_size=2, speed_batch_sizes=(1, 2), speed_batches=1, prompt_multiple=16),
        jax.random.key(2),
    )
    found = json.loads(json.dumps(dataclasses.asdict(comparison)))
    assert found['num_examples'] == 2 and found['speed_batch_size'] == 1
    for name in ('speedup', 'lossless_speedup', 'lookup_speedup'):
        low, high = found[f'{name}_spread']
        assert 0 < low <= found[name] <= high
    assert [speeds['speed_batch_size'] for speeds in found['larger_batches']] == [2]
    assert found['teacher_samples']['exact_match'] == 1 and found['exact_match'] < 1
    assert found['teacher_samples']['teacher_nll'] < found['teacher_nll']
    assert found['implausible_within'] is not None
    assert found['implausible_across'] is not None


def test_lookups_alone_take_the_place_of_every_draft(tiny_config):
    config = SamplingConfig(lookup_ngram=2, draft_length=4, model_draft_length=2)
    alone = looking_up(Sampler(DiffusionGemma(tiny_config), config, 'lossless')).config
    assert alone.drafts.length == 3 and alone.model_draft_length is None


@pytest.mark.parametrize('sizes', [(), (1, 0)])
def test_batch_sizes_that_measure_nothing_are_refused(sizes):
    with pytest.raises(ValueError, match='speed_batch_sizes'):
        EvalConfig(speed_batch_sizes=sizes)
