"""Compares the passes with those of transformers, with equal weights, shapes and threads.

    pip install torch==2.13.0 transformers==5.17.0
    python benchmarks/against_transformers.py --models=dense,moe --canvases=64,256 --prefixes=256

Transformers creates a random DiffusionGemma, which this library reads; both compute in float32.
Four passes are measured in turns: prefill of a prompt, a denoise step (self-conditioning on the
previous logits, then the argmax and the entropy at each position), a commit (the causal pass over a
canvas, appended to the cache) and an autoregressive token (causal pass and next token). The table
has median milliseconds, and the ratio transformers / this library with its quartiles over the
turns. The last line is JSON. With `--compile`, torch compiles its passes first.
"""

import functools
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

_THREADS = str(len(os.sched_getaffinity(0)))
os.environ.setdefault('OMP_NUM_THREADS', _THREADS)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from diffusiongemma import cli  # noqa: E402
from diffusiongemma.checkpoints.load import load_model  # noqa: E402
from diffusiongemma.models import for_inference  # noqa: E402
from diffusiongemma.models.vocabulary import most_likely_tokens  # noqa: E402
from diffusiongemma.sampling import passes  # noqa: E402
from diffusiongemma.sampling.epilogue import entropy  # noqa: E402

_MODELS = flags.DEFINE_list('models', ['dense', 'moe', 'gemma'], 'Models to compare.')
_CANVASES = flags.DEFINE_list('canvases', ['64', '256'], 'Canvas lengths.')
_PREFIXES = flags.DEFINE_list('prefixes', ['256'], 'Prompt lengths, >= 1.')
_TURNS = flags.DEFINE_integer('turns', 7, 'Timed turns of each pass.', lower_bound=2)
_COMPILE = flags.DEFINE_bool(
    'compile', False, 'Compile the passes of transformers with torch.compile.'
)
_SCALE = flags.DEFINE_float('scale', 1.0, 'Factor on the widths.', lower_bound=0.05)

# Each has about 270M parameters; every sixth layer is full, the others are sliding. The class of
# transformers has experts in every layer, so a dense model has one small expert. 'gemma' has the
# width, depth and vocabulary of Gemma 3 270M.
SIZES = {
    'dense': {
        'hidden_size': 1024,
        'intermediate_size': 4096,
        'num_hidden_layers': 15,
        'num_experts': 1,
        'top_k_experts': 1,
        'moe_intermediate_size': 64,
    },
    'moe': {
        'hidden_size': 640,
        'intermediate_size': 1280,
        'num_hidden_layers': 15,
        'num_experts': 32,
        'top_k_experts': 4,
        'moe_intermediate_size': 256,
    },
    'gemma': {
        'hidden_size': 640,
        'intermediate_size': 2048,
        'num_hidden_layers': 18,
        'num_experts': 1,
        'top_k_experts': 1,
        'moe_intermediate_size': 64,
    },
}
VOCAB_SIZES = {'dense': 16_384, 'moe': 16_384, 'gemma': 262_144}
PREFILL_CHUNK = 512  # the window of sliding layers (`SamplingConfig.prefill_chunk`)
Passes = dict[str, Callable]
PASSES = ('prefill', 'denoise step', 'commit', 'autoregressive token')


