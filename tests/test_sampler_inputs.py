import jax
import numpy as np
import pytest
from toy_model import ToyConfig, ToyModel, toy

from diffusiongemma.sampling import Controls, Sampler, SamplingConfig, pad_prompts
from diffusiongemma.sampling.randomness import typed_key

C = 4
KEY = jax.random.key(0)


def config(**fields):
    return SamplingConfig(**({'stop_ids': (), 'pad_id': 22} | fields))


def test_samplers_of_equal_parts_are_equal_and_hashable():
    model, _ = toy(C)
    assert hash(Sampler(model, config())) == hash(Sampler(model, config()))
    assert Sampler(model, config()) == Sampler(model, config())
    assert Sampler(model, config()) != Sampler(model, config(temperature=0))


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'tokens': np.zeros(4, int)}, r'tokens must be \[batch, prompt width\].*\(4,\)'),
        ({'tokens': np.zeros((2, 0), int)}, r'got shape \(2, 0\)'),
        ({'tokens': np.ones((2, 4))}, 'tokens must be integers, got float'),
        ({'lengths': np.array([1.0, 2.0])}, 'lengths must be integers, got float'),
        ({'lengths': np.array([1, 2, 3])}, r'one number per row of tokens, \(2,\)'),
        ({'lengths': np.array([1, 0])}, 'row 1 has 0'),
        ({'lengths': np.array([5, 1])}, r'lie in \[1, 4\].*row 0 has 5'),
        ({'tokens': np.full((2, 4), 23)}, 'Token 23 in row 0, column 0 is outside .* of 23'),
        ({'tokens': np.full((2, 4), -1)}, 'Token -1 in row 0'),
        (
            {'controls': Controls(max_new_tokens=np.array([3.7, 2.0]))},
            'controls.max_new_tokens must hold whole numbers, got float',
        ),
        ({'controls': Controls(pinned=np.full((2, 3), 0.5))}, 'controls.pinned must hold whole'),
        ({'rng': jax.random.split(KEY, 3)}, r'one key or one per row, \(2,\).*\(3,\)'),
    ],
)
def test_unfit_input_is_refused_with_its_value(changes, message):
    model, params = toy(C)
    good = {'tokens': np.ones((2, 4), int), 'lengths': np.array([4, 1]), 'rng': KEY}
    sampler = Sampler(model, config())
    with pytest.raises(ValueError, match=message):
        sampler(params, **(good | changes))
    with pytest.raises(ValueError, match=message):
        sampler.stream(params, **(good | changes))


def test_a_number_is_not_a_key():
    with pytest.raises(ValueError, match=r'rng must be a key such as jax.random.key\(0\), got 3'):
        typed_key(3)


