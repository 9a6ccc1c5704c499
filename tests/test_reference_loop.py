"""The whole generation loop against the public transformers implementation.

Both read the same tiny checkpoint, and the reference's random draws are replaced by ours.
"""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.sampling import Sampler, SamplingConfig
from diffusiongemma.sampling.epilogue import draw_tokens
from diffusiongemma.sampling.randomness import fold_in_rows, row_keys, split_rows, uniform_tokens

torch = pytest.importorskip('torch')
safetensors = pytest.importorskip('safetensors.numpy')
pytest.importorskip('transformers.models.diffusion_gemma')
pytestmark = pytest.mark.slow

TINY = pathlib.Path(__file__).parent / 'data' / 'tiny_moe'
CANVAS = 16
SEEDS = range(20)
STOP_ID = 37
FIELDS = {
    'max_new_tokens': 3 * CANVAS,
    'max_denoising_steps': 24,
    'entropy_bound': 3.0,
    't_min': 0.4,
    't_max': 0.8,
    'stability_threshold': 1,
    'confidence_threshold': 0.7,
    'pad_id': 0,
}


class Draws:
    """Stands in for torch's random functions with the draws of `Sampler` for the same key."""

    def __init__(self, key, batch_size, vocab_size):
        self.vocab_size = vocab_size
        self.rows = row_keys(key, batch_size)
        self.canvas = -1
        self.step = None

    def randint(self, low, high, size, device=None):
        assert low == 0 and high == self.vocab_size
        if self.step is None:
            self.canvas += 1
            keys, self.step_keys = split_rows(fold_in_rows(self.rows, self.canvas))
            self.step = -1
        else:
            keys = self.noise_keys
        return torch.from_numpy(np.array(uniform_tokens(keys, size[1], high))).long()

    def multinomial(self, probs, num_samples):
        assert num_samples == 1
        self.step += 1
        keys, self.noise_keys = split_rows(fold_in_rows(self.step_keys, self.step))
        logits = jnp.log(jnp.asarray(probs.numpy()))
        batch_size = self.rows.shape[0]
        tokens = draw_tokens(logits.reshape(batch_size, -1, self.vocab_size), keys)
        return torch.from_numpy(np.array(tokens)).long().reshape(-1, 1)

    def new_canvas(self):
        self.step = None


def reference_generate(
    model, monkeypatch, key, prompt, stop_id, *, entropy_bound, pad_id, **fields
):
    """The reference's new tokens and its tokens per forward."""
    from transformers.models.diffusion_gemma import generation_diffusion_gemma as reference

    draws = Draws(key, prompt.shape[0], model.config.text_config.vocab_size)
    prepare = model._prepare_denoiser_inputs

    def prepare_canvas(**kwargs):
        draws.new_canvas()
        return prepare(**kwargs)

    config = reference.DiffusionGemmaGenerationConfig(
        sampler_config=reference.EntropyBoundSamplerConfig(entropy_bound),
        eos_token_id=[stop_id],
        pad_token_id=pad_id,
        **fields,
    )
    with monkeypatch.context() as patched:
        patched.setattr(torch, 'randint', draws.randint)
        patched.setattr(torch, 'multinomial', draws.multinomial)
        patched.setattr(model, '_prepare_denoiser_inputs', prepare_canvas)
        output = model.generate(torch.from_numpy(prompt).long(), generation_config=config)
    return output.sequences[:, prompt.shape[1] :].numpy(), output.tokens_per_forward.numpy()


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """The tiny checkpoint, damped.

    With its random weights every step multiplies rounding errors by ten, and no canvas ever
    settles. With small residual updates both are tame and tokens still depend on each other.
    """
    directory = tmp_path_factory.mktemp('damped')
    tensors = safetensors.load_file(TINY / 'model.safetensors')
    damped = ('post_attention_layernorm.weight', 'post_feedforward_layernorm.weight')
    for name, tensor in tensors.items():
        if name.endswith((*damped, 'self_conditioning.down_proj.weight')):
            tensors[name] = tensor * np.float32(0.3)
    safetensors.save_file(tensors, directory / 'model.safetensors', {'format': 'pt'})
    shutil.copy(TINY / 'config.json', directory)
    return directory


def test_tokens_and_step_counts_equal_those_of_the_reference(checkpoint, monkeypatch):
    from transformers import DiffusionGemmaForBlockDiffusion

    prompt = np.load(TINY / 'golden.npz')['prompt']
    lengths = np.full(len(prompt), prompt.shape[1])
    model, params, _ = load_model(checkpoint)
    reference = DiffusionGemmaForBlockDiffusion.from_pretrained(
        checkpoint, attn_implementation='eager', dtype=torch.float32
    ).eval()
    sampler = Sampler(model, SamplingConfig(stop_ids=(STOP_ID,), **FIELDS))
    stopped_early = rows_apart = 0
    for seed in SEEDS:
        key = jax.random.key(seed)
        ours = sampler(params, prompt, lengths, rng=key)
        theirs, tokens_per_forward = reference_generate(
            reference, monkeypatch, key, prompt, STOP_ID, **FIELDS
        )
        width = theirs.shape[1]  # the reference ends with its last canvas
        np.testing.assert_array_equal(ours.tokens[:, :width], theirs, err_msg=f'seed {seed}')
        assert (np.asarray(ours.tokens[:, width:]) == FIELDS['pad_id']).all()
        # The reference counts what is no pad token, and the model may write that one too.
        counted = np.sum(theirs != FIELDS['pad_id'], axis=1)
        np.testing.assert_allclose(counted / ours.denoising_steps, tokens_per_forward, rtol=1e-6)
        limit = FIELDS['max_denoising_steps'] * np.asarray(ours.canvases)
        stopped_early += bool((ours.denoising_steps < limit).all())
        rows_apart += bool(ours.lengths[0] != ours.lengths[1])
    # Runs in which canvases settle before the last step, and rows end in canvases of their own.
    assert stopped_early > len(SEEDS) / 2 and rows_apart > 2