def their_model(name: str, canvas_length: int):
    """Returns a random DiffusionGemma of transformers in float32."""
    import torch
    from transformers import (
        DiffusionGemmaConfig,
        DiffusionGemmaForBlockDiffusion,
        DiffusionGemmaTextConfig,
        Gemma4VisionConfig,
    )

    torch.set_num_threads(int(_THREADS))
    torch.manual_seed(0)
    size = {
        key: value
        if key.startswith(('num_', 'top_'))
        else 64 * max(1, round(value * _SCALE.value / 64))
        for key, value in SIZES[name].items()
    }
    layers, vocab_size = size['num_hidden_layers'], VOCAB_SIZES[name]
    text = DiffusionGemmaTextConfig(
        **size,
        vocab_size=vocab_size,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        global_head_dim=128,
        num_global_key_value_heads=2,
        sliding_window=512,
        max_position_embeddings=8192,
        layer_types=[
            'full_attention' if i % 6 == 5 or i == layers - 1 else 'sliding_attention'
            for i in range(layers)
        ],
    )
    vision = Gemma4VisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, patch_size=4, position_embedding_size=16,
    )  # fmt: skip
    config = DiffusionGemmaConfig(
        text_config=text,
        vision_config=vision,
        canvas_length=canvas_length,
        image_token_id=vocab_size - 1,
        boi_token_id=vocab_size - 2,
        eoi_token_id=vocab_size - 3,
    )
    model = DiffusionGemmaForBlockDiffusion(config).float().eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith('router.proj.weight'):
            parameter.data.mul_(50)  # otherwise experts are near ties that rounding decides
    return model


def their_passes(model, prompt: np.ndarray, canvas: np.ndarray, logits: np.ndarray) -> Passes:
    """Returns, for each pass, a function that prepares it and returns a function that runs it."""
    import copy

    import torch
    from transformers.cache_utils import DynamicCache

    torch.set_grad_enabled(False)
    text = model.config.text_config
    prompt, canvas = torch.from_numpy(prompt).long(), torch.from_numpy(canvas).long()
    encode, denoise = model.model.encoder, model
    if _COMPILE.value:
        encode, denoise = torch.compile(encode), torch.compile(denoise)
    head = functools.partial(_their_head, model)
    cache = encode(input_ids=prompt, past_key_values=DynamicCache(config=text)).past_key_values
    logits = torch.from_numpy(logits)

    def causal(tokens):
        copied = copy.deepcopy(cache)  # the pass appends to it
        return lambda: head(encode(input_ids=tokens, past_key_values=copied).last_hidden_state)

    def denoise_step():
        output = denoise(
            decoder_input_ids=canvas, past_key_values=cache, self_conditioning_logits=logits
        ).logits
        return output.argmax(-1), torch.distributions.Categorical(logits=output).entropy()

    def prefill():
        empty = DynamicCache(config=text)
        hidden = encode(input_ids=prompt, past_key_values=empty).last_hidden_state
        return head(hidden[:, -1:])

    return {
        'prefill': lambda: prefill,
        'denoise step': lambda: denoise_step,
        'commit': lambda: causal(canvas),
        'autoregressive token': lambda: causal(canvas[:, :1]),
    }


def _their_head(model, hidden):
    cap = model.final_logit_softcapping
    return ((model.lm_head(hidden) / cap).tanh() * cap).argmax(-1)


def our_passes(model, params, prompt: np.ndarray, canvas: np.ndarray, logits: np.ndarray) -> Passes:
    """Returns the same as `their_passes` for this library; each pass is one compiled program."""
    batch_size, length = canvas.shape
    capacity = prompt.shape[1] + length
    prompt, canvas = jnp.asarray(prompt, jnp.int32), jnp.asarray(canvas, jnp.int32)
    lengths = jnp.full((batch_size,), prompt.shape[1], jnp.int32)
    active = jnp.ones((batch_size,), bool)

    def head(params, hidden):
        return most_likely_tokens(model.apply({'params': params}, hidden, method='unembed'))

    @jax.jit
    def prefill(params, prompt):
        cache = passes.empty_cache(model, params, batch_size, capacity)
        hidden, cache = passes.prefill(
            model, params, cache, prompt, lengths, PREFILL_CHUNK, is_empty=True
        )
        return head(params, hidden), cache

    @jax.jit
    def denoise_step(params, cache, canvas, logits):
        soft = passes.soft_embed(model, params, logits)
        output = passes.denoise(model, params, cache, canvas, soft, prompt[:, -1])
        return most_likely_tokens(output), entropy(output)

    @functools.partial(jax.jit, donate_argnums=1)
    def causal(params, cache, tokens):
        hidden, cache = passes.extend(model, params, cache, tokens, active)
        return head(params, hidden), cache

    cache = prefill(params, prompt)[1]
    logits = jnp.asarray(logits)

    def appending(tokens):
        copied = jax.block_until_ready(jax.tree.map(jnp.copy, cache))  # `causal` donates it
        return lambda: causal(params, copied, tokens)

    return {
        'prefill': lambda: functools.partial(prefill, params, prompt),
        'denoise step': lambda: functools.partial(denoise_step, params, cache, canvas, logits),
        'commit': lambda: appending(canvas),
        'autoregressive token': lambda: appending(canvas[:, :1]),
    }


