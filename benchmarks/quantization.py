"""Measures the effect of eight-bit weights on logits, answers, bytes and time.

    python benchmarks/quantization.py --checkpoint=builtin

The weights are quantized by `quantize_weights` (weight-only); the table has a row for float, int8
and fp8 weights. It has the bytes of all parameters; for the causal pass over held-out word problems
with their answers, the largest difference of a logit, the mean KL in nats from the float model's
prediction, and the fraction of equal most likely tokens; the fraction of problems that
autoregressive and diffusion decoding solve; and the milliseconds of a denoise step and an
autoregressive token.
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table
from timing import pass_milliseconds, pass_programs

from diffusiongemma import cli
from diffusiongemma.checkpoints.load import load_model
from diffusiongemma.data.pipeline import eval_examples
from diffusiongemma.data.sources import DataSpec
from diffusiongemma.evaluation.tasks import accuracy
from diffusiongemma.models import for_inference, quantize_weights
from diffusiongemma.models.inference import WEIGHT_DTYPES
from diffusiongemma.sampling import Sampler, SamplingConfig, generate_text, pad_prompts

_CHECKPOINT = flags.DEFINE_string('checkpoint', 'builtin', 'A diffusion student.')
_PROBLEMS = flags.DEFINE_integer('problems', 256, 'Held-out word problems.', lower_bound=1)
_STEPS = flags.DEFINE_integer('max_denoising_steps', 4, 'Denoise steps per canvas.', lower_bound=1)

PASSES = 32  # in one timed program


def causal_log_probs(model, params, tokens: np.ndarray, lengths: np.ndarray) -> jax.Array:
    """Returns the log-probabilities [B, L, V] of the causal pass."""
    index = jnp.arange(tokens.shape[1])
    positions = jnp.broadcast_to(index, tokens.shape)
    segments = (index < lengths[:, None]).astype(jnp.int32)
    variables = {'params': params}
    hidden, _ = model.apply(variables, tokens, positions, segments, method='encode')
    return jax.nn.log_softmax(model.apply(variables, hidden, method='unembed'))


def solved(model, params, tokenizer, examples, mode: str) -> float:
    """Returns the fraction of the examples that a decode mode solves."""
    config = SamplingConfig.for_tokenizer(
        tokenizer,
        max_new_tokens=96,
        max_denoising_steps=_STEPS.value,
        stability_threshold=0,
        temperature=0.0,
    )
    sampler, texts = Sampler(model, config, mode), []
    for first in range(0, len(examples), 64):
        prompts = [example['prompt'] for example in examples[first : first + 64]]
        texts += generate_text(sampler, params, tokenizer, prompts, rng=jax.random.key(first))[0]
    return accuracy(examples, texts)


def pass_times(model, params, tokenizer, prompt: list[int]) -> dict[str, float]:
    """Returns the median milliseconds of each pass at batch 1."""
    config = SamplingConfig.for_tokenizer(tokenizer, temperature=0.0)
    first = pad_prompts([prompt], tokenizer.pad_id)
    programs = pass_programs(model, params, config, *first, PASSES)
    return pass_milliseconds(programs, PASSES)


def main(argv: list[str]) -> None:
    del argv
    model, params, tokenizer = load_model(_CHECKPOINT.value)
    model, params = for_inference(model, params)
    examples = eval_examples(DataSpec(kind='wordmath', split='test', size=_PROBLEMS.value))
    prompts = [tokenizer.format_prompt(example['prompt']) for example in examples]
    whole = [
        [*prompt, *tokenizer.encode(example['response'])]
        for prompt, example in zip(prompts, examples, strict=True)
    ]
    tokens, lengths = pad_prompts(whole, tokenizer.pad_id)
    inside = np.arange(tokens.shape[1]) < lengths[:, None]
    log_probs = jax.jit(causal_log_probs, static_argnums=0)
    reference = np.asarray(log_probs(model, params, tokens, lengths))[inside]  # [n, V]
    table = Table(
        'weights', 'MB', 'largest error', 'KL, nats', 'same token', 'solved, AR',
        'solved, diffusion', 'denoise step, ms', 'AR token, ms',
        title=f'{_CHECKPOINT.value} on {jax.devices()[0].device_kind}',
    )  # fmt: skip
    for weights in ('float', *WEIGHT_DTYPES):
        row_params = params if weights == 'float' else quantize_weights(model, params, weights)
        output = np.asarray(log_probs(model, row_params, tokens, lengths))[inside]
        same = np.mean(output.argmax(-1) == reference.argmax(-1))
        kl = np.mean(np.sum(np.exp(reference) * (reference - output), axis=-1))
        times = pass_times(model, row_params, tokenizer, prompts[0])
        table.add_row(
            weights,
            f'{sum(leaf.nbytes for leaf in jax.tree.leaves(row_params)) / 1e6:.1f}',
            f'{np.abs(output - reference).max():.3f}',
            f'{kl:.1e}',
            f'{same:.2%}',
            *(
                f'{solved(model, row_params, tokenizer, examples, mode):.1%}'
                for mode in ('autoregressive', 'diffusion')
            ),
            f'{times["denoise step"]:.2f}',
            f'{times["autoregressive token"]:.2f}',
        )
    Console(width=120).print(table)


if __name__ == '__main__':
    cli.run_main(main)