def test_a_prompt_that_leaves_no_room_for_the_response_is_refused():
    model = ToyModel(ToyConfig(max_positions=8))
    params = toy()[1]
    tokens, lengths = np.ones((2, 8), int), np.array([3, 5])
    Sampler(model, config(max_new_tokens=3))(params, tokens, lengths, rng=KEY)
    with pytest.raises(ValueError, match='row 1 has 5 tokens.* lower max_new_tokens to at most 3'):
        Sampler(model, config(max_new_tokens=4))(params, tokens, lengths, rng=KEY)
    with pytest.raises(ValueError, match='row 0 has 8 tokens, but the model has 8 positions'):
        Sampler(model, config(max_new_tokens=1))(params, tokens, np.array([8, 1]), rng=KEY)


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'max_new_tokens': 0}, 'max_new_tokens must be >= 1, got 0'),
        ({'max_denoising_steps': 0}, 'max_denoising_steps must be >= 1, got 0'),
        ({'temperature': -1.0}, 'temperature must be finite and >= 0, got -1.0'),
        ({'temperature': float('nan')}, 'temperature must be finite'),
        ({'t_min': 0.9}, 't_min=0.9 and t_max=0.8'),
        ({'entropy_bound': -1.0}, 'entropy_bound must be >= 0 nats, got -1.0'),
        ({'stability_threshold': -1}, 'stability_threshold must be >= 0 steps, got -1'),
        ({'stop_ids': (1, -2)}, r'token ids >= 0, got 22 and \(1, -2\)'),
        ({'vocab_size': 0}, 'vocab_size must be >= 1, got 0'),
        ({'prefill_chunk': 0}, 'prefill_chunk must be >= 1, got 0'),
        ({'top_k': 2.5}, 'top_k must be a whole number, got 2.5'),
        ({'max_draft_steps': True}, 'max_draft_steps must be a whole number, got True'),
        ({'temperature': '0.1'}, "temperature must be a number, got '0.1'"),
    ],
)
def test_an_unfit_config_is_refused_with_its_value(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


@pytest.mark.parametrize('fields', [{'pad_id': 23}, {'stop_ids': (23,)}, {'vocab_size': 24}])
def test_a_config_of_another_vocabulary_is_refused(fields):
    with pytest.raises(ValueError, match='The model knows 23 tokens'):
        Sampler(toy(C)[0], config(**fields))


def test_a_model_without_canvas_is_refused_by_the_diffusion_mode_alone():
    model, _ = toy(canvas_length=0)
    Sampler(model, config(), 'autoregressive')
    with pytest.raises(ValueError, match='canvas_length of this ToyModel is 0'):
        Sampler(model, config())


def test_an_unknown_mode_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"\['autoregressive', 'diffusion', 'lossless'\], got 'magic'"
    ):
        Sampler(toy(C)[0], config(), 'magic')


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'canvas_length': '4'}, "canvas_length in the config .* integer >= 0, got '4'"),
        ({'canvas_length': -1}, 'integer >= 0, got -1'),
        ({'vocab_size': 11.0}, 'vocab_size in the config of ToyModel must be an integer'),
        ({'vocab_size': 0}, 'must be an integer >= 1, got 0'),
        ({'max_positions': 0}, 'max_positions in the config .* >= 1, got 0'),
        ({'mask_id': 23}, 'mask_id=23 must be one of the 23 token ids'),
    ],
)
def test_a_config_of_a_model_that_cannot_be_sampled_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampler(ToyModel(ToyConfig(**fields)), config(pad_id=0))


@pytest.mark.parametrize('method', ['encode', 'unembed'])
def test_a_model_without_a_causal_pass_is_refused(method):
    others = {name: None for name in ('encode', 'unembed') if name != method}
    other = type('Other', (), others | {'config': ToyConfig()})()
    with pytest.raises(TypeError, match=f'Other has no method {method}, see CausalModel'):
        Sampler(other, config())


@pytest.mark.parametrize(('method', 'mode'), [('unembed', 'lossless'), ('denoise', 'diffusion')])
def test_logits_of_another_vocabulary_are_refused_with_the_method(method, mode):
    class Model(ToyModel):
        def unembed(self, hidden):
            return super().unembed(hidden)[..., : 5 if method == 'unembed' else None]

        def denoise(self, *args):
            return super().denoise(*args)[..., : 5 if method == 'denoise' else None]

    _, params = toy(C)
    sampler = Sampler(Model(ToyConfig(canvas_length=C)), config(), mode)
    with pytest.raises(ValueError, match=rf'Model.{method} must return logits \[..., 23\]'):
        sampler(params, *pad_prompts([[1, 2]]), rng=KEY)


def test_prompts_are_padded_to_a_multiple():
    tokens, lengths = pad_prompts([[5, 6, 7], [8]], pad_id=9, multiple=4)
    assert tokens.tolist() == [[5, 6, 7, 9], [8, 9, 9, 9]]
    assert lengths.tolist() == [3, 1]
    assert pad_prompts([[1] * 4], multiple=4)[0].shape == (1, 4)
    assert pad_prompts([[1] * 5], multiple=4)[0].shape == (1, 8)


@pytest.mark.parametrize(
    'prompts, options, message',
    [
        ([], {}, 'No prompts'),
        ([[1], []], {}, 'Prompt 1 is empty'),
        ([[1], [1, 2, 3]], {'width': 2}, 'Prompt 1 has 3 tokens .* width=2'),
        ([[1]], {'multiple': 0}, 'multiple must be >= 1, got 0'),
    ],
)
def test_prompts_that_can_not_be_padded_are_refused(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        pad_prompts(prompts, **options)
