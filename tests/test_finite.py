"""Tests that NaN or infinite logits raise an error that names the pass and the row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_light import light_student
from toy_model import ToyConfig, ToyModel, toy

from diffusiongemma.constraints.grammar import from_regex
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.sampling import Controls, Sampler, SamplingConfig, pad_prompts
from diffusiongemma.sampling.batching import generate_many
from diffusiongemma.sampling.finite import PASSES, check_finite
from diffusiongemma.sampling.watch import watch

MARK, PAD = 13, 22
PROMPTS = [[4], [MARK, 5, 7, 11, 3], [9, 9, 6]]  # row 1 is the one that fails
KEY = jax.random.key(0)
EVERY_MODE = pytest.mark.parametrize('mode', ['diffusion', 'autoregressive', 'lossless'])
CONFIG = SamplingConfig(
    max_new_tokens=9, max_denoising_steps=2, stop_ids=(), pad_id=PAD, vocab_size=PAD
)


class Poisoned(ToyModel):
    """The toy with a bad value in the outputs of one pass if a row's prompt starts with MARK."""

    poisoned: str = ''
    value: float = float('nan')

    def encode(self, tokens, positions, segment_ids, prefix=None):
        hidden, kv = super().encode(tokens, positions, segment_ids, prefix)
        if self.poisoned != ('prompt' if prefix is None else 'response'):
            return hidden, kv
        is_marked = tokens[:, 0] == MARK if prefix is None else _is_marked(prefix)
        return jnp.where(is_marked[:, None, None], self.value, hidden), kv

    def denoise(self, canvas, starts, segment_ids, prefix, soft_embeddings=None):
        logits = super().denoise(canvas, starts, segment_ids, prefix, soft_embeddings)
        if self.poisoned != 'canvas':
            return logits
        return logits.at[..., 2, 5].set(
            jnp.where(_is_marked(prefix)[:, None], self.value, logits[..., 2, 5])
        )


def _is_marked(prefix):
    return prefix.kv['values'][:, 0, 0, 0] == 2 * (MARK + 1)


def sampler_of(poisoned, mode, value=float('nan')):
    return Sampler(Poisoned(ToyConfig(), poisoned, value), CONFIG, mode)


CASES = [
    ('prompt', 'diffusion', 'prefill'),
    ('prompt', 'autoregressive', 'prefill'),
    ('prompt', 'lossless', 'prefill'),
    ('canvas', 'diffusion', 'denoise'),
    ('canvas', 'lossless', 'denoise'),
    ('response', 'diffusion', 'commit'),
    ('response', 'autoregressive', 'autoregressive'),
    ('response', 'lossless', 'verify'),
]
# In the default suite a call has one case per mode; inside of a jit, where the output has the
# number of the pass, all are tested.
IN_CALLS = [CASES[3], CASES[6], CASES[7]]


@pytest.mark.parametrize(
    'poisoned, mode, name',
    [
        *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES if case not in IN_CALLS),
        *IN_CALLS,
    ],
)
def test_a_call_names_the_pass_and_the_row(poisoned, mode, name):
    params = toy()[1]
    sampler = sampler_of(poisoned, mode, float('inf'))
    with pytest.raises(FloatingPointError, match=f'of the {name} pass are NaN .* in row 1[.]'):
        sampler(params, *pad_prompts(PROMPTS, PAD, width=8), rng=KEY)


@functools.cache
def sample(poisoned, mode):
    """Returns the output of a call inside another jit."""
    params, prompts = toy()[1], pad_prompts(PROMPTS, PAD, width=8)
    sampler = sampler_of(poisoned, mode)
    return jax.jit(lambda params: sampler(params, *prompts, rng=KEY))(params)


@pytest.mark.parametrize('poisoned, mode, name', CASES)
def test_inside_a_jit_the_output_names_the_pass_and_other_rows_go_on(poisoned, mode, name):
    failed, healthy = sample(poisoned, mode), sample('', mode)
    assert failed.failed_pass.tolist() == [0, PASSES.index(name) + 1, 0]
    assert healthy.failed_pass.tolist() == [0, 0, 0]
    for name in ('tokens', 'lengths', 'denoising_steps'):
        found, expected = (np.asarray(getattr(o, name)) for o in (failed, healthy))
        np.testing.assert_array_equal(found[[0, 2]], expected[[0, 2]])
    # The tokens of row 1 before the pass are correct, and there are none after it.
    length = int(failed.lengths[1])
    assert length < healthy.lengths[1]
    np.testing.assert_array_equal(failed.tokens[1, :length], healthy.tokens[1, :length])
    assert (failed.tokens[1, length:] == PAD).all()


