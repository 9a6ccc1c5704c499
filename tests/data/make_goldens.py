"""Writes tiny random checkpoints of each Gemma family with outputs of the transformers library.

  pip install torch==2.13.0 transformers==5.17.0
  python tests/data/make_goldens.py [--out tests/data] [--only NAME ...]

Each directory then has a checkpoint in the published format and golden files. All outputs are
float32 on the CPU; no norm, scale or scalar has its trivial value. The same seed gives the same
weights and tokens; outputs are equal up to rounding.

golden.npz of an autoregressive model:
  tokens         [B, T] int32
  logits         [B, T, V] of one causal pass
  block_sizes    [n] int32, adds up to T
  cached_logits  [B, T, V] of the same tokens in blocks of these sizes through a K/V cache

golden_left.npz and golden_right.npz of `tiny_padded`, a DiffusionGemma: arrays of
`diffusiongemma/verify.py`, for prompts of unequal length that are padded on that side.
"""

import argparse
import pathlib

import numpy as np
import torch
import transformers as hf
from transformers.cache_utils import DynamicCache
from transformers.models.diffusion_gemma import generation_diffusion_gemma as generation

SLIDING, FULL = 'sliding_attention', 'full_attention'
VOCAB_SIZE = 96
ROPE3 = {
    SLIDING: {'rope_type': 'default', 'rope_theta': 1e4},
    FULL: {'rope_type': 'default', 'rope_theta': 1e6},
}
LINEAR = ROPE3 | {FULL: {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 1e6}}
COMMON = {
    'vocab_size': VOCAB_SIZE,
    'hidden_size': 24,
    'intermediate_size': 40,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'head_dim': 8,
    'sliding_window': 6,
    'attn_implementation': 'eager',
}
GEMMA3 = COMMON | {
    'num_hidden_layers': 4,
    'layer_types': [SLIDING, SLIDING, FULL, SLIDING],
    'query_pre_attn_scalar': 20,
}
GEMMA4 = COMMON | {
    'num_hidden_layers': 4,
    'layer_types': [SLIDING, FULL] * 2,
    'global_head_dim': 16,
    'hidden_size_per_layer_input': 0,
    'final_logit_softcapping': 30.0,
}
KEYS_AS_VALUES = {'attention_k_eq_v': True, 'num_global_key_value_heads': 1}
EXPERTS = {'num_experts': 5, 'top_k_experts': 2, 'moe_intermediate_size': 12}
PADDED = GEMMA4 | KEYS_AS_VALUES | EXPERTS | {'sliding_window': 16}
AUTOREGRESSIVE = {
    'tiny_gemma3': lambda: hf.Gemma3TextConfig(**GEMMA3, rope_parameters=ROPE3),
    # As in the releases from 4B on, there is a vision tower, and positions are scaled by 8.
    'tiny_gemma3_scaled': lambda: hf.Gemma3Config(
        text_config=GEMMA3 | {'rope_parameters': LINEAR},
        vision_config={
            'hidden_size': 16,
            'intermediate_size': 16,
            'num_hidden_layers': 1,
            'num_attention_heads': 2,
            'image_size': 8,
            'patch_size': 4,
        },
        mm_tokens_per_image=4,
        image_token_index=VOCAB_SIZE - 1,
        attn_implementation='eager',
    ),
    'tiny_gemma4': lambda: hf.Gemma4TextConfig(**GEMMA4 | KEYS_AS_VALUES),
    'tiny_gemma4_moe': lambda: hf.Gemma4TextConfig(
        **GEMMA4 | KEYS_AS_VALUES | EXPERTS, enable_moe_block=True
    ),
    # Two repetitions and a single layer have keys and values; one repetition and a layer do not.
    'tiny_gemma4_e2b': lambda: hf.Gemma4TextConfig(
        **GEMMA4
        | {
            'intermediate_size': 20,
            'num_hidden_layers': 8,
            'layer_types': [SLIDING, FULL] * 4,
            'num_kv_shared_layers': 3,
            'use_double_wide_mlp': True,
            'hidden_size_per_layer_input': 8,
            'vocab_size_per_layer_input': VOCAB_SIZE,
        }
    ),
}
BLOCK_SIZES = (5, 1, 1, 5, 1, 1, 1, 5)  # some cross the edge of the window of 6
CANVAS_LENGTH = 6
ENTROPY_BOUND = 10.0
PROMPT_LENGTHS = {
    'left': (19, 24, 11),  # longer than the window
    # transformers drops slots, including padding, that are outside the window. Prompt and canvas
    # together are shorter than the window, so that nothing is dropped.
    'right': (5, 8, 3),
}


