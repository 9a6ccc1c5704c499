"""Tests that constrained sampling gives valid text and leaves valid text unchanged."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
from toy_model import ToyConfig

from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.constraints.grammar import from_json_schema, from_regex
from diffusiongemma.data.pipeline import eval_examples
from diffusiongemma.data.sources import DataSpec
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.sampling import (
    Controls,
    Sampler,
    SamplingConfig,
    decode_responses,
    generate_text,
    pad_prompts,
)

TOKENIZER = Tokenizer.load()
SCHEMA = {
    'type': 'object',
    'properties': {
        'kind': {'enum': ['apple', 'pear', 'plum "x"']},
        'count': {'type': 'integer', 'minimum': 0, 'maximum': 999},
        'ripe': {'type': 'boolean'},
        'tags': {'type': 'array', 'items': {'type': 'string', 'maxLength': 5}, 'maxItems': 2},
        'place': {
            'type': 'object',
            'properties': {'x': {'type': 'number'}, 'note': {'type': 'string', 'maxLength': 8}},
            'required': ['x'],
        },
    },
    'required': ['kind', 'count', 'place'],
}


class Babbler(nn.Module):
    """A model whose predictions depend on all previous tokens and are never valid."""

    config: ToyConfig = ToyConfig(vocab_size=TOKENIZER.vocab_size, canvas_length=16)

    def encode(self, tokens, positions, segment_ids, prefix=None):
        values = jnp.sin(1.0 + tokens * (positions + 1.0))
        return self._hidden(tokens, positions), {'values': values[:, None, :, None]}

    def _hidden(self, tokens, positions):
        return jnp.sin(jnp.arange(1, 9) * (tokens + 0.7 * positions + 1.0)[..., None])

    def unembed(self, hidden):
        rows = jnp.arange(8)[:, None] + 1.0
        return hidden @ (2 * jnp.sin(rows * 1.7 * jnp.arange(self.config.vocab_size)))

    def denoise(self, canvas, starts, segment_ids, prefix, soft_embeddings=None):
        visible = (prefix.segment_ids > 0) & (prefix.positions < starts[:, :1])
        before = jnp.sum(visible * prefix.kv['values'][:, 0, :, 0], axis=-1)
        positions = starts[..., None] + jnp.arange(canvas.shape[-1]) + before[:, None, None]
        return self.unembed(self._hidden(canvas, positions) + 0.1 * soft_embeddings)

    def soft_embed(self, logits):
        return jnp.tanh(logits[..., :8])


@pytest.mark.slow
@pytest.mark.parametrize(
    'mode, temperature, rows',
    [
        ('diffusion', 1.0, 24),
        ('lossless', 1.0, 16),
        pytest.param('diffusion', 1.0, 500, marks=pytest.mark.slow),
        pytest.param('diffusion', 0.0, 250, marks=pytest.mark.slow),
        pytest.param('lossless', 1.0, 250, marks=pytest.mark.slow),
    ],
)
def test_every_generation_under_a_schema_parses_and_validates(mode, temperature, rows):
    """The slow tests generate 1,000 texts over several canvases from an untrained model."""
    config = SamplingConfig.for_tokenizer(
        TOKENIZER, max_new_tokens=100, max_denoising_steps=2, temperature=temperature
    )
    rng = np.random.default_rng(0)
    tokens, lengths = pad_prompts([rng.integers(5, 900, 3).tolist() for _ in range(rows)], width=3)
    controls = Controls(automaton=from_json_schema(SCHEMA, TOKENIZER))
    output = Sampler(Babbler(), config, mode)(
        {}, tokens, lengths, rng=jax.random.key(1), controls=controls
    )
    texts = decode_responses(TOKENIZER, output)
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert np.isin(np.asarray(output.tokens), TOKENIZER.stop_ids).any(axis=1).all()
    assert len(set(texts)) > rows / 3
    assert np.asarray(output.canvases).max() > 2


@pytest.fixture(scope='module')
def student():
    return load_model('builtin')


def answers(student, mode, prompts, automaton=None):
    model, params, tokenizer = student
    config = SamplingConfig.for_tokenizer(
        tokenizer, temperature=0, max_new_tokens=96, max_denoising_steps=4
    )
    return generate_text(
        Sampler(model, config, mode),
        params,
        tokenizer,
        prompts,
        rng=jax.random.key(0),
        controls=None if automaton is None else Controls(automaton=automaton),
    )[0]


@pytest.mark.slow
def test_what_would_be_valid_without_a_constraint_is_not_changed_by_one(student):
    examples = eval_examples(DataSpec(kind='wordmath', split='test', size=16))
    prompts = [example['prompt'] for example in examples]
    anything = from_regex(r'(?s:.*)', TOKENIZER)
    two_digits = from_regex(r'(?s:.*)The answer is \d\d\D*', TOKENIZER)
    free = answers(student, 'lossless', prompts)
    assert answers(student, 'lossless', prompts, anything) == free
    constrained = answers(student, 'lossless', prompts, two_digits)
    valid = [i for i, text in enumerate(free) if _ends_with_two_digits(text)]
    assert 0 < len(valid) < len(free)
    assert [constrained[i] for i in valid] == [free[i] for i in valid]
    assert all(map(_ends_with_two_digits, constrained))
    assert answers(student, 'diffusion', prompts, anything) == answers(
        student, 'diffusion', prompts
    )


def _ends_with_two_digits(text):
    end = text.rpartition('The answer is ')[2]
    return text != end and end[:2].isdigit() and not any(c.isdigit() for c in end[2:])
