"""Compares Gemma 3 270M with transformers in float32, on real weights.

python tests/gemma3_270m_parity.py

It needs the extra `gemma`, torch and transformers. For each of 20 prompts it prints the length, the
largest difference of the logits of 64 greedy tokens, and whether the tokens are equal. The last
line is a JSON summary with a separate figure for the prompt that repeats a sentence, whose logits
depend on the last bit of the rotary frequencies: those of this library are rounded from float64,
those of transformers are float32 powers, which differ by 2 units in the last place. With the
frequencies of this library the logits of transformers change by 3.6e-3. The weights of the
transformers model are copied from the dequantized tensors.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from diffusiongemma.checkpoints.gguf_import import published_name
from diffusiongemma.checkpoints.gguf_reader import GgufFile
from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.checkpoints.packaged import packaged_file
from diffusiongemma.data.sources import DataSpec, load_source
from diffusiongemma.models import for_inference
from diffusiongemma.sampling import Sampler, SamplingConfig, pad_prompts

NUM_TOKENS = 64
MULTIPLE = 256  # prompts are padded to a multiple, so that few shapes are compiled
WINDOW = 512
LONG = 'The window of a sliding layer has 512 tokens, and this text is longer than that. ' * 40
OTHER_LANGUAGES = ('我们去公园。 Где вокзал?', 'مرحبا नमस्ते こんにちは', '안녕 สวัสดี שלום 😀')


def prompts() -> list[str]:
    """Returns 20 prompts: code, prose, other languages, and four longer than the window of 512."""
    problems = load_source(DataSpec(kind='human_eval'))
    code = [problems[i]['prompt'] for i in (0, 20, 40, 60, 80, 100)]
    source = load_source(DataSpec(kind='python_source', split='test'))
    windows = [source[i]['prompt'] for i in range(0, 60, 15)]
    several = ''.join(source[i]['prompt'] for i in range(8))
    long = [LONG, ''.join(code), several, OTHER_LANGUAGES[0] * 60]
    prose = ['The capital of France is', 'Once upon a time', '1, 2, 3, 4,']
    return [*prose, *OTHER_LANGUAGES, *code, *windows, *long]


def in_transformers(file: GgufFile) -> transformers.Gemma3ForCausalLM:
    """Returns the model in transformers, in float32."""
    config = transformers.Gemma3TextConfig(
        vocab_size=262_144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=WINDOW,
        max_position_embeddings=32_768,
    )
    model = transformers.Gemma3ForCausalLM(config).float().eval()
    state = {}
    for name in file.tensors:
        value = file.read(name) - (1 if 'norm' in name else 0)  # stored as 1 + w
        state[published_name(name)] = torch.from_numpy(np.ascontiguousarray(value))
    unmatched = model.load_state_dict(state, strict=False)
    assert unmatched.missing_keys == ['lm_head.weight'] and not unmatched.unexpected_keys
    model.tie_weights()
    model.generation_config.pad_token_id = 0
    return model


@torch.no_grad()
def their_answer(model, ids: list[int]) -> tuple[list[int], np.ndarray]:
    """Returns the greedy tokens of transformers and their logits [64, V]."""
    tokens = model.generate(
        torch.tensor([ids]), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None
    )
    logits = model(tokens, logits_to_keep=NUM_TOKENS + 1).logits[0, :-1]
    return tokens[0, len(ids) :].tolist(), logits.numpy()


def main() -> None:
    file = GgufFile(packaged_file('gemma3-270m'))
    model, params, tokenizer = load_model('gemma3-270m')
    theirs = in_transformers(file)
    config = SamplingConfig.for_tokenizer(
        tokenizer, temperature=0.0, max_new_tokens=NUM_TOKENS, stop_ids=()
    )
    fast_model, fast_params = for_inference(model, params)
    sampler = Sampler(fast_model, config, 'autoregressive')

    @jax.jit
    def logits_of(params, tokens, length):
        with jax.default_matmul_precision('highest'):
            positions = jnp.arange(tokens.shape[1])[None]
            valid = (positions < length).astype(tokens.dtype)
            hidden, _ = model.apply({'params': params}, tokens, positions, valid, method='encode')
            # These positions predict the last tokens.
            tail = jax.lax.dynamic_slice_in_dim(hidden, length - NUM_TOKENS - 1, NUM_TOKENS, 1)
            return model.apply({'params': params}, tail, method='unembed')

    equal = long = 0
    worst = {'worst': 0.0, 'worst_repeated': 0.0}
    asked = prompts()
    for prompt in asked:
        ids = tokenizer.format_prompt(prompt)
        row, lengths = pad_prompts([ids], tokenizer.pad_id, multiple=MULTIPLE)
        output = sampler(fast_params, row, lengths, rng=jax.random.key(0))
        expected, reference = their_answer(theirs, ids)
        same = np.asarray(output.tokens)[0].tolist() == expected
        row, lengths = pad_prompts([ids + expected], tokenizer.pad_id, multiple=MULTIPLE)
        found = np.asarray(logits_of(params, jnp.asarray(row), int(lengths[0])))[0]
        difference = float(np.abs(found - reference).max())
        figure = 'worst_repeated' if prompt == LONG else 'worst'
        worst[figure] = max(worst[figure], difference)
        equal, long = equal + same, long + (len(ids) > WINDOW)
        verdict = 'equal' if same else 'other'
        print(f'{len(ids):5} tokens, logits within {difference:.1e}, {verdict} tokens', flush=True)
    print(json.dumps({'prompts': len(asked), 'long': long, 'equal': equal} | worst))


if __name__ == '__main__':
    main()