def randomize(model: torch.nn.Module, rng: np.random.Generator) -> None:
    """Sets random weights, with no norm, scale or scalar at its trivial value."""
    gemma3 = model.config.model_type.startswith('gemma3')
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if 'inv_freq' in name or 'embed_scale' in name:
                continue
            noise = torch.from_numpy(rng.standard_normal(tuple(value.shape))).to(value.dtype)
            # Gemma 4 does not scale scores: with norms near 1, the softmax of random queries and
            # keys is so sharp that it amplifies rounding errors by a factor of one hundred.
            center = 0.0 if gemma3 else 0.6 if '_norm.' in name else 1.0
            vector = value.ndim <= 1
            value.copy_(center + 0.2 * noise if vector else noise / np.sqrt(value.shape[-1]))
    model.tie_weights()


def long(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values)).long()


def autoregressive_golden(config: hf.PreTrainedConfig, rng: np.random.Generator) -> tuple:
    """Writes a random model of `config` and its outputs on random tokens."""
    model = hf.AutoModelForImageTextToText if hasattr(config, 'vision_config') else None
    model = (model or hf.AutoModelForCausalLM).from_config(config).float().eval()
    randomize(model, rng)
    tokens = rng.integers(3, VOCAB_SIZE - 1, (2, sum(BLOCK_SIZES)))
    cache = DynamicCache(config=config.get_text_config())
    cached, start = [], 0
    for size in BLOCK_SIZES:
        block = long(tokens[:, start : start + size])
        cached.append(model(input_ids=block, past_key_values=cache, use_cache=True).logits)
        start += size
    return model, {
        'tokens': tokens.astype(np.int32),
        'logits': model(input_ids=long(tokens), use_cache=False).logits.numpy(),
        'block_sizes': np.array(BLOCK_SIZES, np.int32),
        'cached_logits': torch.cat(cached, dim=1).numpy(),
    }


def padded_model(rng: np.random.Generator) -> torch.nn.Module:
    config = hf.DiffusionGemmaConfig(
        text_config=hf.DiffusionGemmaTextConfig(
            **{k: v for k, v in PADDED.items() if k != 'attention_k_eq_v'}
        ),
        vision_config=hf.Gemma4VisionConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=4,
            patch_size=4,
            position_embedding_size=4,
        ),
        canvas_length=CANVAS_LENGTH,
        image_token_id=VOCAB_SIZE - 1,
        boi_token_id=VOCAB_SIZE - 2,
        eoi_token_id=VOCAB_SIZE - 3,
        attn_implementation='eager',
    )
    model = hf.DiffusionGemmaForBlockDiffusion(config).float().eval()
    randomize(model, rng)
    return model