@pytest.mark.parametrize(
    'mode, cut',
    [
        ('autoregressive', {'top_k': 3}),
        ('autoregressive', {'top_p': 0.5}),
        ('autoregressive', {'temperature': 0}),
        ('lossless', {'top_k': 3}),
        ('diffusion', {'top_k': 3}),
    ],
)
def test_one_token_without_a_finite_logit_is_found_however_tokens_are_drawn(mode, cut):
    model, params = toy()
    params = {'embedding': params['embedding'].at[:, 8].set(jnp.nan)}
    config = SamplingConfig(
        max_new_tokens=5, max_denoising_steps=2, stop_ids=(), pad_id=PAD, vocab_size=PAD, **cut
    )
    with pytest.raises(FloatingPointError, match=r'NaN or infinite in row 0 \(and 2 more\)[.]'):
        Sampler(model, config, mode)(params, *pad_prompts(PROMPTS, PAD), rng=KEY)


@EVERY_MODE
def test_a_constraint_does_not_hide_them(mode):
    """This holds in greedy rows and in sampled rows."""
    tokenizer = Tokenizer.load()
    model = Poisoned(ToyConfig(vocab_size=tokenizer.vocab_size, canvas_length=4))
    rows = jax.random.normal(KEY, (tokenizer.vocab_size,) * 2)
    poisoned = jnp.asarray(tokenizer.encode('7'))
    config = SamplingConfig.for_tokenizer(tokenizer, max_new_tokens=8, max_denoising_steps=2)
    automaton = from_regex('[0-9]{3}', tokenizer)
    controls = Controls(automaton=automaton, temperature=jnp.array([0.0, 1.0]))
    prompt = pad_prompts([tokenizer.format_prompt('How many?')] * 2, tokenizer.pad_id)
    sampler = Sampler(model, config, mode)
    params = {'embedding': rows.at[:, poisoned].set(jnp.inf)}
    with pytest.raises(FloatingPointError, match=r'row 0 \(and 1 more\)'):
        sampler(params, *prompt, rng=KEY, controls=controls)
    assert sampler({'embedding': rows}, *prompt, rng=KEY, controls=controls).lengths.tolist() == [
        4,
        4,
    ]


@pytest.mark.parametrize(
    'poisoned, temperature',
    [
        pytest.param('denoise_backbone', 0.0, marks=pytest.mark.slow),
        ('serial', 1.0),
    ],
)
def test_a_light_denoiser_whose_drafts_are_not_finite_is_an_error(
    tiny_config, poisoned, temperature
):
    """The text would be correct, but every draft would be rejected."""
    one_layer = tiny_config.replace(layer_types=('sliding',), predict_next=True)
    model, params = light_student(one_layer, serial_rank=2)
    config = SamplingConfig(max_new_tokens=6, stop_ids=(), temperature=temperature)
    sampler = Sampler(model, config, 'lossless')
    prompts = pad_prompts(PROMPTS)
    assert sampler(params, *prompts, rng=KEY).lengths.tolist() == [6, 6, 6]
    params[poisoned] = jax.tree.map(lambda leaf: leaf * jnp.nan, params[poisoned])
    with pytest.raises(FloatingPointError, match='denoise pass'):
        sampler(params, *prompts, rng=KEY)
    with pytest.raises(FloatingPointError, match='denoise pass'):
        list(watch(sampler, params, *prompts, rng=KEY))


@pytest.mark.parametrize('mode, name', [('diffusion', 'commit'), ('lossless', 'verify')])
def test_streams_views_and_batches_of_many_prompts_fail_as_a_call_does(mode, name):
    params, sampler = toy()[1], sampler_of('response', mode)
    prompts = pad_prompts(PROMPTS, PAD, width=8)
    error = f'{name} pass are NaN or infinite in row 1[.]'
    with pytest.raises(FloatingPointError, match=error):
        list(sampler.stream(params, *prompts, rng=KEY))
    with pytest.raises(FloatingPointError, match=error):
        list(watch(sampler, params, *prompts, rng=KEY))
    with pytest.raises(FloatingPointError, match=error.replace('row', 'request')):
        generate_many(sampler, params, PROMPTS, rng=KEY, batch_size=2)


def test_finite_rows_pass():
    check_finite(np.zeros(3, np.int32))
