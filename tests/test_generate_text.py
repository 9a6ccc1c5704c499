import jax
import pytest
from toy_model import ToyConfig, ToyModel

from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.sampling import Sampler, SamplingConfig, generate_text


@pytest.fixture(scope='module')
def tokenizer():
    return Tokenizer.load('builtin')


@pytest.fixture(scope='module')
def toy_of_tokenizer(tokenizer):
    model = ToyModel(ToyConfig(vocab_size=tokenizer.vocab_size))
    return model, model.init(jax.random.key(0))['params']


def test_responses_are_the_decoded_tokens_of_each_row(tokenizer, toy_of_tokenizer):
    model, params = toy_of_tokenizer
    config = SamplingConfig.for_tokenizer(tokenizer, max_new_tokens=6)
    texts, output = generate_text(
        Sampler(model, config, 'autoregressive'),
        params,
        tokenizer,
        ['How many?', 'Why?'],
        rng=jax.random.key(0),
    )
    for text, tokens, length in zip(texts, output.tokens, output.lengths, strict=True):
        assert text == tokenizer.decode(tokens[:length].tolist())
    assert texts[0] != texts[1]


def test_a_config_for_a_tokenizer_takes_its_special_tokens(tokenizer):
    config = SamplingConfig.for_tokenizer(tokenizer, temperature=0, pad_id=5)
    assert config.stop_ids == tokenizer.stop_ids
    assert config.vocab_size == tokenizer.vocab_size
    assert (config.temperature, config.pad_id) == (0, 5)


def test_a_sampler_that_does_not_stop_at_the_turn_end_is_refused(tokenizer, toy_of_tokenizer):
    model, params = toy_of_tokenizer
    sampler = Sampler(model, SamplingConfig(stop_ids=(tokenizer.eos_id,)))
    with pytest.raises(ValueError, match=rf'lack \[{tokenizer.turn_end_id}\]'):
        generate_text(sampler, params, tokenizer, ['Hello'], rng=jax.random.key(0))