def padded_golden(model: torch.nn.Module, side: str, rng: np.random.Generator) -> dict:
    """Writes the outputs of all passes on a batch of prompts that are padded on one side."""
    lengths = np.array(PROMPT_LENGTHS[side])
    batch, width = len(lengths), lengths.max()
    slots = np.arange(width)
    first = (width - lengths if side == 'left' else np.zeros(batch, int))[:, None]
    mask = (slots >= first) & (slots < first + lengths[:, None])
    prompt = np.where(mask, rng.integers(3, VOCAB_SIZE - 3, (batch, width)), 0)
    canvas = rng.integers(0, VOCAB_SIZE, (batch, CANVAS_LENGTH))
    commit = rng.integers(3, VOCAB_SIZE - 3, (batch, CANVAS_LENGTH))
    canvas_slots = np.arange(CANVAS_LENGTH)

    def all_real(blocks: int) -> torch.Tensor:
        real = np.ones((batch, blocks * CANVAS_LENGTH), bool)
        return torch.from_numpy(np.concatenate([mask, real], axis=1))

    def positions(block: int) -> torch.Tensor:
        return long(lengths[:, None] + block * CANVAS_LENGTH + canvas_slots)

    def head(hidden: torch.Tensor) -> torch.Tensor:
        return 30 * torch.tanh(model.lm_head(hidden).float() / 30)

    def denoise(blocks: int, logits: torch.Tensor | None = None) -> torch.Tensor:
        return model(
            decoder_input_ids=long(canvas),
            past_key_values=cache,
            self_conditioning_logits=logits,
            decoder_attention_mask=all_real(blocks),
            decoder_position_ids=positions(blocks - 1),
        ).logits

    cache = DynamicCache(config=model.config.text_config)
    encoded = model.model.encoder(
        input_ids=long(prompt),
        attention_mask=torch.from_numpy(mask),
        position_ids=long(np.maximum(slots - first, 0)),
        past_key_values=cache,
    )
    step0 = denoise(1)
    step1 = denoise(1, step0 / 0.7)
    shaped = step0 / 0.8
    sampler = generation.EntropyBoundSampler(
        generation.EntropyBoundSamplerConfig(entropy_bound=ENTROPY_BOUND),
        CANVAS_LENGTH,
        VOCAB_SIZE,
        48,
    )
    sampler.accept_canvas(long(canvas), long(canvas), shaped, 48)
    encoder_logits = head(encoded.last_hidden_state)
    real = torch.from_numpy(mask[0])
    committed = model.model.encoder(
        input_ids=long(commit),
        attention_mask=all_real(1),
        position_ids=positions(0),
        past_key_values=cache,
    )
    arrays = {
        'prompt': prompt.astype(np.int32),
        'prompt_mask': mask,
        'canvas': canvas.astype(np.int32),
        'commit': commit.astype(np.int32),
        'entropy_bound': np.float32(ENTROPY_BOUND),
        'encoder_hidden': encoded.last_hidden_state,
        'encoder_logits': encoder_logits,
        'logits_step0': step0,
        'logits_step1': step1,
        'next_encoder_logits': head(committed.last_hidden_state),
        'logits_canvas2': denoise(2),
        'accepted': sampler.accepted_token_mask,
        'token_entropy': torch.distributions.Categorical(logits=shaped).entropy(),
        'ar_ce': torch.nn.functional.cross_entropy(
            encoder_logits[0, real][:-1], long(prompt)[0, real][1:]
        ),
    }
    return {name: np.asarray(value) for name, value in arrays.items()}


def write(model: torch.nn.Module, directory: pathlib.Path, goldens: dict[str, dict]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    (directory / 'generation_config.json').unlink(missing_ok=True)
    for file, arrays in goldens.items():
        np.savez_compressed(directory / file, **arrays)


def make(name: str, out: pathlib.Path) -> None:
    """Writes one directory of `NAMES`."""
    rng = np.random.default_rng(NAMES.index(name))
    with torch.no_grad():
        if name == 'tiny_padded':
            model = padded_model(rng)
            goldens = {
                f'golden_{side}.npz': padded_golden(model, side, rng) for side in PROMPT_LENGTHS
            }
        else:
            model, golden = autoregressive_golden(AUTOREGRESSIVE[name](), rng)
            goldens = {'golden.npz': golden}
    write(model, out / name, goldens)


NAMES = [*AUTOREGRESSIVE, 'tiny_padded']


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path(__file__).parent)
    parser.add_argument('--only', nargs='+', choices=NAMES, default=NAMES)
    args = parser.parse_args()
    for name in args.only:
        make(name, args.out)


if __name__ == '__main__':
    main()
