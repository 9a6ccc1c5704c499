"""Tests that transformers loads exported checkpoints completely and computes equal logits."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_student import save_dense_student

from diffusiongemma import verify
from diffusiongemma.checkpoints.convert import convert
from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.models.cache import Prefix
from diffusiongemma.sampling import SamplingConfig
from diffusiongemma.sampling.published import generation_config

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

DATA = Path(__file__).parent / 'data'
TOKENS = np.random.default_rng(0).integers(3, 96, (2, 20))
CANVAS = np.random.default_rng(1).integers(0, 96, (2, 32))


def export(source, directory):
    convert(
        source,
        directory,
        'hf',
        generation=lambda config: generation_config(SamplingConfig(), config.is_diffusion),
    )
    return directory


def load_whole(cls, directory):
    """Returns the transformers model in float32, with every weight from the checkpoint."""
    model, info = cls.from_pretrained(
        directory, dtype=torch.float32, attn_implementation='eager', output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def their_passes(model, tokens, canvas):
    """Returns the encoder logits and denoise logits of transformers."""
    with torch.no_grad():
        encoded = model.model.encoder(input_ids=torch.from_numpy(tokens).long())
        cap = model.final_logit_softcapping
        logits = torch.tanh(model.lm_head(encoded.last_hidden_state) / cap) * cap
        denoised = model(
            decoder_input_ids=torch.from_numpy(canvas).long(),
            past_key_values=encoded.past_key_values,
        ).logits
    return logits.numpy(), denoised.numpy()


@functools.partial(jax.jit, static_argnums=0)
def our_passes(model, params, tokens, canvas):
    """Returns the same logits of this library."""

    def apply(*args, method):
        return model.apply({'params': params}, *args, method=method)

    with jax.default_matmul_precision('highest'):
        ones = jnp.ones_like(tokens)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, kv = apply(tokens, positions, ones, method='encode')
        starts = jnp.full((len(tokens), 1), tokens.shape[1])
        prefix = Prefix(kv, positions, ones)
        denoised = apply(canvas[:, None], starts, ones[:, :1], prefix, method='denoise')
        return apply(hidden, method='unembed'), denoised[:, 0]


@pytest.fixture(scope='module')
def dense(tmp_path_factory):
    """Returns a dense denoiser and its export."""
    directory = tmp_path_factory.mktemp('dense')
    student = save_dense_student(directory / 'student')
    return student, export(student, directory / 'out')


@pytest.mark.parametrize(
    'source',
    [
        'tiny_moe',
        pytest.param('tiny_heldout', marks=pytest.mark.slow),
        pytest.param('tiny_padded', marks=pytest.mark.slow),
    ],
)
def test_transformers_loads_a_denoiser_and_both_passes_agree(tmp_path, source):
    assert_passes_agree(DATA / source, export(DATA / source, tmp_path / 'out'))


@pytest.mark.slow
def test_a_dense_denoiser_loads_and_agrees_too(dense):
    assert_passes_agree(*dense)


def assert_passes_agree(path, exported):
    cls = transformers.DiffusionGemmaForBlockDiffusion
    model = load_whole(cls, exported)
    ours, params, _ = load_model(path)
    canvas = CANVAS[:, : ours.config.canvas_length]
    theirs = their_passes(model, TOKENS, canvas)
    for mine, other in zip(our_passes(ours, params, TOKENS, canvas), theirs, strict=True):
        np.testing.assert_allclose(mine, other, atol=verify.TOLERANCE)


def test_transformers_agrees_with_the_golden_outputs_of_the_original(tmp_path):
    golden = dict(np.load(DATA / 'tiny_heldout' / 'golden.npz'))
    cls = transformers.DiffusionGemmaForBlockDiffusion
    model = load_whole(cls, export(DATA / 'tiny_heldout', tmp_path / 'out'))
    encoder_logits, step0 = their_passes(model, golden['prompt'], golden['canvas'])
    np.testing.assert_allclose(encoder_logits, golden['encoder_logits'], atol=1e-5)
    np.testing.assert_allclose(step0, golden['logits_step0'], atol=1e-5)


@pytest.mark.parametrize(
    ('source', 'architecture'),
    [
        ('tiny_gemma3', 'Gemma3ForCausalLM'),
        ('tiny_gemma3_scaled', 'Gemma3ForCausalLM'),
        ('tiny_gemma4', 'Gemma4ForCausalLM'),
        ('tiny_gemma4_moe', 'Gemma4ForCausalLM'),
        ('tiny_gemma4_e2b', 'Gemma4ForCausalLM'),
        ('builtin-teacher', 'Gemma4ForCausalLM'),
    ],
)
def test_transformers_loads_an_autoregressive_gemma_and_logits_agree(
    tmp_path, source, architecture
):
    path = source if source == 'builtin-teacher' else DATA / source
    model = load_whole(transformers.AutoModelForCausalLM, export(path, tmp_path / 'out'))
    assert type(model).__name__ == architecture
    ours, params, _ = load_model(path)
    with torch.no_grad():
        theirs = model(torch.from_numpy(TOKENS)).logits.numpy()
    with jax.default_matmul_precision('highest'):
        mine = jax.jit(ours.apply)({'params': params}, TOKENS)
    np.testing.assert_allclose(mine, theirs, atol=verify.TOLERANCE)


def test_the_exported_tokenizer_and_chat_template_give_our_ids(dense):
    student, exported = dense
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    ours = load_model(student)[2]
    text = 'Mia has 12 apples.  She buys 3 more.\nHow many now? é'
    assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text)
    chat = theirs.apply_chat_template(
        [{'role': 'user', 'content': text}], add_generation_prompt=True, return_dict=True
    )
    assert chat['input_ids'] == ours.format_prompt(text)


def test_the_exported_sampling_settings_are_those_of_the_sampler(dense):
    config = transformers.DiffusionGemmaGenerationConfig.from_pretrained(dense[1])
    rule = SamplingConfig().acceptance_rule
    assert config.sampler_config.entropy_bound == rule.entropy_bound
    assert config.max_denoising_steps == SamplingConfig().max_denoising_steps
    assert (config.t_min, config.t_max) == (0.4, 0.8)