def seconds(set_up: Callable) -> tuple[float, np.ndarray]:
    """Returns the seconds of one run, and the first array that it returns."""
    run = set_up()
    start = time.perf_counter()
    result = jax.block_until_ready(run())
    elapsed = time.perf_counter() - start
    return elapsed, np.asarray(result[0] if isinstance(result, tuple) else result)


def compare(ours: Passes, theirs: Passes) -> dict[str, dict]:
    """Returns, for each pass, both times in ms, their ratio with quartiles, and equal tokens."""
    rows = {}
    for name in PASSES:
        tokens = [seconds(side[name])[1] for side in (ours, theirs)]  # compiles
        turns = [[seconds(side[name])[0] for side in (ours, theirs)] for _ in range(_TURNS.value)]
        times = np.array(turns)  # [turns, 2]
        ratios = times[:, 1] / times[:, 0]
        rows[name] = {
            'ours_ms': 1e3 * float(np.median(times[:, 0])),
            'theirs_ms': 1e3 * float(np.median(times[:, 1])),
            'ratio': float(np.median(ratios)),
            'quartiles': [float(q) for q in np.percentile(ratios, [25, 75])],
            'equal_tokens': float(np.mean(tokens[0] == tokens[1])),
        }
    return rows


def main(argv: list[str]) -> None:
    del argv
    table = Table('model', 'canvas', 'prefix', 'pass', 'ours ms', 'theirs ms', 'ratio', 'quartiles')
    results = []
    rng = np.random.default_rng(0)
    for name in _MODELS.value:
        for canvas_length in (int(value) for value in _CANVASES.value):
            reference, vocab_size = their_model(name, canvas_length), VOCAB_SIZES[name]
            with tempfile.TemporaryDirectory() as directory:
                reference.save_pretrained(directory)
                model, params, _ = load_model(Path(directory))
            model, params = for_inference(model, params)
            for prefix in (int(value) for value in _PREFIXES.value):
                prompt = rng.integers(3, vocab_size - 3, (1, prefix))
                canvas = rng.integers(3, vocab_size - 3, (1, canvas_length))
                logits = rng.standard_normal((1, canvas_length, vocab_size)).astype(np.float32)
                inputs = (prompt, canvas, logits)
                rows = compare(our_passes(model, params, *inputs), their_passes(reference, *inputs))
                for label, row in rows.items():
                    results.append(
                        {'model': name, 'canvas': canvas_length, 'prefix': prefix, 'pass': label}
                        | row
                    )
                    cells = (
                        name, str(canvas_length), str(prefix), label,
                        f'{row["ours_ms"]:.1f}', f'{row["theirs_ms"]:.1f}',
                        f'{row["ratio"]:.2f}x', '{:.2f}-{:.2f}'.format(*row['quartiles']),
                    )  # fmt: skip
                    print(*cells, flush=True)  # the table is printed when all are measured
                    table.add_row(*cells)
    Console().print(table)
    print(json.dumps({'threads': int(_THREADS), 'compiled': _COMPILE.value, 'rows': results}))


if __name__ == '__main__':
    cli.run_main(main)
